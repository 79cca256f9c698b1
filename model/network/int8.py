"""Weight-only int8: linear layers whose weights take one byte each, with one scale for each output channel.

Symmetric round-to-nearest, no calibration. Activations keep the model's dtype between layers. On a CPU the
product is made of integers (oneDNN's, by torch): a row of activations becomes fixed-point numbers of 16
bits with a scale of its own, split into two bytes, so that two rows of int8 stand for one. Sums of integers
have no rounding, hence a row's result never depends on the rows beside it, bit for bit. Elsewhere, and
where a CPU's integer product saturates, weights are widened for every product: less memory, not less time.

`torch._weight_int8pack_mm` is not used: on two cores (AMX), 11264 x 2048 in bf16, it takes 1.6 ms for one
row and 3.9 ms for eight; the packed bf16 product takes 1.8 ms for either, the integer product 0.9 to 1.1 ms.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.network.packed import PACKED_FOR_ROWS, padded_rows

LARGEST = 127  # of a quantised weight
LOW_UNITS = 254  # in one of the high byte: what is left of an activation then fits -127..127 too
UNITS = 127 * LOW_UNITS  # of the largest activation of a row: its high byte is then at most 127
ADAPTER = "adapter"  # the linear layer that mixes state and input
CHUNK = 1024  # rows of a weight that are quantised together
MOST_INPUTS = (2**31 - 1) // (128 * 128)  # beyond it a sum of products may not fit 32 bits


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


class IntegerLinear(nn.Module):
    """The same on a CPU by integer products, exact but for the rounding of activations to 16 bits."""

    def __init__(self, linear: nn.Linear | Int8Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        held = linear if isinstance(linear, Int8Linear) else Int8Linear(linear)
        self._scales = held.scales
        shape = [2 * PACKED_FOR_ROWS, self.in_features]
        self._weight = torch.ops.onednn.qlinear_prepack(held.weight, shape)
        self._zeros = torch.zeros(self.out_features, dtype=torch.int32)
        self._bias = None if linear.bias is None else linear.bias.detach()
        self._call = torch.ops.onednn.qlinear_pointwise.default

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features), in x's dtype."""
        rows = x.reshape(-1, self.in_features)
        count, padded = len(rows), padded_rows(len(rows))
        units, scales = fixed_point(F.pad(rows, (0, 0, 0, padded - count)) if padded > count else rows)
        high, low = self._product(units).view(2, padded, self.out_features).unbind()
        out = low.add_(high, alpha=LOW_UNITS).mul_(scales)
        if padded > count:
            out = out[:count]
        if self._bias is not None:
            out = out + self._bias
        return out.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _product(self, units: Tensor) -> Tensor:
        """int8 (rows, in_features) -> fp32 (rows, out_features), scaled by output channel."""
        arguments: tuple[Any, ...] = (
            self._weight,
            self._scales,
            self._zeros,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        product: Tensor = self._call(units, 1.0, 0, *arguments)
        return product


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


def fixed_point(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (rows, n) as int8 (2 * rows, n), the high bytes then the low ones, and scales (rows, 1).

    x is about scales * (LOW_UNITS * high + low); a number is off by at most half of its row's scale, which
    is 1 / 32258 of the row's largest magnitude. Few and cheap operations, since a pass calls this for every
    product: torch's inf-norm alone takes 85 us for 16 rows of 1536, abs and amax 8.
    """
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True)
    scales = largest.mul_(1 / UNITS).clamp_min_(torch.finfo(torch.float32).tiny)
    units = x / scales
    high = (units * (1 / LOW_UNITS)).round_()
    low = units.sub_(high, alpha=LOW_UNITS).round_()
    return torch.cat((high, low)).to(torch.int8), scales


def quantize_linears(model: nn.Module) -> int:
    """Replaces every nn.Linear below `model` by an int8 one, in place; how many were replaced.

    The exit gate, a single row, stays, and so does the adapter: it may pass its input on and add a thousandth
    of the state, which a row's scale would round away, and every loop would compute the same. A head that was
    tied to the embedding gets weights of its own. The model can no longer be trained, moved or saved.
    """
    count = hold_in_int8(model)
    use_integer_products(model)
    return count


def hold_in_int8(model: nn.Module) -> int:
    """The first half of `quantize_linears`: an `Int8Linear` for what it quantises, on meta as well."""
    places = [
        (parent, name)
        for parent, name, child in _children(model)
        if isinstance(child, nn.Linear) and child.out_features > 1 and name != ADAPTER
    ]
    for parent, name in places:  # one after the other: the old weight is freed before the next is quantised
        setattr(parent, name, Int8Linear(getattr(parent, name)))
    return len(places)


def use_integer_products(model: nn.Module) -> None:
    """The second: an `IntegerLinear` for every `Int8Linear` where this machine's products are exact."""
    if not integer_products_are_exact():
        return
    places = [
        (parent, name)
        for parent, name, child in _children(model)
        if isinstance(child, Int8Linear)
        and child.weight.device.type == "cpu"
        and child.in_features <= MOST_INPUTS
    ]
    for parent, name in places:
        setattr(parent, name, IntegerLinear(getattr(parent, name)))


def _children(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    return [(parent, *named) for parent in model.modules() for named in parent.named_children()]


def integer_products_are_exact() -> bool:
    """Whether torch has the operators, and this CPU's instructions don't saturate at 16 bits on the way."""
    probe = nn.Linear(64, 32, bias=False)
    nn.init.ones_(probe.weight)
    try:
        out = IntegerLinear(probe)._product(torch.full((2, 64), LARGEST, dtype=torch.int8))
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return bool(torch.allclose(out, torch.full_like(out, 64 * LARGEST), rtol=1e-6))
