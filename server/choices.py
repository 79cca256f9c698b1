"""A completion while it grows: from the engine's events to what a client sees of one choice.

Knows nothing about JSON or HTTP. Invariant: exactly one delta of a choice has a finish reason, its last;
streamed or not, the text is the same, because both are made of these deltas.
"""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

from model.protocol import GenerationRequest, SequenceStats, TokenEvent
from server.batcher import EventStream
from server.errors import EngineFailureError
from server.planning import Plan
from server.schemas.completions import CompletionRequest
from server.text import CompletionText, Detokenizer, StopChecker, StopPattern
from server.tokenizer import TextCodec

CONTEXT_TOKENS = 8  # of the prompt, for decoders whose text depends on what came before


class ChoiceDelta(NamedTuple):
    """What an event adds to a choice."""

    choice_index: int
    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length", "abort"] | None = None
    stop_reason: str | int | None = None


class Choice:
    """One completion: its text, its count of tokens, and in the end what it cost."""

    def __init__(self, index: int, request: GenerationRequest, text: CompletionText, echo: str) -> None:
        self.index = index
        self.request = request
        self.stats = SequenceStats()
        self.num_tokens = 0
        self.finished = False
        self._text = text
        self._echo = echo  # text before the first token, not yet shown

    def add(self, event: TokenEvent, *, include_stop: bool) -> ChoiceDelta:
        """The delta of an event. Raises EngineFailureError if the event says so."""
        if event.finish_reason == "error":
            raise EngineFailureError
        self.stats = event.stats or self.stats
        if self.finished:  # a stop string ended it; the engine ran on until it saw the abort
            return ChoiceDelta(self.index, "", [])
        hide_last = event.stop_token_id is not None and not include_stop
        delta = self._text.push(event.token_ids[:-1] if hide_last else event.token_ids)
        if delta.stop is not None:
            return self._finish(delta.text, event.token_ids[: delta.num_tokens], "stop", delta.stop)
        if event.finish_reason is None:
            return self._grow(delta.text, event.token_ids)
        text = delta.text + self._text.flush()
        return self._finish(text, event.token_ids, event.finish_reason, self._stop_reason(event))

    def finish_empty(self) -> ChoiceDelta:
        """The only delta of a choice without tokens."""
        return self._finish("", [], "length", None)

    def _stop_reason(self, event: TokenEvent) -> int | None:
        """The id of a token that the client asked to stop at; the model's own end has none, as in vLLM."""
        return event.stop_token_id if event.stop_token_id in self.request.stop_token_ids else None

    def _grow(self, text: str, token_ids: list[int]) -> ChoiceDelta:
        self.num_tokens += len(token_ids)
        echo, self._echo = self._echo, ""
        return ChoiceDelta(self.index, echo + text, token_ids)

    def _finish(
        self,
        text: str,
        token_ids: list[int],
        reason: Literal["stop", "length", "abort"],
        stop_reason: str | int | None,
    ) -> ChoiceDelta:
        self.finished = True
        return self._grow(text, token_ids)._replace(finish_reason=reason, stop_reason=stop_reason)


def make_choices(body: CompletionRequest, plan: Plan, codec: TextCodec) -> list[Choice]:
    """The choices of a plan, without text yet."""
    patterns = [StopPattern(stop) for stop in body.stop_strings]
    decode = partial(codec.decode, skip_special_tokens=body.skip_special_tokens)

    def make_choice(index: int, request: GenerationRequest) -> Choice:
        prompt = plan.prompts[index // body.n]
        detokenizer = Detokenizer(decode, prompt.token_ids[-CONTEXT_TOKENS:])
        checker = StopChecker(patterns, include_stop=body.include_stop_str_in_output)
        text = CompletionText(detokenizer, checker, body.min_tokens)
        return Choice(index, request, text, prompt.text if body.echo else "")

    return [make_choice(index, request) for index, request in enumerate(plan.requests)]


@dataclass(frozen=True)
class Generation:
    """A request that is being served: its plan, its choices and the stream that feeds them.

    `close` must be called, also if `deltas` was never read.
    """

    body: CompletionRequest
    plan: Plan
    choices: Sequence[Choice]
    stream: EventStream

    def close(self) -> None:
        """Aborts whatever still runs. May be called twice."""
        self.stream.close()

    async def deltas(self) -> AsyncGenerator[ChoiceDelta, None]:
        """All deltas of all choices, interleaved as they come. Raises EngineFailureError."""
        if self.body.max_tokens == 0:
            for choice in self.choices:
                yield choice.finish_empty()
        choices = {choice.request.request_id: choice for choice in self.choices}
        async for event in self.stream:
            choice = choices[event.request_id]
            was_finished = choice.finished
            delta = choice.add(event, include_stop=self.body.include_stop_str_in_output)
            if was_finished:
                continue
            if choice.finished:
                self.stream.abort(event.request_id)
            yield delta
