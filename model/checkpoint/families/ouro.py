"""Ouro: Llama's projections with norms before and after each sub-layer, the whole stack looped.

Knows nothing about tensors. Follows ByteDance's OuroConfig. The model runs all its loops for every
token, which is what the reference does at an exit threshold of 1; its learned gate is loaded and can be
read. Invariant: a config under which the reference would take another depth's logits is refused.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from model.checkpoint.families.family import Family, Fields, Place, TurnEnd, WeightTable
from model.checkpoint.families.llama import LAYER_WEIGHTS, read_shape
from model.network.config import LoopedConfig, NormPlacement

_OWN_WEIGHTS: WeightTable = {
    "model.layers.{}.input_layernorm.weight": Place("layers.{}.attn_norm.weight"),
    "model.layers.{}.input_layernorm_2.weight": Place("layers.{}.attn_out_norm.weight"),
    "model.layers.{}.post_attention_layernorm.weight": Place("layers.{}.mlp_norm.weight"),
    "model.layers.{}.post_attention_layernorm_2.weight": Place("layers.{}.mlp_out_norm.weight"),
    "model.early_exit_gate.weight": Place("gate.weight"),
    "model.early_exit_gate.bias": Place("gate.bias"),
}

# Where OuroConfig's defaults are not LlamaConfig's.
_DEFAULTS = {
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "bos_token_id": None,
    "eos_token_id": None,
}


def read_config(raw: Mapping[str, Any]) -> LoopedConfig:
    """LoopedConfig of an Ouro config.json; raises ConfigError naming the field."""
    fields = Fields({**_DEFAULTS, **raw})
    fields.refuse("attention_bias", "mlp_bias")
    if fields.number("early_exit_threshold", 1.0) < 1.0:
        raise fields.wrong("early_exit_threshold", "only 1, every loop for every token, is supported")
    if fields.has("early_exit_step"):
        raise fields.wrong("early_exit_step", "only every loop for every token is supported")
    shape = read_shape(fields, "ouro")
    sliding_layers = _sliding_layers(fields, shape.num_block_layers)
    return replace(
        shape,
        sliding_window=fields.integer("sliding_window", 4096) if sliding_layers else None,
        sliding_layers=sliding_layers,
        num_loops=fields.integer("total_ut_steps", 4),
        norm_placement=NormPlacement.SANDWICH,
        exit_gate=True,
    )


def _sliding_layers(fields: Fields, num_layers: int) -> tuple[int, ...]:
    """layer_types decides; without it the layers from max_window_layers on, if windows are in use."""
    in_use = fields.flag("use_sliding_window", False) and fields.raw.get("sliding_window", 0) is not None
    kinds = fields.items("layer_types")
    if not kinds:
        first = fields.count("max_window_layers", 28) if in_use else num_layers
        return tuple(range(first, num_layers))
    if len(kinds) != num_layers or any(kind not in ("full_attention", "sliding_attention") for kind in kinds):
        raise fields.wrong(
            "layer_types", f"full_attention or sliding_attention is wanted for each of {num_layers} layers"
        )
    sliding = tuple(layer for layer, kind in enumerate(kinds) if kind == "sliding_attention")
    if sliding and not in_use:
        raise fields.wrong("layer_types", "it names sliding layers, but use_sliding_window is off")
    return sliding


FAMILY = Family(
    name="ouro",
    model_type="ouro",
    architectures=("OuroForCausalLM",),
    read_config=read_config,
    weights={**LAYER_WEIGHTS, **_OWN_WEIGHTS},
    # The configs say bos = eos = pad = 0, but the models were trained on turns that end with 2.
    turn_end=TurnEnd(2, "<|im_end|>", document_end=0),
)
