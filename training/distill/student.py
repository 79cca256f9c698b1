"""The student's first weights, taken from the teacher's layers.

Knows nothing about training. Invariant: widths are the teacher's; only layers and vocabulary are fewer.
"""

import torch

from model.network.looped import LoopedTransformer
from training.recipe import Recipe


@torch.no_grad()
def student_from_teacher(
    recipe: Recipe, teacher: LoopedTransformer, layers: tuple[int, ...]
) -> LoopedTransformer:
    """The recipe's model, on the teacher's device in fp32: its layers are the teacher's `layers`, in order.

    The adapter, where there is one, passes the prelude's output on and leaves the state out: at first every
    loop computes the same, the teacher without the layers that were left away, so that loops begin as no
    harm and training can only make use of them. Raises ValueError when widths or the number of layers differ.
    """
    model = LoopedTransformer(recipe.model).to(teacher.device)
    if len(layers) != recipe.model.num_layers or max(layers) >= teacher.config.num_layers:
        raise ValueError(
            f"teacher_layers {list(layers)}: {recipe.model.num_layers} of the teacher's "
            f"{teacher.config.num_layers} layers are wanted"
        )
    given = teacher.state_dict()
    for name, weight in model.state_dict().items():
        source = _source(name, weight, given, layers)
        if source.shape != weight.shape:
            shapes = f"{tuple(weight.shape)}, the teacher's {tuple(source.shape)}"
            raise ValueError(f"the student's {name} is {shapes}: the recipe's widths must be the teacher's")
        weight.copy_(source)
    return model


def _source(
    name: str, weight: torch.Tensor, given: dict[str, torch.Tensor], layers: tuple[int, ...]
) -> torch.Tensor:
    """What a parameter of the student begins as."""
    if name == "adapter.weight":
        width = len(weight)
        return torch.cat((torch.zeros(width, width), torch.eye(width)), 1)
    if name.startswith("layers."):
        _, number, rest = name.split(".", 2)
        return given[f"layers.{layers[int(number)]}.{rest}"]
    return given[name][: len(weight)]
