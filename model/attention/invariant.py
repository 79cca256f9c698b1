"""Batch-invariant CPU attention: a row's result is a function of its query and its own context alone.

Each row is one element of a batch by itself: one call of torch's kernel works on the query heads that
share a K/V head, against the context up to the end of the row's page, whatever stands beside it in the
batch. The kernel's shapes, and so its order of summation, follow from the row's position; a prompt row
and a decoding row at one position are computed alike. Always in fp32, the cache too: the bf16 kernel
chooses its path by the size of the whole batch.
"""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention.store import KVStore, RowRun
from model.cache import PageTable
from model.layers import Attend


class InvariantAttention:
    """One attention call for the rows of a sequence that end in the same page."""

    def __init__(self, store: KVStore) -> None:
        self.store = store
        self._strip = torch.empty(0, 1, 1, 0)  # the mask of the longest context so far

    def bind(self, runs: SequenceOf[RowRun], write: bool = True) -> Attend:
        """See PagedAttention."""
        store = self.store
        entries = store.entries(runs)
        calls = [_Call(store, group, self._mask) for group in _groups(runs)]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if write:
                store.write(layer, entries, _finite(k.to(store.dtype)), _finite(v.to(store.dtype)))
            rows = q.view(len(q), -1, store.group, q.shape[-1]).to(store.dtype)
            parts = [call.attend(layer, rows[call.rows]) for call in calls]
            out = parts[0] if len(parts) == 1 else torch.cat(parts)
            return out.flatten(1, 2).to(q.dtype)

        return attend

    def _mask(self, context: int, offsets: list[int], page_size: int) -> Tensor:
        """0 where a row may look, -inf elsewhere; (rows, 1, 1, context), offsets within the last page."""
        if context > self._strip.shape[-1]:
            last = torch.full((page_size, page_size), -torch.inf).triu(1)
            self._strip = F.pad(last, (2 * context - page_size, 0))[:, None, None]
        whole = self._strip[..., -context:]
        first, count = offsets[0], len(offsets)
        if offsets == list(range(first, first + count)):
            return whole[first : first + count]
        return whole[torch.tensor(offsets)]


def _finite(x: Tensor) -> Tensor:
    """x with 0 for NaN and infinity: a mask hides no NaN, and the rest of a page is read under one."""
    return x.nan_to_num(0.0, 0.0, 0.0)


_MaskOf = Callable[[int, list[int], int], Tensor]


class _Piece(NamedTuple):
    """Rows first_row .. of a batch that lie in one page: positions start .. of one sequence at one loop."""

    table: PageTable
    loop: int
    start: int
    num_rows: int
    first_row: int

    @property
    def page(self) -> int:
        """Which page of the sequence, counted from its start."""
        return self.start // self.table.page_size


def _pieces(runs: SequenceOf[RowRun]) -> Iterator[_Piece]:
    """The runs, cut where a page ends."""
    row = 0
    for run in runs:
        start, end = run.start, run.start + run.num_rows
        while start < end:
            count = min(end - start, run.table.page_size - start % run.table.page_size)
            yield _Piece(run.table, run.loop, start, count, row)
            start, row = start + count, row + count


def _groups(runs: SequenceOf[RowRun]) -> list[list[_Piece]]:
    """Pieces that one call can serve: all at one loop, or single rows at loops n, n + 1, ..."""
    groups: list[list[_Piece]] = []
    for piece in _pieces(runs):
        if groups and _joins(groups[-1], piece):
            groups[-1].append(piece)
        else:
            groups.append([piece])
    return groups


def _joins(group: list[_Piece], piece: _Piece) -> bool:
    first, before = group[0], group[-1]
    if before.table is not piece.table or before.page != piece.page:
        return False
    if piece.loop == first.loop == before.loop:
        return True
    return piece.num_rows == first.num_rows == 1 and piece.loop == before.loop + 1 == first.loop + len(group)


class _Call:
    """Attention of one group; each row reads its sequence's context up to the end of its page."""

    def __init__(self, store: KVStore, group: list[_Piece], mask: _MaskOf) -> None:
        first, last = group[0], group[-1]
        self.store, self.table = store, first.table
        self.rows = slice(first.first_row, last.first_row + last.num_rows)
        self.loops = slice(first.loop, last.loop + 1)
        self.num_rows = self.rows.stop - self.rows.start
        size = self.table.page_size
        self.context = (first.page + 1) * size
        offsets = [piece.start % size + step for piece in group for step in range(piece.num_rows)]
        whole = mask(self.context, offsets, size)
        self.masks = {kind: self._windowed(whole, group) if kind else whole for kind in set(store.windowed)}
        self.index = None if self.table.base is not None else self._slots()

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Output (rows, kv_heads, group, head_dim) of the queries q of the same shape."""
        keys, values = self._context_of(self.store.keys[layer]), self._context_of(self.store.values[layer])
        mask = self.masks[self.store.windowed[layer]]
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)

    def _windowed(self, mask: Tensor, group: list[_Piece]) -> Tensor:
        """The mask of windowed layers; what has slid out of a row's window is read all the same."""
        mask = mask.clone()
        for piece in group:
            for position in range(piece.start, piece.start + piece.num_rows):
                row = piece.first_row + position - piece.start - self.rows.start
                mask[row, ..., : self.store.first_seen(True, piece.loop, position)] = -torch.inf
        return mask

    def _context_of(self, cache: Tensor) -> Tensor:
        """(rows, kv_heads, context, head_dim); rows at one loop share it, nothing is repeated in memory."""
        part = cache[self.loops]
        if self.index is not None:
            part = part.index_select(1, self.index)
        else:
            part = part.narrow(1, self.table.base or 0, self.context)
        return part.transpose(1, 2).expand(self.num_rows, -1, -1, -1)

    def _slots(self) -> Tensor:
        return torch.tensor(list(self.table.slots(0, self.context)))
