"""The recipe of a training run, read from a TOML file: model shape, stages, optimiser.

Knows nothing about tensors. Invariant: a recipe and a corpus decide a run; nothing else does.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.config import LoopedConfig


@dataclass(frozen=True)
class Stage:
    """Consecutive steps with one number of loops, sequence length and weight of the agreement loss."""

    steps: int
    num_loops: int
    sequence_length: int  # tokens
    agreement_weight: float = 0.0  # of KL(final || early), stop-gradient on the final


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run but the corpus. Learning rates are peaks."""

    model: LoopedConfig
    stages: tuple[Stage, ...]
    tokens_per_step: int
    matrix_learning_rate: float  # Muon, for the matrices of the layers
    other_learning_rate: float  # AdamW, for embedding and norms
    weight_decay: float
    warmup_steps: int
    decay_fraction: float  # the last part of the run, over which the rates fall linearly to zero
    seed: int

    @property
    def total_steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> Stage:
        """The stage that the step with this index (0..total_steps-1) belongs to."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        raise IndexError(f"step is past the end of the recipe's {self.total_steps} steps")

    def rate_factor(self, step: int) -> float:
        """Learning rate at a step as a share of the peak: warm-up, plateau, linear decay."""
        left = (self.total_steps - step) / max(1.0, self.decay_fraction * self.total_steps)
        return min(1.0, (step + 1) / max(1, self.warmup_steps), left)


def load_recipe(path: Path) -> Recipe:
    """Reads a recipe file; unknown or missing keys raise TypeError with the name."""
    data: dict[str, Any] = tomllib.loads(path.read_text())
    shape = data.pop("model")
    model = LoopedConfig(**{**shape, "eos_token_ids": tuple(shape.get("eos_token_ids", ()))})
    stages = tuple(Stage(**stage) for stage in data.pop("stages"))
    return Recipe(model=model, stages=stages, **data)
