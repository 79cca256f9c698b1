"""The engine: requests in, token events out, one pass a step.

    batch  = scheduler.schedule()
    tokens = runner.forward(batch)
    events = scheduler.update(batch, tokens)

Synchronous and single-threaded; `worker` gives it a process of its own. Invariant: every request that
`add` takes ends with exactly one event that has a finish reason, and gives its pages back with it.
"""

import logging
from dataclasses import dataclass, field

import torch

from model.cache import PagePool, PrefixKeys
from model.compiling import GrammarQueue
from model.cost import FixedBudget
from model.drafts import POLICIES, Experience, make_policy, policy_depths
from model.grammar import GrammarError
from model.looped import LoopedTransformer
from model.matching import GrammarState, Vocabulary
from model.protocol import (
    EngineInfo,
    EngineStats,
    FinishReason,
    GenerationRequest,
    SequenceStats,
    TokenEvent,
)
from model.runner import Runner, bytes_per_token
from model.scheduler import DEFAULT_ROW_BUDGET, Scheduler, SchedulerLimits
from model.sequence import Sequence
from model.wave import Constraint, Unconstrained, Wave

log = logging.getLogger(__name__)

PAGE_SIZE = 16  # positions
GRAMMAR_PATIENCE = 0.002  # seconds that an engine with nothing else to do waits for a grammar at a time
CPU_CACHE_SHARE, GPU_CACHE_SHARE = 0.25, 0.85  # of the memory free when the model is loaded
DEFAULT_POLICY = "adaptive"


class EngineConfigError(ValueError):
    """Engine options that cannot work together or with this model."""


@dataclass(frozen=True)
class EngineConfig:
    """Options of an engine; None means the model's own or what fits."""

    draft_depths: tuple[int, ...] | None = None
    draft_policy: str = DEFAULT_POLICY
    max_model_len: int | None = None  # tokens
    kv_cache_tokens: int | None = None
    kv_cache_memory: int | None = None  # bytes; `kv_cache_tokens` goes first
    row_budget: int = DEFAULT_ROW_BUDGET
    limits: SchedulerLimits = field(default_factory=SchedulerLimits)


class Engine:
    """A loaded model that continues many sequences at once."""

    def __init__(
        self,
        model: LoopedTransformer,
        config: EngineConfig | None = None,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        """`vocabulary` is for requests with a grammar; without it they are answered by an error."""
        config = config or EngineConfig()
        self.model = model
        self.max_model_len = _max_model_len(model, config)
        self.draft_depths = _draft_depths(model, config)
        self._given_depths = None if config.draft_depths is None else self.draft_depths
        self.draft_policy = _known_policy(config.draft_policy)
        self.experience = Experience.none()
        self.pool = PagePool(-(-self._num_cache_tokens(config) // PAGE_SIZE), PAGE_SIZE)
        self.scheduler = Scheduler(self.pool, config.limits, FixedBudget(config.row_budget))
        self.runner = Runner(model, self.pool.num_tokens)
        self._grammars = None if vocabulary is None else GrammarQueue(vocabulary)
        self._answered: list[TokenEvent] = []  # events that need no pass

    @property
    def info(self) -> EngineInfo:
        """Facts for the server."""
        config = self.model.config
        return EngineInfo(
            family=config.family,
            vocab_size=config.vocab_size,
            max_model_len=self.max_model_len,
            num_loops=config.num_loops,
            draft_depths=sorted(self._depths(self.draft_policy, config.num_loops)),
            eos_token_ids=list(config.eos_token_ids),
            device=str(self.model.device),
            dtype=str(self.model.dtype).removeprefix("torch."),
            kv_cache_tokens=self.pool.num_tokens,
            max_num_seqs=self.scheduler.limits.max_num_seqs,
            deterministic=self.model.row_invariant,
            draft_policy=self.draft_policy,
            draft_policies=list(POLICIES),
            row_budget=self.scheduler.cost.most_rows,
            has_noisy_start=self.model.config.has_noisy_start,
        )

    @property
    def stats(self) -> EngineStats:
        """Gauges and counters for the metrics."""
        scheduler, counts = self.scheduler, self.scheduler.counts
        return EngineStats(
            num_requests_running=len(scheduler.running),
            num_requests_waiting=scheduler.num_waiting,
            kv_cache_usage=1.0 - self.pool.num_free_pages / self.pool.num_pages,
            rows_in_flight=scheduler.num_rows_in_flight,
            row_budget=scheduler.cost.most_rows,
            passes=counts.passes,
            rows=counts.rows,
            pass_rows=dict(counts.pass_rows),
            prompt_tokens=counts.prompt_tokens,
            generation_tokens=counts.generation_tokens,
            draft_tokens=counts.accepted_drafts + counts.rejected_drafts,
            accepted_tokens=counts.accepted_drafts,
            flushes=dict(counts.flushes),
            prefix_cache_queries=counts.prefix_queries,
            prefix_cache_hits=counts.prefix_hits,
            preemptions=counts.preemptions,
        )

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return self.scheduler.has_work or bool(self._answered or self._grammars)

    def add(self, request: GenerationRequest) -> None:
        """Takes a request; one that cannot be served is answered by an "error" event."""
        problem = self._problem(request)
        if problem:
            self._answer(request, "error", problem)
        elif request.max_tokens == 0 and request.prompt_logprobs is None:
            self._answer(request, "length")
        elif request.grammar is not None and self._grammars is not None:
            self._grammars.add(request)
        else:
            self.scheduler.add(self._sequence(request, Unconstrained()))

    def abort(self, request_id: str) -> None:
        """Ends a request before its time; unknown ids are ignored."""
        compiling = self._grammars and self._grammars.remove(request_id)
        if compiling:
            self._answer(compiling, "abort")
        event = self.scheduler.abort(request_id)
        if event is not None:
            self.runner.sampler.forget(request_id)
            self._answered.append(event)

    def step(self) -> list[TokenEvent]:
        """One pass, if any rows are due; new tokens and ends, in order."""
        if self._grammars:
            self._start_compiled(self._grammars)
        events, self._answered = self._answered, []
        batch = self.scheduler.schedule()
        if batch:
            events += self.scheduler.update(batch, self.runner.forward(batch))
        for event in events:
            if event.finish_reason:
                self.runner.sampler.forget(event.request_id)
        return events

    def run(self, requests: list[GenerationRequest]) -> dict[str, list[TokenEvent]]:
        """Continues requests together until all have ended; their events by request id."""
        for request in requests:
            self.add(request)
        events: dict[str, list[TokenEvent]] = {request.request_id: [] for request in requests}
        while self.has_work:
            for event in self.step():
                events[event.request_id].append(event)
        return events

    def check_integrity(self) -> None:
        """Raises CacheIntegrityError if a page is lost or doubled, or still owned while nothing runs."""
        self.pool.check_integrity()
        if not self.scheduler.running and self.pool.num_free_pages != self.pool.num_pages:
            raise RuntimeError("pages are in use though no sequence runs")

    def _start_compiled(self, grammars: GrammarQueue) -> None:
        """Queues the requests whose grammars are ready."""
        idle = not self.scheduler.has_work and not self._answered
        for request, matcher, problem in grammars.compiled(GRAMMAR_PATIENCE if idle else 0.0):
            if matcher is None:
                self._answer(request, "error", problem)
                continue
            endings = self._ending_tokens(request)
            try:
                state = GrammarState(grammars.vocabulary, matcher, len(request.prompt_token_ids), endings)
            except GrammarError as error:
                self._answer(request, "error", str(error))
                continue
            self.runner.sampler.constrain(request.request_id, state)
            self.scheduler.add(self._sequence(request, state))

    def _ending_tokens(self, request: GenerationRequest) -> frozenset[int]:
        eos = () if request.ignore_eos else self.model.config.eos_token_ids
        return frozenset(eos) | frozenset(request.stop_token_ids)

    def _sequence(self, request: GenerationRequest, constraint: Constraint) -> Sequence:
        num_loops = request.num_loops or self.model.config.num_loops
        name = (request.draft_policy or self.draft_policy) if request.speculation else "none"
        wave = Wave(
            request.prompt_token_ids,
            num_loops=num_loops,
            policy=make_policy(name, self._depths(name, num_loops), self.experience),
            length_limit=min(len(request.prompt_token_ids) + request.max_tokens, self.max_model_len),
            ending_tokens=self._ending_tokens(request),
            constraint=constraint,
        )
        noise = (request.init_scale, request.sampling.seed) if request.init_scale > 0 else ""
        salt = f"{num_loops}\n{noise}\n{request.cache_salt}"  # all that K/V depends on beside the tokens
        return Sequence(request, wave, PrefixKeys(salt, PAGE_SIZE))

    def _depths(self, policy: str, num_loops: int) -> frozenset[int]:
        return policy_depths(policy, num_loops, self.draft_depths, self._given_depths)

    def _problem(self, request: GenerationRequest) -> str | None:
        """Why a request cannot be served, or None. The server checks the same with better words."""
        length, loops = len(request.prompt_token_ids), self.model.config.num_loops
        if not length:
            return "prompt_token_ids is empty; at least one token is needed"
        vocab_size = self.model.config.vocab_size
        ids = [*request.prompt_token_ids, *request.stop_token_ids, *request.sampling.logit_bias]
        if outside := next((i for i in ids if not 0 <= i < vocab_size), None):
            return f"token id {outside} is outside the vocabulary of {vocab_size}"
        if request.max_tokens < 0 or length + request.max_tokens > self.max_model_len:
            return (
                f"{length} prompt tokens and max_tokens {request.max_tokens} exceed the context of "
                f"{self.max_model_len} tokens"
            )
        if request.num_loops is not None and not 1 <= request.num_loops <= loops:
            return f"num_loops {request.num_loops} is outside 1..{loops}"
        if request.init_scale and not self.model.config.has_noisy_start:
            return (
                f"init_scale is {request.init_scale}, but the state of this model does not start from noise"
            )
        if request.draft_policy not in {None, *POLICIES}:
            return f"draft_policy {request.draft_policy!r} is not known; {', '.join(POLICIES)} are"
        if request.grammar is not None and self._grammars is None:
            return "a grammar needs the model's tokenizer.json, which is missing or cannot be used for it"
        return None

    def _answer(self, request: GenerationRequest, reason: FinishReason, error: str | None = None) -> None:
        """Ends a request that never ran."""
        self._answered.append(
            TokenEvent(
                request_id=request.request_id, finish_reason=reason, stats=SequenceStats(), error=error
            )
        )

    def _num_cache_tokens(self, config: EngineConfig) -> int:
        """Token slots of the cache; by default `max_num_seqs` full contexts, or what memory allows.

        Where nobody asked for a length of the context and the model's own does not fit, `max_model_len`
        becomes what does. Raises EngineConfigError when a context that was asked for would not fit.
        """
        each = bytes_per_token(self.model)
        memory = config.kv_cache_memory or _memory_for_cache(self.model.device)
        fit = int(memory / each)
        if config.kv_cache_tokens is not None:
            fit = config.kv_cache_tokens
        elif config.kv_cache_memory is None:
            fit = min(fit, self.max_model_len * config.limits.max_num_seqs)
            if config.max_model_len is None and PAGE_SIZE <= fit < self.max_model_len:
                self.max_model_len = self._shortened(fit)
        if fit < self.max_model_len:
            raise EngineConfigError(
                f"max_model_len {self.max_model_len} needs {self.max_model_len * each} bytes of KV cache for "
                f"one request, {fit * each} are there ({fit} tokens): lower max_model_len or give more memory"
            )
        return fit

    def _shortened(self, fit: int) -> int:
        """The longest context that `fit` token slots hold, said in the log."""
        length = fit // PAGE_SIZE * PAGE_SIZE
        log.warning(
            "the model's context of %d tokens needs more memory than there is; it is cut to %d tokens "
            "(max_model_len says how many are wanted)",
            self.max_model_len,
            length,
        )
        return length


def _known_policy(name: str) -> str:
    if name not in POLICIES:
        raise EngineConfigError(f"draft_policy {name!r} is not known; {', '.join(POLICIES)} are")
    return name


def _max_model_len(model: LoopedTransformer, config: EngineConfig) -> int:
    most = model.config.max_positions
    wanted = config.max_model_len or most
    if not 1 <= wanted <= most:
        raise EngineConfigError(f"max_model_len {wanted} is outside 1..{most}, the model's positions")
    return wanted


def _draft_depths(model: LoopedTransformer, config: EngineConfig) -> tuple[int, ...]:
    loops = model.config.num_loops
    if config.draft_depths is None:
        return model.config.default_draft_depths
    for depth in config.draft_depths:
        if not 1 <= depth < loops:
            raise EngineConfigError(f"draft depth {depth} is outside 1..{loops - 1} (num_loops - 1)")
    return tuple(sorted(set(config.draft_depths)))


def _memory_for_cache(device: torch.device) -> float:
    """Bytes that the KV cache may take."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free * GPU_CACHE_SHARE
    with open("/proc/meminfo") as file:
        lines = dict(line.split(":", 1) for line in file)
    return int(lines["MemAvailable"].split()[0]) * 1024 * CPU_CACHE_SHARE
