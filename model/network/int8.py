"""Weight-only int8: linear layers whose weights take one byte each, with one scale for each output channel.

Symmetric round-to-nearest, no calibration. Activations keep the model's dtype. In torch, weights are widened
for every product: less memory, not less time. The native library multiplies them as they are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGEST = 127  # of a quantised weight
ADAPTER = "adapter"  # the linear layer that mixes state and input
CHUNK = 1024  # rows of a weight that are quantised together


class Int8Linear(nn.Module):
    """x @ (scales * weight).T + bias with an int8 weight, widened for every product; any device.

    `weight` (out, in) and fp32 `scales` (out,) are buffers that a loader may fill.
    """

    weight: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scales = quantized(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features), in x's dtype."""
        weight = self.weight * self.scales[:, None]
        return F.linear(x, weight.to(x.dtype), self.bias)


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 weight (out, in) and fp32 scales (out,): weight is about scales[:, None] * int8.

    Of a weight on the meta device only the places.
    """
    stored = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(weight), device=weight.device)
    num_rows = 0 if weight.is_meta else len(weight)
    for start in range(0, num_rows, CHUNK):  # a head's fp32 copy may be a quarter of the model
        part = weight[start : start + CHUNK].float()
        scale = (part.abs().amax(1) / LARGEST).clamp_min_(torch.finfo(torch.float32).tiny)
        stored[start : start + CHUNK] = torch.round(part / scale[:, None])
        scales[start : start + CHUNK] = scale
    return stored, scales


def quantize_linears(model: nn.Module) -> int:
    """Replaces every nn.Linear below `model` by an int8 one, in place, on meta too; how many were replaced.

    The exit gate, a single row, stays, and so does the adapter: it may pass its input on and add a thousandth
    of the state, which a row's scale would round away, and every loop would compute the same. A head that was
    tied to the embedding gets weights of its own. The model can no longer be trained or saved.
    """
    places = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear) and child.out_features > 1 and name != ADAPTER
    ]
    for parent, name in places:  # one after the other: the old weight is freed before the next is quantised
        setattr(parent, name, Int8Linear(getattr(parent, name)))
    return len(places)
