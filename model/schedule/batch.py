"""What one pass is asked and what it answers, in pure Python.

The scheduler makes a list of `ScheduledRun`s; `Readouts` says what is to be read out of them; a backend
answers with a `PassResult`. Invariant: results stand in the order of the readouts, and readouts in the
order of the runs, so that nothing but the batch is needed to know whose each result is.
"""

from collections import abc
from typing import NamedTuple

from model.protocol import LoopScores, TokenLogprobs
from model.schedule.sequence import Sequence


class ScheduledRun(NamedTuple):
    """Rows of one sequence in this pass: `num_rows` positions from `start`, running loop `loop` (0..R-1).

    `num_readouts`: so many of the last ones predict the token behind theirs.
    """

    sequence: Sequence
    start: int
    num_rows: int
    loop: int
    num_readouts: int

    @property
    def is_last_loop(self) -> bool:
        """Whether the rows have done all their loops after the pass."""
        return self.loop + 1 == self.sequence.wave.num_loops

    @property
    def num_prompt_rows(self) -> int:
        """How many of its first rows score the prompt's token behind theirs, if the request asks for it."""
        if self.sequence.request.prompt_logprobs is None or not self.is_last_loop:
            return 0
        return max(0, min(self.num_rows, self.sequence.wave.prompt_length - 1 - self.start))

    @property
    def num_kept_rows(self) -> int:
        """How many of its last rows are kept for the loop that will choose the token behind theirs."""
        if self.sequence.request.loop_logprobs is None or self.is_last_loop:
            return 0
        num_undecided = self.start + self.num_rows - self.sequence.wave.num_committed + 1
        return max(0, min(self.num_rows, num_undecided))


class Readout(NamedTuple):
    """A row of the pass that predicts a token: its sequence, and the position of that token.

    `is_final` is False for a draft: a readout that no token is committed by.
    """

    row: int
    sequence: Sequence
    position: int
    is_final: bool = True


class PromptReadout(NamedTuple):
    """Rows of the pass, from `row` on, whose next tokens stand in the prompt and are to be scored."""

    row: int
    sequence: Sequence
    start: int
    num_rows: int

    @property
    def token_ids(self) -> list[int]:
        """The tokens behind the rows."""
        return self.sequence.wave.tokens[self.start + 1 : self.start + 1 + self.num_rows]


class KeptRow(NamedTuple):
    """A row of the pass, that of `position`, whose head's input after loop `loop` (0..R-1) is kept."""

    row: int
    sequence: Sequence
    position: int
    loop: int


class Readouts(NamedTuple):
    """All that a pass reads out: rows that predict tokens, and rows that score their prompt.

    `keeping` are rows whose head's input goes out, to be scored when their token is known.
    """

    predicting: list[Readout]
    scoring: list[PromptReadout]
    keeping: list[KeptRow]

    @classmethod
    def of(cls, batch: abc.Sequence[ScheduledRun]) -> "Readouts":
        """The readouts of a batch, in its order."""
        predicting: list[Readout] = []
        scoring: list[PromptReadout] = []
        keeping: list[KeptRow] = []
        row = 0
        for run in batch:
            sequence, start, num_rows, loop, num_readouts = run
            if num_prompt_rows := run.num_prompt_rows:
                scoring.append(PromptReadout(row, sequence, start, num_prompt_rows))
            row += num_rows
            is_final = run.is_last_loop or sequence.wave.exit_threshold is not None
            end = start + num_rows
            for back in range(num_readouts, 0, -1):
                predicting.append(Readout(row - back, sequence, end - back + 1, is_final))
            keeping += (
                KeptRow(row - back, sequence, end - back, loop) for back in range(run.num_kept_rows, 0, -1)
            )
        return cls(predicting, scoring, keeping)


class LoopResult(NamedTuple):
    """What a pass says of single loops.

    `scores` maps the index of a final readout to what each loop so far says of its token, where the request
    asks for it. `kept` has the head's input of each row of `Readouts.keeping`, in the backend's own form.
    `gates` maps the index of a readout to the probability to stop there, where the exit gate decides.
    """

    scores: dict[int, list[LoopScores]]
    kept: list[object]
    gates: dict[int, float]


NOTHING_OF_LOOPS = LoopResult({}, [], {})


class PassResult(NamedTuple):
    """All that a pass says.

    `tokens` has one for each predicting readout. `scores` maps the index of such a readout to what the
    last depth says of its token, where the request asks for it. `prompt_scores` has those of each scoring
    readout, row by row. `faults` names the sequences that the pass could not serve, and why: whatever else
    is said of them is not to be used.
    """

    tokens: list[int]
    scores: dict[int, TokenLogprobs]
    prompt_scores: list[list[TokenLogprobs]]
    faults: dict[Sequence, str]
    loops: LoopResult = NOTHING_OF_LOOPS


NOTHING_READ = PassResult([], {}, [], {})
