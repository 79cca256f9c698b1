"""Messages between the API process and the engine, and what the server asks of any engine.

Imports neither torch nor a web framework, so that both sides may import it. Invariant: every request
that `submit` accepts is answered by events whose last one, and only that one, has a finish reason.
"""

from collections.abc import AsyncIterator, Mapping
from typing import Literal, Protocol

import msgspec

FinishReason = Literal["stop", "length", "abort", "error"]
# Unloaded: there is no process, and nobody has asked for one yet.
EngineState = Literal["unloaded", "loading", "ready", "dead"]
# Why an engine had to be started again: its process ended by itself or was killed (exited), said what was
# wrong (failed), said nothing for too long (silent), stood still by a signal (stopped), took too long to load
# (load_timeout), could not be started (not_started), or said what is no message (not_understood).
RestartReason = Literal[
    "exited", "failed", "silent", "stopped", "load_timeout", "not_started", "not_understood"
]
GrammarKind = Literal["json_object", "json_schema", "regex", "choice", "lark"]
MOST_WAVE_PASSES = 64  # that one event tells of
GREEDY_BELOW = 1e-5  # a temperature below is greedy: dividing by it would overflow


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How a token is chosen from logits. The defaults change nothing; `temperature` 0 is greedy.

    `logit_bias` maps token ids to additive biases. `seed` is a signed 64-bit integer: the same seed,
    prompt and parameters give the same text, whatever else runs.
    """

    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int = 0

    @property
    def is_drawn(self) -> bool:
        """Whether chance has a part in a token."""
        return self.temperature > GREEDY_BELOW

    @property
    def has_penalties(self) -> bool:
        """Whether a token's score depends on how often it came before."""
        neutral = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) == (0, 0, 1)
        return not neutral


class Grammar(msgspec.Struct, frozen=True, kw_only=True):
    """What the generated text must match; `model.grammar.check.check_grammar` says whether `text` is valid.

    `text` is JSON (a schema, or a list of strings for `choice`), a regular expression or a grammar in
    Lark's notation; empty for `json_object`, which is any JSON object. `special_tokens` are those of the
    model that a grammar in Lark's notation may name, such as `<tool_call>`; all others never come.
    """

    kind: GrammarKind
    text: str = ""
    special_tokens: tuple[str, ...] = ()


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position, from the logits of the last depth before any adjustment.

    `logprob` and `rank` (1 is the likeliest) are the token's own; `top` holds the likeliest tokens as
    (id, log-probability), likeliest first.
    """

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]] = []


class LoopScores(msgspec.Struct, frozen=True, array_like=True):
    """What one loop says at the place of a token that the last loop has chosen.

    `scores` are the chosen token's own. `agrees`: the loop's most likely token is that of the last loop.
    `gate` is the probability by which the model's exit gate stops here, if it has stopped at no loop before;
    None in a model without a gate.
    """

    scores: TokenLogprobs
    agrees: bool
    gate: float | None = None


class RequestOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a sequence is continued, but for the choice of tokens: what those of one HTTP request share."""

    stop_token_ids: list[int] = []
    min_tokens: int = 0
    ignore_eos: bool = False
    speculation: bool = True
    num_loops: int | None = None  # None: the model's own
    init_scale: float = 0.0  # of the noise, decided by the seed, that a recurrent model's state starts from
    priority: int = 0  # smaller is served first
    logprobs: int | None = None  # likeliest tokens to report beside each chosen one; None: nothing
    prompt_logprobs: int | None = None  # the same for the prompt's tokens, the first excepted
    grammar: Grammar | None = None
    cache_salt: str = ""  # requests share cached prefixes only with those of the same salt
    tenant: str = ""  # whose it is, empty without keys: tenants take turns in the queue
    draft_policy: str | None = None  # None: the engine's own
    decoder_prompt: list[int] = []  # behind an encoder: what the text begins with, after its start token
    include_wave: bool = False  # tell what each pass did for it
    loop_logprobs: int | None = None  # likeliest tokens to report of every loop; None: nothing of any
    # Lossy: a token is what the first loop says at which the gate has stopped with this probability.
    exit_threshold: float | None = None


class GenerationRequest(RequestOptions, frozen=True, kw_only=True):
    """One sequence to continue. Ids are of the model's vocabulary; counts are tokens.

    In a model with an encoder the prompt is its source, and the decoder begins a text of its own.

    The engine ends it at `max_tokens`, at a token of `stop_token_ids` or, unless `ignore_eos`, at an
    end-of-sequence token of the model; the ending token is reported like any other. With a `grammar`
    it ends, as "stop" without a `stop_token_id`, where the grammar is complete and nothing can follow;
    before that the ending tokens come only where the text may end, and `min_tokens` yields to the grammar.
    `model.rules` says what may be asked.
    """

    request_id: str
    prompt_token_ids: list[int]
    max_tokens: int
    sampling: SamplingParams


class SequenceStats(msgspec.Struct, frozen=True, kw_only=True):
    """What a finished request cost. Passes per token = passes / tokens committed."""

    passes: int = 0  # decode passes the sequence took part in
    rows: int = 0  # decode rows it ran, flushed ones included
    accepted_drafts: int = 0
    rejected_drafts: int = 0
    cached_prompt_tokens: int = 0
    preemptions: int = 0
    queue_seconds: float = 0.0  # from its arrival at the engine to its first pass


class WaveToken(msgspec.Struct, frozen=True, array_like=True):
    """A committed token. `guesses` are what the readouts at its place said, as (depth, token), the last
    depth's own at the end; a depth that was not read out is missing.
    """

    token_id: int
    guesses: list[tuple[int, int]]


class WavePass(msgspec.Struct, frozen=True, array_like=True):
    """What one pass did for one request.

    `runs` are the rows that took part, as (first position, number, loops done behind the pass). `position`
    is that of the first token that was not final before; from there on stand `committed`, the tokens that
    the pass made final, and behind them `drafts`, what is guessed now. `flushed` is the position of the
    first draft that was dropped and the depth that contradicted it.
    """

    runs: list[tuple[int, int, int]]
    position: int
    committed: list[WaveToken]
    drafts: list[int]
    flushed: tuple[int, int] | None


class WaveRecord(msgspec.Struct, frozen=True, array_like=True):
    """The latest passes of one request, at most `MOST_WAVE_PASSES`, and how many before them are left out."""

    num_loops: int
    passes: list[WavePass]
    omitted: int = 0

    def followed_by(self, later: "WaveRecord | None") -> "WaveRecord":
        """What this record and a later one say together."""
        if later is None:
            return self
        passes = [*self.passes, *later.passes] if later.omitted == 0 else later.passes
        kept = passes[-MOST_WAVE_PASSES:]
        total = self.omitted + len(self.passes) + later.omitted + len(later.passes)
        return WaveRecord(self.num_loops, kept, total - len(kept))


class TokenEvent(msgspec.Struct, frozen=True, kw_only=True):
    """New tokens of one request. Exactly one event of a request has a `finish_reason`, the last.

    `stop_token_id` is the token that ended it, if one did (it is also the last of `token_ids`).
    `stats` comes with the finish reason; `error` says what went wrong when that is "error", for the log or,
    if `is_refusal`, for whoever sent the request: it is at fault and would meet the same again.
    `logprobs` has one entry for each of `token_ids` if the request asked; `prompt_logprobs` comes once,
    with or before the first token: one entry for each prompt token, None for the first. `wave` tells of the
    passes since the event before, if the request asked for it. `loop_logprobs` has, for each of `token_ids`,
    an entry for each loop that had been run when the token was chosen, if the request asked.
    """

    request_id: str
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    stats: SequenceStats | None = None
    error: str | None = None
    is_refusal: bool = False
    wave: WaveRecord | None = None
    loop_logprobs: list[list[LoopScores]] = []


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a loaded engine is; fixed until the engine restarts."""

    family: str
    vocab_size: int
    max_model_len: int  # tokens of prompt and completion together
    num_loops: int
    max_loops: int = 0  # that a request may ask for; see `most_loops`
    draft_depths: list[int]
    eos_token_ids: list[int]
    device: str
    dtype: str
    kv_cache_tokens: int
    max_num_seqs: int
    kv_page_size: int = 16  # tokens of a page of the cache
    kv_cache_dtype: str = ""  # what K/V is held in
    backend: str = "torch"  # what runs the passes
    deterministic: bool = False  # the same bits alone and in a batch
    draft_policy: str = "single"
    draft_policies: list[str] = []  # those that a request may ask for
    row_budget: int = 0
    speculation_enabled: bool = True  # whether a request that runs alone is speculated for
    grammar_problem: str = ""  # why this engine can't follow a grammar; empty: it can
    has_noisy_start: bool = False  # whether requests may have an `init_scale` above 0
    prompt_scores_problem: str = ""  # why log-probabilities of a prompt would mean nothing; empty: they do
    is_encoder_decoder: bool = False  # whether a prompt is the source of another text
    has_exit_gate: bool = False  # whether requests may have an `exit_threshold`

    @property
    def most_loops(self) -> int:
        """Loops that a request may ask for: the model's own unless the engine has slots for more."""
        return max(self.num_loops, self.max_loops)


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine does now (gauges) and has done since it was loaded (counters)."""

    num_requests_running: int = 0
    num_requests_waiting: int = 0
    kv_cache_usage: float = 0.0  # share of the pages that requests hold, 0..1
    rows_in_flight: int = 0
    row_budget: int = 0
    speculation_enabled: int = (
        0  # 1 if a request that is alone is speculated for, by policy and prices of passes
    )
    passes: int = 0
    rows: int = 0  # of all passes
    pass_rows: dict[int, int] = {}  # passes by their rows, rounded up to a power of two
    prompt_tokens: int = 0  # read, prefix-cache hits included
    generation_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    flushes: dict[int, int] = {}  # by the depth whose readout contradicted
    compared_readouts: dict[int, int] = {}  # of drafts, by their depth: those that the last depth has judged
    agreeing_readouts: dict[int, int] = {}  # those of them that said what the last depth said
    prefix_cache_queries: int = 0  # prompt tokens looked up
    prefix_cache_hits: int = 0  # prompt tokens found
    preemptions: int = 0
    resident_memory: int = 0  # bytes that the engine's process holds
    device_memory: int = 0  # bytes that it holds of a GPU's memory


class EngineHealth(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a request submitted now would be served, and if not, why."""

    state: EngineState
    reason: str = ""
    num_failures: int = 0  # in a row, while the engine is started again
    load_failed: bool = False  # whether it is dead because its first load showed what a user can mend


class EngineUnavailableError(RuntimeError):
    """The engine is loading or dead: nothing was submitted."""


class EngineClient(Protocol):
    """The engine as the server sees it: everything asynchronous arrives through `events`."""

    @property
    def info(self) -> EngineInfo:
        """Facts of the loaded model; raises EngineUnavailableError while loading."""

    def health(self) -> EngineHealth:
        """The present state; never blocks."""

    @property
    def restarts(self) -> Mapping[RestartReason, int]:
        """How often the engine died and was started again, and why."""

    def stats(self) -> EngineStats:
        """The latest counts, at most a second old; zeros while loading. Never blocks."""

    def submit(self, request: GenerationRequest) -> None:
        """Queues a request without waiting; raises EngineUnavailableError unless ready."""

    def abort(self, request_id: str) -> None:
        """Ends a request early; unknown or finished ids are ignored. Its last event says "abort"."""

    def events(self) -> AsyncIterator[list[TokenEvent]]:
        """Batches of events, in order, until the engine is closed. One consumer."""

    async def start(self) -> None:
        """Begins loading; returns at once. Call once, in the event loop that reads `events`."""

    async def close(self) -> None:
        """Ends the engine; requests in flight get an "abort" event first."""
