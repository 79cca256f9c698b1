"""The recipe of a distillation: what the teacher writes, where the student begins, how it is trained.

Knows nothing about tensors. Invariant: a recipe and a teacher decide a run; nothing else does.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.distill.generate import Generation
from training.recipe import Recipe, recipe_from


@dataclass(frozen=True)
class DistillRecipe:
    """`shards` is how many are generated in all.

    `teacher_layers` are those that the student starts from, prelude first; `primer_share` is the share of
    batches that hold conversations of the primer.
    """

    generation: Generation
    shards: int
    teacher_layers: tuple[int, ...]
    primer_share: float
    training: Recipe


def load_distill_recipe(path: Path) -> DistillRecipe:
    """Reads a recipe file; unknown or missing keys raise TypeError with the name."""
    data: dict[str, Any] = tomllib.loads(path.read_text())
    try:
        generation, shards = data.pop("generation"), data.pop("shards")
        layers, share = tuple(data.pop("teacher_layers")), data.pop("primer_share")
    except KeyError as error:
        raise TypeError(f"{path} has no {error}") from None
    temperatures = tuple(generation.pop("answer_temperatures", (0.0,)))
    written = Generation(**generation, answer_temperatures=temperatures)
    return DistillRecipe(written, shards, layers, share, recipe_from(data))
