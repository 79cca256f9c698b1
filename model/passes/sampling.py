"""From logits to a token: penalties, bias, filters, and the coupling that makes speculation exact.

Token t of position p is argmax over the vocabulary of filter(logits) / T + G(seed, p, t), with G Gumbel
noise from a counter-based generator (Philox, Salmon et al. 2011): by the Gumbel-max trick a sample of
the filtered softmax, and a function of (logits, seed, position) alone. A draft and its confirmation
share G, so they agree whenever their logits are close (Daliri, Musco, Suresh 2024, arXiv 2408.07978).
Invariant: a row's token does not depend on which other rows are in the batch.
"""

from collections import abc
from functools import lru_cache

import torch
from torch import Tensor

from model.passes.noise import gumbel_noise_numpy, gumbel_noise_torch
from model.passes.tensors import array_to_device, to_device
from model.protocol import SamplingParams
from model.schedule.batch import Readout
from model.schedule.counts import Counted
from model.schedule.sequence import Sequence, contained

USUALLY_ENOUGH = 512  # tokens that nearly always hold the nucleus; all are sorted when they don't
NOISE_ROWS_KEPT = 128  # a draft and its confirmation, a few passes apart, need the same noise


class Sampler:
    """Chooses tokens. Keeps nothing of a request: its counts and constraint are the sequence's."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self._noise_row = lru_cache(NOISE_ROWS_KEPT)(gumbel_noise_numpy)

    def sample(self, logits: Tensor, readouts: abc.Sequence[Readout], faults: dict[Sequence, str]) -> Tensor:
        """Token ids (rows,) on the device of `logits` (rows, vocab); `logits` is left as it is.

        A sequence whose own penalties, bias or constraint fail is noted in `faults`, and its tokens mean
        nothing.
        """
        if all(is_plain_greedy(readout) for readout in readouts):
            return logits.argmax(-1)
        scores = logits.float().clone()
        for row, readout in enumerate(readouts):
            # torch raises RuntimeErrors of the device and of memory wherever it is called next
            with contained(readout.sequence, faults, beyond=(RuntimeError, MemoryError)):
                self._adjust(scores[row], readout)
        drawn = [row for row, r in enumerate(readouts) if r.sequence.request.sampling.is_drawn]
        if len(drawn) == len(readouts):
            return self._draw_scores(scores, readouts).argmax(-1)
        if drawn:
            rows = self._tensor(drawn)
            scores[rows] = self._draw_scores(scores[rows], [readouts[row] for row in drawn])
        return scores.argmax(-1)

    def _draw_scores(self, scores: Tensor, readouts: abc.Sequence[Readout]) -> Tensor:
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
        """Penalties, bias, constraint and banned endings of one row, in place."""
        params = readout.sequence.request.sampling
        wave = readout.sequence.wave
        if params.has_penalties:
            apply_penalties(scores, readout.sequence.counts.upto(wave, readout.position), params)
        if params.logit_bias:
            ids = self._tensor(list(params.logit_bias))
            scores[ids] += to_device(list(params.logit_bias.values()), torch.float32, self.device)
        before_min = bans_endings(readout)
        forbidden = wave.constraint.forbidden(wave, readout.position, before_min_tokens=before_min)
        if forbidden is not None:
            scores.masked_fill_(array_to_device(forbidden, self.device), -torch.inf)
        elif before_min:
            scores[self._tensor(sorted(wave.ending_tokens))] = -torch.inf

    def _tensor(self, values: list[int]) -> Tensor:
        return to_device(values, torch.int64, self.device)

    def _column(self, values: list[float]) -> Tensor:
        return to_device(values, torch.float32, self.device)[:, None]


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


def apply_penalties(scores: Tensor, counts: Counted, params: SamplingParams) -> None:
    """Repetition (prompt and output), frequency and presence (output) penalties, in place.

    scores (vocab,). As in vLLM: a repeated token's positive score is divided by the repetition
    penalty and a negative one multiplied; the others are subtracted (OpenAI's definition).
    """
    seen = to_device(counts.tokens, torch.int64, scores.device)
    output = to_device(counts.outputs, torch.float32, scores.device)
    own = scores[seen]
    own = torch.where(own > 0, own / params.repetition_penalty, own * params.repetition_penalty)
    scores[seen] = own - (params.frequency_penalty * output + params.presence_penalty * (output > 0))


def bans_endings(readout: Readout) -> bool:
    """Whether the text may not end at the readout's token."""
    wave, request = readout.sequence.wave, readout.sequence.request
    return readout.position - wave.prompt_length < request.min_tokens and bool(wave.ending_tokens)


def is_plain_greedy(readout: Readout) -> bool:
    """Whether the likeliest token of the raw logits is what the row wants."""
    sequence = readout.sequence
    return sequence.takes_likeliest and not (sequence.request.min_tokens and bans_endings(readout))
