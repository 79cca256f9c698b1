"""Tiny real models with random weights, sharp enough that greedy text is not one repeated token."""

import torch
from torch import nn

from model.network.config import (
    EncoderConfig,
    InitialState,
    LoopedConfig,
    NormKind,
    NormPlacement,
    RelativeBias,
    RopeConfig,
    UnitScales,
)
from model.network.looped import LoopedTransformer
from tests.loose import Field


def tiny_config(**changes: Field) -> LoopedConfig:
    """A looped model of a few thousand parameters; `changes` replace fields."""
    fields: dict[str, Field] = {
        "family": "nanbeige",
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "num_block_layers": 2,
        "num_loops": 3,
        "max_positions": 128,
    }
    return LoopedConfig(**{**fields, **changes})


def tiny_model(seed: int = 0, **changes: Field) -> LoopedTransformer:
    """A model of `tiny_config`, deterministic in `seed`."""
    generator = torch.Generator().manual_seed(seed)
    model = LoopedTransformer(tiny_config(**changes)).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.25, generator=generator)
    return model


SHAPES: dict[str, dict[str, Field]] = {
    "pre_norm": {},
    "norm_after_loop": {"norm_after_loop": True},
    "coda_behind_a_closing_norm": {"norm_after_loop": True, "num_coda_layers": 1},
    "one_loop": {"num_loops": 1},
    "multi_head": {"num_kv_heads": 4, "tie_embeddings": True},
    "one_kv_head": {"num_kv_heads": 1, "num_loops": 5},
    "sandwich": {"norm_placement": NormPlacement.SANDWICH, "norm_after_loop": True},
    "prelude_and_coda": {
        "num_prelude_layers": 1,
        "num_coda_layers": 2,
        "input_injection": True,
        "norm_before_coda": True,
        "norm_placement": NormPlacement.POST_ADD,
        "num_loops": 4,
    },
    "sliding_windows": {
        "norm_placement": NormPlacement.SANDWICH,
        "norm_after_loop": True,
        "sliding_window": 6,
        "sliding_layers": (1,),
    },
    "first_loop_gate": {"num_loops": 4, "sliding_window": 5, "first_loop_gate": True},
    "skipped_adapter": {
        "num_prelude_layers": 1,
        "num_coda_layers": 1,
        "input_injection": True,
        "initial_state": InitialState.INPUT_ALONE,
        "norm_placement": NormPlacement.OUTPUT,
        "qk_norm": True,
    },
    "started_from_the_input": {"input_injection": True, "initial_state": InitialState.INPUT},
    "without_coda": {"num_prelude_layers": 1, "input_injection": True, "tie_embeddings": True},
    "output_norm": {"norm_placement": NormPlacement.OUTPUT, "num_prelude_layers": 1, "num_coda_layers": 1},
    "unit_vectors": {
        "num_prelude_layers": 1,
        "num_coda_layers": 2,
        "num_loops": 4,
        "norm_kind": NormKind.UNIT,
        "norm_placement": NormPlacement.INTERPOLATION,
        "norm_after_loop": True,
        "norm_after_prelude": True,
        "input_addition": True,
        "output_gate": True,
        "unit_scales": UnitScales(query=2.0, gate=1.5, mlp=5.0, rate=0.4, logit=20.0),
        "sliding_window": 6,
        "sliding_layers": (0, 2, 3),
        "second_rope": RopeConfig(theta=300.0),
        "second_rope_layers": (1, 4),
    },
    "two_stacks": {
        "norm_kind": NormKind.PLAIN,
        "norm_after_loop": True,
        "low_cycles": 2,
        "output_gate": True,
        "num_kv_heads": 4,
        "num_block_layers": 4,
    },
}
SHAPES["two_stacks_both_ways"] = {**SHAPES["two_stacks"], "prefix_lm": True, "num_loops": 2}

# A decoder behind an encoder, whose prompts are sources; `source_model` makes a model of it.
BEHIND_ENCODER: dict[str, Field] = {
    "family": "t5_loop",
    "num_kv_heads": 4,
    "attention_scale": 1.0,
    "encoder": EncoderConfig(2, 3),
    "relative_bias": RelativeBias(8, 20),
}


def source_model(seed: int = 0, **changes: Field) -> LoopedTransformer:
    """A decoder behind an encoder, with biases for distances drawn at their usual size."""
    model = tiny_model(seed, **{**BEHIND_ENCODER, **changes})
    for table in (model.relative, model.encoder.relative):
        nn.init.normal_(table.weight, generator=torch.Generator().manual_seed(2))
    return model
