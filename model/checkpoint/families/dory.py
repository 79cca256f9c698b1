"""Dory: unit vectors (nGPT), prelude, looped core and coda, trained for several numbers of loops.

Knows nothing about tensors. Follows transformers' DoryConfig and the older spelling that vLLM's reads; what
both spell must agree. On disk a layer is two entries, attention at even and MLP at odd numbers, and most
configs count entries. Invariant: an option that names maths which the published models don't have is refused.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from model.checkpoint.families.family import Family, Fields, Part, Place, WeightTable
from model.checkpoint.families.rope import read_rope
from model.network.config import (
    ACTIVATIONS,
    InitialState,
    LoopedConfig,
    NormKind,
    NormPlacement,
    RopeConfig,
    UnitScales,
)

_SLIDING, _FULL, _MLP = "sliding_attention", "full_attention", "mlp"
_EPSILON = 1e-6  # of every norm; no key sets it
_LETTERS = {"S": _SLIDING, "*": _FULL, "-": _MLP}  # of the older spelling
_THETAS = {_SLIDING: 1e4, _FULL: 1e7}  # where no key gives any
_FULL_EVERY = 4  # layers, where no key names them
_LAST_LOOP = (
    "last_loop keeps the K/V of a token's last loop alone, so a token's first loop would need its "
    "predecessor's last one: no two tokens of a text can be in flight, and what a text says would depend on "
    "how it was cut into passes. Only per_loop is supported"
)
# The older spelling's switches, and all that the published models are made of.
_FIXED: dict[str, tuple[Any, ...]] = {
    "dory_format_version": (1,),
    "ngpt": (True,),
    "fngpt": (True,),
    "ngpt_enable_final_norm": (False,),
    "attention_output_gate": (True,),
    "mlp_hidden_act": ("silu",),
    "initial_state": ("input_copy",),
    "input_transform": ("residual",),
    "output_transform": ("replace",),
    "partial_rotary_factor": (1, 1.0),
    "partial_rotary_factor_2": (1, 1.0),
}


class _Kinds(NamedTuple):
    """The layers' kinds of attention, and how many layers a count of config.json takes for one."""

    attention: list[str]
    entries: int


class _Ropes(NamedTuple):
    """The rotary embedding of each layer, and the longest context that all of them serve."""

    of_layers: list[RopeConfig]
    max_positions: int


def read_config(raw: Mapping[str, Any]) -> LoopedConfig:
    """LoopedConfig of a Dory config.json; raises ConfigError naming the field."""
    fields = Fields(raw)
    _refuse_other_maths(fields)
    kinds = _kinds(fields)
    prelude, core, coda = _counts(fields, kinds)
    ropes = _ropes(fields, kinds)
    sliding = tuple(layer for layer, kind in enumerate(kinds.attention) if kind == _SLIDING)
    window = fields.integer(_spelt(fields, "sliding_window", "swa_window_size"), 1024)
    config = LoopedConfig(
        **_sizes(fields),
        num_prelude_layers=prelude,
        num_block_layers=core,
        num_coda_layers=coda,
        num_loops=fields.integer("n_recurrent_loops"),
        max_positions=ropes.max_positions,
        norm_eps=_EPSILON,
        norm_kind=NormKind.UNIT,
        norm_placement=NormPlacement.INTERPOLATION,
        norm_after_loop=True,
        norm_after_prelude=True,
        input_addition=True,
        initial_state=InitialState.INPUT,
        activation=_activation(fields),
        output_gate=True,
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        sliding_window=window if sliding else None,
        sliding_layers=sliding,
        bos_token_id=next(iter(fields.token_ids("bos_token_id", None)), None),
        eos_token_ids=fields.token_ids("eos_token_id", None),
    )
    return replace(config, unit_scales=_scales(fields, config), **_two_ropes(fields, ropes))


def _refuse_other_maths(fields: Fields) -> None:
    fields.refuse("attention_bias", "mlp_bias", "mixer_type", "rope_scaling")
    for key, possible in _FIXED.items():
        value = fields.raw.get(key)
        if fields.has(key) and not any(type(value) is type(one) and value == one for one in possible):
            raise fields.wrong(key, f"only {possible[0]!r} is supported")
    if any(fields.items("no_rope_layers")):
        raise fields.wrong("no_rope_layers", "layers without a rotary embedding are not supported")
    mode = fields.text("recurrent_kv_cache_mode", "per_loop")
    if mode != "per_loop":
        why = _LAST_LOOP if mode == "last_loop" else "only per_loop is supported"
        raise fields.wrong("recurrent_kv_cache_mode", why)
    for key, same in (
        ("swa_num_attention_heads", "num_attention_heads"),
        ("swa_num_key_value_heads", "num_key_value_heads"),
        ("swa_head_dim", "attention_head_dim" if fields.has("attention_head_dim") else "head_dim"),
    ):
        if fields.has(key) and fields.raw[key] != fields.raw.get(same):
            raise fields.wrong(key, f"it must equal {same}: all layers have the same heads")


def _sizes(fields: Fields) -> dict[str, Any]:
    heads, kv_heads = fields.integer("num_attention_heads"), fields.integer("num_key_value_heads", 4)
    if heads % kv_heads:
        raise fields.wrong("num_key_value_heads", f"it must divide num_attention_heads, {heads}")
    return {
        "family": "dory",
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": fields.integer("hidden_size"),
        "intermediate_size": fields.integer("intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": fields.integer(_spelt(fields, "head_dim", "attention_head_dim"), 256),
    }


def _activation(fields: Fields) -> str:
    if (name := fields.text("hidden_act", "silu")) not in ACTIVATIONS:
        raise fields.wrong("hidden_act", f"only {', '.join(sorted(ACTIVATIONS))} are supported")
    return name


def _scales(fields: Fields, config: LoopedConfig) -> UnitScales:
    init = fields.number(_spelt(fields, "initializer_range", "init_method_std"))
    width = float(config.hidden_size**0.5)
    return UnitScales(
        query=config.head_dim**0.5 / init,
        gate=fields.number("attention_output_gate_logit_scale_init", width) ** 0.5 / init,
        mlp=width,
        rate=fields.number("ngpt_alpha_init", 0.05) / init,
        logit=1 / init,
    )


def _spelt(fields: Fields, key: str, older: str) -> str:
    """Which of a field's two names config.json has; raises ConfigError if it has both, with two values."""
    if not fields.has(older):
        return key
    if fields.has(key) and fields.raw[key] != fields.raw[older]:
        raise fields.wrong(key, f"{older} says {fields.raw[older]}")
    return older


def _kinds(fields: Fields) -> _Kinds:
    """Every layer's kind: by layer_types, hybrid_layer_pattern or, without either, every fourth one full."""
    given = [
        (key, entries)
        for key, entries in (
            ("layer_types", fields.items("layer_types")),
            ("hybrid_layer_pattern", [_LETTERS.get(c, c) for c in fields.text("hybrid_layer_pattern", "")]),
        )
        if entries
    ]
    total = fields.integer("num_hidden_layers")
    if not given and fields.has("init_method_std"):
        raise fields.wrong("hybrid_layer_pattern", "a config in the older spelling must give it")
    if not given:
        return _Kinds([_FULL if (i + 1) % _FULL_EVERY == 0 else _SLIDING for i in range(total)], 1)
    read = [_read_kinds(fields, key, entries, total) for key, entries in given]
    if read[0].attention != read[-1].attention:
        raise fields.wrong("layer_types", "hybrid_layer_pattern names other layers")
    return read[-1]


def _read_kinds(fields: Fields, key: str, entries: list[Any], total: int) -> _Kinds:
    step = 2 if _MLP in entries else 1
    attention = entries[::step]
    if any(kind not in (_SLIDING, _FULL) for kind in attention) or (
        step == 2 and any(kind != _MLP for kind in entries[1::2])
    ):
        raise fields.wrong(key, "attention (sliding or full) and mlp in turn are wanted, or attention alone")
    if len(entries) != total or total % step:
        raise fields.wrong(
            key, f"{total} entries, num_hidden_layers, are wanted, as many of mlp as of attention"
        )
    return _Kinds(attention, step)


def _counts(fields: Fields, kinds: _Kinds) -> tuple[int, int, int]:
    """Layers of the prelude, the core and the coda."""
    total = len(kinds.attention)
    prelude, coda = (_layers(fields, key, kinds.entries) for key in ("n_input_layers", "n_output_layers"))
    rest = total - prelude - coda
    core = _layers(fields, "n_recurrent_layers", kinds.entries) if fields.has("n_recurrent_layers") else rest
    if core != rest or core < 1:
        key = "n_recurrent_layers" if fields.has("n_recurrent_layers") else "num_hidden_layers"
        raise fields.wrong(
            key,
            "n_input_layers, n_recurrent_layers (1 or more) and n_output_layers must add up to the layers",
        )
    return prelude, core, coda


def _layers(fields: Fields, key: str, entries: int) -> int:
    """A count that takes `entries` for a layer."""
    count = fields.count(key)
    if count % entries:
        raise fields.wrong(key, "it must be even: a layer is two entries, attention and mlp")
    return count // entries


def _ropes(fields: Fields, kinds: _Kinds) -> _Ropes:
    """Every layer's rotary embedding, by rope_parameters of each kind or the older rope_profile_layers."""
    newer = fields.section("rope_parameters")
    by_profile = _profile_ropes(fields, kinds)
    if not newer.raw and by_profile is not None:
        return by_profile
    if newer.raw and not all(isinstance(newer.raw.get(kind), dict) for kind in set(kinds.attention)):
        raise fields.wrong("rope_parameters", "an object for each kind of attention layer is wanted")
    read = {kind: _rope_of_kind(fields, newer, kind) for kind in set(kinds.attention)}
    found = _Ropes([read[kind][1] for kind in kinds.attention], min(longest for longest, _ in read.values()))
    if by_profile is not None and found.of_layers != by_profile.of_layers:
        raise fields.wrong("rope_profile_layers", "rope_parameters gives the layers other rotary embeddings")
    return found


def _rope_of_kind(fields: Fields, newer: Fields, kind: str) -> tuple[int, RopeConfig]:
    parameters = newer.raw[kind] if newer.raw else {"rope_theta": _THETAS[kind]}
    Fields(parameters, f"rope_parameters.{kind}.").number("rope_theta", above=1.0)
    longest = {"max_position_embeddings": fields.integer("max_position_embeddings", 8192)}
    return read_rope(Fields({**longest, "rope_parameters": parameters}, f"{kind}: "))


def _profile_ropes(fields: Fields, kinds: _Kinds) -> _Ropes | None:
    """By rope_theta (profile 1) and rope_theta_2 (profile 2); None where the config isn't spelt so."""
    profiles = fields.items("rope_profile_layers")
    if not profiles and (fields.has("rope_parameters") or not fields.has("hybrid_layer_pattern")):
        return None
    if profiles and len(profiles) != fields.integer("num_hidden_layers"):
        raise fields.wrong("rope_profile_layers", "a profile for each of num_hidden_layers is wanted")
    if any(type(profile) is not int or profile not in (1, 2) for profile in profiles):
        raise fields.wrong("rope_profile_layers", "only the profiles 1 and 2 are supported")
    first = fields.number("rope_theta", 10000.0, above=1.0)
    thetas = {1: first, 2: fields.number("rope_theta_2", first, above=1.0)}
    of_layers = profiles[:: kinds.entries] if profiles else [1] * len(kinds.attention)
    longest = fields.integer("max_position_embeddings", 8192)
    return _Ropes([RopeConfig(theta=thetas[profile]) for profile in of_layers], longest)


def _two_ropes(fields: Fields, ropes: _Ropes) -> dict[str, Any]:
    """The first layer's rotary embedding, and the other one with its layers."""
    different = list(dict.fromkeys(ropes.of_layers))
    if len(different) == 1:
        return {"rope": different[0]}
    if different[0].kind == "longrope" or different[1].kind == "longrope":
        raise fields.wrong("rope_parameters", "longrope is supported where all layers have it alone")
    second = tuple(layer for layer, rope in enumerate(ropes.of_layers) if rope == different[1])
    return {"rope": different[0], "second_rope": different[1], "second_rope_layers": second}


def _attention(name: str, parameter: str, part: Part | None = None) -> dict[str, Place]:
    return {f"backbone.layers.{{}}.{name}": Place(f"layers.{{}}.{parameter}", part, first=0, step=2)}


def _mlp(name: str, parameter: str, part: Part | None = None) -> dict[str, Place]:
    return {f"backbone.layers.{{}}.{name}": Place(f"layers.{{}}.{parameter}", part, first=1, step=2)}


_WEIGHTS: WeightTable = {
    "backbone.embeddings.weight": Place("embedding.weight"),
    "lm_head.weight": Place("head.weight"),
    "lm_head.logit_scale": Place("logit_scale"),
    **_attention("mixer.q_proj.weight", "attn.qkv_proj.weight", Part.Q),
    **_attention("mixer.k_proj.weight", "attn.qkv_proj.weight", Part.K),
    **_attention("mixer.v_proj.weight", "attn.qkv_proj.weight", Part.V),
    **_attention("mixer.g_proj.weight", "attn.qkv_proj.weight", Part.OUTPUT_GATE),
    **_attention("mixer.o_proj.weight", "attn.o_proj.weight"),
    **_attention("mixer.sqk", "attn.query_scale"),
    **_attention("mixer.s_gate", "attn.gate_scale"),
    **_attention("attn_alpha", "attn_rate"),
    **_mlp("mixer.gate_proj.weight", "mlp.gate_up_proj.weight", Part.GATE),
    **_mlp("mixer.up_proj.weight", "mlp.gate_up_proj.weight", Part.UP),
    **_mlp("mixer.down_proj.weight", "mlp.down_proj.weight"),
    **_mlp("mixer.suv_gate", "mlp.gate_up_scale", Part.GATE),
    **_mlp("mixer.suv_up", "mlp.gate_up_scale", Part.UP),
    **_mlp("mlp_alpha", "mlp_rate"),
}

FAMILY = Family(
    name="dory",
    model_type="dory",
    architectures=("DoryForCausalLM",),
    read_config=read_config,
    weights=_WEIGHTS,
    is_elastic=True,
)
