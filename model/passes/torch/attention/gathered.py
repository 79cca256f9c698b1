"""Reference attention: gathers every run's K and V through its page table, pads, attends.

Slow and obvious, on any device, without a host synchronisation: all sizes come from the host. Invariant: a
row meets numbers of its own sequence alone. What lies behind a mask is multiplied by zero, which hides no NaN
that another sequence has left in a page: there it is replaced.
"""

from collections import abc
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.network.layers import Attend
from model.passes.rows import RowRun
from model.passes.tensors import to_device
from model.passes.torch.attention.store import KVStore


class GatheredAttention:
    """Decoding runs (one row each) in one padded batch, prompt chunks in another."""

    def __init__(self, store: KVStore, relative: Tensor | None = None) -> None:
        """`relative` (distances, heads): what is added to scores by how far a key stands before its query.

        The last entry is for all that stand further; None adds nothing.
        """
        self.store, self.relative = store, relative

    def bind(self, runs: abc.Sequence[RowRun], write: bool = True) -> Attend:
        """An `Attend` for the rows of these runs, in this order; good for one pass."""
        entries = self.store.entries(runs)
        firsts, total = [], 0
        for run in runs:
            firsts.append(total)
            total += run.num_rows
        single = [i for i, run in enumerate(runs) if run.num_rows == 1]
        several = [i for i, run in enumerate(runs) if run.num_rows > 1]
        groups = [
            _Group(self.store, [runs[i] for i in chosen], [firsts[i] for i in chosen], self.relative)
            for chosen in (single, several)
            if chosen
        ]

        readers = _source_readers(self.store, runs) if self.store.config.encoder else []

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if layer in self.store.config.source_caches:
                return _over_sources(self.store, layer, readers, q)
            if write:
                self.store.write(layer, entries, k, v)
            out = torch.empty_like(q)
            for group in groups:
                group.attend(layer, q, out)
            return out

        return attend


class _SourceReader(NamedTuple):
    """The rows of one sequence in a pass, and where its source's K/V lie."""

    rows: slice
    cells: Tensor


def _source_readers(store: KVStore, runs: abc.Sequence[RowRun]) -> list[_SourceReader]:
    readers: list[_SourceReader] = []
    total, last = 0, None
    for run in runs:
        source, end = run.source, total + run.num_rows
        assert source is not None
        assert source.table is not None
        if source is last:
            readers[-1] = readers[-1]._replace(rows=slice(readers[-1].rows.start, end))
        else:
            cells = source.table.cells(0, len(source.tokens))
            readers.append(_SourceReader(slice(total, end), to_device(cells, torch.int64, store.device)))
        total, last = end, source
    return readers


def _over_sources(store: KVStore, cache: int, readers: list[_SourceReader], q: Tensor) -> Tensor:
    """Attention of q (rows, heads, head_dim) over sources, each by itself: no row meets another's source."""
    out = torch.empty_like(q)
    for rows, cells in readers:
        keys, values = (kept.transpose(0, 1)[None] for kept in store.read(cache, cells))
        queries = q[rows].transpose(0, 1)[None]
        got = F.scaled_dot_product_attention(queries, keys, values, scale=store.config.attention_scale)
        out[rows] = got[0].transpose(0, 1)
    return out


class _Group:
    """Runs padded to one number of rows and one context length."""

    def __init__(
        self, store: KVStore, runs: list[RowRun], firsts: list[int], relative: Tensor | None
    ) -> None:
        self.store = store
        width = max(run.num_rows for run in runs)
        context = max(run.start + run.num_rows for run in runs)
        device = store.device
        column = [
            [run.start, run.num_rows, first, run.loop, run.prefix]
            for run, first in zip(runs, firsts, strict=True)
        ]
        start, count, first, loop, prefix = to_device(column, torch.int64, device).t()[:, :, None]
        step = torch.arange(width, device=device)
        self.rows = first + torch.minimum(step, count - 1)  # (runs, width); padding repeats the last row
        seen = torch.arange(context, device=device)
        last = (start + torch.minimum(step, count - 1))[:, :, None]  # (runs, width, 1)
        self.foreign = (seen > start + count - 1)[:, None, :, None]  # behind the run's end
        end = torch.maximum(last + 1, prefix[:, :, None])
        self.masks = [(seen < end)[:, None]]  # of layers that see all, and of windowed ones
        if any(store.windowed):
            windows = [store.config.window_of_loop(run.loop) or context for run in runs]
            window = to_device(windows, torch.int64, device)[:, None, None]
            self.masks.append(self.masks[0] & (seen > last - window)[:, None])
        if relative is not None:
            self.masks = [_biased(mask, last - seen, relative) for mask in self.masks]
        self.entries = loop * store.num_tokens + self._cells(runs, seen)  # (runs, context)

    def _cells(self, runs: list[RowRun], seen: Tensor) -> Tensor:
        size = runs[0].table.page_size
        num_pages = -(-len(seen) // size)
        pages = [[*run.table.pages, *[0] * num_pages][:num_pages] for run in runs]
        first = to_device(pages, torch.int64, self.store.device)[:, seen // size] * size
        return first + seen % size

    def attend(self, layer: int, q: Tensor, out: Tensor) -> None:
        """Fills the rows of this group in `out` (rows, heads, head_dim)."""
        keys, values = (
            found.transpose(1, 2).masked_fill(self.foreign, 0)
            for found in self.store.read(layer, self.entries)
        )
        queries = q[self.rows].transpose(1, 2)  # (runs, heads, width, head_dim)
        grouped, mask = self.store.group > 1, self.masks[self.store.windowed[layer]]
        got = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=mask,
            scale=self.store.config.attention_scale,
            enable_gqa=grouped,
        )
        out[self.rows] = got.transpose(1, 2)  # a repeated row is written twice with one value


def _biased(mask: Tensor, distance: Tensor, relative: Tensor) -> Tensor:
    """What is added to scores (runs, heads, width, context) for a mask, (runs, 1, width, context)."""
    bias = relative[distance.clamp(0, len(relative) - 1)].permute(0, 3, 1, 2)
    return bias.masked_fill(~mask, -torch.inf)
