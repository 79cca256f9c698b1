"""A completion while it grows: from the engine's events to what a client sees of one choice.

Knows nothing about JSON or HTTP. Invariants: exactly one delta of a choice has a finish reason, its last;
streamed or not, text, tokens and log-probabilities are the same, because both are made of these deltas; a
token comes with the delta that shows its text.
"""

from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from types import MappingProxyType
from typing import Literal, NamedTuple

import msgspec

from model.protocol import (
    GenerationRequest,
    LoopScores,
    SequenceStats,
    TokenEvent,
    TokenLogprobs,
    WaveRecord,
)
from server.batcher import EventStream, RequestBatcher
from server.errors import EngineFailureError, RefusedError
from server.output.pieces import CallStart, OutputParser, PassThrough, Piece, join_pieces
from server.output.rules import CallEnd
from server.planning import Plan
from server.prompts import EncodedPrompt
from server.schemas.sampling import SamplingFields
from server.text import Checker, CompletionText, Detokenizer, StopChecker, StopPattern
from server.tokenizer import TextCodec

CONTEXT_TOKENS = 8  # of the prompt, for decoders whose text depends on what came before
FinishReason = Literal["stop", "tool_calls", "length", "abort"]  # the second one: stopped after calls


class SpecialStop(NamedTuple):
    """A stop string that is a special token, and what the choice shows of it."""

    text: str
    shown: str


class ShownToken(NamedTuple):
    """A token of a choice: where in the choice's text it begins, and its log-probabilities if wanted.

    `logprobs` is None for the first token of a prompt as well: nothing predicts it. `loops` is what each loop
    said of the token, empty unless that is wanted.
    """

    token_id: int
    start: int
    logprobs: TokenLogprobs | None
    loops: Sequence[LoopScores] = ()


class ChoiceDelta(NamedTuple):
    """What an event adds to a choice; `echoed` are tokens of the prompt, if those are shown one by one.

    `pieces` is what the text comes to: thoughts, calls, the answer. A piece may come later than its text,
    when it is certain what it is. Without a parser it is the text itself.
    """

    choice_index: int
    text: str
    tokens: list[ShownToken]
    echoed: list[ShownToken]
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    pieces: Sequence[Piece] = ()
    wave: WaveRecord | None = None

    @property
    def has_news(self) -> bool:
        """Whether a client that asked for no tokens can see a difference."""
        return bool(self.pieces or self.finish_reason or self.echoed or self.wave)


def join_deltas(deltas: Sequence[ChoiceDelta]) -> ChoiceDelta:
    """One delta that says what all of a choice said."""
    return deltas[-1]._replace(
        text="".join(delta.text for delta in deltas),
        tokens=[token for delta in deltas for token in delta.tokens],
        echoed=[token for delta in deltas for token in delta.echoed],
        pieces=join_pieces([piece for delta in deltas for piece in delta.pieces]),
    )


class _Waiting(NamedTuple):
    """A token whose text is held back, and its scores if they are wanted."""

    token_id: int
    logprobs: TokenLogprobs | None
    loops: Sequence[LoopScores]


class Choice:
    """One completion: its text, its count of tokens, and in the end what it cost."""

    def __init__(
        self,
        index: int,
        request: GenerationRequest,
        text: CompletionText,
        echo: EncodedPrompt,
        special_stops: Mapping[int, SpecialStop] = MappingProxyType({}),
        *,
        parser: OutputParser | None = None,
    ) -> None:
        """`special_stops` are found by the ids of their tokens; `parser` takes the text apart."""
        self.index = index
        self.request = request
        self.stats = SequenceStats()
        self.num_tokens = 0
        self.prompt_scores: list[TokenLogprobs | None] | None = None  # of the prompt's tokens, if asked
        self.finished = False
        self._sum_logprobs = 0.0
        self._parser = parser or PassThrough()
        self._has_calls = False
        self._num_thoughts = 0  # tokens that are, or may be, part of them
        self._text = text
        self._special_stops = special_stops
        self._echo = echo
        self._pending_echo = echo.text  # not yet shown
        self._waiting: deque[_Waiting] = deque()  # tokens whose text is held back

    @property
    def mean_logprob(self) -> float:
        """The mean log-probability of the choice's tokens; 0 if there are none or none was asked for."""
        return self._sum_logprobs / max(self.num_tokens, 1)

    @property
    def num_reasoning_tokens(self) -> int:
        """The tokens of the thoughts, with those of their tags."""
        return self._num_thoughts if self._parser.has_thoughts else 0

    @property
    def thoughts_end(self) -> int | None:
        """Where in the text the thoughts end, as `OutputParser` has it."""
        return self._parser.thoughts_end

    def add(self, event: TokenEvent, *, include_stop: bool) -> ChoiceDelta:
        """The delta of an event. Raises EngineFailureError or RefusedError if the event says so."""
        if event.finish_reason == "error":
            raise RefusedError(event.error or "") if event.is_refusal else EngineFailureError
        self.stats = event.stats or self.stats
        if self.finished:  # a stop string ended it; the engine ran on until it saw the abort
            return ChoiceDelta(self.index, "", [], [])
        echoed = self._echoed(event)
        hidden = event.token_ids[-1:] if event.stop_token_id is not None and not include_stop else []
        delta = self._text.push(event.token_ids[: len(event.token_ids) - len(hidden)])
        if delta.stop is not None:
            self._count(event, delta.num_tokens)
            return self._delta(delta.text, delta.starts, echoed, "stop", delta.stop)
        self._count(event, len(event.token_ids))
        if event.finish_reason is None:
            return self._delta(delta.text, delta.starts, echoed)
        rest = self._text.flush()
        starts = [*delta.starts, *rest.starts, *(self._text.length for _ in hidden)]
        stop = self._special_stops.get(-1 if event.stop_token_id is None else event.stop_token_id)
        text = delta.text + rest.text + ("" if stop is None else stop.shown)
        reason = self._stop_reason(event) if stop is None else stop.text
        return self._delta(text, starts, echoed, event.finish_reason, reason)

    def finish_empty(self) -> ChoiceDelta:
        """The only delta of a choice without tokens."""
        return self._delta("", [], [], "length")

    def _count(self, event: TokenEvent, num_tokens: int) -> None:
        """Takes the first tokens of an event as the choice's own."""
        asked = self.request.logprobs is not None
        logprobs: Sequence[TokenLogprobs | None] = event.logprobs if asked else [None] * len(event.token_ids)
        loops = event.loop_logprobs or [[]] * len(event.token_ids)
        shown = zip(event.token_ids, logprobs, loops, strict=True)
        self._waiting.extend(_Waiting(*entry) for entry in islice(shown, num_tokens))
        self._sum_logprobs += sum(entry.logprob for entry in event.logprobs[:num_tokens])
        self.num_tokens += num_tokens

    def _echoed(self, event: TokenEvent) -> list[ShownToken]:
        """The prompt's tokens, with the event that brings their log-probabilities."""
        if event.prompt_logprobs is None:
            return []
        self.prompt_scores = event.prompt_logprobs
        if not self._echo.starts:
            return []
        length = len(self._echo.text)
        tokens = zip(self._echo.token_ids, self._echo.starts, event.prompt_logprobs, strict=True)
        most = self.request.logprobs or 0  # `prompt_logprobs` may have asked for more
        return [
            ShownToken(token_id, min(start, length), _likeliest(logprobs, most))
            for token_id, start, logprobs in tokens
        ]

    def _stop_reason(self, event: TokenEvent) -> int | None:
        """The id of a token that the client asked to stop at; the model's own end has none, as in vLLM."""
        return event.stop_token_id if event.stop_token_id in self.request.stop_token_ids else None

    def _delta(
        self,
        text: str,
        starts: Sequence[int],
        echoed: list[ShownToken],
        finish_reason: FinishReason | None = None,
        stop_reason: str | int | None = None,
    ) -> ChoiceDelta:
        """`starts` are the tokens that are shown now, the first of those that wait."""
        self.finished = finish_reason is not None
        echo, self._pending_echo = self._pending_echo, ""
        offset = len(self._echo.text)
        tokens = []
        for start in starts:
            token_id, logprobs, loops = self._waiting.popleft()
            tokens.append(ShownToken(token_id, offset + start, logprobs, loops))
        pieces = self._parser.push(echo + text)
        if self.finished:
            pieces += self._parser.flush()
        end = self._parser.thoughts_end
        self._num_thoughts += sum(1 for token in tokens if end is None or token.start < end)
        self._has_calls = self._has_calls or any(isinstance(piece, CallStart) for piece in pieces)
        if self._has_calls and finish_reason == "stop":
            finish_reason = "tool_calls"
        return ChoiceDelta(self.index, echo + text, tokens, echoed, finish_reason, stop_reason, pieces)


def _likeliest(logprobs: TokenLogprobs | None, most: int) -> TokenLogprobs | None:
    """The log-probabilities with at most so many of the likeliest tokens."""
    if logprobs is None or len(logprobs.top) <= most:
        return logprobs
    return msgspec.structs.replace(logprobs, top=logprobs.top[:most])


def make_choices(fields: SamplingFields, plan: Plan, codec: TextCodec) -> list[Choice]:
    """The choices of a plan, candidates that may be dropped included, without text yet."""
    patterns = [StopPattern(stop) for stop in fields.stop_strings]
    decode = partial(codec.decode, skip_special_tokens=fields.skip_special_tokens)
    tags = frozenset(codec.special_stops(plan.output.tags))
    if fields.skip_special_tokens and tags:
        decode = partial(codec.decode_showing, shown=tags)
    appended = fields.include_stop_str_in_output and fields.skip_special_tokens
    special_stops = {
        token_id: SpecialStop(text, text if appended else "")
        for token_id, text in codec.special_stops(fields.stop_strings).items()
        if token_id not in fields.stop_token_ids
    }

    def make_choice(index: int, request: GenerationRequest) -> Choice:
        prompt = plan.prompts[index // fields.num_candidates]
        before = request.decoder_prompt if plan.has_sources else prompt.token_ids
        detokenizer = Detokenizer(decode, before[-CONTEXT_TOKENS:])
        checker: Checker = StopChecker(patterns, include_stop=fields.include_stop_str_in_output)
        if plan.output.ends_behind_calls:
            checker = CallEnd(checker, plan.output.parser())
        text = CompletionText(detokenizer, checker, fields.min_tokens)
        echo = prompt if fields.echoes else EncodedPrompt([])
        return Choice(index, request, text, echo, special_stops, parser=plan.output.parser())

    return [make_choice(index, request) for index, request in enumerate(plan.requests)]


@dataclass(frozen=True)
class Generation:
    """A request that is being served: its plan, its choices and the stream that feeds them.

    `close` must be called, also if `deltas` was never read.
    """

    fields: SamplingFields
    plan: Plan
    choices: Sequence[Choice]
    stream: EventStream

    @classmethod
    def start(
        cls, fields: SamplingFields, plan: Plan, codec: TextCodec, batcher: RequestBatcher
    ) -> "Generation":
        """Submits a plan; raises QueueFullError or UnavailableError."""
        # A prompt that is only echoed needs no model.
        requests = [request for request in plan.requests if _needs_engine(request)]
        return cls(fields, plan, make_choices(fields, plan, codec), batcher.open(requests))

    def close(self) -> None:
        """Aborts whatever still runs. May be called twice."""
        self.stream.close()

    async def deltas(self) -> AsyncGenerator[ChoiceDelta, None]:
        """All deltas of all choices, interleaved as they come. Raises EngineFailureError or RefusedError."""
        for choice in self.choices:
            if not _needs_engine(choice.request):
                yield choice.finish_empty()
        choices = {choice.request.request_id: choice for choice in self.choices}
        async for event in self.stream:
            choice = choices[event.request_id]
            was_finished = choice.finished
            delta = choice.add(event, include_stop=self.fields.include_stop_str_in_output)
            if was_finished:
                continue
            if choice.finished:
                self.stream.abort(event.request_id)
            yield delta._replace(wave=event.wave) if event.wave else delta

    def best(self) -> list[Choice]:
        """The choices to return: of each prompt the `n` of highest mean log-probability, best first."""
        num_candidates, n = self.fields.num_candidates, self.fields.n
        if num_candidates == n:
            return list(self.choices)
        best: list[Choice] = []
        for start in range(0, len(self.choices), num_candidates):
            candidates = self.choices[start : start + num_candidates]
            best += sorted(candidates, key=lambda choice: -choice.mean_logprob)[:n]
        return best


def _needs_engine(request: GenerationRequest) -> bool:
    return request.max_tokens > 0 or request.prompt_logprobs is not None
