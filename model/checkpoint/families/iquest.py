"""IQuest-Coder-Loop: Llama's layers looped, the later loops reading the first loop's K/V through a gate.

Knows nothing about tensors. Follows the vendor's IQuestLoopCoderConfig. From loop 2 on every layer attends
twice with the same query: over all K/V that loop 1 stored, and over its own loop's K/V in a window; a gate
for each head mixes the two. Invariant: the final norm is applied once, after the last loop.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from model.checkpoint.families.family import Family, Fields, Place, WeightTable
from model.checkpoint.families.llama import BIASES, LAYER_WEIGHTS, PRE_NORMS, read_shape, refuse_windows
from model.network.config import LoopedConfig

_GATES: WeightTable = {
    "model.gate_projections.{}.weight": Place("layers.{}.attn.gate_weight"),
    "model.gate_projections.{}.bias": Place("layers.{}.attn.gate_bias"),
}

# Where IQuestLoopCoderConfig's defaults are not LlamaConfig's.
_DEFAULTS = {"max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0}


def read_config(raw: Mapping[str, Any]) -> LoopedConfig:
    """LoopedConfig of an IQuestLoopCoder config.json; raises ConfigError naming the field."""
    fields = Fields({**_DEFAULTS, **raw})
    refuse_windows(fields)
    return replace(
        read_shape(fields, "iquest"),
        num_loops=fields.integer("loop_num", 2),
        norm_after_loop=False,
        sliding_window=fields.integer("loop_window_size", 64),
        first_loop_gate=True,
    )


FAMILY = Family(
    name="iquest",
    model_type="iquestloopcoder",
    architectures=("IQuestLoopCoderForCausalLM",),
    read_config=read_config,
    weights={**LAYER_WEIGHTS, **BIASES, **PRE_NORMS, **_GATES},
)
