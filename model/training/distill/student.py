"""The student's first weights, taken from the teacher's layers.

Knows nothing about training. Invariant: widths are the teacher's; only layers and vocabulary are fewer.
"""

from enum import Enum

import torch

from model.looped import LoopedTransformer
from model.training.recipe import Recipe


class Start(Enum):
    """Which of the teacher's layers a block of L starts from (Bae et al. 2024, arXiv 2410.20672).

    STEPWISE  L layers in depth order, evenly spread from the first to the last
    AVERAGE   layer j is the mean of layers j, j + L, j + 2L, ...: of all that it stands for when looped
    """

    STEPWISE = "stepwise"
    AVERAGE = "average"


def student_from_teacher(recipe: Recipe, teacher: LoopedTransformer, start: Start) -> LoopedTransformer:
    """The recipe's model, on the teacher's device in fp32, with weights from `teacher`.

    Raises ValueError when their widths differ.
    """
    model = LoopedTransformer(recipe.model).to(teacher.device)
    block = recipe.model.num_block_layers
    given, wanted = teacher.state_dict(), model.state_dict()
    chosen = _sources(block, teacher.config.num_block_layers, start)
    for name, weight in wanted.items():
        if name.startswith("layers."):
            _, number, rest = name.split(".", 2)
            sources = [given[f"layers.{layer}.{rest}"] for layer in chosen[int(number)]]
        else:
            sources = [given[name][: len(weight)]]
        if sources[0].shape != weight.shape:
            shapes = f"{tuple(weight.shape)}, the teacher's {tuple(sources[0].shape)}"
            raise ValueError(f"the student's {name} is {shapes}: the recipe's widths must be the teacher's")
        weight.copy_(torch.stack([source.float() for source in sources]).mean(0))
    return model


def _sources(block: int, depth: int, start: Start) -> list[list[int]]:
    """The teacher's layers that each of the block's is the mean of."""
    if start is Start.AVERAGE:
        return [list(range(layer, depth, block)) for layer in range(block)]
    return [[round(layer * (depth - 1) / max(1, block - 1))] for layer in range(block)]
