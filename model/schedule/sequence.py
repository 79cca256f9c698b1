"""A request on its way through the engine. Pure Python.

Made by the engine from a `GenerationRequest`, changed by the scheduler alone, read by whoever runs a pass.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from model.protocol import GenerationRequest, LoopScores, SequenceStats, TokenLogprobs, WaveRecord
from model.schedule.counts import TokenCounts
from model.schedule.pages import PagePool, PageTable, PrefixKeys
from model.schedule.record import WaveRecorder
from model.schedule.source import Source
from model.schedule.wave import NO_GATES, Run, Wave

log = logging.getLogger(__name__)


class Sequence:
    """One request on its way: its wave, its pages (None while it waits), what it has cost.

    `source` is what an encoder reads for it, in a model that has one.

    `rank` (priority, round, arrival) orders the sequences that were admitted, None before: the smaller one
    is served first and pre-empted last. `fault` says why the sequence cannot go on: the scheduler ends the
    sequence, and no other, with this error.
    """

    def __init__(
        self, request: GenerationRequest, wave: Wave, keys: PrefixKeys, source: Source | None = None
    ) -> None:
        self.request = request
        self.source = source
        self.wave = wave
        self._recorder = WaveRecorder(wave) if request.include_wave else None
        self.keys = keys
        self.table: PageTable | None = None
        self.arrival = 0  # its number in order of arrival
        self.rank: tuple[int, int, int] | None = None
        self.fault: str | None = None
        self.strikes = 0  # passes that failed while it ran alone
        self.due = 0  # how many prompt rows the engine will have run when it ought to be read
        self.arrived_at = 0.0  # seconds of a monotonic clock
        self.queue_seconds: float | None = None  # until it was first admitted
        self.num_cached = 0  # prompt tokens found in the prefix cache
        self.preemptions = 0
        self.passes = 0
        self.rows = 0
        self.logprobs: dict[int, TokenLogprobs] = {}  # by position, what the last depth said, until taken
        self.prompt_logprobs: dict[int, TokenLogprobs] = {}  # the same of prompt tokens
        self.loop_logprobs: dict[int, list[LoopScores]] = {}  # by position, what each loop said, until taken
        # By position of a row, its head's inputs after each loop so far, in the backend's own form.
        self.head_inputs: dict[int, list[object]] = {}
        # Whether its tokens are those of the largest logits, but for endings before `min_tokens`.
        self.takes_likeliest = _takes_likeliest(request)
        self._prompt_logprobs_are_due = request.prompt_logprobs is not None
        self._counts: TokenCounts | None = None

    @property
    def precedence(self) -> tuple[int, int, int]:
        """Its rank, which it has from its first admission on."""
        assert self.rank is not None
        return self.rank

    @property
    def num_generated(self) -> int:
        """Tokens committed behind the prompt."""
        return self.wave.num_committed - self.wave.prompt_length

    @property
    def num_unread_source(self) -> int:
        """Tokens of its source that the pass which runs its next rows encodes first."""
        return 0 if self.source is None else self.source.num_unread

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens that are read before the first one is generated: of the source, and before the text."""
        return self.wave.prompt_length + (0 if self.source is None else len(self.source.tokens))

    def open_tables(self, pool: PagePool, shared: list[int], spare: int = 0) -> bool:
        """Takes pages for all that is known; False, with none taken, if too few are free.

        The text begins with the pages `shared`. `spare` pages must stay free.
        """
        wave = self.wave
        length = min(wave.num_known + 1, wave.length_limit)
        self.table = pool.open(shared, length, spare)
        if self.table is None or self.source is None or self.source.open(pool, spare):
            return self.table is not None
        pool.free(self.table)
        self.table = None
        return False

    def free_tables(self, pool: PagePool) -> None:
        """Gives all its pages back."""
        assert self.table is not None
        pool.free(self.table)
        self.table = None
        if self.source is not None:
            self.source.close(pool)

    def forget_tables(self, pool: PagePool) -> None:
        """Nobody shares its pages from now on: what is in them may be wrong."""
        assert self.table is not None
        pool.forget(self.table)
        if self.source is not None:
            assert self.source.table is not None
            pool.forget(self.source.table)

    @property
    def counts(self) -> TokenCounts:
        """How often each token stands in it; made when it is first asked for."""
        if self._counts is None:
            self._counts = TokenCounts()
        return self._counts

    def update(
        self, runs: list[Run], predictions: Mapping[int, int], gates: Mapping[int, float] = NO_GATES
    ) -> list[int]:
        """Takes a pass in and notes what it did if that is asked for; returns what is committed."""
        return (self._recorder or self.wave).update(runs, predictions, gates)

    def restart(self) -> None:
        """Forgets all rows and what was kept of them; what is committed will be read again like a prompt."""
        self.wave.restart()
        self.head_inputs.clear()

    def keep(self, position: int, loop: int, head_input: object) -> None:
        """Keeps what the head would read at the row of `position` after loop `loop` (0..R-1)."""
        if loop == 0:  # the row entered, maybe again behind another token
            self.head_inputs[position] = []
        self.head_inputs[position].append(head_input)

    def take_loop_logprobs(self, count: int) -> list[list[LoopScores]]:
        """What each loop said of the `count` tokens committed last; empty unless the request asks."""
        if self.request.loop_logprobs is None:
            return []
        end = self.wave.num_committed
        for position in [row for row in self.head_inputs if row < end - 1]:
            del self.head_inputs[position]
        return [self.loop_logprobs.pop(position) for position in range(end - count, end)]

    def take_wave(self) -> WaveRecord | None:
        """What the passes since the last call did; None unless the request asks for it."""
        return None if self._recorder is None else self._recorder.take()

    def take_logprobs(self, count: int) -> list[TokenLogprobs]:
        """Log-probabilities of the `count` tokens committed last; empty unless the request asks for them."""
        if self.request.logprobs is None:
            return []
        end = self.wave.num_committed
        return [self.logprobs.pop(position) for position in range(end - count, end)]

    def take_prompt_logprobs(self) -> list[TokenLogprobs | None] | None:
        """Log-probabilities of all prompt tokens, None for the first.

        It returns None when they are not asked for, not read yet or taken.
        """
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


def _takes_likeliest(request: GenerationRequest) -> bool:
    params = request.sampling
    return request.grammar is None and not (params.is_drawn or params.logit_bias or params.has_penalties)


@contextmanager
def contained(
    sequence: Sequence, faults: dict[Sequence, str], beyond: tuple[type[BaseException], ...] = ()
) -> Iterator[None]:
    """Work for one sequence: an exception is noted in `faults`, and whoever works for all goes on.

    Exceptions of the types `beyond` are raised: they need not be the fault of this sequence.
    """
    try:
        yield
    except BaseException as error:  # a panic of a Rust library is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit, *beyond)):
            raise
        log.exception("request %s failed and is ended; the others go on", sequence.request.request_id)
        faults[sequence] = f"{type(error).__name__}: {error}"
