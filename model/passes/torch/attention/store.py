"""The tensors behind the pages, and what every attention implementation promises.

Layout: one K and one V tensor for each layer with weights, (loops, cells, kv_heads, head_dim);
the loops of a layer are its slots. The K/V of a sequence's position p at loop r is [r, table.cell(p)].
In int8 there is a tensor of scales beside each, (loops, cells, kv_heads, 1).
Invariant: rows of one pass never write the same entry, and a row reads no position behind its own, nor
one that has slid out of its layer's window.
"""

import math
import mmap
from collections import abc
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor

from model.network.config import LoopedConfig
from model.network.layers import Attend
from model.passes.kv import narrowed, read_back, to_int8
from model.passes.rows import RowRun
from model.passes.tensors import to_device


class KVStore:
    """K and V of all layers (`LoopedConfig.num_caches`), loops and cells, and of sources behind them.

    Memory is touched only where it is written.
    """

    def __init__(
        self,
        config: LoopedConfig,
        num_tokens: int,
        device: torch.device,
        dtype: torch.dtype,
        held_in: torch.dtype | None = None,
    ) -> None:
        """`dtype` is what is written and read; it is `held_in` another one if that is given."""
        self.config = config
        self.windowed = [config.is_windowed(layer) for layer in range(config.num_caches)]
        self.num_tokens = num_tokens
        self.device = device
        self.dtype = dtype
        self.held_in = held_in or dtype
        self.group = config.num_heads // config.num_kv_heads
        shapes = [
            (config.loops_of_layer(layer), num_tokens, config.num_kv_heads, config.head_dim)
            for layer in (*range(config.num_caches), *config.source_caches)
        ]
        self.keys = [zeros(shape, device, self.held_in) for shape in shapes]
        self.values = [zeros(shape, device, self.held_in) for shape in shapes]
        scaled = [(*shape[:-1], 1) for shape in shapes] if self.held_in == torch.int8 else []
        self.key_scales = [zeros(shape, device, torch.float32) for shape in scaled]
        self.value_scales = [zeros(shape, device, torch.float32) for shape in scaled]

    def entries(self, runs: abc.Sequence[RowRun]) -> Tensor:
        """Index of each row's entry in a layer's flattened (loops * cells) cache, (rows,)."""
        flat: list[int] = []
        for run in runs:
            offset = run.loop * self.num_tokens
            flat.extend(offset + cell for cell in run.table.cells(run.start, run.num_rows))
        return to_device(flat, torch.int64, self.device)

    def first_seen(self, windowed: bool, loop: int, position: int) -> int:
        """The first position that the row at `position` sees in a layer that is windowed, or isn't.

        All layers of one of these two kinds see the same, so a pass needs one mask for each.
        """
        window = self.config.window_of_loop(loop) if windowed else None
        return 0 if window is None else max(0, position - window + 1)

    def write(self, layer: int, entries: Tensor, k: Tensor, v: Tensor) -> None:
        """Stores k and v (rows, kv_heads, head_dim) of the rows at `entries`, rounded to what holds them."""
        for numbers, scales, x in ((self.keys, self.key_scales, k), (self.values, self.value_scales, v)):
            if scales:
                steps, x_scales = to_int8(x)
                scales[layer].flatten(0, 1).index_copy_(0, entries, x_scales)
            else:
                steps = narrowed(x, self.held_in)
            numbers[layer].flatten(0, 1).index_copy_(0, entries, steps)

    def read(self, layer: int, entries: Tensor) -> tuple[Tensor, Tensor]:
        """K and V at `entries` (...) of a layer's flattened cache, (..., kv_heads, head_dim) each."""
        sides = ((self.keys, self.key_scales), (self.values, self.value_scales))
        keys, values = (self._read(numbers, scales, layer, entries) for numbers, scales in sides)
        return keys, values

    def read_back(self, x: Tensor) -> Tensor:
        """What would be read of K or V (..., head_dim) if it were stored: an encoder's own aren't."""
        return x if self.held_in == self.dtype else read_back(x, self.held_in)

    def _read(self, numbers: list[Tensor], scales: list[Tensor], layer: int, entries: Tensor) -> Tensor:
        found = numbers[layer].flatten(0, 1)[entries]
        if scales:
            found = found * scales[layer].flatten(0, 1)[entries]
        return found.to(self.dtype)


def zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Like torch.zeros, but on the CPU memory comes from the kernel page by page as it is first written.

    In small pages, where numpy asks for 2 MB: a sequence's first token writes to one for each layer and loop,
    keys and values, which took 0.3 s and 180 MB for 12 layers x 4. Reading is no slower (60 to 2,000
    positions). The memory begins at a page, since matrix products may round by where their operands begin.
    """
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):  # another system, or a kernel without such pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape)).view(shape)


class PagedAttention(Protocol):
    """Writes a batch's K and V into the cache and attends over what is there."""

    def bind(self, runs: abc.Sequence[RowRun], write: bool = True) -> Attend:
        """An `Attend` for the rows of these runs, in this order; good for one pass.

        Without `write` it only reads: the entries of the runs' loop must be there, and k and v count
        for nothing.
        """
