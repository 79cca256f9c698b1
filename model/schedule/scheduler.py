"""Which rows run in the next pass, and what a finished pass means for every sequence. Pure Python.

Knows nothing about tensors: a `ScheduledRun` names rows, a backend turns them into numbers. Order of
a pass: the certain row of every decoding sequence, then speculative rows, the likeliest first, while the
pass is worth them (`model.schedule.cost`), then prompt chunks in the time that is left
(`model.schedule.prompts`). A sequence gets pages as it grows. When none are left the newest one is
pre-empted: it gives its pages back, waits at its old place in the queue and is read again later; its text
is the same. After a pass that failed all who ran do the same (`model.schedule.isolation`). Invariant: the
oldest sequence that decodes always advances, and every prompt is due some time, so every sequence ends.
"""

import heapq
import math
from collections import Counter, abc
from copy import copy
from dataclasses import dataclass, field
from itertools import count
from operator import attrgetter
from time import monotonic

import msgspec

from model.options import DEFAULT_ROW_BUDGET, SchedulerLimits
from model.protocol import TokenEvent
from model.schedule.batch import PassResult, ScheduledRun
from model.schedule.cost import FixedBudget, Outlay, PassCost, PassPrice
from model.schedule.isolation import MOST_STRIKES, Trial, place_of, trials_of
from model.schedule.pages import PagePool
from model.schedule.prompts import PromptRows, PromptSharing
from model.schedule.queue import WaitingQueue
from model.schedule.readouts import ReadoutChooser, must_read
from model.schedule.sequence import Sequence, contained
from model.schedule.wave import Ending, Run, Wave

ABORTED = Ending("abort")
# What a pass says to one sequence, by the rows' positions: the tokens predicted, and the exit gates.
_Said = tuple[dict[int, int], dict[int, float]]


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
        self._waiting = WaitingQueue()
        self._trials: list[Trial] = []  # the last one runs, and nobody else
        self._ended: list[TokenEvent] = []  # of sequences that could not go on
        self._prompts = PromptSharing(limits.prefill_chunk_size, limits.most_prompt_rows)
        self._arrivals = count()
        self._in_pass: list[tuple[Sequence, list[Run]]] = []
        self.expected_milliseconds = 0.0  # of the last pass; 0 where prompts were read in it
        self._least_agreement = 0.0  # of rows that the last pass still took
        self._chooser = ReadoutChooser()

    @property
    def num_waiting(self) -> int:
        """Sequences that have no pages: not admitted yet, pre-empted, or to be tried after a failure."""
        return len(self._waiting) + sum(len(trial.queue) for trial in self._trials)

    @property
    def num_rows_in_flight(self) -> int:
        """Rows of all waves, whether or not they take part in the next pass."""
        return sum(run.num_rows for sequence in self.running for run in sequence.wave.runs)

    @property
    def has_work(self) -> bool:
        """Whether any sequence is still to be answered."""
        return bool(self.running or self._ended or self.num_waiting)

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence; it joins at the next pass that has room for it."""
        sequence.arrival = next(self._arrivals)
        sequence.arrived_at = monotonic()
        self._waiting.push(sequence)

    def abort(self, request_id: str) -> TokenEvent | None:
        """Drops a waiting or running sequence and frees its pages; None if there is no such one.

        Call between passes, not between `schedule` and `update`.
        """
        for queue in (self._waiting, *(trial.queue for trial in self._trials)):
            if waiting := queue.remove(request_id):
                self._drop(waiting)
                return _final_event(waiting, [], ABORTED)
        for sequence in self.running:
            if sequence.request.request_id == request_id:
                self._release(sequence)
                self._drop(sequence)
                return _final_event(sequence, [], ABORTED)
        return None

    def schedule(self) -> list[ScheduledRun]:
        """The rows of the next pass, those of one sequence side by side, shallowest first."""
        self._close_trials()
        self._admit()
        self._make_room()
        taken = dict.fromkeys(self.running, 0)  # how many of its first runs each sequence runs
        decoding, outlay = self._take_rows(taken)
        rows = outlay.rows
        self._in_pass = [(seq, seq.wave.runs[:num]) for seq, num in taken.items() if num]
        if rows:
            self.counts.passes += 1
            self.counts.rows += rows
            self.counts.pass_rows[1 << (rows - 1).bit_length()] += 1
        self._chooser.choose(self._in_pass, decoding)
        return [
            ScheduledRun(seq, run.start, run.num_rows, run.depth, run.num_read)
            for seq, runs in self._in_pass
            for run in reversed(runs)
        ]

    def update(self, batch: abc.Sequence[ScheduledRun], result: PassResult) -> list[TokenEvent]:
        """Takes in the pass of the last `schedule`.

        A sequence that has a fault, or whose wave fails here, is left to `take_ended`.
        """
        faults = dict(result.faults)
        said = self._file(batch, result)
        events = []
        for sequence, runs in self._in_pass:
            if sequence in faults:
                continue
            with contained(sequence, faults):
                event = self._advance(sequence, runs, said[sequence])
                if event is not None:
                    events.append(event)
        for sequence, fault in faults.items():
            sequence.fault = fault
        self._in_pass = []
        return events

    def _file(self, batch: abc.Sequence[ScheduledRun], result: PassResult) -> dict[Sequence, _Said]:
        """Leaves scores on their sequences; what is said to each sequence."""
        said: dict[Sequence, _Said] = {sequence: ({}, {}) for sequence, _ in self._in_pass}
        index, prompts, kept = 0, iter(result.prompt_scores), iter(result.loops.kept)
        for run in batch:
            sequence, start, num_rows, _, num_readouts = run
            end, (tokens, gates) = start + num_rows, said[sequence]
            for position in range(end - num_readouts, end):
                tokens[position] = result.tokens[index]
                if index in result.scores:
                    sequence.logprobs[position + 1] = result.scores[index]
                if index in result.loops.scores:
                    sequence.loop_logprobs[position + 1] = result.loops.scores[index]
                if index in result.loops.gates:
                    gates[position] = result.loops.gates[index]
                index += 1
            if result.loops.kept:
                for position in range(end - run.num_kept_rows, end):
                    sequence.keep(position, run.loop, next(kept))
            if result.prompt_scores and run.num_prompt_rows:
                sequence.prompt_logprobs.update(enumerate(next(prompts), start=start + 1))
        return said

    def take_ended(self) -> list[TokenEvent]:
        """Ends the sequences that have a fault; the last events of these and of those that `retry` ended."""
        for sequence in [sequence for sequence in self.running if sequence.fault is not None]:
            sequence.forget_tables(self.pool)
            self._release(sequence)
            self._fail(sequence)
        ended, self._ended = self._ended, []
        return ended

    def retry(self, error: str) -> None:
        """A pass failed or was not made: all who run are read again, in groups, to find who is at fault.

        Frees the pages of all. Who has failed alone before is ended with `error`.
        """
        suspects = {sequence: place_of(sequence.wave) for sequence in self.running}
        self._in_pass = []
        for sequence in suspects:
            self._take_back(sequence)
        if self._trials:
            trial = self._trials.pop()
            untried = {sequence: trial.places[sequence] for sequence in trial.queue}
            self._trials += [Trial(untried)] if untried else []
        self._trials += trials_of(suspects)
        for sequence in suspects:
            if sequence.strikes >= MOST_STRIKES:
                sequence.fault = error
                self._fail(sequence)

    # ---- who runs, and where -------------------------------------------------------------------

    @property
    def _queue(self) -> WaitingQueue:
        """The queue of the sequences that may be admitted now."""
        return self._trials[-1].queue if self._trials else self._waiting

    def _close_trials(self) -> None:
        """Who has passed a trial waits while others are on trial; after the last one all go on."""
        while self._trials and self._trials[-1].is_over:
            trial = self._trials.pop()
            for sequence in trial.places:
                sequence.strikes = 0
            for sequence in trial.queue:
                self._waiting.push(sequence)
            for sequence in list(self.running) if self._trials else []:
                self._take_back(sequence)
                self._waiting.push(sequence)

    def _fail(self, sequence: Sequence) -> None:
        """The last event of a sequence that has a fault."""
        self._drop(sequence)
        event = TokenEvent(
            request_id=sequence.request.request_id,
            finish_reason="error",
            stats=sequence.stats,
            error=sequence.fault,
        )
        self._ended.append(event)

    def _drop(self, sequence: Sequence) -> None:
        """No trial is about a sequence that has ended."""
        for trial in self._trials:
            trial.drop(sequence)

    def _admit(self) -> None:
        """First come, first served: nobody overtakes the one that waits for memory.

        Who begins with the very tokens that a running sequence is reading right now waits for it.
        """
        deferred: list[Sequence] = []
        while (sequence := self._queue.first()) is not None:
            if len(self.running) + len(deferred) >= self.limits.max_num_seqs:
                break
            opened, faults = True, dict[Sequence, str]()
            with contained(sequence, faults):
                digests = self._digests(sequence)
                shared = self.pool.lookup(digests)
                if self._is_being_encoded(sequence) or (
                    len(shared) < len(digests) and self._is_being_read(digests, len(shared))
                ):
                    self._queue.pop()
                    deferred.append(sequence)
                    continue
                spare = len(self.running)  # each may need one more page soon
                opened = sequence.open_tables(self.pool, shared, spare)
            if not opened:
                break
            self._queue.pop()
            sequence.fault = faults.get(sequence)
            if sequence.fault is None:
                self._start(sequence, len(shared) * self.pool.page_size)
            else:
                self._fail(sequence)
        for sequence in deferred:
            self._queue.push(sequence)

    def _start(self, sequence: Sequence, num_cached: int) -> None:
        sequence.wave.skip(num_cached)
        self.running.append(sequence)
        self._queue.admitted(sequence)
        if sequence.queue_seconds is None:
            sequence.queue_seconds = monotonic() - sequence.arrived_at
            found = num_cached
            if sequence.source is not None and sequence.source.is_written:
                found += len(sequence.source.tokens)
            sequence.num_cached = found
            sequence.due = self._prompts.due(sequence)
            self.counts.prompt_tokens += sequence.num_prompt_tokens
            self.counts.prefix_queries += sequence.num_prompt_tokens
            self.counts.prefix_hits += found

    def _digests(self, sequence: Sequence) -> list[bytes]:
        """Digests of the full pages that will be read; the last token must run, to predict the next one."""
        if not self.limits.prefix_caching or sequence.request.prompt_logprobs is not None:
            return []
        wave = sequence.wave
        return sequence.keys.upto(wave.tokens, (wave.num_known - 1) // self.pool.page_size)

    def _is_being_read(self, digests: list[bytes], page: int) -> bool:
        readers = (sequence for sequence in self.running if sequence.wave.is_reading_prompt)
        return any(digests[page] in self._digests(reader)[page : page + 1] for reader in readers)

    def _is_being_encoded(self, sequence: Sequence) -> bool:
        """Whether the next pass, or one after it, encodes a source like this one's for somebody else."""
        if sequence.source is None or not sequence.source.keys:
            return False
        unread = (running.source for running in self.running if running.num_unread_source)
        return any(source is not None and source.keys == sequence.source.keys for source in unread)

    def _make_room(self) -> None:
        """Pages for the certain rows of the next pass, oldest first; the newest sequences make way."""
        for sequence in sorted(self.running, key=attrgetter("precedence")):
            wave = sequence.wave
            if sequence.table is None or wave.is_reading_prompt:
                continue  # made way, or got pages for all that it reads when it was admitted
            if self.pool.grow(sequence.table, wave.certain_end):
                continue
            wave.narrow()
            while not self.pool.grow(sequence.table, wave.certain_end):
                newest = max(self.running, key=attrgetter("precedence"))
                self._preempt(newest)
                if newest is sequence:
                    break

    def _preempt(self, sequence: Sequence) -> None:
        self._take_back(sequence)
        sequence.preemptions += 1
        self.counts.preemptions += 1
        self._queue.push(sequence)

    def _take_back(self, sequence: Sequence) -> None:
        """Frees the sequence's pages; it will read again what is committed, and goes on from there."""
        self._release(sequence)
        dropped = sequence.wave.rejected_drafts
        sequence.restart()
        self.counts.rejected_drafts += sequence.wave.rejected_drafts - dropped

    def _release(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        sequence.free_tables(self.pool)

    # ---- the rows of a pass --------------------------------------------------------------------

    def _take_rows(self, taken: dict[Sequence, int]) -> tuple[Outlay, Outlay]:
        """Counts in `taken` what each sequence runs; what decoding comes to, and what the whole pass does.

        The first leaves prompts out: they change nothing of what a draft is worth to those who decode.
        """
        readers: list[Sequence] = []
        decoding: list[Sequence] = []
        for sequence in taken:
            (readers if sequence.wave.is_reading_prompt else decoding).append(sequence)
        reads = bool(readers)
        rows = self._take_certain(decoding, taken)
        if not any(sequence.num_generated for sequence in decoding):  # nobody waits for a next token
            rows += self._take_prompts(readers, taken, math.inf).rows
            decoding, readers = list(taken), []
        outlay = self._outlay(decoding, taken, rows)
        self._take_speculative(decoding, taken, outlay)
        self._least_agreement = outlay.least_agreement
        whole = outlay
        if readers:
            whole = copy(outlay)
            spare = (self.limits.pass_time_factor - 1) * outlay.milliseconds
            prompts = self._take_prompts(readers, taken, spare)
            whole.add_prompts(prompts.rows, prompts.milliseconds)
            self._take_speculative(readers, taken, whole)
        self.expected_milliseconds = 0.0 if reads else whole.milliseconds
        return outlay, whole

    def _take_certain(self, decoding: list[Sequence], taken: dict[Sequence, int]) -> int:
        rows = 0
        for sequence in decoding:
            taken[sequence] = 1
            if sequence.wave.proposal_agreement < self._least_agreement:
                sequence.wave.narrow()
            rows += sequence.wave.runs[0].num_rows
        return rows

    def _take_prompts(
        self, readers: list[Sequence], taken: dict[Sequence, int], milliseconds: float
    ) -> PromptRows:
        prompts = self._prompts.take(readers, self.cost, milliseconds)
        taken.update(prompts.num_runs)
        return prompts

    def _outlay(self, sequences: list[Sequence], taken: dict[Sequence, int], rows: int) -> Outlay:
        """What a pass comes to in which `sequences` run `rows` certain rows."""
        if not sequences:
            return Outlay(PassPrice(1.0, 0.0), 0, rows)
        context, drawn, reads = 0, 0, False
        for sequence in sequences:
            context += len(sequence.wave.tokens)
            drawn += sequence.request.sampling.temperature > 0
            reads = reads or must_read(sequence.wave, taken[sequence])
        price = self.cost.price(len(sequences), context / len(sequences), drawn / len(sequences))
        return Outlay(price, len(sequences), rows, reads)

    def _take_speculative(
        self, sequences: list[Sequence], taken: dict[Sequence, int], outlay: Outlay
    ) -> None:
        """Adds drafts, the likeliest to be of use first, while each is worth its time."""
        order = count()  # among equals, every sequence gets its turn
        drafts: list[tuple[float, int, Sequence]] = []

        def offer(sequence: Sequence, agreement: float) -> None:
            """Considers the sequence's next run, if it is a draft."""
            wave, num_taken = sequence.wave, taken[sequence]
            if 0 < num_taken < len(wave.runs) and wave.runs[num_taken].start >= wave.num_known:
                agreement *= wave.agreement(wave.runs[num_taken])
                if agreement:
                    heapq.heappush(drafts, (-agreement, next(order), sequence))

        for sequence in sequences:
            offer(sequence, 1.0)
        while drafts:
            agreement, sequence = -drafts[0][0], heapq.heappop(drafts)[2]
            run = sequence.wave.runs[taken[sequence]]
            if outlay.rows + run.num_rows > self.cost.most_rows or agreement < outlay.least_agreement:
                break
            assert sequence.table is not None
            if self.pool.grow(sequence.table, run.start + run.num_rows):
                outlay.add(run.num_rows, agreement)
                taken[sequence] += 1
                offer(sequence, agreement)

    def _advance(self, sequence: Sequence, runs: list[Run], said: _Said) -> TokenEvent | None:
        wave = sequence.wave
        if sequence.num_generated:
            sequence.passes += 1
            sequence.rows += sum([run.num_rows for run in runs])
        before = wave.accepted_drafts, wave.rejected_drafts
        if sequence.num_unread_source and sequence.source is not None:
            sequence.source.written(self.pool)
        committed = sequence.update(runs, *said)
        self._count(wave, before, len(committed))
        self._register(sequence)
        if wave.ending is None:
            return _event(sequence, committed) if committed else None
        self._release(sequence)
        return _final_event(sequence, committed, wave.ending)

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


def _event(sequence: Sequence, committed: list[int]) -> TokenEvent:
    return TokenEvent(
        request_id=sequence.request.request_id,
        token_ids=committed,
        logprobs=sequence.take_logprobs(len(committed)),
        prompt_logprobs=sequence.take_prompt_logprobs(),
        wave=sequence.take_wave(),
        loop_logprobs=sequence.take_loop_logprobs(len(committed)),
    )


def _final_event(sequence: Sequence, committed: list[int], ending: Ending) -> TokenEvent:
    return msgspec.structs.replace(
        _event(sequence, committed),
        finish_reason=ending.reason,
        stop_token_id=ending.stop_token_id,
        stats=sequence.stats,
        error=ending.problem,
        is_refusal=ending.is_refusal,
    )
