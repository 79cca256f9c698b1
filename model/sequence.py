"""A request on its way through the engine, and the rows of it that one pass runs. Pure Python.

Made by the engine from a `GenerationRequest`, changed by the scheduler alone (readouts leave their
log-probabilities here), read by the runner.
"""

from typing import NamedTuple

from model.cache import PageTable
from model.protocol import GenerationRequest, SequenceStats, TokenLogprobs
from model.wave import Wave


class Sequence:
    """One request on its way: its wave, its pages (None while it waits), what it has cost."""

    def __init__(self, request: GenerationRequest, wave: Wave) -> None:
        self.request = request
        self.wave = wave
        self.table: PageTable | None = None
        self.passes = 0
        self.rows = 0
        self.logprobs: dict[int, TokenLogprobs] = {}  # by position, what the last depth said, until taken
        self.prompt_logprobs: dict[int, TokenLogprobs] = {}  # the same of prompt tokens
        self._prompt_logprobs_are_due = request.prompt_logprobs is not None

    @property
    def num_generated(self) -> int:
        """Tokens committed behind the prompt."""
        return self.wave.num_committed - self.wave.prompt_length

    def take_logprobs(self, count: int) -> list[TokenLogprobs]:
        """Of the `count` tokens committed last; empty unless the request asks for them."""
        if self.request.logprobs is None:
            return []
        end = self.wave.num_committed
        return [self.logprobs.pop(position) for position in range(end - count, end)]

    def take_prompt_logprobs(self) -> list[TokenLogprobs | None] | None:
        """Of all prompt tokens, None for the first; None when not asked for, not read yet or taken."""
        if not self._prompt_logprobs_are_due or self.wave.is_reading_prompt:
            return None
        self._prompt_logprobs_are_due = False
        found, self.prompt_logprobs = self.prompt_logprobs, {}
        return [None, *(found[position] for position in range(1, self.wave.prompt_length))]

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
