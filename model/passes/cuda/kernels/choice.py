"""Choosing tokens on the device: the likeliest one, or the one that wins with Gumbel noise added.

The noise is that of `model.passes.noise`, from the same Philox words (Salmon et al. 2011) made where they are
used. Its logarithms are taken in fp64 and rounded once. Invariant: a row's token depends on its logits, its
temperature, its seed and its position alone; the least of equally good tokens wins.
"""

import triton
import triton.language as tl

ROUNDS = tl.constexpr(10)


@triton.jit
def _words(seed, position, block):
    """Philox4x64-10 of counters (block, position, 0, 0) and key (seed, 0): four uint64 for each block."""
    first, second = tl.full([1], 0xD2E7470EE14C6C93, tl.uint64), tl.full([1], 0xCA5A826395121157, tl.uint64)
    step, other_step = (
        tl.full([1], 0x9E3779B97F4A7C15, tl.uint64),
        tl.full([1], 0xBB67AE8584CAA73B, tl.uint64),
    )
    a = block.to(tl.uint64)
    zero = a ^ a
    b, c, d = zero + position.to(tl.uint64), zero, zero
    key, other_key = zero + seed.to(tl.uint64), zero
    for _ in tl.static_range(ROUNDS):
        high, low = tl.umulhi(a, zero + first), a * first
        other_high, other_low = tl.umulhi(c, zero + second), c * second
        a, b, c, d = other_high ^ b ^ key, other_low, high ^ d ^ other_key, low
        key, other_key = key + step, other_key + other_step
    return a, b, c, d


@triton.jit
def words_of(seed, position, first_block, BLOCKS: tl.constexpr):
    """4 * BLOCKS words in order, from block `first_block` (counted from 0) on."""
    # numpy counts up before it draws, so that the first words are those of counter 1
    a, b, c, d = _words(seed, position, first_block + 1 + tl.arange(0, BLOCKS))
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def _gumbel(words):
    """-log(-log(1 - w)) of w = words / 2^64, which are rounded to fp32 first; fp32."""
    w = words.to(tl.float32) * 5.421010862427522e-20
    w = tl.minimum(tl.maximum(w, 2.710505431213761e-20), 0.9999999403953552).to(tl.float64)
    # log(1 - w) where 1 - w has lost digits of w, by the quotient of what is left of both
    left = 1.0 - w
    safe = tl.where(left == 1.0, 0.5, left)
    inner = tl.where(left == 1.0, w, -tl.log(safe) * w / (1.0 - safe))
    return (-tl.log(inner)).to(tl.float32)


@triton.jit
def noise(seeds, positions, words, out, vocab_size, BLOCK: tl.constexpr):
    """Of one row and BLOCK tokens the noise, out (rows, vocab), or where `words` is given these, as int64."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    seed, position = tl.load(seeds + row), tl.load(positions + row)
    found = words_of(seed, position, block * (BLOCK // 4), BLOCK // 4)
    token = block * BLOCK + tl.arange(0, BLOCK)
    at, known = row * vocab_size + token, token < vocab_size
    if words is not None:
        tl.store(words + at, found.to(tl.int64, bitcast=True), mask=known)
    else:
        tl.store(out + at, _gumbel(found), mask=known)


@triton.jit
def best_of_blocks(
    logits, scales, seeds, positions, temperatures, scores, tokens, vocab_size, BLOCK: tl.constexpr
):
    """Of one row and BLOCK tokens the best one and its score, scores and tokens (rows, blocks).

    A temperature of 0 asks for the likeliest, one below 0 for nothing. What is no number beats all others.
    """
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature = tl.load(temperatures + row)
    if temperature >= 0:
        token = block * BLOCK + tl.arange(0, BLOCK)
        known = token < vocab_size
        score = tl.load(logits + row * vocab_size + token, mask=known, other=float("-inf"))
        if scales is not None:
            score = score * tl.load(scales + token, mask=known, other=1.0)
        if temperature > 0:
            found = words_of(tl.load(seeds + row), tl.load(positions + row), block * (BLOCK // 4), BLOCK // 4)
            score = score / temperature + _gumbel(found)
        score = tl.where(score != score, float("inf"), score)
        best = tl.max(score, 0)
        place = row * tl.num_programs(1) + block
        tl.store(scores + place, best)
        tl.store(tokens + place, tl.min(tl.where(score == best, token, vocab_size), 0).to(tl.int64))


@triton.jit
def best_of_all(
    logits,
    scales,
    temperatures,
    scores,
    tokens,
    out,
    num_blocks,
    vocab_size,
    PAD: tl.constexpr,
):
    """Of one row the best token and its logit, out (rows, 2) in fp64, which stays where nothing is asked."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(temperatures + row) >= 0:
        block = tl.arange(0, PAD)
        known = block < num_blocks
        score = tl.load(scores + row * num_blocks + block, mask=known, other=float("-inf"))
        token = tl.load(tokens + row * num_blocks + block, mask=known, other=vocab_size)
        token = tl.min(tl.where(score == tl.max(score, 0), token, vocab_size), 0)
        logit = tl.load(logits + row * vocab_size + token)
        if scales is not None:
            logit = logit * tl.load(scales + token)
        tl.store(out + row * 2, token.to(tl.float64))
        tl.store(out + row * 2 + 1, logit.to(tl.float64))
