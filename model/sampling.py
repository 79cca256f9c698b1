"""From logits to a token: penalties, bias, filters, and the coupling that makes speculation exact.

Token t of position p is argmax over the vocabulary of filter(logits) / T + G(seed, p, t), with G Gumbel
noise from a counter-based generator (Philox, Salmon et al. 2011): by the Gumbel-max trick a sample of
the filtered softmax, and a function of (logits, seed, position) alone. A draft and its confirmation
share G, so they agree whenever their logits are close (Daliri, Musco, Suresh 2024, arXiv 2408.07978).
Invariant: a row's token does not depend on which other rows are in the batch.
"""

from collections.abc import Sequence as SequenceOf
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.matching import GrammarState
from model.protocol import SamplingParams
from model.sequence import Sequence

GREEDY_BELOW = 1e-5  # a temperature below is greedy: dividing by it would overflow
USUALLY_ENOUGH = 512  # tokens that nearly always hold the nucleus; all are sorted when they don't
NOISE_ROWS_KEPT = 128  # a draft and its confirmation, a few passes apart, need the same noise
_WORD = 2**64

# Philox4x64-10 (Random123): multipliers and Weyl increments.
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_ROUNDS = 10


class Readout(NamedTuple):
    """A row of logits: its sequence, the position of the token that it predicts, whether it is the last word.

    `is_final` is False for a draft: a readout before the sequence's last depth.
    """

    sequence: Sequence
    position: int
    is_final: bool = True


class Sampler:
    """Chooses tokens; keeps token counts of the sequences that have penalties, until `forget`."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self._noise_row = lru_cache(NOISE_ROWS_KEPT)(gumbel_noise_numpy)
        self._counts: dict[str, TokenCounts] = {}
        self._grammars: dict[str, GrammarState] = {}

    def constrain(self, request_id: str, grammar: GrammarState) -> None:
        """From now on tokens of the request are those that `grammar` allows, until `forget`."""
        self._grammars[request_id] = grammar

    def sample(self, logits: Tensor, readouts: SequenceOf[Readout]) -> Tensor:
        """Token ids (rows,) on the device of `logits` (rows, vocab); `logits` is left as it is."""
        if all(_is_plain_greedy(readout) for readout in readouts):
            return logits.argmax(-1)
        scores = logits.float().clone()
        for row, readout in enumerate(readouts):
            self._adjust(scores[row], readout)
        drawn = [row for row, r in enumerate(readouts) if _is_drawn(r)]
        if len(drawn) == len(readouts):
            return self._draw_scores(scores, readouts).argmax(-1)
        if drawn:
            rows = self._tensor(drawn)
            scores[rows] = self._draw_scores(scores[rows], [readouts[row] for row in drawn])
        return scores.argmax(-1)

    def forget(self, request_id: str) -> None:
        """Drops what is kept for a sequence that has ended."""
        self._counts.pop(request_id, None)
        self._grammars.pop(request_id, None)

    def _draw_scores(self, scores: Tensor, readouts: SequenceOf[Readout]) -> Tensor:
        """filter(scores / T) + G; what the filters drop is -inf."""
        params = [readout.sequence.request.sampling for readout in readouts]
        scores = scores / self._column([p.temperature for p in params])
        scores = self._filter(scores, params)
        keys = [(p.seed, readout.position) for p, readout in zip(params, readouts, strict=True)]
        return scores + self._noise(keys)

    def _noise(self, keys: list[tuple[int, int]]) -> Tensor:
        if self.device.type != "cpu":
            return gumbel_noise_torch(keys, self.vocab_size, self.device)
        return torch.stack([self._noise_row(seed, position, self.vocab_size) for seed, position in keys])

    def _filter(self, scores: Tensor, params: list[SamplingParams]) -> Tensor:
        """min_p, top_k and top_p, each only if some row asks for it."""
        if any(p.min_p > 0 for p in params):
            floor = scores.amax(-1, keepdim=True) + self._column([p.min_p for p in params]).log()
            scores = scores.masked_fill(scores < floor, -torch.inf)
        if any(p.top_k > 0 or p.top_p < 1 for p in params):
            ks = [min(p.top_k or self.vocab_size, self.vocab_size) for p in params]
            tops = self._column([p.top_p for p in params])
            scores = keep_top(scores, self._tensor(ks)[:, None], tops)
        return scores

    def _adjust(self, scores: Tensor, readout: Readout) -> None:
        """Penalties, bias, grammar and banned endings of one row, in place."""
        request = readout.sequence.request
        params = request.sampling
        if _has_penalties(params):
            counts = self._counts.setdefault(request.request_id, TokenCounts(self.vocab_size))
            apply_penalties(scores, counts.upto(readout), params)
        if params.logit_bias:
            ids = self._tensor(list(params.logit_bias))
            scores[ids] += to_device(list(params.logit_bias.values()), torch.float32, self.device)
        grammar = self._grammars.get(request.request_id)
        if grammar is not None:
            self._apply(grammar, scores, readout)
        elif _bans_endings(readout):
            scores[self._tensor(sorted(readout.sequence.wave.ending_tokens))] = -torch.inf

    def _apply(self, grammar: GrammarState, scores: Tensor, readout: Readout) -> None:
        """Drops the tokens that the grammar forbids, in place; none behind a draft that it forbids."""
        wave, position = readout.sequence.wave, readout.position
        forbidden = grammar.forbidden(wave, position, before_min_tokens=_bans_endings(readout))
        if forbidden is not None:
            scores.masked_fill_(mask_to_device(forbidden, self.device), -torch.inf)

    def _tensor(self, values: list[int]) -> Tensor:
        return to_device(values, torch.int64, self.device)

    def _column(self, values: list[float]) -> Tensor:
        return to_device(values, torch.float32, self.device)[:, None]


class RowwiseSampler(Sampler):
    """Samples one row at a time, for batch-invariant engines.

    A vectorised exp or log rounds otherwise than the scalar one at the end of a tensor, so on several
    rows at once a row's result can depend on their number. An argmax can't.
    """

    def sample(self, logits: Tensor, readouts: SequenceOf[Readout]) -> Tensor:
        """See Sampler."""
        if len(readouts) == 1 or all(_is_plain_greedy(readout) for readout in readouts):
            return super().sample(logits, readouts)
        rows = zip(torch.split(logits, 1), readouts, strict=True)
        return torch.cat([super(RowwiseSampler, self).sample(row, [readout]) for row, readout in rows])


def to_device(values: object, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of host numbers on `device`; through pinned memory, so that no stream is waited for."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def mask_to_device(mask: NDArray[np.bool_], device: torch.device) -> Tensor:
    """The same for a mask; on a CPU it is not copied."""
    tensor = torch.from_numpy(mask)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def keep_top(scores: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """-inf outside the k likeliest tokens and the smallest set with probability p, row by row.

    scores (rows, vocab); top_k (rows, 1) in 1..vocab; top_p (rows, 1) in (0, 1]; 1 keeps everything.
    Ties with the last token kept are kept too. top_p counts within what top_k left.
    """
    vocab_size = scores.shape[-1]
    # On a CPU a look at the values costs no wait, and sorting a whole row is slow.
    size = min(USUALLY_ENOUGH, vocab_size) if scores.device.type == "cpu" else vocab_size
    floor, complete = _floor(scores, top_k, top_p, size)
    if size < vocab_size and not complete.all():
        rows = (~complete[:, 0]).nonzero()[:, 0]  # these alone: a row's tokens depend on no other row
        floor[rows], _ = _floor(scores[rows], top_k[rows], top_p[rows], vocab_size)
    return scores.masked_fill(scores < floor, -torch.inf)


def _floor(scores: Tensor, top_k: Tensor, top_p: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The lowest score kept in each row, found among the `size` highest, and whether that was enough."""
    ordered = scores.topk(size, -1).values
    within = top_k <= size
    kth = ordered.gather(-1, top_k.clamp(max=size) - 1).where(within, -torch.inf)
    ordered = ordered.masked_fill(ordered < kth, -torch.inf)
    total = torch.where(within, ordered.logsumexp(-1, True), scores.logsumexp(-1, True))
    share = (ordered - total).exp()
    upto = share.cumsum(-1)
    needed = upto - share < top_p
    nucleus = ordered.masked_fill(~needed, torch.inf).amin(-1, keepdim=True).where(top_p < 1, -torch.inf)
    whole = top_k >= scores.shape[-1]
    complete = within | (whole & ((top_p >= 1) | (upto[:, -1:] >= top_p)))
    return torch.maximum(nucleus, kth), complete


class TokenCounts:
    """How often each token stands in the prompt and in the output of one sequence.

    Committed tokens are counted once, when they are first seen; the drafts of a wave are added on top
    for each row, so a flush has nothing to take back.
    """

    def __init__(self, vocab_size: int) -> None:
        self.prompt = np.zeros(vocab_size, np.int64)
        self.output = np.zeros(vocab_size, np.int64)
        self.num_counted = 0

    def upto(self, readout: Readout) -> tuple[np.ndarray, np.ndarray]:
        """(prompt counts, output counts) of the tokens before the readout's position; read only."""
        wave = readout.sequence.wave
        if not self.num_counted:
            np.add.at(self.prompt, wave.tokens[: wave.prompt_length], 1)
            self.num_counted = wave.prompt_length
        certain = min(wave.num_committed, readout.position)
        np.add.at(self.output, wave.tokens[self.num_counted : certain], 1)
        self.num_counted = max(self.num_counted, certain)
        drafts = wave.tokens[self.num_counted : readout.position]
        if not drafts:
            return self.prompt, self.output
        output = self.output.copy()
        np.add.at(output, drafts, 1)
        return self.prompt, output


def apply_penalties(scores: Tensor, counts: tuple[np.ndarray, np.ndarray], params: SamplingParams) -> None:
    """Repetition (prompt and output), frequency and presence (output) penalties, in place.

    scores (vocab,). As in vLLM: a repeated token's positive score is divided by the repetition
    penalty and a negative one multiplied; the others are subtracted (OpenAI's definition).
    """
    output = to_device(counts[1], torch.float32, scores.device)
    seen = to_device((counts[0] + counts[1]) > 0, torch.bool, scores.device)
    penalised = torch.where(
        scores > 0, scores / params.repetition_penalty, scores * params.repetition_penalty
    )
    scores.copy_(torch.where(seen, penalised, scores))
    scores -= params.frequency_penalty * output + params.presence_penalty * (output > 0)


def gumbel_noise_numpy(seed: int, position: int, vocab_size: int) -> Tensor:
    """Gumbel noise (vocab,), fp32, for one seed and position, by numpy's Philox on the CPU."""
    bits = np.random.Philox(key=seed % _WORD, counter=position << 64).random_raw(vocab_size)
    return _gumbel(torch.from_numpy(bits.astype(np.float32)))


def gumbel_noise_torch(keys: list[tuple[int, int]], vocab_size: int, device: torch.device) -> Tensor:
    """The same noise (rows, vocab) for (seed, position) keys, computed on `device`."""
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


def _has_penalties(params: SamplingParams) -> bool:
    neutral = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0, 0, 1)
    return not neutral


def _bans_endings(readout: Readout) -> bool:
    wave, request = readout.sequence.wave, readout.sequence.request
    return readout.position - wave.prompt_length < request.min_tokens and bool(wave.ending_tokens)


def _is_drawn(readout: Readout) -> bool:
    return readout.sequence.request.sampling.temperature > GREEDY_BELOW


def _is_plain_greedy(readout: Readout) -> bool:
    params = readout.sequence.request.sampling
    return (
        not _is_drawn(readout)
        and readout.sequence.request.grammar is None
        and not params.logit_bias
        and not _has_penalties(params)
        and not _bans_endings(readout)
    )
