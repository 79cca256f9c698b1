"""A request on its way through the engine, and the rows of it that one pass runs. Pure Python.

Made by the engine from a `GenerationRequest`, changed by the scheduler alone, read by the runner.
"""

from typing import NamedTuple

from model.cache import PageTable
from model.protocol import GenerationRequest, SequenceStats
from model.wave import Wave


class Sequence:
    """One request on its way: its wave, its pages (None while it waits), what it has cost."""

    def __init__(self, request: GenerationRequest, wave: Wave) -> None:
        self.request = request
        self.wave = wave
        self.table: PageTable | None = None
        self.passes = 0
        self.rows = 0

    @property
    def num_generated(self) -> int:
        """Tokens committed behind the prompt."""
        return self.wave.num_committed - self.wave.prompt_length

    @property
    def stats(self) -> SequenceStats:
        """What it has cost so far."""
        return SequenceStats(
            passes=self.passes,
            rows=self.rows,
            accepted_drafts=self.wave.accepted_drafts,
            rejected_drafts=self.wave.rejected_drafts,
        )


class ScheduledRun(NamedTuple):
    """Rows of one sequence in this pass: `num_rows` positions from `start`, running loop `loop` (0..R-1).

    `readout`: the last of them predicts the token behind it.
    """

    sequence: Sequence
    start: int
    num_rows: int
    loop: int
    readout: bool
