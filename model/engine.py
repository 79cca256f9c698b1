"""The engine: requests in, token events out, one pass a step.

    batch  = scheduler.schedule()
    result = backend.run(Rows(batch), Readouts.of(batch))
    events = scheduler.update(batch, result)

Synchronous and single-threaded; `worker` gives it a process of its own. Invariant: every request that
`add` takes ends with exactly one event that has a finish reason, and gives its pages back with it. An
exception while one request is worked for ends this one; after one in a pass all are read again, and who
is at fault is found (`schedule.isolation`). `step` raises only what shows that the engine itself is broken.
"""

import hashlib
import logging
import traceback
from array import array
from time import thread_time

import msgspec

from model.grammar.check import GrammarError
from model.grammar.queue import GrammarQueue
from model.grammar.state import GrammarState, Vocabulary
from model.network.config import LoopedConfig
from model.network.looped import LoopedTransformer
from model.options import DEFAULT_ROW_BUDGET, POLICIES, EngineOptions, unknown_policy
from model.passes.backend import Backend, BackendMaker
from model.passes.memory import cache_memory, free_memory, held_memory
from model.passes.rows import Rows
from model.passes.torch.backend import TorchMaker
from model.protocol import (
    EngineInfo,
    EngineStats,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    SequenceStats,
    TokenEvent,
)
from model.rules import RuleError, check_request
from model.schedule.batch import PassResult, Readouts, ScheduledRun
from model.schedule.cost import FixedBudget, speculates_alone
from model.schedule.drafts import LOOKUP_POLICIES, Experience, default_depths, make_policy, policy_depths
from model.schedule.pages import PagePool, PrefixKeys, prefix_salt
from model.schedule.scheduler import Scheduler
from model.schedule.sequence import Sequence
from model.schedule.source import Source
from model.schedule.watch import PriceKeeper
from model.schedule.wave import Constraint, Unconstrained, Wave

log = logging.getLogger(__name__)

PAGE_SIZE = 16  # positions
NO_VOCABULARY = "a grammar needs the model's tokenizer.json, which is missing or cannot be used for it"
GRAMMAR_PATIENCE = 0.002  # seconds that an engine with nothing else to do waits for a grammar at a time


class EngineConfigError(ValueError):
    """Engine options that cannot work together or with this model."""


class Engine:
    """A loaded model that continues many sequences at once."""

    def __init__(
        self,
        model: LoopedTransformer,
        options: EngineOptions | None = None,
        vocabulary: Vocabulary | None = None,
        maker: BackendMaker | None = None,
    ) -> None:
        """`vocabulary` is for requests with a grammar; without it they are answered by an error.

        `maker` brings the backend, by default that of torch modules.
        """
        maker = maker or TorchMaker()
        options = options or EngineOptions()
        if options.prefill_rows is None:  # one chunk in each loop
            rows = options.prefill_chunk_size * model.config.num_loops
            options = msgspec.structs.replace(options, prefill_rows=rows)
        self.model = model
        each = maker.cache_bytes(model).per_token
        fit = _fitting_tokens(model, options, each)
        self.max_model_len = _max_model_len(model, options, fit)
        self.draft_depths = _draft_depths(model, options)
        self._given_depths = None if options.draft_depths is None else self.draft_depths
        self.draft_policy = _known_policy(options.draft_policy)
        self.experience = Experience.none()
        num_tokens = _num_cache_tokens(options, self.max_model_len, fit, each)
        _warn_if_too_large(num_tokens * each, free_memory(model.device).free)
        # Source and text of a request begin a page each.
        num_pages = -(-num_tokens // PAGE_SIZE) + (model.config.encoder is not None)
        self.pool = PagePool(num_pages, PAGE_SIZE)
        self.scheduler = Scheduler(self.pool, options, FixedBudget(options.row_budget or DEFAULT_ROW_BUDGET))
        self.backend: Backend = maker.make(model, self.pool.num_tokens, self.max_model_len)
        self.prices: PriceKeeper | None = None
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
            max_loops=config.most_loops,
            draft_depths=sorted(self._depths(self.draft_policy, config.num_loops)),
            eos_token_ids=list(config.eos_token_ids),
            backend=self.backend.facts.name,
            device=self.backend.facts.device,
            dtype=self.backend.facts.dtype,
            kv_cache_tokens=self.pool.num_tokens,
            kv_page_size=self.pool.page_size,
            kv_cache_dtype=self.backend.facts.kv_cache_dtype,
            max_num_seqs=self.scheduler.limits.max_num_seqs,
            deterministic=self.backend.facts.is_exact,
            draft_policy=self.draft_policy,
            draft_policies=list(POLICIES),
            row_budget=self.scheduler.cost.most_rows,
            speculation_enabled=self.speculates,
            grammar_problem=NO_VOCABULARY if self._grammars is None else "",
            has_noisy_start=self.model.config.has_noisy_start,
            prompt_scores_problem=_prompt_scores_problem(config),
            is_encoder_decoder=config.encoder is not None,
            has_exit_gate=config.exit_gate,
        )

    @property
    def stats(self) -> EngineStats:
        """Gauges and counters for the metrics."""
        scheduler, counts = self.scheduler, self.scheduler.counts
        held, agreement = held_memory(self.backend.facts.device), self.experience.depths
        return EngineStats(
            num_requests_running=len(scheduler.running),
            num_requests_waiting=scheduler.num_waiting,
            kv_cache_usage=1.0 - self.pool.num_free_pages / self.pool.num_pages,
            rows_in_flight=scheduler.num_rows_in_flight,
            row_budget=scheduler.cost.most_rows,
            speculation_enabled=int(self.speculates),
            passes=counts.passes,
            rows=counts.rows,
            pass_rows=dict(counts.pass_rows),
            prompt_tokens=counts.prompt_tokens,
            generation_tokens=counts.generation_tokens,
            draft_tokens=counts.accepted_drafts + counts.rejected_drafts,
            accepted_tokens=counts.accepted_drafts,
            flushes=dict(counts.flushes),
            compared_readouts=dict(agreement.num_observed),
            agreeing_readouts=dict(agreement.num_agreed),
            prefix_cache_queries=counts.prefix_queries,
            prefix_cache_hits=counts.prefix_hits,
            preemptions=counts.preemptions,
            resident_memory=held.resident,
            device_memory=held.device,
        )

    @property
    def speculates(self) -> bool:
        """Whether a request that is alone is speculated for: by its policy, and by the prices of passes."""
        depths = self._depths(self.draft_policy, self.model.config.num_loops)
        drafts = self.draft_policy in LOOKUP_POLICIES or bool(depths)
        return drafts and speculates_alone(self.scheduler.cost)

    @property
    def has_requests(self) -> bool:
        """Whether any request is still to be answered."""
        return self.scheduler.has_work or bool(self._answered or self._grammars)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return self.has_requests or (self.prices is not None and self.prices.is_due)

    def add(self, request: GenerationRequest) -> None:
        """Takes a request; one that cannot be served is answered by an "error" event."""
        try:
            self._add(request)
        except Exception as error:
            log.exception("request %s could not be taken", request.request_id)
            self._answer(request, "error", f"{type(error).__name__}: {error}")

    def _add(self, request: GenerationRequest) -> None:
        if self.prices is not None:
            self.prices.pause()
        try:
            check_request(request, self.info)
        except RuleError as error:
            self._refuse(request, str(error))
            return
        if request.max_tokens == 0 and request.prompt_logprobs is None:
            self._answer(request, "length")
        elif request.grammar is not None and self._grammars is not None:
            self._grammars.add(request, with_drafts=self._policy_name(request) != "none")
        else:
            self.scheduler.add(self._sequence(request, Unconstrained()))

    def abort(self, request_id: str) -> None:
        """Ends a request before its time; unknown ids are ignored."""
        compiling = self._grammars and self._grammars.remove(request_id)
        if compiling:
            self._answer(compiling, "abort")
        event = self.scheduler.abort(request_id)
        if event is not None:
            self._answered.append(event)

    def step(self) -> list[TokenEvent]:
        """One pass, if any rows are due; new tokens and ends, in order."""
        if self.prices is not None and not self.has_requests:
            self.prices.work()
            return []
        if self._grammars:
            self._start_compiled(self._grammars)
        events, self._answered = self._answered, []
        return events + self._pass() + self.scheduler.take_ended()

    def run_pass(self, batch: list[ScheduledRun]) -> PassResult:
        """One pass over rows that have pages; commits nothing."""
        return self.backend.run(Rows(batch), Readouts.of(batch))

    def _pass(self) -> list[TokenEvent]:
        """Runs the rows that are due. Where that fails, nothing has been committed, and it is tried again."""
        try:
            batch = self.scheduler.schedule()
            return self.scheduler.update(batch, self._timed_pass(batch)) if batch else []
        except Exception as error:
            if not self.scheduler.running:
                raise  # no request's rows can be at fault
            log.exception("a pass of %d sequences failed", len(self.scheduler.running))
            # They hold the pass's tensors, which may fill the memory.
            traceback.clear_frames(error.__traceback__)
            self.scheduler.retry(f"{type(error).__name__}: {error}")
            if not self._is_sound():
                raise
            return []

    def _timed_pass(self, batch: list[ScheduledRun]) -> PassResult:
        """One pass; what it took goes to the keeper of prices."""
        if self.prices is None:
            return self.run_pass(batch)
        started = thread_time()
        result = self.run_pass(batch)
        self.prices.note(self.scheduler.expected_milliseconds, 1000 * (thread_time() - started))
        return result

    def _is_sound(self) -> bool:
        """Whether a pass of a made-up sequence succeeds; if not, no request is at fault. It needs a page."""
        request = GenerationRequest(
            request_id="self-test", prompt_token_ids=[0], max_tokens=1, sampling=SamplingParams(temperature=0)
        )
        sequence = self._sequence(request, Unconstrained())
        if not sequence.open_tables(self.pool, []):
            return False
        try:
            for loop in range(self.model.config.num_loops):
                is_last = loop + 1 == self.model.config.num_loops
                self.run_pass([ScheduledRun(sequence, 0, 1, loop, int(is_last))])
        except Exception:
            log.exception("a pass without any request's rows failed as well")
            return False
        finally:
            sequence.free_tables(self.pool)
        return True

    def run(self, requests: list[GenerationRequest]) -> dict[str, list[TokenEvent]]:
        """Continues requests together until all have ended; their events by request id."""
        for request in requests:
            self.add(request)
        events: dict[str, list[TokenEvent]] = {request.request_id: [] for request in requests}
        while self.has_requests:
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
        for request, matchers, problem in grammars.compiled(GRAMMAR_PATIENCE if idle else 0.0):
            if matchers is None:
                self._refuse(request, problem)
                continue
            endings = self._ending_tokens(request)
            try:
                state = GrammarState(grammars.vocabulary, matchers, len(self._prompt(request)), endings)
            except GrammarError as error:
                self._refuse(request, str(error))
                continue
            except Exception as error:
                log.exception("the grammar of request %s failed", request.request_id)
                self._answer(request, "error", f"{type(error).__name__}: {error}")
                continue
            self.scheduler.add(self._sequence(request, state))

    def _ending_tokens(self, request: GenerationRequest) -> frozenset[int]:
        eos = () if request.ignore_eos else self.model.config.eos_token_ids
        return frozenset(eos) | frozenset(request.stop_token_ids)

    def _sequence(self, request: GenerationRequest, constraint: Constraint) -> Sequence:
        num_loops = request.num_loops or self.model.config.num_loops
        name, prompt, source = self._policy_name(request), self._prompt(request), self._source(request)
        num_source = 0 if source is None else len(source.tokens)
        wave = Wave(
            prompt,
            num_loops=num_loops,
            policy=make_policy(name, self._depths(name, num_loops), self.experience),
            length_limit=min(len(prompt) + request.max_tokens, self.max_model_len - num_source),
            ending_tokens=self._ending_tokens(request),
            constraint=constraint,
            prefix=len(prompt) if self.model.config.prefix_lm else 0,
            exit_threshold=request.exit_threshold,
            ends_alone=self._reads_coda_of_loops(request),
        )
        whole = _whole_prompt(wave) if source is None else source.digest.hex()
        salt = prefix_salt(request, num_loops, whole)
        return Sequence(request, wave, PrefixKeys(salt, PAGE_SIZE), source)

    def _prompt(self, request: GenerationRequest) -> list[int]:
        """What the text begins with: the prompt, or behind an encoder the decoder's own beginning."""
        encoder = self.model.config.encoder
        if encoder is None:
            return request.prompt_token_ids
        return [encoder.start_token_id, *request.decoder_prompt]

    def _source(self, request: GenerationRequest) -> Source | None:
        if self.model.config.encoder is None:
            return None
        is_shared = self.scheduler.limits.prefix_caching
        return Source(request.prompt_token_ids, request.cache_salt, PAGE_SIZE, is_shared=is_shared)

    def _policy_name(self, request: GenerationRequest) -> str:
        is_plain = request.exit_threshold is not None or self._reads_coda_of_loops(request)
        if is_plain or not request.speculation:
            return "none"
        return request.draft_policy or self.draft_policy

    def _reads_coda_of_loops(self, request: GenerationRequest) -> bool:
        """Whether the coda runs behind every loop for scores, and so must find final K/V before each row."""
        return request.loop_logprobs is not None and self.model.config.num_coda_layers > 0

    def _depths(self, policy: str, num_loops: int) -> frozenset[int]:
        return policy_depths(policy, num_loops, self.draft_depths, self._given_depths)

    def _refuse(self, request: GenerationRequest, problem: str) -> None:
        """Ends a request that is at fault itself."""
        self._answer(request, "error", problem, is_refusal=True)

    def _answer(
        self,
        request: GenerationRequest,
        reason: FinishReason,
        error: str | None = None,
        *,
        is_refusal: bool = False,
    ) -> None:
        """Ends a request that never ran."""
        self._answered.append(
            TokenEvent(
                request_id=request.request_id,
                finish_reason=reason,
                stats=SequenceStats(),
                error=error,
                is_refusal=is_refusal,
            )
        )


def _prompt_scores_problem(config: LoopedConfig) -> str:
    """Why log-probabilities of a prompt would mean nothing; empty if they mean something."""
    if config.encoder is not None:
        return "the prompt of this model is read by its encoder, which predicts no token"
    if not config.prefix_lm:
        return ""
    return (
        "this model reads its prompt both ways, so each of its tokens has seen the one that would be scored"
    )


def _whole_prompt(wave: Wave) -> str:
    """A digest of a prompt that is read both ways: its K/V is worth nothing to any other prompt."""
    tokens = array("q", wave.tokens[: wave.prefix]).tobytes()
    return hashlib.blake2b(tokens, digest_size=16).hexdigest() if tokens else ""


def _known_policy(name: str) -> str:
    if name not in POLICIES:
        raise EngineConfigError(unknown_policy(name))
    return name


def _fitting_tokens(model: LoopedTransformer, options: EngineOptions, each: int) -> int:
    """Cells of `each` bytes that the cache may have: as many as was said, or as memory holds."""
    if options.kv_cache_tokens is not None:
        return options.kv_cache_tokens
    if options.kv_cache_memory is not None:
        return options.kv_cache_memory // each
    return cache_memory(model, model.device, options) // options.cache_sharers // each


def _is_sized(options: EngineOptions) -> bool:
    """Whether a size of the cache was asked for."""
    return options.kv_cache_tokens is not None or options.kv_cache_memory is not None


def _max_model_len(model: LoopedTransformer, options: EngineOptions, fit: int) -> int:
    """The longest context in tokens, where the cache may have `fit` cells.

    Where nobody asked for a length or a size and the model's own length does not fit, it is what does.
    """
    most = model.config.max_positions
    wanted = options.max_model_len or most
    if not 1 <= wanted <= most:
        raise EngineConfigError(f"max_model_len {wanted} is outside 1..{most}, the model's positions")
    if options.max_model_len is not None or _is_sized(options) or not PAGE_SIZE <= fit < wanted:
        return wanted
    length = fit // PAGE_SIZE * PAGE_SIZE
    log.warning(
        "the model's context of %d tokens needs more memory than there is; it is cut to %d tokens "
        "(max_model_len says how many are wanted)",
        wanted,
        length,
    )
    return length


def _num_cache_tokens(options: EngineOptions, max_model_len: int, fit: int, each: int) -> int:
    """Cells of the cache: `fit` of `each` bytes, or fewer where `max_num_seqs` contexts need no more.

    Raises EngineConfigError when one context would not fit.
    """
    if fit < max_model_len:
        raise EngineConfigError(
            f"max_model_len {max_model_len} needs {max_model_len * each} bytes of KV cache for "
            f"one request, {fit * each} are there ({fit} tokens): lower max_model_len or give more memory"
        )
    return fit if _is_sized(options) else min(fit, max_model_len * options.max_num_seqs)


def _draft_depths(model: LoopedTransformer, options: EngineOptions) -> tuple[int, ...]:
    loops = model.config.most_loops
    if options.draft_depths is None:
        return default_depths(model.config.num_loops, loops)
    for depth in options.draft_depths:
        if not 1 <= depth < loops:
            raise EngineConfigError(f"draft depth {depth} is outside 1..{loops - 1} (loops - 1)")
    return tuple(sorted(set(options.draft_depths)))


def _warn_if_too_large(cache: int, free: int) -> None:
    """Says so where a size was asked for that memory does not hold: the cache is filled later, in silence."""
    if cache > free:
        log.warning(
            "the KV cache may grow to %d MiB, but %d MiB of memory are free: the engine may be killed for it "
            "(kv_cache_memory and kv_cache_tokens set its size)",
            cache >> 20,
            free >> 20,
        )
