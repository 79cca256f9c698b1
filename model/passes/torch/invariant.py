"""Batch invariance: a model rebuilt so that a row's result depends on that row alone, to the last bit.

The ordinary operators round differently with the number of rows: a matrix product takes another kernel
with another order of summation, and an element that falls behind the last whole vector of a tensor goes
through the scalar exp, not the vector one. Here every operator sees one of few shapes, chosen so that it
treats each row alike. Invariant: the modules below give a row the same bits for any number of rows, any
place among them and any other rows; what can't be shown to do so is refused (InvarianceError).

Knows nothing about attention, which keeps the same promise in `model.passes.torch.attention.invariant`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.network.config import LoopedConfig
from model.network.int8 import IntegerLinear
from model.network.layers import Attention, GatedMLP, Layer, RMSNorm, Rotary
from model.network.looped import LoopedTransformer
from model.network.packed import PACKABLE, PackedLinear, can_pack

BASE_ROWS = 16  # the size that decides: a product of another size is used only if its bits are the same
SIZES = (*range(1, BASE_ROWS + 1), 2 * BASE_ROWS, 4 * BASE_ROWS)
UNSPLIT = 32768  # elements; torch gives an operator on more than these to several threads
VECTOR = 64  # elements; torch's longest step through a contiguous tensor (bf16, AVX-512, two at a time)
TABLE_ROWS = 1024  # positions of which cos and sin are computed together

_CONTAINERS = (nn.ModuleList, LoopedTransformer, Layer, Attention, GatedMLP)
_EXACT = (nn.Embedding, nn.Identity, IntegerLinear)  # sums of integers have no rounding


class InvarianceError(ValueError):
    """A model or machine for which no batch-invariant implementation is known."""


def make_invariant(model: LoopedTransformer) -> None:
    """Replaces every module whose result for a row could depend on other rows, in place.

    As with `pack_linears`, the model can no longer be trained, moved or saved. Raises InvarianceError, the
    model untouched, if it holds other modules than this knows, or isn't fp32 or bf16 on a CPU with oneDNN.
    """
    _refuse_what_is_unknown(model)
    proven = _proven_sizes(model)
    rotary = InvariantRotary(model.config)
    model.rotary = rotary
    for parent in list(model.modules()):
        if isinstance(parent, Attention):
            parent.rotary = [rotary]
            parent.gate_activation = InvariantActivation(torch.sigmoid)
        if isinstance(parent, GatedMLP):
            parent.activation = InvariantActivation(parent.activation)
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                sizes = proven[child.in_features, child.out_features]
                setattr(parent, name, InvariantLinear(PackedLinear(child), sizes))
            elif isinstance(child, RMSNorm):
                setattr(parent, name, InvariantNorm(child))
    model.row_invariant = True


def _proven_sizes(model: LoopedTransformer) -> dict[tuple[int, int], tuple[int, ...]]:
    """`invariant_sizes` of every shape (in, out) that a linear layer of the model has."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    shapes = {(linear.in_features, linear.out_features): linear.weight.dtype for linear in linears}
    return {shape: invariant_sizes(*shape, dtype) for shape, dtype in shapes.items()}


def _refuse_what_is_unknown(model: LoopedTransformer) -> None:
    if model.device.type != "cpu":
        raise InvarianceError(f"deterministic mode runs on a CPU only; the device is {model.device}")
    if model.dtype not in PACKABLE or not can_pack(model):
        raise InvarianceError(
            "deterministic mode needs float32, or bfloat16 on a CPU that has its products (AVX-512), and "
            f"oneDNN; dtype is {model.dtype} on a CPU with {torch.backends.cpu.get_cpu_capability()}"
        )
    for name, module in model.named_modules():
        if not isinstance(module, (*_CONTAINERS, *_EXACT, nn.Linear, RMSNorm, Rotary)):
            kind = type(module).__name__
            raise InvarianceError(f"deterministic mode has no implementation of {kind} ({name})")


class InvariantLinear(nn.Module):
    """A packed linear layer that runs only with numbers of rows that give a row the same bits."""

    def __init__(self, packed: PackedLinear, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.packed = packed
        self.in_features, self.out_features = packed.in_features, packed.out_features
        self._most = sizes[-1]
        self._size_of = [next(size for size in sizes if size >= rows) for rows in range(1, self._most + 1)]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        if x.dim() != 2:
            return self.forward(x.flatten(0, -2)).view(*x.shape[:-1], -1)
        if x.shape[0] <= self._most:
            return self._block(x)
        return torch.cat([self._block(part) for part in torch.split(x, self._most)])

    def _block(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        size = self._size_of[rows - 1]
        if size == rows:
            return self.packed.product(x)
        return self.packed.product(F.pad(x, (0, 0, 0, size - rows)))[:rows]


class InvariantNorm(nn.Module):
    """RMSNorm of few enough rows at a time that no row's mean is split between threads."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """See RMSNorm."""
        return _in_blocks(self.norm, x)


class InvariantActivation:
    """An element-wise function, on whole vectors only."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def __call__(self, x: Tensor) -> Tensor:
        """The function of x (..., channels), same shape."""
        channels = x.shape[-1]
        if channels % VECTOR == 0:
            return _in_blocks(self.function, x.contiguous())
        return _in_blocks(self.function, F.pad(x, (0, -channels % VECTOR)))[..., :channels]


class InvariantRotary(Rotary):
    """Rotary embedding from a table: cos and sin of a position are computed once, in one shape."""

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__(config)
        self._cos = self._sin = torch.empty(0)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """See Rotary; `dtype` must be the same in every call."""
        while positions.numel() and len(self._cos) <= int(positions.max()):
            self._grow(dtype)
        return self._cos[positions], self._sin[positions]

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """See Rotary; products and sums, each rounded once, are the same in every kernel."""
        turned = x[..., : self.rotary_dim]
        turned = turned * cos + self.swapped(turned) * sin
        return turned if turned.shape == x.shape else torch.cat((turned, x[..., turned.shape[-1] :]), -1)

    def _grow(self, dtype: torch.dtype) -> None:
        first = len(self._cos)
        cos, sin = super().forward(torch.arange(first, first + TABLE_ROWS), dtype)
        self._cos = torch.cat((self._cos, cos)) if first else cos
        self._sin = torch.cat((self._sin, sin)) if first else sin


def _in_blocks(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), x (rows, channels), so many rows at a time that torch runs each call in one thread."""
    if x.numel() <= UNSPLIT or x.dim() != 2:
        return function(x)
    return torch.cat([function(part) for part in torch.split(x, max(1, UNSPLIT // x.shape[1]))])


def invariant_sizes(in_features: int, out_features: int, dtype: torch.dtype) -> tuple[int, ...]:
    """The numbers of rows in SIZES whose product gives a row the bits that BASE_ROWS rows give it.

    The largest is at least BASE_ROWS, so that every number of rows has a size. Tried on this machine,
    with its threads, on rows of which every product cancels: the exact sums are zero, what is left is
    rounding error alone, and another order of summation shows in nearly every number. Raises
    InvarianceError if even products of BASE_ROWS rows depend on a row's place.
    """
    linear, rows = _cancelling(in_features, out_features, dtype)
    packed = PackedLinear(linear)
    blocks = torch.split(rows, BASE_ROWS)
    base = torch.cat([packed.product(block) for block in blocks])
    moved = torch.cat([packed.product(block.flip(0)).flip(0) for block in blocks])
    if not torch.equal(base, moved):
        raise InvarianceError(
            f"a product of {BASE_ROWS} rows ({in_features} x {out_features}, {dtype}) depends on the rows' "
            "places on this machine; deterministic mode cannot work"
        )
    return tuple(size for size in SIZES if size == BASE_ROWS or _agrees(packed, rows, base, size))


def _agrees(packed: PackedLinear, rows: Tensor, base: Tensor, size: int) -> bool:
    """Whether the first and the last `size` rows, also in turned order, come out as in `base`."""
    return all(
        torch.equal(packed.product(rows[part]), base[part])
        and torch.equal(packed.product(rows[part].flip(0)).flip(0), base[part])
        for part in (slice(size), slice(len(rows) - size, None))
    )


def _cancelling(in_features: int, out_features: int, dtype: torch.dtype) -> tuple[nn.Linear, Tensor]:
    """A linear layer and rows for it, (SIZES[-1], in_features), whose exact products are near zero."""
    generator = torch.Generator().manual_seed(0)
    half, few = in_features // 2, min(out_features, 128)
    order = torch.randperm(half, generator=generator)
    weight = torch.zeros(few, in_features)
    rows = torch.zeros(SIZES[-1], in_features)
    weight[:, :half] = torch.randn(few, half, generator=generator)
    weight[:, half : 2 * half] = weight[:, order]
    rows[:, :half] = torch.randn(SIZES[-1], half, generator=generator)
    rows[:, half : 2 * half] = -rows[:, order]
    linear = nn.Linear(in_features, out_features, bias=False, dtype=dtype).requires_grad_(False)
    repeats = -(-out_features // few)
    linear.weight.copy_(weight.to(dtype).repeat(repeats, 1)[:out_features])
    return linear, rows.to(dtype)
