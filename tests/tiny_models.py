"""Tiny real models with random weights, sharp enough that greedy text is not one repeated token."""

import torch
from torch import nn

from model.network.config import InitialState, LoopedConfig, NormPlacement
from model.network.looped import LoopedTransformer


def tiny_config(**changes: object) -> LoopedConfig:
    """A looped model of a few thousand parameters; `changes` replace fields."""
    fields: dict[str, object] = {
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
    return LoopedConfig(**{**fields, **changes})  # type: ignore[arg-type]


def tiny_model(seed: int = 0, **changes: object) -> LoopedTransformer:
    """A model of `tiny_config`, deterministic in `seed`."""
    generator = torch.Generator().manual_seed(seed)
    model = LoopedTransformer(tiny_config(**changes)).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.25, generator=generator)
    return model


SHAPES: dict[str, dict[str, object]] = {
    "pre_norm": {},
    "norm_after_loop": {"norm_after_loop": True},
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
}
