"""Which rows run in the next pass, and what a finished pass means for every sequence. Pure Python.

Knows nothing about tensors: a `ScheduledRun` names rows, the runner turns them into numbers. Order of
a pass: the certain row of every decoding sequence, then prompt chunks up to `prefill_rows`, then
speculative rows, the likeliest first, while the pass is worth them (`model.cost`). A sequence gets
pages as it grows. When none are left the newest one is pre-empted: it gives its pages back, waits at
its old place in the queue and is read again later; its text is the same. Invariant: the oldest running
sequence always advances, so every sequence ends.
"""

import heapq
from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from itertools import count
from time import monotonic

import msgspec

from model.cache import PagePool
from model.cost import FixedBudget, Outlay, PassCost, PassPrice
from model.protocol import FinishReason, TokenEvent
from model.reading import ReadoutChooser, must_read
from model.sequence import ScheduledRun, Sequence
from model.wave import Run, Wave

DEFAULT_ROW_BUDGET = 32


@dataclass(frozen=True)
class SchedulerLimits:
    """Bounds of a pass and of what runs at once, in rows and sequences."""

    max_num_seqs: int = 32
    prefill_chunk_size: int = 64
    prefill_rows: int = 256
    prefix_caching: bool = True

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "prefill_chunk_size", "prefill_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.prefill_rows < self.prefill_chunk_size:
            raise ValueError(
                f"prefill_rows {self.prefill_rows} is below prefill_chunk_size {self.prefill_chunk_size}"
            )


@dataclass
class SchedulerCounts:
    """What has been done since the start; see protocol.EngineStats."""

    passes: int = 0
    rows: int = 0
    pass_rows: Counter[int] = field(default_factory=Counter)
    prompt_tokens: int = 0
    generation_tokens: int = 0
    accepted_drafts: int = 0
    rejected_drafts: int = 0
    flushes: Counter[int] = field(default_factory=Counter)
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0


class Scheduler:
    """Waiting and running sequences, and the pages they own."""

    def __init__(self, pool: PagePool, limits: SchedulerLimits, cost: PassCost | None = None) -> None:
        self.pool, self.limits = pool, limits
        self.cost = cost or FixedBudget(DEFAULT_ROW_BUDGET)
        self.running: list[Sequence] = []
        self.counts = SchedulerCounts()
        self._waiting: list[tuple[tuple[int, int], Sequence]] = []  # heap by rank
        self._arrivals = count()
        self._in_pass: list[tuple[Sequence, list[Run]]] = []
        self._least_chance = 0.0  # that rows of the last pass had to be of use with
        self._chooser = ReadoutChooser()

    @property
    def num_waiting(self) -> int:
        """Sequences that have no pages: not admitted yet, or pre-empted."""
        return len(self._waiting)

    @property
    def num_rows_in_flight(self) -> int:
        """Rows of all waves, whether or not they take part in the next pass."""
        return sum(run.num_rows for sequence in self.running for run in sequence.wave.runs)

    @property
    def has_work(self) -> bool:
        """Whether `schedule` would return any rows."""
        return bool(self.running or self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence; it joins at the next pass that has room for it."""
        sequence.rank = (sequence.request.priority, next(self._arrivals))
        sequence.arrived_at = monotonic()
        self._wait(sequence)

    def abort(self, request_id: str) -> TokenEvent | None:
        """Drops a waiting or running sequence and frees its pages; None if there is no such one.

        Call between passes, not between `schedule` and `update`.
        """
        for entry in self._waiting:
            if entry[1].request.request_id == request_id:
                self._waiting.remove(entry)
                heapq.heapify(self._waiting)
                return _final_event(entry[1], [], "abort")
        for sequence in self.running:
            if sequence.request.request_id == request_id:
                self._release(sequence)
                return _final_event(sequence, [], "abort")
        return None

    def schedule(self) -> list[ScheduledRun]:
        """The rows of the next pass, those of one sequence side by side, shallowest first."""
        self._admit()
        self._make_room()
        taken = dict.fromkeys(self.running, 0)  # how many of its first runs each sequence runs
        rows = self._take_certain(taken) + self._take_prompts(taken)
        outlay = self._take_speculative(taken, rows)
        rows, self._least_chance = outlay.rows, outlay.least_chance
        self._in_pass = [(seq, seq.wave.runs[:num]) for seq, num in taken.items() if num]
        if rows:
            self.counts.passes += 1
            self.counts.rows += rows
            self.counts.pass_rows[1 << (rows - 1).bit_length()] += 1
        read = self._chooser.choose(self._in_pass, outlay)
        return [
            ScheduledRun(seq, run.start, run.num_rows, run.depth, read.get((seq, run.start), 0))
            for seq, runs in self._in_pass
            for run in reversed(runs)
        ]

    def update(self, batch: SequenceOf[ScheduledRun], tokens: Iterable[int]) -> list[TokenEvent]:
        """Takes in the pass of the last `schedule`; `tokens` are its readouts in the batch's order."""
        results = iter(tokens)
        predictions: dict[Sequence, dict[int, int]] = {seq: {} for seq, _ in self._in_pass}
        for item in batch:
            end = item.start + item.num_rows
            for position in range(end - item.num_readouts, end):
                predictions[item.sequence][position] = next(results)
        events = []
        for sequence, runs in self._in_pass:
            event = self._advance(sequence, runs, predictions[sequence])
            if event is not None:
                events.append(event)
        self._in_pass = []
        return events

    # ---- who runs, and where -------------------------------------------------------------------

    def _wait(self, sequence: Sequence) -> None:
        heapq.heappush(self._waiting, (sequence.rank, sequence))

    def _admit(self) -> None:
        """First come, first served: nobody overtakes the one that waits for memory.

        Who begins with the very tokens that a running sequence is reading right now waits for it.
        """
        deferred: list[Sequence] = []
        while self._waiting and len(self.running) + len(deferred) < self.limits.max_num_seqs:
            sequence = self._waiting[0][1]
            digests = self._digests(sequence)
            shared = self.pool.lookup(digests)
            if len(shared) < len(digests) and self._is_being_read(digests, len(shared)):
                deferred.append(heapq.heappop(self._waiting)[1])
                continue
            wave = sequence.wave
            spare = len(self.running)  # each may need one more page soon
            sequence.table = self.pool.open(
                shared, min(wave.num_known + 1, wave.length_limit), wave.length_limit, spare
            )
            if sequence.table is None:
                break
            heapq.heappop(self._waiting)
            self._start(sequence, len(shared) * self.pool.page_size)
        for sequence in deferred:
            self._wait(sequence)

    def _start(self, sequence: Sequence, num_cached: int) -> None:
        sequence.wave.skip(num_cached)
        self.running.append(sequence)
        if sequence.queue_seconds is None:
            sequence.queue_seconds = monotonic() - sequence.arrived_at
            sequence.num_cached = num_cached
            self.counts.prompt_tokens += sequence.wave.prompt_length
            self.counts.prefix_queries += sequence.wave.prompt_length
            self.counts.prefix_hits += num_cached

    def _digests(self, sequence: Sequence) -> list[bytes]:
        """Of the full pages of what it will read; its last token must run, to predict the next one."""
        if not self.limits.prefix_caching or sequence.request.prompt_logprobs is not None:
            return []
        wave = sequence.wave
        return sequence.keys.upto(wave.tokens, (wave.num_known - 1) // self.pool.page_size)

    def _is_being_read(self, digests: list[bytes], page: int) -> bool:
        readers = (sequence for sequence in self.running if sequence.wave.is_reading_prompt)
        return any(digests[page] in self._digests(reader)[page : page + 1] for reader in readers)

    def _make_room(self) -> None:
        """Pages for the certain rows of the next pass, oldest first; the newest sequences make way."""
        for sequence in sorted(self.running, key=lambda sequence: sequence.rank):
            if sequence.table is None:
                continue  # made way
            wave = sequence.wave
            wave.enter_prompt(self.limits.prefill_chunk_size)
            if not wave.is_reading_prompt and not self.pool.grow(sequence.table, wave.runs[0].last + 1):
                wave.narrow()
            while not self.pool.grow(sequence.table, wave.certain_end):
                newest = max(self.running, key=lambda running: running.rank)
                self._preempt(newest)
                if newest is sequence:
                    break

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        dropped = sequence.wave.rejected_drafts
        sequence.wave.restart()
        self.counts.rejected_drafts += sequence.wave.rejected_drafts - dropped
        sequence.preemptions += 1
        self.counts.preemptions += 1
        self._wait(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        assert sequence.table is not None
        self.pool.free(sequence.table)
        sequence.table = None

    # ---- the rows of a pass --------------------------------------------------------------------

    def _take_certain(self, taken: dict[Sequence, int]) -> int:
        rows = 0
        for sequence in taken:
            if not sequence.wave.is_reading_prompt:
                taken[sequence] = 1
                if sequence.wave.proposal_chance < self._least_chance:
                    sequence.wave.narrow()
                rows += sequence.wave.runs[0].num_rows
        return rows

    def _take_prompts(self, taken: dict[Sequence, int]) -> int:
        left = self.limits.prefill_rows
        for sequence in taken:
            wave = sequence.wave
            if not wave.is_reading_prompt:
                continue
            for run in wave.runs:
                if run.start >= wave.num_known or run.num_rows > left:
                    break
                taken[sequence] += 1
                left -= run.num_rows
        return self.limits.prefill_rows - left

    def _take_speculative(self, taken: dict[Sequence, int], rows: int) -> Outlay:
        """Adds drafts, the likeliest to be of use first, while each is worth its time; what it comes to."""
        if not taken:
            return Outlay(PassPrice(1.0, 0.0), 0, rows)
        context = sum(len(sequence.wave.tokens) for sequence in taken) / len(taken)
        drawn = sum(sequence.request.sampling.temperature > 0 for sequence in taken) / len(taken)
        price = self.cost.price(len(taken), context, drawn)
        outlay = Outlay(price, len(taken), rows, any(must_read(seq.wave, num) for seq, num in taken.items()))
        order = count()  # among equals, every sequence gets its turn
        drafts: list[tuple[float, int, Sequence]] = []

        def offer(sequence: Sequence, chance: float) -> None:
            if chance := chance * _survival(sequence, taken[sequence]):
                heapq.heappush(drafts, (-chance, next(order), sequence))

        for sequence in taken:
            offer(sequence, 1.0)
        while drafts:
            chance, sequence = -drafts[0][0], heapq.heappop(drafts)[2]
            run = sequence.wave.runs[taken[sequence]]
            if outlay.rows + run.num_rows > self.cost.most_rows or chance < outlay.least_chance:
                break
            assert sequence.table is not None
            if self.pool.grow(sequence.table, run.last + 1):
                outlay.add(run.num_rows, chance)
                taken[sequence] += 1
                offer(sequence, chance)
        return outlay

    def _advance(self, sequence: Sequence, runs: list[Run], predictions: dict[int, int]) -> TokenEvent | None:
        wave = sequence.wave
        if sequence.num_generated:
            sequence.passes += 1
            sequence.rows += sum(run.num_rows for run in runs)
        before = wave.accepted_drafts, wave.rejected_drafts
        committed = wave.update(runs, predictions)
        self._count(wave, before, len(committed))
        self._register(sequence)
        if not wave.finished:
            return _event(sequence, committed) if committed else None
        self._release(sequence)
        return _end_event(sequence, committed)

    def _count(self, wave: Wave, before: tuple[int, int], num_committed: int) -> None:
        self.counts.generation_tokens += num_committed
        self.counts.accepted_drafts += wave.accepted_drafts - before[0]
        self.counts.rejected_drafts += wave.rejected_drafts - before[1]
        if wave.flushed_depth is not None:
            self.counts.flushes[wave.flushed_depth] += 1

    def _register(self, sequence: Sequence) -> None:
        """Lets others share the pages that are full and final."""
        table, wave = sequence.table, sequence.wave
        assert table is not None
        num_pages = wave.num_complete // self.pool.page_size
        if num_pages > table.num_registered and self.limits.prefix_caching:
            self.pool.register(table, sequence.keys.upto(wave.tokens, num_pages))


def _survival(sequence: Sequence, num_taken: int) -> float:
    """How likely the rows of the sequence's next run are to be of use; 0 if it has no draft to run."""
    runs = sequence.wave.runs
    if not 0 < num_taken < len(runs) or runs[num_taken].start < sequence.wave.num_known:
        return 0.0
    return runs[num_taken].survival


def _event(sequence: Sequence, committed: list[int]) -> TokenEvent:
    return TokenEvent(
        request_id=sequence.request.request_id,
        token_ids=committed,
        logprobs=sequence.take_logprobs(len(committed)),
        prompt_logprobs=sequence.take_prompt_logprobs(),
    )


def _end_event(sequence: Sequence, committed: list[int]) -> TokenEvent:
    """The last event of a sequence whose wave has finished."""
    wave = sequence.wave
    if not committed:
        return _final_event(sequence, committed, "length")
    position, token = wave.num_committed - 1, committed[-1]
    if token in wave.ending_tokens:
        return _final_event(sequence, committed, "stop", stop_token_id=token)
    outcome = wave.constraint.outcome(wave.tokens, position, token)
    if outcome == "stuck":
        return _final_event(sequence, committed, "error", error=wave.constraint.problem)
    return _final_event(sequence, committed, "stop" if outcome == "complete" else "length")


def _final_event(
    sequence: Sequence,
    committed: list[int],
    reason: FinishReason,
    *,
    stop_token_id: int | None = None,
    error: str | None = None,
) -> TokenEvent:
    return msgspec.structs.replace(
        _event(sequence, committed),
        finish_reason=reason,
        stop_token_id=stop_token_id,
        stats=sequence.stats,
        error=error,
    )
