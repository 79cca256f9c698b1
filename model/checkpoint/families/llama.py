"""Llama: pre-norm layers run once (R = 1), and what other families share with it.

Knows nothing about tensors. Follows transformers' LlamaConfig, defaults included, in the style of its
version 4 (rope_theta, rope_scaling) and 5 (rope_parameters). Invariant: an option that would change
the result is either read or refused.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from model.checkpoint.families.family import Family, Fields, Part, Place, WeightTable
from model.checkpoint.families.rope import read_rope
from model.network.config import ACTIVATIONS, ConfigError, LoopedConfig

LAYER_WEIGHTS: WeightTable = {
    "model.layers.{}.self_attn.q_proj.weight": Place("layers.{}.attn.qkv_proj.weight", Part.Q),
    "model.layers.{}.self_attn.k_proj.weight": Place("layers.{}.attn.qkv_proj.weight", Part.K),
    "model.layers.{}.self_attn.v_proj.weight": Place("layers.{}.attn.qkv_proj.weight", Part.V),
    "model.layers.{}.self_attn.o_proj.weight": Place("layers.{}.attn.o_proj.weight"),
    "model.layers.{}.mlp.gate_proj.weight": Place("layers.{}.mlp.gate_up_proj.weight", Part.GATE),
    "model.layers.{}.mlp.up_proj.weight": Place("layers.{}.mlp.gate_up_proj.weight", Part.UP),
    "model.layers.{}.mlp.down_proj.weight": Place("layers.{}.mlp.down_proj.weight"),
    # Constants of the model class that older versions of transformers stored.
    "model.layers.{}.self_attn.rotary_emb.inv_freq": None,
    "model.rotary_emb.inv_freq": None,
    "model.embed_tokens.weight": Place("embedding.weight"),
    "model.norm.weight": Place("norm.weight"),
    "lm_head.weight": Place("head.weight"),
}

BIASES: WeightTable = {
    "model.layers.{}.self_attn.q_proj.bias": Place("layers.{}.attn.qkv_proj.bias", Part.Q),
    "model.layers.{}.self_attn.k_proj.bias": Place("layers.{}.attn.qkv_proj.bias", Part.K),
    "model.layers.{}.self_attn.v_proj.bias": Place("layers.{}.attn.qkv_proj.bias", Part.V),
    "model.layers.{}.self_attn.o_proj.bias": Place("layers.{}.attn.o_proj.bias"),
    "model.layers.{}.mlp.gate_proj.bias": Place("layers.{}.mlp.gate_up_proj.bias", Part.GATE),
    "model.layers.{}.mlp.up_proj.bias": Place("layers.{}.mlp.gate_up_proj.bias", Part.UP),
    "model.layers.{}.mlp.down_proj.bias": Place("layers.{}.mlp.down_proj.bias"),
}

PRE_NORMS: WeightTable = {
    "model.layers.{}.input_layernorm.weight": Place("layers.{}.attn_norm.weight"),
    "model.layers.{}.post_attention_layernorm.weight": Place("layers.{}.mlp_norm.weight"),
}


class Heads(NamedTuple):
    """Widths of attention."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


def read_config(raw: Mapping[str, Any]) -> LoopedConfig:
    """LoopedConfig of a Llama config.json; raises ConfigError naming the field."""
    fields = Fields(raw)
    refuse_windows(fields)
    return read_shape(fields, "llama")


def read_shape(fields: Fields, family: str) -> LoopedConfig:
    """What every family with Llama's layers has in common, as a model of one loop."""
    refuse_what_changes_attention(fields)
    max_positions, rope = read_rope(fields)
    if (activation := fields.text("hidden_act", "silu")) not in ACTIVATIONS:
        raise fields.wrong("hidden_act", f"only {', '.join(sorted(ACTIVATIONS))} are supported")
    attention_bias = fields.flag("attention_bias", False)
    return LoopedConfig(
        family=family,
        vocab_size=fields.integer("vocab_size"),
        **read_heads(fields)._asdict(),
        intermediate_size=fields.integer("intermediate_size"),
        num_block_layers=fields.integer("num_hidden_layers"),
        num_loops=1,
        max_positions=max_positions,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        norm_after_loop=True,
        activation=activation,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias", False),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        rope=rope,
        bos_token_id=next(iter(fields.token_ids("bos_token_id", 1)), None),
        eos_token_ids=fields.token_ids("eos_token_id", 2),
    )


def read_heads(fields: Fields) -> Heads:
    """head_dim is hidden_size / heads, and there are as many K/V heads as heads, unless given."""
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if not fields.has("head_dim") and hidden % heads:
        raise ConfigError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    kv_heads = fields.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ConfigError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    return Heads(hidden, heads, kv_heads, fields.integer("head_dim", max(1, hidden // heads)))


def refuse_windows(fields: Fields) -> None:
    """Raises ConfigError for a sliding window that is on: the classes of these families have none."""
    if fields.has("sliding_window") and fields.flag("use_sliding_window", True):
        raise fields.wrong("sliding_window", "a window is not supported in this family")
    if any(kind != "full_attention" for kind in fields.items("layer_types")):
        raise fields.wrong("layer_types", "only full_attention is supported in this family")


def refuse_what_changes_attention(fields: Fields) -> None:
    """Raises ConfigError for other kinds of layers."""
    fields.refuse("per_layer_config")
    if not fields.flag("is_causal", True):
        raise fields.wrong("is_causal", "only causal attention is supported")


FAMILY = Family(
    name="llama",
    model_type="llama",
    architectures=("LlamaForCausalLM",),
    read_config=read_config,
    weights={**LAYER_WEIGHTS, **BIASES, **PRE_NORMS},
)
