"""The rows of one pass as arrays, made once from what the scheduler chose and read by every backend.

Invariant: the rows of a run stand side by side, and those of one sequence never write the same entry.
"""

from collections import abc
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.schedule.batch import ScheduledRun
from model.schedule.pages import PageTable

Ints = NDArray[np.int64]


class RowRun(NamedTuple):
    """Consecutive rows of a pass: positions start .. start + num_rows - 1 of one sequence at one loop.

    `loop` (0..R-1) picks the slots of the layers that the rows run through; 0 in prelude and coda.
    """

    table: PageTable
    start: int
    num_rows: int
    loop: int


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

    `positions`, `slots` (of tokens, in the cache) and `loops` have one entry a row, (rows,). `entering` are
    the indices of the rows before their first loop and `token_ids` their tokens, (entering rows,).
    """

    runs: list[RowRun]
    first_rows: list[int]
    ends_loops: list[bool]  # of each run: whether it does its last loop
    positions: Ints
    slots: Ints
    loops: Ints
    entering: Ints
    token_ids: Ints
    noises: list[Noise]

    @classmethod
    def of(cls, batch: abc.Sequence[ScheduledRun]) -> "Rows":
        """The rows of a batch, in its order."""
        runs: list[RowRun] = []
        firsts: list[int] = []
        slots: list[int] = []
        entering: list[int] = []
        ids: list[int] = []
        noises: list[Noise] = []
        total = 0
        for run in batch:
            table, request = run.sequence.table, run.sequence.request
            assert table is not None
            runs.append(RowRun(table, run.start, run.num_rows, run.loop))
            firsts.append(total)
            slots.extend(table.slots(run.start, run.num_rows))
            if run.loop == 0:
                if request.init_scale > 0:
                    seed, scale = request.sampling.seed, request.init_scale
                    noises.append(Noise(len(ids), run.num_rows, seed, run.start, scale))
                entering.extend(range(total, total + run.num_rows))
                ids.extend(run.sequence.wave.tokens[run.start : run.start + run.num_rows])
            total += run.num_rows
        counts = [run.num_rows for run in runs]
        offsets = np.repeat([run.start - first for run, first in zip(runs, firsts, strict=True)], counts)
        return cls(
            runs=runs,
            first_rows=firsts,
            ends_loops=[run.is_last_loop for run in batch],
            positions=np.arange(total) + offsets,
            slots=np.array(slots, np.int64),
            loops=np.repeat([run.loop for run in runs], counts),
            entering=np.array(entering, np.int64),
            token_ids=np.array(ids, np.int64),
            noises=noises,
        )

    def __len__(self) -> int:
        return len(self.positions)

    def rows_of(self, chosen: abc.Sequence[int]) -> Ints:
        """The indices of all rows of the runs with these indices, in order."""
        parts = [np.arange(self.runs[i].num_rows) + self.first_rows[i] for i in chosen]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)
