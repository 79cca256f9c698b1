"""A request on its way through the engine, and the rows of it that one pass runs. Pure Python.

Made by the engine from a `GenerationRequest`, changed by the scheduler alone (readouts leave their
log-probabilities here), read by the runner.
"""

from typing import NamedTuple

from model.cache import PageTable, PrefixKeys
from model.protocol import GenerationRequest, SequenceStats, TokenLogprobs
from model.wave import Wave


class Sequence:
    """One request on its way: its wave, its pages (None while it waits), what it has cost.

    `rank` orders sequences: the smaller one is served first and pre-empted last.
    """

    def __init__(self, request: GenerationRequest, wave: Wave, keys: PrefixKeys) -> None:
        self.request = request
        self.wave = wave
        self.keys = keys
        self.table: PageTable | None = None
        self.rank: tuple[int, int] = (request.priority, 0)
        self.arrived_at = 0.0  # seconds of a monotonic clock
        self.queue_seconds: float | None = None  # until it was first admitted
        self.num_cached = 0  # prompt tokens found in the prefix cache
        self.preemptions = 0
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
            cached_prompt_tokens=self.num_cached,
            preemptions=self.preemptions,
            queue_seconds=self.queue_seconds or 0.0,
        )


class ScheduledRun(NamedTuple):
    """Rows of one sequence in this pass: `num_rows` positions from `start`, running loop `loop` (0..R-1).

    `num_readouts`: so many of the last ones predict the token behind theirs.
    """

    sequence: Sequence
    start: int
    num_rows: int
    loop: int
    num_readouts: int
