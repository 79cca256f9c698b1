"""The rows of one pass, made once from what the scheduler chose and read by every backend.

Invariant: the rows of a run stand side by side, and those of one sequence never write the same entry.
"""

from collections import abc
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.schedule.batch import ScheduledRun
from model.schedule.pages import PageTable

Ints = NDArray[np.int64]


class RowRun(NamedTuple):
    """Consecutive rows of a pass: positions start .. start + num_rows - 1 of one sequence at one loop.

    `loop` (0..R-1) picks the slots of the layers that the rows run through; 0 in prelude and coda. The
    first `prefix` positions of the sequence see one another both ways: its prompt, if the model reads so.
    """

    table: PageTable
    start: int
    num_rows: int
    loop: int
    prefix: int = 0

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


@dataclass(frozen=True)
class Rows:
    """All rows of a pass. `first_rows[i]` is the index of the first row of `runs[i]`.

    `entering_rows` are the indices of the rows before their first loop and `tokens` what they read. Arrays
    are made when they are first asked for: `positions`, `cells` (where positions lie in the cache) and
    `loops` have one entry a row, (rows,), `entering` and `token_ids` one for each row that enters.
    """

    runs: list[RowRun]
    first_rows: list[int]
    ends_loops: list[bool]  # of each run: whether it does its last loop
    num_rows: int
    entering_rows: list[int]
    tokens: list[int]
    noises: list[Noise]

    @classmethod
    def of(cls, batch: abc.Sequence[ScheduledRun]) -> "Rows":
        """The rows of a batch, in its order."""
        runs: list[RowRun] = []
        firsts: list[int] = []
        ends: list[bool] = []
        entering: list[int] = []
        tokens: list[int] = []
        noises: list[Noise] = []
        total = 0
        for sequence, start, num_rows, loop, _ in batch:
            table, wave = sequence.table, sequence.wave
            assert table is not None
            runs.append(RowRun(table, start, num_rows, loop, wave.prefix))
            firsts.append(total)
            ends.append(loop + 1 == wave.num_loops)
            if loop == 0:
                request = sequence.request
                if request.init_scale > 0:
                    seed, scale = request.sampling.seed, request.init_scale
                    noises.append(Noise(len(tokens), num_rows, seed, start, scale))
                entering.extend(range(total, total + num_rows))
                tokens.extend(wave.tokens[start : start + num_rows])
            total += num_rows
        return cls(runs, firsts, ends, total, entering, tokens, noises)

    def __len__(self) -> int:
        return self.num_rows

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
        """`entering_rows`."""
        return np.array(self.entering_rows, np.int64)

    @cached_property
    def token_ids(self) -> Ints:
        """`tokens`."""
        return np.array(self.tokens, np.int64)

    def rows_of(self, chosen: abc.Sequence[int]) -> Ints:
        """The indices of all rows of the runs with these indices, in order."""
        parts = [np.arange(self.runs[i].num_rows) + self.first_rows[i] for i in chosen]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)
