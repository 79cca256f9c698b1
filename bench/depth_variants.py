"""The models of `bench.depth_for_free`: one recipe, trained with shared and with unshared depth.

Knows nothing about timing. Invariant: all models see the same number of tokens, in the same batches, at
the same learning rates; they differ in layers and loops alone.
"""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.checkpoint.loader import save_checkpoint
from training.corpus import standard_library
from training.main import TOKENIZER, prepare
from training.recipe import Recipe, Stage
from training.text_task import TextTask, spread_windows
from training.trainer import Trainer, new_model

HELD_OUT_WINDOWS = 100


class Variant(NamedTuple):
    """Stored layers, and how often each token runs through them."""

    layers: int
    loops: int

    @property
    def name(self) -> str:
        """Also the name of the run's folder."""
        return f"{self.layers}x{self.loops}"


def variants(layers: list[int], depths: list[int]) -> list[Variant]:
    """Blocks of so many layers alone; looped to each of `depths`; and as deep with layers of their own."""
    looped = [Variant(count, depth) for count in layers for depth in (1, *depths)]
    deep = [Variant(count * depth, 1) for count in layers for depth in depths]
    return list(dict.fromkeys((*looped, *deep)))


def recipe_of(recipe: Recipe, variant: Variant) -> Recipe:
    """The recipe for a variant: stages of one loop stay so, the others run all of the variant's."""

    def staged(stage: Stage) -> Stage:
        return replace(stage, num_loops=1 if stage.num_loops == 1 else variant.loops)

    model = replace(recipe.model, num_block_layers=variant.layers, num_loops=variant.loops)
    return replace(recipe, model=model, stages=tuple(map(staged, recipe.stages)))


def train(
    recipe: Recipe,
    variant: Variant,
    runs: Path,
    max_minutes: float,
    *,
    compiled: bool = False,
    device: str = "cpu",
) -> bool:
    """Trains one variant, or goes on with it; True when its checkpoint is in `runs`/name/model."""
    folder = runs / variant.name
    if (folder / "model" / "config.json").exists():
        return True
    folder.mkdir(parents=True, exist_ok=True)
    prepare(recipe, standard_library(), runs)
    own = recipe_of(recipe, variant)
    trainer = Trainer(own, TextTask(np.load(runs / "train.npy"), own), folder, new_model(own).to(device))
    if compiled:
        trainer.compile()
    if not trainer.run(max_minutes):
        return False
    save_checkpoint(trainer.model, folder / "model", torch.float32)
    (folder / "model" / TOKENIZER).write_bytes((runs / TOKENIZER).read_bytes())
    return True


def held_out(recipe: Recipe, runs: Path) -> Tensor:
    """Held-out windows as long as the training's longest, (count, length + 1)."""
    length = max(stage.sequence_length for stage in recipe.stages)
    return spread_windows(np.load(runs / "held_out.npy"), HELD_OUT_WINDOWS, length)
