"""Noise that is a function of seed and position alone: of sampling, and of a recurrent model's first state.

Counter-based (Philox, Salmon et al. 2011), a stream for each of the two, so that a text is the same whatever
else runs, however the prompt was cut up, and after a pre-emption. Knows nothing about requests. Invariant:
every device gets the same bits; the state's noise is computed on the host, in double precision.
"""

import math

import numpy as np
import torch
from torch import Tensor

from model.passes.tensors import to_device

CUT = 3.0  # standard deviations, as the reference's trunc_normal_
_STREAM = 1 << 128  # the third word of the counter; the sampler's noise has 0 there
_WORD = 2**64

# Philox4x64-10 (Random123): multipliers and Weyl increments.
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_ROUNDS = 10
_TAIL = 0.5 * math.erfc(CUT / math.sqrt(2))  # probability below -CUT


def state_noise(seed: int, start: int, count: int, size: int) -> Tensor:
    """Standard normal noise cut at +-3 for positions start .. start + count - 1, (count, size), fp32.

    By inversion of 53-bit uniform numbers; `seed` is a signed 64-bit integer.
    """
    rows = [
        np.random.Philox(key=seed % 2**64, counter=_STREAM | position << 64).random_raw(size)
        for position in range(start, start + count)
    ]
    uniform = ((np.stack(rows) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    normal: Tensor = torch.special.ndtri(torch.from_numpy(_TAIL + (1 - 2 * _TAIL) * uniform))
    return normal.clamp(-CUT, CUT).float()


def gumbel_noise_numpy(seed: int, position: int, vocab_size: int) -> Tensor:
    """Gumbel noise (vocab,), fp32, for one seed and position, by numpy's Philox on the CPU."""
    bits = np.random.Philox(key=seed % _WORD, counter=position << 64).random_raw(vocab_size)
    return _gumbel(torch.from_numpy(bits.astype(np.float32)))


def gumbel_noise_torch(keys: list[tuple[int, int]], vocab_size: int, device: torch.device) -> Tensor:
    """Gumbel noise (rows, vocab) for (seed, position) keys, as numpy's, but computed on `device`."""
    bits = philox_bits(keys, vocab_size, device)
    high, low = (bits >> 32) & 0xFFFFFFFF, bits & 0xFFFFFFFF
    return _gumbel((high.double() * 2.0**32 + low.double()).float())


def philox_bits(keys: list[tuple[int, int]], count: int, device: torch.device) -> Tensor:
    """First `count` words of Philox4x64-10 for each (seed, position), as int64 bit patterns.

    (rows, count), equal to `numpy.random.Philox(key=seed, counter=position << 64).random_raw(count)`.
    """
    seeds = [_signed(seed % _WORD) for seed, _ in keys]
    key = [
        to_device(seeds, torch.int64, device)[:, None],
        torch.zeros(1, 1, dtype=torch.int64, device=device),
    ]
    blocks = torch.arange(1, -(-count // 4) + 1, device=device)[None].expand(len(keys), -1)
    position = to_device([p for _, p in keys], torch.int64, device)[:, None].expand_as(blocks)
    zero = torch.zeros_like(blocks)
    words = (blocks, position, zero, zero)
    for turn in range(_ROUNDS):
        k0 = key[0] + _signed(turn * _WEYL[0] % _WORD)
        k1 = key[1] + _signed(turn * _WEYL[1] % _WORD)
        high0, low0 = _multiply(words[0], _MULTIPLIERS[0])
        high1, low1 = _multiply(words[2], _MULTIPLIERS[1])
        words = (high1 ^ words[1] ^ k0, low1, high0 ^ words[3] ^ k1, low0)
    return torch.stack(words, -1).flatten(1)[:, :count]


def _multiply(x: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low 64 bits of the unsigned product, from 32-bit halves (int64 wraps as uint64 does)."""
    mask = 0xFFFFFFFF
    x_low, x_high = x & mask, (x >> 32) & mask
    c_low, c_high = constant & mask, constant >> 32
    low, middle = x_low * c_low, x_high * c_low
    carry = (middle & mask) + x_low * c_high
    carry += (low >> 32) & mask  # at most 2^64 - 1: no bit is lost
    return x_high * c_high + ((middle >> 32) & mask) + ((carry >> 32) & mask), x * _signed(constant)


def _signed(word: int) -> int:
    return word - _WORD if word >= _WORD // 2 else word


def _gumbel(words: Tensor) -> Tensor:
    """-log(-log(1 - w)) of w = words / 2^64: fine-grained where the winner is, near w = 0."""
    w = (words * 2.0**-64).clamp(2.0**-65, 1 - 2.0**-24)
    return -(-(-w).log1p()).log()
