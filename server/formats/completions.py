"""Answers of /v1/completions: the whole one, and the chunks that say the same."""

import time
from collections.abc import Sequence

from server.choices import ChoiceDelta, Generation, ShownToken
from server.formats.loop_scores import loop_scores
from server.formats.prompt_scores import clamp, prompt_scores
from server.formats.wave import shown_wave
from server.schemas.completions import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    CompletionResponse,
)
from server.schemas.usage import Usage
from server.tokenizer import TextCodec, printable


class CompletionFormat:
    """The format of one answer."""

    def __init__(self, body: CompletionRequest, generation: Generation, codec: TextCodec) -> None:
        self._body = body
        self._generation = generation
        self._codec = codec
        self._created = int(time.time())

    def whole(self, choices: Sequence[ChoiceDelta], usage: Usage) -> CompletionResponse:
        """The answer; `choices` are those to return, in order."""
        parts = [
            self._part(delta, first=True).model_copy(update={"index": index})
            for index, delta in enumerate(choices)
        ]
        return self.chunk(parts, usage=usage)

    def parts(self, delta: ChoiceDelta, *, first: bool) -> list[CompletionChoice]:
        """What each chunk for a delta adds to its choice."""
        return [self._part(delta, first=first)]

    def nothing(self) -> CompletionChoice:
        """What a chunk adds that is sent only to be sent."""
        return CompletionChoice(index=0, text="", logprobs=None, finish_reason=None, stop_reason=None)

    def chunk(self, parts: list[CompletionChoice], **usage: Usage | None) -> CompletionResponse:
        """A chunk of a stream."""
        chunk = CompletionResponse(
            id=self._generation.plan.id,
            object="text_completion",
            created=self._created,
            model=self._body.model,
            choices=parts,
            **usage,
        )
        if lossy := self._body.lossy_fields:
            chunk.lossy = lossy
        return chunk

    def _part(self, delta: ChoiceDelta, *, first: bool) -> CompletionChoice:
        part = CompletionChoice(
            index=delta.choice_index,
            text=delta.text,
            logprobs=self._logprobs([*delta.echoed, *delta.tokens]),
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
        )
        if self._body.return_token_ids:
            part.token_ids = [token.token_id for token in delta.tokens]
            if first:
                part.prompt_token_ids = self._generation.choices[delta.choice_index].request.prompt_token_ids
        if self._body.loop_logprobs is not None:
            part.loop_logprobs = loop_scores(delta.tokens, self._codec)
        if delta.wave is not None:
            part.wave = shown_wave(delta.wave, self._codec)
        choice = self._generation.choices[delta.choice_index]
        if self._body.prompt_logprobs is not None and choice.prompt_scores is not None:
            part.prompt_logprobs = prompt_scores(
                choice.request.prompt_token_ids,
                choice.prompt_scores,
                self._body.prompt_logprobs,
                self._codec,
            )
        return part

    def _logprobs(self, tokens: Sequence[ShownToken]) -> CompletionLogprobs | None:
        if self._body.logprobs is None:
            return None
        return CompletionLogprobs.model_construct(  # ours, and there may be a million: not checked
            tokens=[self._text(token.token_id) for token in tokens],
            token_logprobs=[clamp(t.logprobs.logprob) if t.logprobs else None for t in tokens],
            top_logprobs=[self._top(token) for token in tokens],
            text_offset=[token.start for token in tokens],
        )

    def _top(self, token: ShownToken) -> dict[str, float] | None:
        """The likeliest tokens and the chosen one; of two that are written alike, the likelier."""
        if token.logprobs is None:
            return None
        top: dict[str, float] = {}
        for token_id, logprob in [*token.logprobs.top, (token.token_id, token.logprobs.logprob)]:
            top.setdefault(self._text(token_id), clamp(logprob))
        return top

    def _text(self, token_id: int) -> str:
        return printable(self._codec.token_bytes(token_id))
