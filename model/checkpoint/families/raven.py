"""Raven: Huginn and the models retrofitted from Llama and OLMo-2, three blocks under one class name.

Knows nothing about tensors. Follows `RavenConfig` of the recurrent-pretraining and
retrofitting-recurrence repositories. config.json is the same for all three, so the names of the tensors
tell them apart. Prelude, looped core and coda; every loop mixes the prelude's output into the state. Our
own models with such a mixture are written as retrofitted Llamas (`write_config`).
Invariant: an option that names code which the published class of that block doesn't have is refused.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from model.checkpoint.families.family import (
    Family,
    Fields,
    Layout,
    Place,
    Section,
    WeightTable,
    write_token_ids,
)
from model.checkpoint.families.rope import read_rope, write_rope
from model.network.config import ConfigError, InitialState, LoopedConfig, NormPlacement, RopeConfig

_SECTIONS = {
    "transformer.prelude.{}": Section.PRELUDE,
    "transformer.core_block.{}": Section.BLOCK,
    "transformer.coda.{}": Section.CODA,
}
_OUTSIDE: WeightTable = {
    "transformer.wte.weight": Place("embedding.weight"),
    "transformer.adapter.weight": Place("adapter.weight"),
    "transformer.ln_f.weight": Place("norm.weight"),
    "lm_head.weight": Place("head.weight"),
    "freqs_cis": None,  # the rotary table, which is computed
}
_BLOCK = {
    "attn.Wqkv.weight": Place("layers.{}.attn.qkv_proj.weight"),
    "attn.proj.weight": Place("layers.{}.attn.o_proj.weight"),
    "mlp.fc.weight": Place("layers.{}.mlp.gate_up_proj.weight"),
    "mlp.proj.weight": Place("layers.{}.mlp.down_proj.weight"),
}
_HUGINN_BLOCK = {
    "attn.qk_bias": Place("layers.{}.attn.qk_bias", shape=lambda c: (2, 1, c.num_heads, c.head_dim)),
    "norm_1.weight": Place("layers.{}.attn_norm.weight"),
    "norm_2.weight": Place("layers.{}.attn_sum_norm.weight"),
    "norm_3.weight": Place("layers.{}.mlp_norm.weight"),
    "norm_4.weight": Place("layers.{}.mlp_sum_norm.weight"),
}
_LLAMA_BLOCK = {
    "norm_1.weight": Place("layers.{}.attn_norm.weight"),
    "norm_2.weight": Place("layers.{}.mlp_norm.weight"),
}
_OLMO_BLOCK = {
    "attn.q_norm.weight": Place("layers.{}.attn.q_norm.weight"),
    "attn.k_norm.weight": Place("layers.{}.attn.k_norm.weight"),
    "norm_1.weight": Place("layers.{}.attn_out_norm.weight"),
    "norm_2.weight": Place("layers.{}.mlp_out_norm.weight"),
}
# What the published classes are built from; any other value names code that they don't contain.
_FIXED = {
    "block_class_name": "SandwichBlock",
    "norm_class_name": "RMSNorm_llama",
    "mlp_class_name": "GatedMLP",
    "nonlin_name": "SiLU",
    "injection_type": "linear",
}
_STARTS = {
    "random": InitialState.NOISE,
    "embed-init": InitialState.INPUT,
    "skip-adapter": InitialState.INPUT_ALONE,
}


def read_huginn(raw: Mapping[str, Any]) -> LoopedConfig:
    """LoopedConfig of Huginn's config.json; raises ConfigError naming the field."""
    fields = Fields(raw)
    _refuse_other_starts(fields)
    shape = _read_shape(fields, fields.integer("block_size", 4096))
    qk_bias = fields.flag("qk_bias", True)
    if qk_bias and shape.num_kv_heads != shape.num_heads:
        raise fields.wrong("num_key_value_heads", "with qk_bias it must equal n_heads")
    return replace(
        shape,
        norm_placement=NormPlacement.POST_ADD,
        norm_before_coda=True,
        qk_bias=qk_bias,
        rope=RopeConfig(theta=fields.number("rope_base", 50000.0, above=1.0), interleaved=True),
    )


def read_llama(raw: Mapping[str, Any]) -> LoopedConfig:
    """LoopedConfig of a retrofitted Llama's config.json; raises ConfigError naming the field."""
    fields = Fields(raw)
    _refuse_other_starts(fields)
    return _read_retrofit(fields, NormPlacement.PRE)


def read_olmo(raw: Mapping[str, Any]) -> LoopedConfig:
    """LoopedConfig of a retrofitted OLMo-2's config.json; raises ConfigError naming the field."""
    fields = Fields(raw)
    mode = fields.text("initial_state_mode", "random")
    if mode not in _STARTS:
        raise fields.wrong("initial_state_mode", f"only {', '.join(_STARTS)} are supported")
    retrofit = _read_retrofit(fields, NormPlacement.OUTPUT, own_head_dim=True)
    return replace(retrofit, qk_norm=True, initial_state=_STARTS[mode])


def _read_retrofit(fields: Fields, placement: NormPlacement, *, own_head_dim: bool = False) -> LoopedConfig:
    """rope_theta counts and rope_base is a stale copy; there is no norm between loop and coda."""
    fields.refuse("qk_bias")
    fields.number("rope_theta")
    max_positions, rope = read_rope(fields)
    shape = _read_shape(fields, max_positions, own_head_dim=own_head_dim)
    return replace(shape, norm_placement=placement, rope=rope)


def _read_shape(fields: Fields, max_positions: int, *, own_head_dim: bool = False) -> LoopedConfig:
    """What the three kinds of blocks have in common, for a context of `max_positions` tokens.

    `own_head_dim`: the block takes `head_dim` from config.json. The others always use n_embd / n_heads and
    ignore the key.
    """
    _refuse_what_changes_the_loop(fields)
    init = fields.section("init_values")
    hidden, heads = fields.integer("n_embd"), fields.integer("n_heads")
    kv_heads = fields.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ConfigError(f"num_key_value_heads {kv_heads} must divide n_heads {heads}")
    head_dim = fields.integer("head_dim", max(1, hidden // heads))
    if not own_head_dim:
        if hidden % heads:
            raise ConfigError(f"n_heads {heads} must divide n_embd {hidden}")
        head_dim = hidden // heads
    scale, default_std = init.number("embed_scale", math.sqrt(hidden)), math.sqrt(2 / (5 * hidden))
    return LoopedConfig(
        family="raven",
        vocab_size=fields.integer("padded_vocab_size", fields.integer("vocab_size")),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        num_prelude_layers=fields.count("n_layers_in_prelude"),
        num_block_layers=fields.integer("n_layers_in_recurrent_block"),
        num_coda_layers=fields.count("n_layers_in_coda"),
        num_loops=fields.integer("mean_recurrence"),
        max_positions=max_positions,
        norm_eps=fields.number("norm_eps", 1e-6),
        input_injection=True,
        initial_state_std=init.number("std", default_std) * scale,
        embedding_scale=scale,
        tie_embeddings=fields.flag("tie_embeddings", True),
        bos_token_id=next(iter(fields.token_ids("bos_token_id", None)), None),
        eos_token_ids=fields.token_ids("eos_token_id", None),
    )


def write_config(config: LoopedConfig) -> dict[str, Any]:
    """The config.json that `read_llama` reads back as this config; ValueError where it can't hold it."""
    if config.initial_state_std <= 0 or config.embedding_scale <= 0:
        raise ValueError(f"the raven layout has init_values above 0 alone: {config}")
    raw = {**_fixed_fields(), **_size_fields(config)}
    if config.hidden_size % config.num_heads or read_llama(raw) != replace(config, family="raven"):
        raise ValueError(f"a {config.family} model does not fit the raven (Llama) layout: {config}")
    return raw


def _fixed_fields() -> dict[str, Any]:
    return {
        "architectures": list(LLAMA.architectures),
        "bias": False,
        "initial_state_mode": "random",
        "model_type": LLAMA.model_type,
        "pad_token_id": None,
        "qk_bias": False,
        "test_time_noise": 0,
        "use_cache": True,
        **_FIXED,
    }


def _size_fields(config: LoopedConfig) -> dict[str, Any]:
    scale = config.embedding_scale
    return {
        "block_size": config.max_positions,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": write_token_ids(config.eos_token_ids),
        "init_values": {"embed_scale": scale, "std": config.initial_state_std / scale},
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_positions,
        "mean_recurrence": config.num_loops,
        "n_embd": config.hidden_size,
        "n_heads": config.num_heads,
        "n_layers": config.num_layers,
        "n_layers_in_coda": config.num_coda_layers,
        "n_layers_in_prelude": config.num_prelude_layers,
        "n_layers_in_recurrent_block": config.num_block_layers,
        "norm_eps": config.norm_eps,
        "num_key_value_heads": config.num_kv_heads,
        "padded_vocab_size": config.vocab_size,
        "rope_scaling": write_rope(config.rope),
        "rope_theta": config.rope.theta,
        "tie_embeddings": config.tie_embeddings,
        "vocab_size": config.vocab_size,
    }


def _refuse_other_starts(fields: Fields) -> None:
    if fields.text("initial_state_mode", "random") != "random":
        raise fields.wrong("initial_state_mode", "with these blocks only random is supported")


def _refuse_what_changes_the_loop(fields: Fields) -> None:
    fields.refuse("bias", "test_time_noise")
    for key, only in _FIXED.items():
        if fields.text(key, only) != only:
            raise fields.wrong(key, f"only {only} is supported")


def _weights(block: Mapping[str, Place]) -> WeightTable:
    layers = {
        f"{prefix}.{suffix}": replace(place, section=section)
        for prefix, section in _SECTIONS.items()
        for suffix, place in {**_BLOCK, **block}.items()
    }
    return {**_OUTSIDE, **layers}


HUGINN = Family(
    name="raven (Huginn)",
    model_type="huginn_raven",
    architectures=("RavenForCausalLM",),
    read_config=read_huginn,
    weights=_weights(_HUGINN_BLOCK),
    has=(".norm_3.weight",),
    is_elastic=True,
)
OLMO = replace(
    HUGINN,
    name="raven (OLMo-2)",
    read_config=read_olmo,
    weights=_weights(_OLMO_BLOCK),
    has=(".attn.q_norm.weight",),
)
LLAMA = replace(
    HUGINN,
    name="raven (Llama)",
    read_config=read_llama,
    weights=_weights(_LLAMA_BLOCK),
    has=(".norm_1.weight",),
    lacks=(".norm_3.weight", ".attn.q_norm.weight"),
    layout=Layout(lambda config: config.input_injection, write_config),
)
