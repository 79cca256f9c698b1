"""The recipe of a distillation: what the teacher writes, where the student begins, how it is trained.

Knows nothing about tensors. Invariant: a recipe and a teacher decide a run; nothing else does.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.training.distill.generate import Generation
from model.training.distill.student import Start
from model.training.recipe import Recipe, recipe_from


@dataclass(frozen=True)
class DistillRecipe:
    """`shards` is how many are generated in all."""

    generation: Generation
    shards: int
    start: Start
    training: Recipe


def load_distill_recipe(path: Path) -> DistillRecipe:
    """Reads a recipe file; unknown or missing keys raise TypeError with the name.

    Raises ValueError for an unknown start.
    """
    data: dict[str, Any] = tomllib.loads(path.read_text())
    try:
        generation, shards, start = data.pop("generation"), data.pop("shards"), data.pop("start")
    except KeyError as error:
        raise TypeError(f"{path} has no {error}") from None
    return DistillRecipe(Generation(**generation), shards, Start(start), recipe_from(data))
