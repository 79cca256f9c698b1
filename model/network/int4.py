"""Weights in 4 bits as the native library multiplies them: what is left of a matrix, in torch.

Groups of 32 inputs share a scale in fp16; the number of largest magnitude in a group stands at -8. Rounded to
the nearest, without calibration: a small model is ruined by it, `speed inspect --text` says what it costs.
"""

import torch
from torch import nn

from model.network.int8 import ADAPTER

GROUP = 32  # inputs that share a scale
BYTES_PER_WEIGHT = 0.5 + 2 / GROUP
LARGEST = -8


def rounded_to_int4(weight: torch.Tensor) -> torch.Tensor:
    """What 4 bits leave of a weight (out, in), in fp32."""
    rows, inputs = weight.shape
    groups = nn.functional.pad(weight.float(), (0, -inputs % GROUP)).view(rows, -1, GROUP)
    top = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scale = (top / LARGEST).half().float()
    units = torch.where(scale == 0, 0, groups / scale).round().clamp(LARGEST, -LARGEST - 1)
    return (units * scale).view(rows, -1)[:, :inputs]


def round_linears_to_int4(model: nn.Module) -> None:
    """Rounds every matrix that the library holds in int4, in place: those that int8 would replace.

    A head that is tied to the embedding gets weights of its own: the embedding is read as it is.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and child.out_features > 1 and name != ADAPTER:
                rounded = rounded_to_int4(child.weight.detach()).to(child.weight.dtype)
                child.weight = nn.Parameter(rounded, requires_grad=False)
