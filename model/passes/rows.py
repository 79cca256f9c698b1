"""The rows of one pass, made once from what the scheduler chose and read by every backend.

Invariant: the rows of a run stand side by side, and those of one sequence never write the same entry.
"""

from collections import abc
from functools import cached_property
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.schedule.batch import ScheduledRun
from model.schedule.pages import PageTable
from model.schedule.source import Source

Ints = NDArray[np.int64]


class RowRun(NamedTuple):
    """Consecutive rows of a pass: positions start .. start + num_rows - 1 of one sequence at one loop.

    `loop` (0..R-1) picks the slots of the layers that the rows run through; 0 in prelude and coda. The
    first `prefix` positions of the sequence see one another both ways: its prompt, if the model reads so.
    All rows also see the `source`, in a model with an encoder.
    """

    table: PageTable
    start: int
    num_rows: int
    loop: int
    prefix: int = 0
    source: Source | None = None

    def end_seen(self, position: int) -> int:
        """The position behind the last one that the row at `position` sees."""
        return max(position + 1, self.prefix)


class Noise(NamedTuple):
    """Entering rows whose state starts from noise: `num_rows` from the `first` on, which is at `start`."""

    first: int
    num_rows: int
    seed: int
    start: int
    scale: float


class Rows:
    """All rows of a pass, those of `batch` in its order.

    All else is made when it is first asked for: `first_rows[i]` is the index of the first row of `runs[i]`;
    `positions`, `cells` (where positions lie in the cache) and `loops` have one entry a row, (rows,),
    `entering` (the indices of the rows before their first loop) and `token_ids` (what these read) one for
    each row that enters.
    """

    def __init__(self, batch: abc.Sequence[ScheduledRun]) -> None:
        self.batch = batch
        self.num_rows = sum(run.num_rows for run in batch)

    def __len__(self) -> int:
        return self.num_rows

    @cached_property
    def runs(self) -> list[RowRun]:
        """The rows that stand side by side, with what they need of their sequences."""
        runs = []
        for sequence, start, num_rows, loop, _ in self.batch:
            assert sequence.table is not None
            runs.append(RowRun(sequence.table, start, num_rows, loop, sequence.wave.prefix, sequence.source))
        return runs

    @cached_property
    def first_rows(self) -> list[int]:
        """The index of each run's first row."""
        return [0, *accumulate(run.num_rows for run in self.batch[:-1])]

    @cached_property
    def ends_loops(self) -> list[bool]:
        """Of each run: whether it does its last loop."""
        return [run.is_last_loop for run in self.batch]

    @cached_property
    def new_sources(self) -> list[Source]:
        """Sources that are to be encoded before any row runs, each once."""
        sources = (run.sequence.source for run in self.batch)
        return list(dict.fromkeys(source for source in sources if source is not None and source.num_unread))

    def noises(self) -> list[Noise]:
        """The entering rows whose states start from noise."""
        noises, first = list[Noise](), 0
        for sequence, start, num_rows, loop, _ in self.batch:
            if loop:
                continue
            if (scale := sequence.request.init_scale) > 0:
                noises.append(Noise(first, num_rows, sequence.request.sampling.seed, start, scale))
            first += num_rows
        return noises

    @cached_property
    def positions(self) -> Ints:
        """Of each row, in its sequence."""
        return np.concatenate([np.arange(run.start, run.start + run.num_rows) for run in self.runs])

    @cached_property
    def cells(self) -> Ints:
        """Where each row's position lies in the cache."""
        return np.array([cell for run in self.runs for cell in run.table.cells(run.start, run.num_rows)])

    @cached_property
    def loops(self) -> Ints:
        """What each row runs, 0..R-1."""
        return np.repeat([run.loop for run in self.runs], [run.num_rows for run in self.runs])

    @cached_property
    def entering(self) -> Ints:
        """The indices of the rows before their first loop."""
        return np.flatnonzero(self.loops == 0)

    @cached_property
    def token_ids(self) -> Ints:
        """What the entering rows read."""
        entering = (run for run in self.batch if run.loop == 0)
        parts = (run.sequence.wave.tokens[run.start : run.start + run.num_rows] for run in entering)
        return np.fromiter(chain.from_iterable(parts), np.int64)

    def rows_of(self, chosen: abc.Sequence[int]) -> Ints:
        """The indices of all rows of the runs with these indices, in order."""
        parts = [np.arange(self.runs[i].num_rows) + self.first_rows[i] for i in chosen]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)
