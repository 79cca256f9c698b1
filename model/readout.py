"""From the head's logits to tokens and log-probabilities, on the host in one transfer.

Knows nothing about K/V or loops. Log-probabilities are those of the raw logits, in fp32, before bias,
penalties, filters or grammar: vLLM's `raw_logprobs`. Invariant: `read` waits for the device once, however
much was asked for, and never holds the logits of more than one prompt chunk.
"""

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from model.looped import LoopedTransformer
from model.protocol import TokenLogprobs
from model.sampling import Readout, Sampler, to_device
from model.sequence import Sequence


class PromptReadout(NamedTuple):
    """Rows of a prompt from `start` on whose next tokens, of the prompt too, are to be scored."""

    sequence: Sequence
    start: int
    num_rows: int

    @property
    def token_ids(self) -> list[int]:
        """The tokens behind the rows."""
        return self.sequence.wave.tokens[self.start + 1 : self.start + 1 + self.num_rows]


class _Place(NamedTuple):
    """Where the scores of a row belong, and how many of the likeliest tokens were asked for."""

    scores: dict[int, TokenLogprobs]
    position: int
    num_top: int


class _Scores(NamedTuple):
    """What `token_logprobs` returned, still on the device, and the place of each row."""

    packed: Tensor
    places: list[_Place]


class Reader:
    """Reads out hidden states with the head of `model`: (rows, hidden) -> (rows, vocab)."""

    def __init__(self, model: LoopedTransformer, sampler: Sampler) -> None:
        self.model = model
        self.sampler = sampler

    def read(
        self, hidden: Tensor, sampled: SequenceOf[Readout], prompts: SequenceOf[PromptReadout]
    ) -> list[int]:
        """The tokens of the rows `sampled`, on the host.

        hidden (rows, hidden): first those of `sampled`, then those of `prompts`. Log-probabilities that
        were asked for are left on the sequences, at the positions of the tokens.
        """
        if not len(hidden):
            return []
        logits = self.model.head(hidden[: len(sampled)])
        tokens = self.sampler.sample(logits, sampled)
        scores = [
            *self._scores_of_tokens(logits, tokens, sampled),
            *self._scores_of_prompts(hidden, len(sampled), prompts),
        ]
        if not scores:
            ids: list[int] = tokens.tolist()
            return ids
        flat = torch.cat([tokens.double(), *(score.packed.flatten() for score in scores)])
        numbers = iter(flat.tolist())
        chosen = [int(number) for number in islice(numbers, len(sampled))]
        for score in scores:
            _file(score, numbers)
        return chosen

    def _scores_of_tokens(
        self, logits: Tensor, tokens: Tensor, sampled: SequenceOf[Readout]
    ) -> Iterator[_Scores]:
        """Of those that are read out at their last depth and whose requests ask."""
        rows, places = [], []
        for row, readout in enumerate(sampled):
            num_top = readout.sequence.request.logprobs
            if readout.is_final and num_top is not None:
                rows.append(row)
                places.append(_Place(readout.sequence.logprobs, readout.position, num_top))
        if rows:
            if len(rows) < len(sampled):
                index = to_device(rows, torch.int64, logits.device)
                logits, tokens = logits[index], tokens[index]
            yield _Scores(token_logprobs(logits, tokens, max(place.num_top for place in places)), places)

    def _scores_of_prompts(
        self, hidden: Tensor, start: int, prompts: SequenceOf[PromptReadout]
    ) -> Iterator[_Scores]:
        """Of prompt tokens, one chunk after the other; its rows begin at `start` in `hidden`."""
        for prompt in prompts:
            num_top = prompt.sequence.request.prompt_logprobs or 0
            tokens = to_device(prompt.token_ids, torch.int64, hidden.device)
            logits = self.model.head(hidden[start : start + prompt.num_rows])
            start += prompt.num_rows
            positions = range(prompt.start + 1, prompt.start + 1 + prompt.num_rows)
            places = [_Place(prompt.sequence.prompt_logprobs, position, num_top) for position in positions]
            yield _Scores(token_logprobs(logits, tokens, num_top), places)


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


def _file(score: _Scores, numbers: Iterator[float]) -> None:
    """Takes the rows of `score` off `numbers` and puts them where they belong."""
    width = score.packed.shape[-1]
    most = (width - 3) // 2
    for place in score.places:
        token, logprob, rank, *top = islice(numbers, width)
        ids, values = map(int, top[:most]), top[most:]
        place.scores[place.position] = TokenLogprobs(
            int(token), logprob, int(rank), list(islice(zip(ids, values, strict=True), place.num_top))
        )
