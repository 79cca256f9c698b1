"""Rotary embedding, writing of K/V, and attention over pages for rows of mixed depth.

K and V of a layer are (loops, cells, kv_heads, head_dim). A context is cut into blocks of one size, which are
dealt out to a fixed number of slots in turn; a slot walks its blocks in order with an online softmax (Milakov
and Gimelshein 2018), and the slots are put together in order. Invariant: which slot a position falls to, and
so a row's bits, depends on the position alone. A block is never read behind a row's end.
"""

import triton
import triton.language as tl

from model.passes.cuda.kernels.products import finished


@triton.jit(do_not_specialize=["num_rows"])
def rotate(
    parts,
    scales,
    biases,
    more,
    positions,
    entries,
    cosines,
    sines,
    queries,
    keys,
    values,
    num_rows,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PAD: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    TURNED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One row and one K/V head: rotated and scaled queries out, K and V into the entry of the row.

    The product's channels are those of all query heads, of keys, of values. `more` are biases of queries and
    keys. PAD is a power of two of at least GROUP + 1 heads: the queries of the group, and its key.
    """
    row, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    width: tl.constexpr = (GROUP + 2) * KV_HEADS * DIM
    head, dim = tl.arange(0, PAD), tl.arange(0, DIM_PAD)
    number = tl.where(head < GROUP, kv_head * GROUP + head, KV_HEADS * GROUP + kv_head)
    mask = (head <= GROUP)[:, None] & (dim < DIM)[None, :]
    partner = dim ^ 1 if INTERLEAVED else tl.where(dim < TURNED // 2, dim + TURNED // 2, dim - TURNED // 2)
    partner = tl.where(dim < TURNED, partner, dim)
    at, other = number[:, None] * DIM + dim[None, :], number[:, None] * DIM + partner[None, :]
    own = finished(parts, scales, biases, more, row, at, mask, num_rows, width, PARTS)
    swapped = finished(parts, scales, biases, more, row, other, mask, num_rows, width, PARTS)
    angle = tl.load(positions + row) * TURNED + dim
    cosine = tl.load(cosines + angle, mask=dim < TURNED, other=1.0)
    sine = tl.load(sines + angle, mask=dim < TURNED, other=0.0)
    turned = own * cosine[None, :] + swapped * sine[None, :]
    first = (row * KV_HEADS + kv_head) * GROUP * DIM
    query_at = first + head[:, None] * DIM + dim[None, :]
    tl.store(queries + query_at, turned * scale, mask=mask & (head < GROUP)[:, None])
    entry = (tl.load(entries + row) * KV_HEADS + kv_head) * DIM
    key_at = entry + head[:, None] * 0 + dim[None, :]
    tl.store(keys + key_at, turned.to(keys.dtype.element_ty), mask=mask & (head == GROUP)[:, None])
    value_at = ((GROUP + 1) * KV_HEADS + kv_head) * DIM + dim
    value = finished(parts, scales, biases, None, row, value_at, dim < DIM, num_rows, width, PARTS)
    tl.store(values + entry + dim, value.to(values.dtype.element_ty), mask=dim < DIM)


@triton.jit
def attend(
    queries,
    keys,
    values,
    offsets,
    tables,
    ends,
    pages,
    mixed,
    weights,
    window,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PAD: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """One row, K/V head and slot: mixed (rows, heads, SLOTS, DIM), weights (rows, heads, SLOTS, 2).

    `weights` are the highest score of a slot and the sum of its shares. The row sees what stands before
    `ends[row]`, nothing where that is 0; of it the last `window` positions, if that is not 0.
    """
    row, kv_head, slot = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    end, offset, table = tl.load(ends + row), tl.load(offsets + row), tl.load(tables + row)
    first = tl.where(window > 0, tl.maximum(end - window, 0), 0)
    first_block = first // BLOCK
    block = first_block + (slot - first_block % SLOTS + SLOTS) % SLOTS
    head, dim = tl.arange(0, PAD), tl.arange(0, DIM_PAD)
    heads_at = (row * KV_HEADS + kv_head) * GROUP + head
    known = (head < GROUP)[:, None] & (dim < DIM)[None, :]
    q = tl.load(queries + heads_at[:, None] * DIM + dim[None, :], mask=known, other=0.0)  # (PAD, DIM_PAD)
    best = tl.full([PAD], float("-inf"), tl.float32)
    total = tl.zeros([PAD], tl.float32)
    sums = tl.zeros([PAD, DIM_PAD], tl.float32)
    for start in range(block * BLOCK, end, SLOTS * BLOCK):
        seen = start + tl.arange(0, BLOCK)
        inside = (seen >= first) & (seen < end)
        page = tl.load(pages + table + seen // PAGE, mask=inside, other=0)
        entry = offset + page * PAGE + seen % PAGE
        at = (entry[:, None] * KV_HEADS + kv_head) * DIM + dim[None, :]
        mask = inside[:, None] & (dim < DIM)[None, :]
        k = tl.load(keys + at, mask=mask, other=0.0).to(tl.float32)  # (BLOCK, DIM_PAD)
        v = tl.load(values + at, mask=mask, other=0.0).to(tl.float32)
        scores = tl.where(inside[None, :], tl.sum(q[:, None, :] * k[None, :, :], 2), float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        shrink, shares = tl.exp(best - higher), tl.exp(scores - higher[:, None])
        total = total * shrink + tl.sum(shares, 1)
        sums = sums * shrink[:, None] + tl.sum(shares[:, :, None] * v[None, :, :], 1)
        best = higher
    slot_at = heads_at * SLOTS + slot
    tl.store(mixed + slot_at[:, None] * DIM + dim[None, :], sums, mask=known)
    tl.store(weights + slot_at * 2, best, mask=head < GROUP)
    tl.store(weights + slot_at * 2 + 1, total, mask=head < GROUP)


@triton.jit
def combine(mixed, weights, out, DIM: tl.constexpr, DIM_PAD: tl.constexpr, SLOTS: tl.constexpr):
    """One row and one head: its slots put together; zeros where it saw nothing. out (rows, heads, DIM)."""
    head = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    highest = float("-inf")
    for slot in tl.static_range(SLOTS):
        highest = tl.maximum(highest, tl.load(weights + (head * SLOTS + slot) * 2))
    dim = tl.arange(0, DIM_PAD)
    sums, total = tl.zeros([DIM_PAD], tl.float32), 0.0
    if highest > float("-inf"):
        for slot in tl.static_range(SLOTS):
            place = head * SLOTS + slot
            share = tl.exp(tl.load(weights + place * 2) - highest)
            total += share * tl.load(weights + place * 2 + 1)
            sums += share * tl.load(mixed + place * DIM + dim, mask=dim < DIM, other=0.0)
        sums = sums / total
    tl.store(out + head * DIM + dim, sums.to(out.dtype.element_ty), mask=dim < DIM)
