"""CPU attention: reads the cache through views, without a copy, where a sequence's pages are neighbours.

The rows of a wave stand at neighbouring loops of the same positions, so one view (loops, kv_heads,
positions, head_dim) serves them all in one call. A sequence that lies in a few stretches of pages (a
shared prefix and its own, say) is attended to stretch by stretch, and the parts are joined by their
log-sum-exp (3 to 6 % of a pass; copying would be 20 to 60 %); one that is scattered further is gathered.
"""

from collections import abc
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.network.layers import Attend
from model.passes.rows import RowRun
from model.passes.torch.attention.store import KVStore
from model.schedule.pages import PageTable, Segment

MOST_PARTS = 4  # stretches of a context beyond which copying it is faster
# What scaled_dot_product_attention calls on a CPU; this one also gives the log-sum-exp of the scores.
_flash_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class ViewedAttention:
    """One attention call for each wave and for each prompt chunk."""

    def __init__(self, store: KVStore) -> None:
        self.store = store

    def bind(self, runs: abc.Sequence[RowRun], write: bool = True) -> Attend:
        """See PagedAttention."""
        store = self.store
        entries = store.entries(runs)
        calls = [_Call(store, group, first) for group, first in _groups(runs)]
        if len(calls) == 1:
            only = calls[0]

            def attend_one(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                if write:
                    store.write(layer, entries, k, v)
                return only.attend(layer, q)

            return attend_one

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if write:
                store.write(layer, entries, k, v)
            return torch.cat([call.attend(layer, q[call.rows]) for call in calls])

        return attend


def _groups(runs: abc.Sequence[RowRun]) -> list[tuple[list[RowRun], int]]:
    """Runs that one call can serve, each group with its first row: single rows at loops n, n+1, ..."""
    groups: list[tuple[list[RowRun], int]] = []
    first = 0
    for run in runs:
        before = groups[-1][0][-1] if groups else None
        if before is not None and _continues(before, run):
            groups[-1][0].append(run)
        else:
            groups.append(([run], first))
        first += run.num_rows
    return groups


def _continues(before: RowRun, run: RowRun) -> bool:
    single = before.num_rows == run.num_rows == 1
    return single and before.table is run.table and run.loop == before.loop + 1


class _Span(NamedTuple):
    """The first position that any row sees, and the mask from there on."""

    first: int
    mask: Tensor | None


class _Call:
    """Attention of one group: rows of one sequence, all at one loop or one row a loop."""

    def __init__(self, store: KVStore, runs: list[RowRun], first: int) -> None:
        self.store = store
        self.runs = runs
        self.table: PageTable = runs[0].table
        self.context = max(run.start + run.num_rows for run in runs)
        self.loops = slice(runs[0].loop, runs[-1].loop + 1)
        self.num_loops = len(runs)
        self.num_rows = runs[0].num_rows
        self.rows = slice(first, first + sum(run.num_rows for run in runs))
        self.parts = self._parts()
        self.index = None if self.table.base is not None or self.parts else self._slots()
        self.spans = {windowed: self._span(windowed) for windowed in set(store.windowed)}

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Output (rows, heads, head_dim) of the group's queries q, of the same shape."""
        span = self.spans[self.store.windowed[layer]]
        # Query heads that share a K/V head stand in the place of tokens: no head is repeated.
        rows, heads, head_dim = q.shape
        grouped = q.view(self.num_loops, self.num_rows, heads // self.store.group, self.store.group, head_dim)
        if self.num_rows == 1:
            return self._attend(layer, grouped[:, 0], span).reshape(rows, heads, head_dim)
        queries = grouped.permute(0, 2, 3, 1, 4).flatten(2, 3)  # (1, kv_heads, group * num_rows, head_dim)
        out = self._attend(layer, queries, span)
        out = out.view(1, out.shape[1], self.store.group, self.num_rows, head_dim)
        return out.permute(0, 3, 1, 2, 4).reshape(rows, heads, head_dim)

    def _attend(self, layer: int, queries: Tensor, span: _Span) -> Tensor:
        """Of queries (loops, kv_heads, rows, head_dim) to the cache of a layer, same shape."""
        if self.parts:
            return self._attend_by_parts(layer, queries, span.mask)
        keys = self._context_of(self.store.keys[layer], span.first)
        values = self._context_of(self.store.values[layer], span.first)
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=span.mask)

    def _attend_by_parts(self, layer: int, queries: Tensor, mask: Tensor | None) -> Tensor:
        """The same over stretches; the rows stand in the last one and see all of those before it."""
        out, total = queries, None
        for part in self.parts:
            keys, values = (
                cache[layer][self.loops].narrow(1, part.slot, part.length).transpose(1, 2)
                for cache in (self.store.keys, self.store.values)
            )
            part_mask = None if mask is None or part is not self.parts[-1] else mask[..., part.start :]
            more, weight = _flash_attention(queries, keys, values, attn_mask=part_mask)
            if total is None:
                out, total = more, weight
            else:
                out = torch.lerp(out, more, torch.sigmoid(weight - total)[..., None].to(out.dtype))
                total = torch.logaddexp(total, weight)
        return out

    def _parts(self) -> list[Segment]:
        """The stretches of the context if they are few and attention can go through them, else none."""
        parts = self.table.segments_of(self.context)
        in_last = all(run.start >= parts[-1].start for run in self.runs)
        return parts if 1 < len(parts) <= MOST_PARTS and in_last and not any(self.store.windowed) else []

    def _context_of(self, cache: Tensor, first: int) -> Tensor:
        """(loops of the group, kv_heads, context from `first`, head_dim); a view, but of scattered pages."""
        part = cache[self.loops]
        if self.index is not None:
            part = part.index_select(1, self.index[first:])
        else:
            part = part.narrow(1, (self.table.base or 0) + first, self.context - first)
        return part.transpose(1, 2)

    def _slots(self) -> Tensor:
        return torch.tensor(list(self.table.slots(0, self.context)))

    def _span(self, windowed: bool) -> _Span:
        """What the rows see in layers of one kind: a part of the context, and a mask over it.

        The mask is 0 where a query may look, -inf elsewhere; None when every query sees the whole part.
        """
        seen = [
            [
                (self.store.first_seen(windowed, run.loop, p), p + 1)
                for p in range(run.start, run.start + run.num_rows)
            ]
            for run in self.runs
        ]
        first = min(low for rows in seen for low, _ in rows)
        if all(bounds == (first, self.context) for rows in seen for bounds in rows):
            return _Span(first, None)
        mask = np.full((self.num_loops, 1, self.num_rows, self.context - first), -np.inf, np.float32)
        for loop, rows in enumerate(seen):
            for row, (low, end) in enumerate(rows):
                mask[loop, 0, row, low - first : end - first] = 0
        tensor = torch.from_numpy(mask).to(self.store.dtype)
        return _Span(first, tensor.repeat(1, 1, self.store.group, 1) if self.num_rows > 1 else tensor)
