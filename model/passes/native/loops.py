"""What a pass's readouts ask of single loops, as the library reads it, and what the answers come to.

Knows nothing about how tokens are chosen. Invariant: the inputs of the head that earlier passes kept are read
behind all rows of the pass, so that nothing else of it moves.
"""

import math
from collections import abc
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from model.network.looped import LoopedTransformer
from model.passes.loops import gated_exits, kept_inputs, loop_scores, num_likeliest, scored_loops
from model.protocol import LoopScores, TokenLogprobs
from model.schedule.batch import LoopResult, Readouts

Floats = NDArray[np.float32]


class HeadRows(NamedTuple):
    """Inputs of the head: of which rows they are `kept`, and those `given` (n, hidden) by earlier passes."""

    kept: list[int]
    given: Floats


def _sigmoid(x: float) -> float:
    share = math.exp(-abs(x))  # at most 1, whatever the sign
    return (1.0 if x >= 0 else share) / (1.0 + share)


class ExitGate:
    """The learned gate on the head's input after each loop: the probability to stop there."""

    def __init__(self, model: LoopedTransformer) -> None:
        self._weight = model.gate.weight.detach().float().numpy().copy()[0]  # the model's may be released
        self._bias = float(model.gate.bias.detach().float())

    def __call__(self, inputs: abc.Sequence[Floats]) -> list[float]:
        """Of each input of the head (hidden,)."""
        return [_sigmoid(float(each @ self._weight) + self._bias) for each in inputs]


class AskedLoops(NamedTuple):
    """Readouts whose token all loops score, those at which the gate decides, and what the pass is given."""

    readouts: Readouts
    scored: list[int]
    exits: list[int]
    gated: list[int]  # readouts whose head's input the gate reads
    head: HeadRows | None  # None: nothing is asked

    @classmethod
    def of(cls, readouts: Readouts, hidden_size: int, *, has_gate: bool) -> "AskedLoops":
        """What the readouts ask. The library keeps rows of `keeping` first, then those of `gated`."""
        predicting, _, keeping = readouts
        scored, exits = scored_loops(predicting), gated_exits(predicting)
        gated = sorted({*scored, *exits}) if has_gate else []
        kept = [row.row for row in keeping] + [predicting[index].row for index in gated]
        given = [one for index in scored for one in cast(list[Floats], kept_inputs(predicting[index]))]
        if not kept and not scored:
            return cls(readouts, [], [], [], None)
        rows = np.stack(given) if given else np.empty((0, hidden_size), np.float32)
        return cls(readouts, scored, exits, gated, HeadRows(kept, rows))

    @property
    def num_given(self) -> int:
        """Readouts of what earlier passes kept."""
        return 0 if self.head is None else len(self.head.given)

    @property
    def num_loops(self) -> list[int]:
        """Of each scored readout, the loops that score its token."""
        return [len(kept_inputs(self.readouts.predicting[index])) + 1 for index in self.scored]

    @property
    def num_tops(self) -> list[int]:
        """How many likeliest tokens each row of scores has, loop by loop of each scored readout."""
        counts = zip(self.scored, self.num_loops, strict=True)
        return [num_likeliest(self.readouts.predicting[i]) for i, loops in counts for _ in range(loops)]

    def logit_rows(self, own: abc.Sequence[int], first_given: int) -> list[int]:
        """Rows of logits to be scored, loop by loop; `own` has those of all predicting readouts."""
        rows: list[int] = []
        for index, num_loops in zip(self.scored, self.num_loops, strict=True):
            rows += [*range(first_given, first_given + num_loops - 1), own[index]]
            first_given += num_loops - 1
        return rows

    def result(self, kept: Floats, scores: abc.Iterator[TokenLogprobs], gate: ExitGate | None) -> LoopResult:
        """What the pass says of loops; takes the rows of `scores` that `logit_rows` named."""
        predicting, _, keeping = self.readouts
        states = dict(zip(self.gated, kept[len(keeping) :], strict=True))
        of_tokens: dict[int, list[LoopScores]] = {}
        for index, num_loops in zip(self.scored, self.num_loops, strict=True):
            rows = [next(scores) for _ in range(num_loops)]
            inputs = [*cast(list[Floats], kept_inputs(predicting[index])), *([states[index]] if gate else [])]
            of_tokens[index] = loop_scores(rows, gate(inputs) if gate else [], predicting[index])
        stops = gate([states[index] for index in self.exits]) if gate else []
        return LoopResult(of_tokens, list(kept[: len(keeping)]), dict(zip(self.exits, stops, strict=True)))
