"""What readouts ask of logits, as the library reads it: how tokens are chosen, and whose scores are wanted.

Knows nothing about passes. Invariant: an asking keeps alive all memory that its array points to.
"""

from collections import abc
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.passes.native.structs import Choice
from model.passes.sampling import bans_endings, is_plain_greedy
from model.protocol import TokenLogprobs
from model.schedule.batch import Readout
from model.schedule.sequence import Sequence, contained

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]
_WORD = 2**64
_MOST = 2**31 - 1  # that the library's whole numbers hold, more than a vocabulary has tokens
CHOICE = np.dtype(Choice)  # an array of these is made at once from tuples, ten times as fast as of ctypes'
_NOTHING = (0, 0)  # numbers, and where they lie


class Choices:
    """How tokens are chosen, one after the other: `array` has an entry for each `readout` that was added."""

    def __init__(self) -> None:
        self._entries: list[tuple[float, ...]] = []
        self._kept: list[NDArray[np.generic]] = []

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def array(self) -> "NDArray[np.void]":
        """What the library reads; good as long as this is."""
        return np.array(self._entries, CHOICE)

    def add(self, readout: Readout) -> None:
        """Raises whatever the sequence's own constraint raises; nothing is added then."""
        sequence, params = readout.sequence, readout.sequence.request.sampling
        wave = sequence.wave
        counted = outputs = biased = biases = banned = _NOTHING
        forbidden = 0
        if params.has_penalties:
            counts = sequence.counts.upto(wave, readout.position)
            counted, outputs = self._numbers(counts.tokens), self._numbers(counts.outputs)
        if params.logit_bias:
            biased = self._numbers(np.array(list(params.logit_bias), np.int32))
            biases = self._numbers(np.array(list(params.logit_bias.values()), np.float32))
        before_min = bans_endings(readout)
        mask = wave.constraint.forbidden(wave, readout.position, before_min_tokens=before_min)
        if mask is not None:
            forbidden = self._numbers(np.ascontiguousarray(mask))[1]
        elif before_min:
            banned = self._numbers(np.array(sorted(wave.ending_tokens), np.int32))
        self._entries.append(
            (
                params.seed % _WORD,
                readout.position,
                params.temperature if params.is_drawn else 0.0,
                params.top_p,
                params.min_p,
                min(params.top_k, _MOST),
                params.repetition_penalty,
                params.frequency_penalty,
                params.presence_penalty,
                counted[0],
                biased[0],
                banned[0],
                counted[1],
                outputs[1],
                biased[1],
                biases[1],
                banned[1],
                forbidden,
            )
        )

    def _numbers(self, numbers: NDArray[np.generic]) -> tuple[int, int]:
        """How many there are, and where."""
        self._kept.append(numbers)
        return len(numbers), numbers.ctypes.data


class Asked(NamedTuple):
    """What a pass's predicting readouts want beyond the likeliest token, by their indices."""

    choices: Choices
    chosen: list[int]  # those that `choices` is about
    scored: list[int]  # those whose scores are wanted

    @classmethod
    def of(cls, predicting: abc.Sequence[Readout], faults: dict[Sequence, str]) -> "Asked":
        """A sequence whose own constraint or counts fail is noted in `faults`."""
        asked = cls(Choices(), [], [])
        for index, readout in enumerate(predicting):
            if not is_plain_greedy(readout):
                with contained(readout.sequence, faults, beyond=(MemoryError,)):
                    asked.choices.add(readout)
                    asked.chosen.append(index)
            if readout.is_final and readout.sequence.request.logprobs is not None:
                asked.scored.append(index)
        return asked


class Scores(NamedTuple):
    """What rows of logits say of one token each, and of the likeliest ones: (rows,) and (rows, num_top)."""

    tokens: abc.Sequence[int] | Ints
    logprobs: Floats
    ranks: Ints
    top_tokens: Ints
    top_logprobs: Floats

    def listed(self, num_tops: abc.Sequence[int]) -> list[TokenLogprobs]:
        """Row by row, with so many of the likeliest tokens each."""
        columns = (column.tolist() for column in self[1:])
        return [
            TokenLogprobs(token, logprob, rank, list(zip(tops[:num], values[:num], strict=True)))
            for token, logprob, rank, tops, values, num in zip(self.tokens, *columns, num_tops, strict=True)
        ]
