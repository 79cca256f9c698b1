"""GPU attention: a Triton kernel that reads K and V through the page table, copying nothing.

One program for each (row, K/V head): it walks the row's context once with an online softmax (Milakov and
Gimelshein 2018), in fp32, in blocks of fixed size. So the order of summation, and the result to the last
bit, does not depend on which other rows are in the pass. TRITON_INTERPRET=1 runs it on a CPU, for tests.
"""

from collections import abc

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.network.layers import Attend
from model.passes.rows import RowRun
from model.passes.tensors import to_device
from model.passes.torch.attention.store import KVStore

BLOCK = 32  # context positions a step


class TritonAttention:
    """Gives the results of GatheredAttention, for any mix of waves and prompt chunks."""

    def __init__(self, store: KVStore) -> None:
        self.store = store

    def bind(self, runs: abc.Sequence[RowRun], write: bool = True) -> Attend:
        """An `Attend` for the rows of these runs, in this order; good for one pass."""
        entries = self.store.entries(runs)
        kinds = sorted(set(self.store.windowed))
        row_facts = {windowed: self._row_facts(runs, windowed) for windowed in kinds}
        width = max(len(run.table.pages) for run in runs)
        pages = [[*run.table.pages, *[0] * (width - len(run.table.pages))] for run in runs]
        page_table = to_device(pages, torch.int64, self.store.device)  # (runs, pages)
        page_size = runs[0].table.page_size

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if write:
                self.store.write(layer, entries, k, v)
            facts = row_facts[self.store.windowed[layer]]
            return self._launch(layer, q.contiguous(), facts, page_table, page_size)

        return attend

    def _row_facts(self, runs: abc.Sequence[RowRun], windowed: bool) -> Tensor:
        """Run, last position seen, loop and first position seen of every row, (rows, 4)."""
        rows = [
            [index, run.end_seen(position) - 1, run.loop, self.store.first_seen(windowed, run.loop, position)]
            for index, run in enumerate(runs)
            for position in range(run.start, run.start + run.num_rows)
        ]
        return to_device(rows, torch.int64, self.store.device)

    def _launch(self, layer: int, q: Tensor, rows: Tensor, pages: Tensor, page_size: int) -> Tensor:
        num_rows, heads, head_dim = q.shape
        out, group = torch.empty_like(q), self.store.group
        kernel = _attend_rows[(num_rows, heads // group)]
        kernel(
            q,
            self.store.keys[layer],
            self.store.values[layer],
            out,
            rows,
            pages,
            pages.shape[1],
            self.store.num_tokens,
            head_dim**-0.5,
            KV_HEADS=heads // group,
            GROUP=group,
            GROUP_PAD=triton.next_power_of_2(group),
            HEAD_DIM=head_dim,
            HEAD_PAD=triton.next_power_of_2(head_dim),
            PAGE=page_size,
            BLOCK=BLOCK,
        )
        return out


@triton.jit
def _attend_rows(
    q,
    keys,
    values,
    out,
    rows,
    pages,
    max_pages,
    num_tokens,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row (program 0) and one K/V head (program 1) with the query heads that share it."""
    row, kv_head = tl.program_id(0), tl.program_id(1)
    run = tl.load(rows + row * 4)
    last = tl.load(rows + row * 4 + 1)
    loop = tl.load(rows + row * 4 + 2)
    first = tl.load(rows + row * 4 + 3)
    heads, dims = tl.arange(0, GROUP_PAD), tl.arange(0, HEAD_PAD)
    q_at = ((row * KV_HEADS + kv_head) * GROUP + heads[:, None]) * HEAD_DIM + dims[None, :]
    q_mask = (heads[:, None] < GROUP) & (dims[None, :] < HEAD_DIM)
    queries = tl.load(q + q_at, mask=q_mask, other=0.0).to(tl.float32) * scale  # (GROUP_PAD, HEAD_PAD)
    best = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    mixed = tl.zeros([GROUP_PAD, HEAD_PAD], tl.float32)
    for start in range(first // BLOCK * BLOCK, last + 1, BLOCK):
        seen = start + tl.arange(0, BLOCK)
        inside = (seen >= first) & (seen <= last)
        page = tl.load(pages + run * max_pages + seen // PAGE, mask=inside, other=0)
        entry = loop * num_tokens + page * PAGE + seen % PAGE
        at = (entry[:, None] * KV_HEADS + kv_head) * HEAD_DIM + dims[None, :]
        mask = inside[:, None] & (dims[None, :] < HEAD_DIM)
        k = tl.load(keys + at, mask=mask, other=0.0).to(tl.float32)  # (BLOCK, HEAD_PAD)
        v = tl.load(values + at, mask=mask, other=0.0).to(tl.float32)
        scores = tl.sum(queries[:, None, :] * k[None, :, :], 2)  # (GROUP_PAD, BLOCK)
        scores = tl.where(inside[None, :], scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        shrink = tl.exp(best - higher)
        weights = tl.exp(scores - higher[:, None])
        total = total * shrink + tl.sum(weights, 1)
        mixed = mixed * shrink[:, None] + tl.sum(weights[:, :, None] * v[None, :, :], 1)
        best = higher
    result = mixed / total[:, None]
    tl.store(out + q_at, result.to(out.dtype.element_ty), mask=q_mask)
