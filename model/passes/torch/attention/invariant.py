"""Batch-invariant CPU attention: a row's result is a function of its query and its own context alone.

Each row is one element of a batch by itself: one call of torch's kernel works on the query heads that
share a K/V head, against the context up to the end of the row's page, whatever stands beside it in the
batch. The kernel's shapes, and so its order of summation, follow from the row's position; a prompt row
and a decoding row at one position are computed alike. Where this machine is seen to give them the same
bits (it depends on the number of heads), a prompt's rows in one page are a single element instead, which
reads their context once (two AMX cores, 16 rows, 1504 positions: 0.64 ms, not 1.5). Always in fp32, the
cache too: the bf16 kernel chooses its path by the size of the whole batch.
"""

import functools
from collections import abc
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.network.layers import Attend
from model.passes.rows import RowRun
from model.passes.torch.attention.store import KVStore
from model.schedule.pages import PageTable

KV_BLOCK = 512  # positions that torch's kernel takes at a time
BLOCK_SHARE = (
    0.75  # of a page: fewer rows are faster by themselves, up to 8 of 16 at 1504 positions, 11 at 512
)


class InvariantAttention:
    """One attention call for the rows of a sequence that end in the same page."""

    def __init__(self, store: KVStore) -> None:
        self.store = store
        self._strip = torch.empty(0, 1, 1, 0)  # the mask of the longest context so far

    def bind(self, runs: abc.Sequence[RowRun], write: bool = True) -> Attend:
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


def _pieces(runs: abc.Sequence[RowRun]) -> Iterator[_Piece]:
    """The runs, cut where a page ends."""
    row = 0
    for run in runs:
        start, end = run.start, run.start + run.num_rows
        while start < end:
            count = min(end - start, run.table.page_size - start % run.table.page_size)
            yield _Piece(run.table, run.loop, start, count, row)
            start, row = start + count, row + count


def _groups(runs: abc.Sequence[RowRun]) -> list[list[_Piece]]:
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
        at_one_loop = first.loop == last.loop and self.num_rows > size * BLOCK_SHARE
        self.is_block = at_one_loop and _blocks_agree_here(store, size)
        self.batch = 1 if self.is_block else self.num_rows
        offsets = [piece.start % size + step for piece in group for step in range(piece.num_rows)]
        whole = mask(self.context, offsets, size)
        self.masks = {kind: self._windowed(whole, group) if kind else whole for kind in set(store.windowed)}
        if self.is_block:
            self.masks = {kind: block_mask(each, store.group, size) for kind, each in self.masks.items()}
        self.index = None if self.table.base is not None else self._slots()

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Output (rows, kv_heads, group, head_dim) of the queries q of the same shape."""
        keys, values = self._context_of(self.store.keys[layer]), self._context_of(self.store.values[layer])
        mask = self.masks[self.store.windowed[layer]]
        if self.is_block:
            return attend_block(q, keys, values, mask)
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
        """(batch, kv_heads, context, head_dim); rows at one loop share it, nothing is repeated in memory."""
        if self.index is not None:
            part = cache[self.loops].index_select(1, self.index)
            return part.transpose(1, 2).expand(self.batch, -1, -1, -1)
        loop, token, head, channel = cache.stride()  # one view, not four: a pass makes two a layer
        start = cache.storage_offset() + self.loops.start * loop + (self.table.base or 0) * token
        step = loop if self.loops.stop - self.loops.start > 1 else 0
        shape = (self.batch, cache.shape[2], self.context, cache.shape[3])
        return cache.as_strided(shape, (step, head, token, channel), start)

    def _slots(self) -> Tensor:
        return torch.tensor(list(self.table.slots(0, self.context)))


def block_mask(mask: Tensor, group: int, page_size: int) -> Tensor:
    """The mask (rows, 1, 1, context) of rows by themselves, for a block: (1, 1, page_size * group, context).

    What fills the page up sees everything: nobody reads what comes of it.
    """
    whole = F.pad(mask[:, 0, 0], (0, 0, 0, page_size - len(mask)))
    return whole.repeat_interleave(group, 0)[None, None]


def attend_block(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attention of rows at one loop as one element of as many rows as `mask` has, from `block_mask`.

    q (rows, kv_heads, group, head_dim), keys and values (1, kv_heads, context, head_dim); same shape out.
    """
    rows, heads, group, channels = q.shape
    page = F.pad(q, (0, 0, 0, 0, 0, 0, 0, mask.shape[2] // group - rows)).transpose(0, 1)
    out = F.scaled_dot_product_attention(page.reshape(1, heads, -1, channels), keys, values, attn_mask=mask)
    return out.view(heads, -1, group, channels)[:, :rows].transpose(0, 1)


def _blocks_agree_here(store: KVStore, page_size: int) -> bool:
    _, _, heads, channels = store.keys[0].shape
    return blocks_agree(heads, store.group, channels, page_size, torch.get_num_threads())


@functools.cache
def blocks_agree(kv_heads: int, group: int, head_dim: int, page_size: int, _threads: int) -> bool:
    """Whether rows of a page come out of `attend_block` with the bits that each has by itself.

    Tried at every length of a context up to a block of torch's kernel and some beyond, so in all shapes that
    there are, on numbers whose sums depend on their order. 20 ms.
    """
    lengths = [*range(page_size, KV_BLOCK + 1, page_size), KV_BLOCK + page_size, 2 * KV_BLOCK + page_size]
    return all(_agrees(kv_heads, group, head_dim, page_size, length) for length in lengths)


def _agrees(kv_heads: int, group: int, head_dim: int, page_size: int, context: int) -> bool:
    generator = torch.Generator().manual_seed(context)
    q = 4 * torch.randn(page_size, kv_heads, group, head_dim, generator=generator)
    drawn = torch.randn(2, 1, context, kv_heads, head_dim, generator=generator)
    keys, values = drawn.transpose(2, 3)
    mask = torch.full((page_size, context), -torch.inf).triu(context - page_size + 1)[:, None, None]
    shared = keys.expand(page_size, -1, -1, -1), values.expand(page_size, -1, -1, -1)
    alone = F.scaled_dot_product_attention(q, shared[0], shared[1], attn_mask=mask)
    return torch.equal(attend_block(q, keys, values, block_mask(mask, group, page_size)), alone)
