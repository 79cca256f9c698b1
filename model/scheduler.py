"""Which rows run in the next pass, and what a finished pass means for every sequence. Pure Python.

Knows nothing about tensors: a `ScheduledRun` names rows, the runner turns them into numbers. Order of
a pass: the certain row of every decoding sequence, then prompt chunks up to `prefill_rows`, then
speculative rows while the pass has fewer than `row_budget`. Invariant: a sequence owns pages for its
whole possible length from admission to its end, so a running sequence never waits for memory.
"""

import heapq
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import count

import msgspec

from model.cache import PagePool
from model.protocol import FinishReason, TokenEvent
from model.sequence import ScheduledRun, Sequence
from model.wave import Run, Wave


@dataclass(frozen=True)
class SchedulerLimits:
    """Bounds of a pass and of what runs at once, in rows and sequences."""

    max_num_seqs: int = 32
    prefill_chunk_size: int = 64
    prefill_rows: int = 256
    row_budget: int = 32

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "prefill_chunk_size", "prefill_rows", "row_budget"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.prefill_rows < self.prefill_chunk_size:
            raise ValueError(
                f"prefill_rows {self.prefill_rows} is below prefill_chunk_size {self.prefill_chunk_size}"
            )


class Scheduler:
    """Waiting and running sequences, and the pages they own."""

    def __init__(self, pool: PagePool, limits: SchedulerLimits) -> None:
        self.pool, self.limits = pool, limits
        self.running: list[Sequence] = []
        self._waiting: list[tuple[int, int, Sequence]] = []  # heap by priority, then arrival
        self._arrivals = count()
        self._in_pass: list[tuple[Sequence, list[Run]]] = []

    @property
    def num_waiting(self) -> int:
        """Sequences not admitted yet."""
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        """Whether `schedule` would return any rows."""
        return bool(self.running or self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence; it joins at the next pass that has room for it."""
        heapq.heappush(self._waiting, (sequence.request.priority, next(self._arrivals), sequence))

    def abort(self, request_id: str) -> TokenEvent | None:
        """Drops a waiting or running sequence and frees its pages; None if there is no such one.

        Call between passes, not between `schedule` and `update`.
        """
        for entry in self._waiting:
            if entry[2].request.request_id == request_id:
                self._waiting.remove(entry)
                heapq.heapify(self._waiting)
                return _final_event(entry[2], [], "abort")
        for sequence in self.running:
            if sequence.request.request_id == request_id:
                self._release(sequence)
                return _final_event(sequence, [], "abort")
        return None

    def schedule(self) -> list[ScheduledRun]:
        """The rows of the next pass, those of one sequence side by side, shallowest first."""
        self._admit()
        taken = dict.fromkeys(self.running, 0)  # how many of its first runs each sequence runs
        rows = self._take_certain(taken) + self._take_prompts(taken)
        self._take_speculative(taken, self.limits.row_budget - rows)
        self._in_pass = [(seq, seq.wave.runs[:num]) for seq, num in taken.items() if num]
        return [
            ScheduledRun(seq, run.start, run.num_rows, run.depth, seq.wave.wants_readout(run))
            for seq, runs in self._in_pass
            for run in reversed(runs)
        ]

    def update(self, batch: SequenceOf[ScheduledRun], tokens: Iterable[int]) -> list[TokenEvent]:
        """Takes in the pass of the last `schedule`; `tokens` are its readouts in the batch's order."""
        results = iter(tokens)
        predictions: dict[Sequence, dict[int, int]] = {seq: {} for seq, _ in self._in_pass}
        for item in batch:
            if item.readout:
                predictions[item.sequence][item.start + item.num_rows - 1] = next(results)
        events = []
        for sequence, runs in self._in_pass:
            event = self._advance(sequence, runs, predictions[sequence])
            if event is not None:
                events.append(event)
        self._in_pass = []
        return events

    def _admit(self) -> None:
        while self._waiting and len(self.running) < self.limits.max_num_seqs:
            sequence = self._waiting[0][2]
            if not self.pool.can_allocate(sequence.wave.length_limit):
                return  # first come, first served: nobody overtakes the one that waits for memory
            heapq.heappop(self._waiting)
            sequence.table = self.pool.allocate(sequence.wave.length_limit)
            self.running.append(sequence)

    def _take_certain(self, taken: dict[Sequence, int]) -> int:
        for sequence in taken:
            if not sequence.wave.is_reading_prompt:
                taken[sequence] = 1
        return sum(taken.values())

    def _take_prompts(self, taken: dict[Sequence, int]) -> int:
        left = self.limits.prefill_rows
        for sequence in taken:
            wave = sequence.wave
            if not wave.is_reading_prompt:
                continue
            wave.enter_prompt(self.limits.prefill_chunk_size)
            for run in wave.runs:
                if run.start >= wave.prompt_length or run.num_rows > left:
                    break
                taken[sequence] += 1
                left -= run.num_rows
        return self.limits.prefill_rows - left

    def _take_speculative(self, taken: dict[Sequence, int], left: int) -> None:
        """Adds drafts one place of the wave at a time, over all sequences, while rows are left."""
        grew = True
        while grew:
            grew = False
            for sequence, num in taken.items():
                if left > 0 and num and _next_is_draft(sequence.wave, num):
                    taken[sequence] += 1
                    left -= 1
                    grew = True

    def _advance(self, sequence: Sequence, runs: list[Run], predictions: dict[int, int]) -> TokenEvent | None:
        if sequence.num_generated:
            sequence.passes += 1
            sequence.rows += sum(run.num_rows for run in runs)
        committed = sequence.wave.update(runs, predictions)
        if not sequence.wave.finished:
            return _event(sequence, committed) if committed else None
        self._release(sequence)
        stopped = bool(committed) and committed[-1] in sequence.wave.ending_tokens
        return _final_event(sequence, committed, "stop" if stopped else "length")

    def _release(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        assert sequence.table is not None
        self.pool.free(sequence.table)
        sequence.table = None


def _next_is_draft(wave: Wave, num_taken: int) -> bool:
    return num_taken < len(wave.runs) and wave.runs[num_taken].start >= wave.prompt_length


def _event(sequence: Sequence, committed: list[int]) -> TokenEvent:
    return TokenEvent(
        request_id=sequence.request.request_id,
        token_ids=committed,
        logprobs=sequence.take_logprobs(len(committed)),
        prompt_logprobs=sequence.take_prompt_logprobs(),
    )


def _final_event(sequence: Sequence, committed: list[int], reason: FinishReason) -> TokenEvent:
    return msgspec.structs.replace(
        _event(sequence, committed),
        finish_reason=reason,
        stop_token_id=committed[-1] if reason == "stop" else None,
        stats=sequence.stats,
    )
