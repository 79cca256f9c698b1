"""HRM-Text: two stacks of layers in turn, each with a state; the prompt is read both ways.

Knows nothing about tensors. Follows transformers' HrmTextConfig in both its styles: num_hidden_layers is the
layers of a stack, or, where num_layers_per_stack is given, a count of all visits. A loop is one high cycle:
the low stack L_cycles times, the high stack once. Invariant: norms have no weights; each stack ends with one.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from model.checkpoint.families.family import Family, Fields, Place, Section, WeightTable
from model.checkpoint.families.rope import read_rope
from model.network.config import ACTIVATIONS, LoopedConfig, NormKind


def read_config(raw: Mapping[str, Any]) -> LoopedConfig:
    """LoopedConfig of an HRM-Text config.json; raises ConfigError naming the field."""
    fields = Fields(raw)
    fields.refuse("attention_bias", "mlp_bias")
    if (activation := fields.text("hidden_act", "silu")) not in ACTIVATIONS:
        raise fields.wrong("hidden_act", f"only {', '.join(sorted(ACTIVATIONS))} are supported")
    per_stack = "num_layers_per_stack" if fields.has("num_layers_per_stack") else "num_hidden_layers"
    max_positions, rope = read_rope(fields)
    heads = fields.integer("num_attention_heads")
    return LoopedConfig(
        family="hrm_text",
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=fields.integer("head_dim", 128),
        num_block_layers=2 * fields.integer(per_stack),
        num_loops=fields.integer("H_cycles", 2),
        low_cycles=fields.integer("L_cycles", 3),
        max_positions=max_positions,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        norm_kind=NormKind.PLAIN,
        norm_after_loop=True,
        prefix_lm=fields.flag("prefix_lm", True),
        embedding_scale=_embedding_scale(fields),
        activation=activation,
        output_gate=True,
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        rope=rope,
        bos_token_id=next(iter(fields.token_ids("bos_token_id", None)), None),
        eos_token_ids=fields.token_ids("eos_token_id", None),
    )


def _embedding_scale(fields: Fields) -> float:
    if fields.has("embedding_scale"):
        return fields.number("embedding_scale")
    return 1 / fields.number("initializer_range", 0.02)


def _weights() -> WeightTable:
    layer = {
        "attn.gqkv_proj.weight": Place("layers.{}.attn.qkv_proj.weight"),
        "attn.o_proj.weight": Place("layers.{}.attn.o_proj.weight"),
        "mlp.gate_up_proj.weight": Place("layers.{}.mlp.gate_up_proj.weight"),
        "mlp.down_proj.weight": Place("layers.{}.mlp.down_proj.weight"),
    }
    stacks = {"L": Section.LOW, "H": Section.HIGH}
    return {
        "model.embed_tokens.weight": Place("embedding.weight"),
        "model.z_L_init": Place("low_state"),
        "lm_head.weight": Place("head.weight"),
        **{
            f"model.{stack}_module.layers.{{}}.{name}": replace(place, section=section)
            for stack, section in stacks.items()
            for name, place in layer.items()
        },
    }


FAMILY = Family(
    name="hrm_text",
    model_type="hrm_text",
    architectures=("HrmTextForCausalLM",),
    read_config=read_config,
    weights=_weights(),
)
