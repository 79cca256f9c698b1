"""What a pass needs to know of its rows, as one array of whole numbers: one transfer to the device.

Rows are padded to a bucket. A row that has nothing to do somewhere (padding; before the loops one that has
entered long ago; behind them one that goes on) writes to a spare cell, which belongs to no page, and sees
nothing. Invariant: what is read of the device's copy depends on the bucket alone.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.passes.cuda.operations import Asked, Places
from model.passes.rows import Rows
from model.passes.sampling import is_plain_greedy
from model.schedule.batch import Readout, Readouts

Ints = NDArray[np.int64]
COLUMNS = (
    "tokens",
    "positions",
    "cells",
    "entering_cells",
    "entering_ends",
    "loops",
    "offsets",
    "ends",
    "coda_cells",
    "coda_ends",
    "tables",
    "read_rows",
    "read_positions",
    "seeds",
    "temperatures",
)
_WORD = 2**64
NOTHING = -1.0  # the temperature of a readout that asks nothing


class Inputs(NamedTuple):
    """A pass on the host: `numbers` are the columns, each as long as the bucket, and the pages behind them.

    `enters`, `ends`, `chooses`: whether any row comes before its first loop, runs the coda, is chosen by.
    """

    numbers: Ints
    bucket: int
    enters: bool
    ends: bool
    chooses: bool


class Columns:
    """The same on the device: views of a buffer of COLUMNS x bucket numbers and pages behind them."""

    def __init__(self, buffer: Tensor, bucket: int) -> None:
        size = len(COLUMNS) * bucket
        self.bucket = bucket
        whole = buffer[:size].view(len(COLUMNS), bucket)
        self._columns: dict[str, Tensor] = dict(zip(COLUMNS, whole, strict=True))
        self._pages = buffer[size:]

    def __getitem__(self, name: str) -> Tensor:
        return self._columns[name]

    def entering(self) -> Places:
        """Of layers before the loops."""
        return self._outside("entering")

    def looping(self) -> Places:
        """Of the block's layers."""
        column = self._columns
        entries = column["offsets"] + column["cells"]
        places = (column["positions"], entries, column["offsets"], column["tables"], column["ends"])
        return Places(*places, self._pages)

    def coda(self) -> Places:
        """Of layers behind the loops."""
        return self._outside("coda")

    def _outside(self, kind: str) -> Places:
        """Of layers that have the K/V of one loop alone: offsets are those of the first."""
        column = self._columns
        cells, ends = column[f"{kind}_cells"], column[f"{kind}_ends"]
        first = torch.zeros_like(column["offsets"])
        return Places(column["positions"], cells, first, column["tables"], ends, self._pages)

    def asked(self) -> Asked:
        """How tokens are chosen; temperatures come as the bits of an fp64 number."""
        temperatures = self._columns["temperatures"].view(torch.float64).float()
        return Asked(self._columns["seeds"], self._columns["read_positions"], temperatures)


def bucket_of(num_rows: int) -> int:
    """The number of rows that a pass is padded to: the next power of two."""
    return 1 << (num_rows - 1).bit_length()


def pass_inputs(rows: Rows, readouts: Readouts, spare: int, *, with_choice: bool) -> Inputs:
    """The numbers of a pass; `spare` is the cell that no page has. Without a choice none is prepared."""
    count, bucket = len(rows), bucket_of(len(rows))
    pages, tables = _lay_out_pages(rows)
    size = len(COLUMNS) * bucket
    numbers = np.zeros(size + len(pages), np.int64)
    numbers[size:] = pages
    columns: dict[str, Ints] = dict(zip(COLUMNS, numbers[:size].reshape(-1, bucket), strict=True))
    for name in ("cells", "entering_cells", "coda_cells"):
        columns[name][:] = spare
    columns["positions"][:count] = rows.positions
    columns["cells"][:count] = rows.cells
    columns["loops"][:count] = rows.loops
    columns["offsets"][:count] = rows.loops * (spare + 1)
    columns["ends"][:count] = rows.positions + 1
    columns["tables"][:count] = tables
    entering, due = rows.entering, _due(rows, readouts)
    columns["tokens"][entering] = rows.token_ids
    for kind, chosen in (("entering", entering), ("coda", due)):
        columns[f"{kind}_cells"][chosen] = rows.cells[chosen]
        columns[f"{kind}_ends"][chosen] = rows.positions[chosen] + 1
    chooses = with_choice and bool(readouts.predicting)
    _ask(columns, readouts.predicting if chooses else [])
    return Inputs(numbers, bucket, bool(len(entering)), bool(len(due)), chooses)


def _due(rows: Rows, readouts: Readouts) -> Ints:
    """Rows that run the coda: those that end their loops, and those that are read out before."""
    due = np.zeros(len(rows), bool)
    due[rows.rows_of([index for index, ends in enumerate(rows.ends_loops) if ends])] = True
    due[[readout.row for readout in readouts.predicting]] = True
    due[[kept.row for kept in readouts.keeping]] = True
    return np.flatnonzero(due)


def _lay_out_pages(rows: Rows) -> tuple[list[int], list[int]]:
    """The page numbers of all sequences one behind the other, and where those of each row begin."""
    pages, tables = list[int](), list[int]()
    last, first_page = None, 0
    for run in rows.runs:
        if run.table is not last:  # the runs of a sequence stand side by side
            last, first_page = run.table, len(pages)
            pages.extend(run.table.pages)
        tables += [first_page] * run.num_rows
    return pages, tables


def _ask(columns: dict[str, Ints], predicting: list[Readout]) -> None:
    """Which rows are read, and how their tokens are chosen."""
    temperatures = columns["temperatures"].view(np.float64)
    temperatures[:] = NOTHING
    if not predicting:
        return
    found = [
        (readout.row, readout.position, readout.sequence.request.sampling.seed % _WORD, _temperature(readout))
        for readout in predicting
    ]
    count, (numbers, positions, seeds, wanted) = len(found), zip(*found, strict=True)
    columns["read_rows"][:count], columns["read_positions"][:count] = numbers, positions
    columns["seeds"][:count] = np.array(seeds, np.uint64).view(np.int64)
    temperatures[:count] = wanted


def _temperature(readout: Readout) -> float:
    params = readout.sequence.request.sampling
    return params.temperature if params.is_drawn else 0.0


def is_simple(readout: Readout) -> bool:
    """Whether logits, a temperature and noise are all that the token is chosen by, and it is not scored."""
    sequence = readout.sequence
    request, params, wave = sequence.request, sequence.request.sampling, sequence.wave
    is_scored = request.logprobs is not None or request.loop_logprobs is not None
    if is_scored or wave.exit_threshold is not None:
        return False
    if is_plain_greedy(readout):
        return True
    is_altered = params.has_penalties or bool(params.logit_bias) or request.grammar is not None
    is_filtered = params.min_p > 0 or params.top_k > 0 or params.top_p < 1
    return params.is_drawn and not (is_altered or is_filtered or request.min_tokens)
