"""From the head's logits to tokens and log-probabilities, on the host in one transfer.

Knows nothing about K/V or loops. Log-probabilities are those of the raw logits, in fp32, before bias,
penalties, filters or grammar: vLLM's `raw_logprobs`. Invariant: `read` waits for the device once, however
much was asked for, and never holds the logits of more than one prompt chunk. A row whose logits are not
numbers is a fault of its sequence and of no other.
"""

import math
from collections import abc
from itertools import islice
from typing import NamedTuple, cast

import torch
from torch import Tensor

from model.passes.loops import gated_exits, kept_inputs, loop_scores, num_likeliest, scored_loops
from model.passes.sampling import Sampler
from model.passes.tensors import to_device
from model.protocol import TokenLogprobs
from model.schedule.batch import NOTHING_READ, LoopResult, PassResult, PromptReadout, Readout, Readouts
from model.schedule.sequence import Sequence


class _Place(NamedTuple):
    """Where the scores of a row belong, `scores[key]`; `num_top` of the likeliest tokens were asked for."""

    sequence: Sequence
    position: int
    num_top: int
    scores: dict[int, TokenLogprobs]
    key: int


class _Scores(NamedTuple):
    """What `token_logprobs` returned, still on the device, and the place of each row."""

    packed: Tensor
    places: list[_Place]


class _LoopRows(NamedTuple):
    """Scores of one token by every loop so far, and the gate after each (loops,), or nothing without one."""

    readout: int  # its index among those that predict
    score: _Scores
    gates: Tensor


class Reader:
    """Reads out hidden states with `head`, which makes logits (rows, vocab) of them (rows, hidden).

    `gate` makes logits (rows, 1) of an exit gate, in a model that has one.
    """

    def __init__(
        self,
        head: abc.Callable[[Tensor], Tensor],
        sampler: Sampler,
        gate: abc.Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.head = head
        self.sampler = sampler
        self.gate = gate

    def read(self, hidden: Tensor, readouts: Readouts) -> PassResult:
        """Tokens and scores, on the host.

        hidden (rows, hidden): first those that predict, then those that score their prompt, then those
        that are kept.
        """
        if not len(hidden):
            return NOTHING_READ
        predicting, scoring, keeping = readouts
        faults: dict[Sequence, str] = {}
        tokens_scored: dict[int, TokenLogprobs] = {}
        prompts_scored: list[dict[int, TokenLogprobs]] = [{} for _ in scoring]
        logits = self.head(hidden[: len(predicting)])
        tokens = self.sampler.sample(logits, predicting, faults)
        scores = [
            *_scores_of_tokens(logits, tokens, predicting, tokens_scored),
            *self._scores_of_prompts(hidden[len(predicting) :], scoring, prompts_scored),
        ]
        loops = list(self._loops_of_tokens(hidden, logits, tokens, predicting))
        exits = gated_exits(predicting)
        gates = self._gates(hidden[to_device(exits, torch.int64, hidden.device)] if exits else hidden[:0])
        # An argmax takes a nan for the greatest number: the token's own logit shows one anywhere in the row.
        own = logits.gather(-1, tokens[:, None])[:, 0]
        parts = [tokens.double(), own.double(), *(score.packed.flatten() for score in scores)]
        parts += (part for rows in loops for part in (rows.score.packed.flatten(), rows.gates))
        flat = torch.cat([*parts, gates])
        numbers = iter(flat.tolist())
        chosen = [int(number) for number in islice(numbers, len(predicting))]
        for readout, logit in zip(predicting, islice(numbers, len(predicting)), strict=True):
            if readout.is_final and not math.isfinite(logit):
                faults[readout.sequence] = not_a_number(readout.position, logit)
        for score in scores:
            _file(score, numbers, faults)
        of_loops = {}
        for rows in loops:
            _file(rows.score, numbers, faults)
            of_gates = list(islice(numbers, len(rows.gates)))
            said = list(rows.score.places[0].scores.values())
            of_loops[rows.readout] = loop_scores(said, of_gates, predicting[rows.readout])
        kept: list[object] = [*hidden[len(hidden) - len(keeping) :].clone()]
        return PassResult(
            chosen,
            tokens_scored,
            [list(part.values()) for part in prompts_scored],
            faults,
            LoopResult(of_loops, kept, dict(zip(exits, numbers, strict=True))),
        )

    def _loops_of_tokens(
        self, hidden: Tensor, logits: Tensor, tokens: Tensor, predicting: list[Readout]
    ) -> abc.Iterator[_LoopRows]:
        """Scores of tokens by all loops so far; the last loop's are those of the row's own logits."""
        for index in scored_loops(predicting):
            readout, own = predicting[index], slice(index, index + 1)
            kept = cast(list[Tensor], kept_inputs(readout))
            inputs = torch.stack([*kept, hidden[index]])  # (loops, hidden)
            whole = torch.cat([self.head(inputs[:-1]), logits[own]])
            num_top, found = num_likeliest(readout), dict[int, TokenLogprobs]()
            packed = token_logprobs(whole, tokens[own].expand(len(inputs)), num_top)
            places = [
                _Place(readout.sequence, readout.position, num_top, found, loop)
                for loop in range(len(inputs))
            ]
            yield _LoopRows(index, _Scores(packed, places), self._gates(inputs))

    def _gates(self, inputs: Tensor) -> Tensor:
        """The probability to stop at inputs of the head, fp64 (rows,); empty without an exit gate."""
        if self.gate is None:
            return inputs.new_empty(0, dtype=torch.float64)
        return self.gate(inputs)[:, 0].float().sigmoid().double()

    def _scores_of_prompts(
        self, hidden: Tensor, scoring: list[PromptReadout], found: list[dict[int, TokenLogprobs]]
    ) -> abc.Iterator[_Scores]:
        """Scores of prompt tokens, one chunk after the other."""
        start = 0
        for prompt, scores in zip(scoring, found, strict=True):
            num_top = prompt.sequence.request.prompt_logprobs or 0
            tokens = to_device(prompt.token_ids, torch.int64, hidden.device)
            logits = self.head(hidden[start : start + prompt.num_rows])
            start += prompt.num_rows
            positions = range(prompt.start + 1, prompt.start + 1 + prompt.num_rows)
            places = [_Place(prompt.sequence, position, num_top, scores, position) for position in positions]
            yield _Scores(token_logprobs(logits, tokens, num_top), places)


def _scores_of_tokens(
    logits: Tensor, tokens: Tensor, predicting: list[Readout], found: dict[int, TokenLogprobs]
) -> abc.Iterator[_Scores]:
    """Scores of the tokens that are read out at their last depth and whose requests ask."""
    places = [
        _Place(readout.sequence, readout.position, readout.sequence.request.logprobs, found, index)
        for index, readout in enumerate(predicting)
        if readout.is_final and readout.sequence.request.logprobs is not None
    ]
    if places:
        if len(places) < len(predicting):
            rows = to_device([place.key for place in places], torch.int64, logits.device)
            logits, tokens = logits[rows], tokens[rows]
        yield _Scores(token_logprobs(logits, tokens, max(place.num_top for place in places)), places)


def token_logprobs(logits: Tensor, tokens: Tensor, num_top: int) -> Tensor:
    """Scores of `tokens` (rows,) and of the likeliest `num_top`, from logits (rows, vocab).

    Returns fp64 (rows, 3 + 2 * num_top): id, log-probability and rank of the token (1 + the number of
    likelier ones), ids of the likeliest, their log-probabilities. Ids stay exact in fp64.
    """
    logprobs = logits.float().log_softmax(-1)
    tokens = tokens[:, None]
    own = logprobs.gather(-1, tokens)
    rank = (logprobs > own).sum(-1, keepdim=True) + 1
    top = logprobs.topk(min(num_top, logits.shape[-1]), -1)
    return torch.cat([part.double() for part in (tokens, own, rank, top.indices, top.values)], -1)


def not_a_number(position: int, logit: float) -> str:
    """The fault of a sequence whose token at `position` cannot be told."""
    return (
        f"the model's output for position {position} is {logit}: not a number that a token can be chosen by"
    )


def _file(score: _Scores, numbers: abc.Iterator[float], faults: dict[Sequence, str]) -> None:
    """Takes the rows of `score` off `numbers` and puts them where they belong."""
    width = score.packed.shape[-1]
    most = (width - 3) // 2
    for place in score.places:
        token, logprob, rank, *top = islice(numbers, width)
        if math.isnan(logprob):
            faults[place.sequence] = not_a_number(place.position, logprob)
        ids, values = map(int, top[:most]), top[most:]
        place.scores[place.key] = TokenLogprobs(
            int(token), logprob, int(rank), list(islice(zip(ids, values, strict=True), place.num_top))
        )
