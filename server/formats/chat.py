"""Answers of /v1/chat/completions: the whole one, and the chunks that say the same."""

import time
from collections.abc import Sequence

from server.choices import ChoiceDelta, Generation, ShownToken
from server.formats.loop_scores import loop_scores
from server.formats.prompt_scores import prompt_scores
from server.formats.token_scores import token_logprobs
from server.formats.wave import shown_wave
from server.output.pieces import (
    CallArguments,
    CallStart,
    ContentText,
    ParsedMessage,
    Piece,
    join_pieces,
    parsed_message,
)
from server.schemas.chat import (
    AnsweredCall,
    AnsweredFunction,
    AssistantMessage,
    CallDelta,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatLogprobs,
    ChatRequest,
    ChatResponse,
    Delta,
    FunctionDelta,
)
from server.schemas.usage import Usage
from server.tokenizer import TextCodec


class ChatFormat:
    """The format of one answer."""

    def __init__(self, body: ChatRequest, generation: Generation, codec: TextCodec) -> None:
        self._body = body
        self._generation = generation
        self._codec = codec
        self._created = int(time.time())
        self._prompt_ids_due = body.return_token_ids

    def whole(self, choices: Sequence[ChoiceDelta], usage: Usage) -> ChatResponse:
        """The answer; `choices` are those to return, in order."""
        response = ChatResponse(
            id=self._generation.plan.id,
            object="chat.completion",
            created=self._created,
            model=self._body.model,
            choices=[self._choice(index, delta) for index, delta in enumerate(choices)],
            usage=usage,
        )
        if lossy := self._body.lossy_fields:
            response.lossy = lossy
        if self._body.return_token_ids:
            response.prompt_token_ids = self._prompt_ids
        scores = self._generation.choices[0].prompt_scores
        if self._body.prompt_logprobs is not None and scores is not None:
            most = self._body.prompt_logprobs
            response.prompt_logprobs = prompt_scores(self._prompt_ids, scores, most, self._codec)
        return response

    def parts(self, delta: ChoiceDelta, *, first: bool) -> list[ChatChunkChoice]:
        """What each chunk for a delta adds to its choice; the role comes first, alone."""
        index = delta.choice_index
        opening = [Delta(role="assistant", content="")] if first else []
        *others, last = [_delta(piece) for piece in join_pieces(delta.pieces)] or [Delta()]
        part = ChatChunkChoice(
            index=index,
            delta=last,
            logprobs=self._logprobs(delta.tokens),
            finish_reason=delta.finish_reason,
        )
        if delta.finish_reason is not None:
            part.stop_reason = delta.stop_reason
        if self._body.return_token_ids:
            part.token_ids = [token.token_id for token in delta.tokens]
        if self._body.loop_logprobs is not None:
            part.loop_logprobs = loop_scores(delta.tokens, self._codec)
        if delta.wave is not None:
            part.wave = shown_wave(delta.wave, self._codec)
        before = [
            ChatChunkChoice(index=index, delta=other, logprobs=None, finish_reason=None)
            for other in [*opening, *others]
        ]
        return [*before, part]

    def nothing(self) -> ChatChunkChoice:
        """What a chunk adds that is sent only to be sent."""
        return ChatChunkChoice(index=0, delta=Delta(content=""), logprobs=None, finish_reason=None)

    def chunk(self, parts: list[ChatChunkChoice], **usage: Usage | None) -> ChatChunk:
        """A chunk of a stream."""
        chunk = ChatChunk(
            id=self._generation.plan.id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._body.model,
            choices=parts,
        )
        if lossy := self._body.lossy_fields:
            chunk.lossy = lossy
        if "usage" in usage:
            chunk.usage = usage["usage"]
        if self._prompt_ids_due and any(part.delta.role for part in parts):
            chunk.prompt_token_ids, self._prompt_ids_due = self._prompt_ids, False
        return chunk

    @property
    def _prompt_ids(self) -> list[int]:
        return self._generation.plan.prompts[0].token_ids

    def _choice(self, index: int, delta: ChoiceDelta) -> ChatChoice:
        assert delta.finish_reason is not None
        choice = ChatChoice(
            index=index,
            message=_message(parsed_message(delta.pieces)),
            logprobs=self._logprobs(delta.tokens),
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
        )
        if self._body.return_token_ids:
            choice.token_ids = [token.token_id for token in delta.tokens]
        if self._body.loop_logprobs is not None:
            choice.loop_logprobs = loop_scores(delta.tokens, self._codec)
        return choice

    def _logprobs(self, tokens: Sequence[ShownToken]) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        # Ours, and there may be a million: not checked.
        return ChatLogprobs.model_construct(content=token_logprobs(tokens, self._codec), refusal=None)


def _delta(piece: Piece) -> Delta:
    """A piece as a chunk says it."""
    if isinstance(piece, ContentText):
        return Delta(content=piece.text)
    if isinstance(piece, CallStart):
        function = FunctionDelta(name=piece.name, arguments="")
        return Delta(
            tool_calls=[CallDelta(index=piece.index, id=piece.call_id, type="function", function=function)]
        )
    if isinstance(piece, CallArguments):
        return Delta(tool_calls=[CallDelta(index=piece.index, function=FunctionDelta(arguments=piece.text))])
    return Delta(reasoning_content=piece.text, reasoning=piece.text)


def _message(parsed: ParsedMessage) -> AssistantMessage:
    """The message of a whole answer. Fields that were not set are left out of the JSON."""
    content = None if parsed.calls and not parsed.content else parsed.content
    message = AssistantMessage(role="assistant", content=content, refusal=None)
    if parsed.reasoning:
        message.reasoning_content = message.reasoning = parsed.reasoning
    if parsed.calls:
        message.tool_calls = [
            AnsweredCall(
                id=call.call_id,
                type="function",
                function=AnsweredFunction(name=call.name, arguments=call.arguments),
            )
            for call in parsed.calls
        ]
    return message
