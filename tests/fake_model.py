"""A model made of hashes: pure Python, no tensors, and strict about the cache.

The final token behind a prefix is a hash of the prefix; the readout at an earlier depth gives the same
token, or another one with a set probability (also a hash, so every run repeats). Every row checks that
each entry it would attend to was written, at its own loop, by the very tokens that stand there now. What
is kept of a row for its last loop is the prefix and the depth, and is checked against that row.
"""

from collections.abc import Callable, Sequence

from model.options import SchedulerLimits
from model.protocol import (
    GenerationRequest,
    LoopScores,
    SamplingParams,
    SequenceStats,
    TokenEvent,
    TokenLogprobs,
)
from model.schedule.batch import LoopResult, PassResult, Readouts, ScheduledRun
from model.schedule.cost import PassCost
from model.schedule.drafts import Experience, make_policy, policy_depths
from model.schedule.pages import PagePool, PrefixKeys
from model.schedule.scheduler import Scheduler
from model.schedule.sequence import Sequence as EngineSequence
from model.schedule.wave import Wave

VOCAB = 50


def mixed(*values: int) -> int:
    """A well-mixed 64-bit hash of integers, the same in every process."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = (state ^ (value + 1)) * 0xBF58476D1CE4E5B9 % 2**64
        state ^= state >> 29
    return state


def gate_of(prefix: Sequence[int], depth: int) -> float:
    """The probability by which the exit gate stops behind a prefix after so many loops."""
    return mixed(*prefix, depth, 13) % 1000 / 1000


def waiting_sequence(
    request_id: str, *, priority: int = 0, tenant: str = "", arrival: int = 0
) -> EngineSequence:
    """A sequence that has just arrived."""
    request = GenerationRequest(
        request_id=request_id,
        prompt_token_ids=[1],
        max_tokens=1,
        sampling=SamplingParams(),
        priority=priority,
        tenant=tenant,
    )
    wave = Wave([1], 2, make_policy("none", frozenset()), 2)
    sequence = EngineSequence(request, wave, PrefixKeys("", 4))
    sequence.arrival = arrival
    return sequence


class FakeBackend:
    """Runs passes for the scheduler; `num_loops` as in the waves it is given.

    With `memory`, a token depends on so many tokens before it: texts soon repeat themselves.
    """

    def __init__(
        self, error_rate: float, error_depths: range = range(1, 100), memory: int | None = None
    ) -> None:
        self.error_rate = error_rate
        self.error_depths = error_depths  # the depths whose readouts may be wrong, below the last
        self.memory = memory
        self.cache: dict[tuple[int, int], list[int]] = {}  # (cell, loop) -> the text up to there
        self.pass_rows: list[int] = []
        self.pass_readouts: list[int] = []
        self.faults: dict[EngineSequence, str] = {}
        self.inject: Callable[[Sequence[ScheduledRun]], None] = lambda _: None  # may raise, or set faults

    def run(self, batch: Sequence[ScheduledRun]) -> PassResult:
        """Writes the cache, checks what is read, returns the readouts' tokens."""
        for item in batch:
            for position in range(item.start, item.start + item.num_rows):
                self.cache[self._entry(item, position)] = self._prefix(item, position)
        for item in batch:
            for position in range(item.start + item.num_rows):
                assert self.cache.get(self._entry(item, position)) == self._prefix(item, position)
        self.inject(batch)
        self.pass_rows.append(sum(item.num_rows for item in batch))
        self.pass_readouts.append(sum(item.num_readouts for item in batch))
        tokens = [
            self._token(item, position)
            for item in batch
            for position in range(item.start + item.num_rows - item.num_readouts, item.start + item.num_rows)
        ]
        prompts = [
            [TokenLogprobs(token, 0.0, 1) for token in readout.token_ids]
            for readout in Readouts.of(batch).scoring
        ]
        return PassResult(tokens, {}, prompts, self.faults.copy(), self._loops(batch, tokens))

    def _loops(self, batch: Sequence[ScheduledRun], tokens: list[int]) -> LoopResult:
        """Prefix and depth of each row that is kept, and for a final token an entry for each loop so far."""
        predicting, _, keeping = Readouts.of(batch)
        # Of each sequence, by the position of a row: loops that it has done after the pass.
        depths: dict[EngineSequence, dict[int, int]] = {run.sequence: {} for run in batch}
        for run in batch:
            depths[run.sequence].update(
                dict.fromkeys(range(run.start, run.start + run.num_rows), run.loop + 1)
            )
        scores, gates = {}, {}
        for index, (readout, token) in enumerate(zip(predicting, tokens, strict=True)):
            sequence, row = readout.sequence, readout.position - 1
            depth = depths[sequence][row]
            prefix = tuple(sequence.wave.tokens[: row + 1])
            if sequence.wave.exit_threshold is not None:
                gates[index] = gate_of(prefix, depth)
            if readout.is_final and sequence.request.loop_logprobs is not None:
                kept = sequence.head_inputs.get(row, [])
                assert kept == [(prefix, earlier) for earlier in range(1, depth)]
                scores[index] = [LoopScores(TokenLogprobs(token, 0.0, 1), True) for _ in range(depth)]
        kept_now = [(tuple(row.sequence.wave.tokens[: row.position + 1]), row.loop + 1) for row in keeping]
        return LoopResult(scores, list[object](kept_now), gates)

    def final_token(self, tokens: list[int]) -> int:
        """The token that depth R gives behind a text."""
        return mixed(*tokens[-self.memory if self.memory else 0 :], 7) % VOCAB

    def continue_plainly(self, prompt: list[int], count: int, ending: frozenset[int]) -> list[int]:
        """What plain decoding gives: no cache, no wave."""
        tokens: list[int] = []
        while len(tokens) < count:
            tokens.append(self.final_token([*prompt, *tokens]))
            if tokens[-1] in ending:
                break
        return tokens

    def continue_by_gate(
        self, prompt: list[int], count: int, num_loops: int, threshold: float
    ) -> tuple[list[int], list[int]]:
        """What the first loops say at which the gate has stopped, and which loops these are."""
        tokens, exits = list[int](), list[int]()
        for _ in range(count):
            text, going_on, depth = [*prompt, *tokens], 1.0, 0
            while depth < num_loops and (depth == 0 or 1 - going_on < threshold):
                depth += 1
                going_on *= 1 - gate_of(tuple(text), depth)
            tokens.append(self._said(text, depth, num_loops))
            exits.append(depth)
        return tokens, exits

    def _token(self, item: ScheduledRun, position: int) -> int:
        tokens = item.sequence.wave.tokens[: position + 1]
        return self._said(tokens, item.loop + 1, item.sequence.wave.num_loops)

    def _said(self, tokens: list[int], depth: int, num_loops: int) -> int:
        token = self.final_token(tokens)
        may_err = depth < num_loops and depth in self.error_depths
        wrong = may_err and mixed(*tokens, depth, 99) % 1000 < 1000 * self.error_rate
        return (token + 1) % VOCAB if wrong else token

    def _entry(self, item: ScheduledRun, position: int) -> tuple[int, int]:
        assert item.sequence.table is not None
        return item.sequence.table.cell(position), item.loop

    def _prefix(self, item: ScheduledRun, position: int) -> list[int]:
        return item.sequence.wave.tokens[: position + 1]


class Harness:
    """Scheduler and fake runner, one `step` a pass; keeps what every request was answered."""

    def __init__(
        self,
        limits: SchedulerLimits | None = None,
        num_pages: int = 400,
        error_rate: float = 0.3,
        error_depths: range = range(1, 100),
        cost: PassCost | None = None,
        memory: int | None = None,
    ) -> None:
        self.pool = PagePool(num_pages, 4)
        self.scheduler = Scheduler(self.pool, limits or SchedulerLimits(), cost)
        self.backend = FakeBackend(error_rate, error_depths, memory)
        self.experience = Experience.none()
        self.answers: dict[str, list[TokenEvent]] = {}

    def add(
        self,
        request_id: str,
        prompt: list[int],
        max_tokens: int = 20,
        *,
        num_loops: int = 4,
        policy: str = "recheck",
        draft_depths: tuple[int, ...] = (1, 2, 3),
        ending: frozenset[int] = frozenset(),
        priority: int = 0,
        tenant: str = "",
        include_wave: bool = False,
        loop_logprobs: int | None = None,
        exit_threshold: float | None = None,
        ends_alone: bool = False,
        prompt_logprobs: int | None = None,
    ) -> None:
        """Queues a request."""
        request = GenerationRequest(
            request_id=request_id,
            prompt_token_ids=prompt,
            max_tokens=max_tokens,
            sampling=SamplingParams(temperature=0),
            priority=priority,
            tenant=tenant,
            include_wave=include_wave,
            loop_logprobs=loop_logprobs,
            exit_threshold=exit_threshold,
            prompt_logprobs=prompt_logprobs,
        )
        depths = policy_depths(policy, num_loops, (), draft_depths)
        drafts = make_policy(policy, depths, self.experience)
        wave = Wave(
            prompt,
            num_loops,
            drafts,
            len(prompt) + max_tokens,
            ending,
            exit_threshold=exit_threshold,
            ends_alone=ends_alone,
        )
        self.answers[request_id] = []
        self.scheduler.add(EngineSequence(request, wave, PrefixKeys(f"{num_loops}", self.pool.page_size)))

    def abort(self, request_id: str) -> None:
        """Aborts, and keeps the answer."""
        self._keep(filter(None, [self.scheduler.abort(request_id)]))

    def step(self) -> list[ScheduledRun]:
        """One pass; the rows that it ran, none if it failed."""
        try:
            batch = self.scheduler.schedule()
            self._keep(self.scheduler.update(batch, self.backend.run(batch)))
        except RuntimeError as error:
            batch = []
            self.scheduler.retry(str(error))
        self._keep(self.scheduler.take_ended())
        self.pool.check_integrity()
        return batch

    def finish(self, watch: Callable[[list[ScheduledRun]], None] = lambda _: None) -> None:
        """Steps until nothing is left to do."""
        while self.scheduler.has_work:
            watch(self.step())

    def text(self, request_id: str) -> list[int]:
        """All tokens that a request was answered."""
        return [token for event in self.answers[request_id] for token in event.token_ids]

    def stats(self, request_id: str) -> SequenceStats:
        """What a finished request cost."""
        stats = self.answers[request_id][-1].stats
        assert stats is not None
        return stats

    def _keep(self, events: "list[TokenEvent] | filter[TokenEvent]") -> None:
        for event in events:
            self.answers[event.request_id].append(event)
