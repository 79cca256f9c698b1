"""The recipe of a training run, read from a TOML file: model shape, stages, optimiser.

Knows nothing about tensors. Invariant: a recipe and a corpus decide a run; nothing else does.
"""

import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.network.config import EncoderConfig, LoopedConfig, RelativeBias, RopeConfig

# Tables within [model].
PARTS: dict[str, Callable[..., object]] = {
    "rope": RopeConfig,
    "encoder": EncoderConfig,
    "relative_bias": RelativeBias,
}


@dataclass(frozen=True)
class Stage:
    """Consecutive steps with one number of loops, one sequence length and one loss.

    `rates` are the learning rates at its first step and behind its last, as shares of the peak; they
    change linearly between.
    """

    steps: int
    num_loops: int
    sequence_length: int  # tokens
    rates: tuple[float, float]
    depth_power: float = 1.0  # loop r's cross-entropy weighs r ** depth_power
    agreement_weight: float = 0.0  # of KL(final || early), stop-gradient on the final
    teacher_weight: float = (
        0.0  # share of KL(teacher || loop) beside the cross-entropy, if there is a teacher
    )


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run but the corpus. Learning rates are peaks."""

    model: LoopedConfig
    stages: tuple[Stage, ...]
    tokens_per_step: int
    matrix_learning_rate: float  # Muon, for the matrices of the layers
    other_learning_rate: float  # AdamW, for embedding and norms
    weight_decay: float
    seed: int
    adapter_learning_rate: float = 1e-5  # AdamW, for the adapter of a model with input injection
    # Of random weights. Beside a block's output, of order 1, a loop after the first sees nothing of an
    # embedding of 0.02; one of order 1 needs a head of its own, or logits start too large.
    embedding_std: float = 0.02

    @property
    def total_steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def at(self, step: int) -> tuple[Stage, float]:
        """Stage, and learning rate as a share of the peak, of the step with this index.

        Raises IndexError outside 0..total_steps-1.
        """
        before = 0
        for stage in self.stages:
            if before <= step < before + stage.steps:
                first, last = stage.rates
                return stage, first + (last - first) * (step - before) / stage.steps
            before += stage.steps
        raise IndexError(f"step {step} is outside the recipe's {self.total_steps} steps")


def load_recipe(path: Path) -> Recipe:
    """Reads a recipe file; unknown or missing keys raise TypeError with the name."""
    return recipe_from(tomllib.loads(path.read_text()))


def recipe_from(data: dict[str, Any]) -> Recipe:
    """The recipe of a parsed file; unknown or missing keys raise TypeError with the name."""
    fields = dict(data)
    shape = dict(fields.pop("model", {}))
    for name, part in PARTS.items():
        if name in shape:
            shape[name] = part(**shape[name])
    model = LoopedConfig(**{**shape, "eos_token_ids": tuple(shape.get("eos_token_ids", ()))})
    stages = tuple(Stage(**{**stage, "rates": tuple(stage["rates"])}) for stage in fields.pop("stages", ()))
    return Recipe(model=model, stages=stages, **fields)
