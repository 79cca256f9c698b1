"""Answers of /v1/messages: the events of a stream, and the whole message that they come to.

Invariant: whole or streamed, a message has the same blocks, because both are made by the same writer.
"""

import hashlib
import uuid
from collections.abc import Sequence
from typing import Any

from pydantic_core import from_json

from server.choices import ChoiceDelta, FinishReason, Generation
from server.error_answers import anthropic_error
from server.errors import ApiError, UnavailableError
from server.output.pieces import CallArguments, CallStart, Piece, ReasoningText
from server.schemas.messages import (
    BlockDelta,
    MessageDelta,
    MessageEvent,
    MessageObject,
    MessagesRequest,
    MessageUsage,
    OutputBlock,
    OutputTextBlock,
    OutputThinkingBlock,
    OutputToolUseBlock,
    StopReason,
    ThinkingDetails,
)
from server.schemas.usage import Usage

PING = b'event: ping\ndata: {"type": "ping"}\n\n'


class _OpenBlock:
    """The block that is being written; a call's input is its text."""

    def __init__(self, begin: Piece) -> None:
        self.begin = begin
        self._texts: list[str] = []

    def goes_on_with(self, piece: Piece) -> bool:
        """Whether `piece` is a part of this block."""
        if isinstance(piece, CallArguments):
            return isinstance(self.begin, CallStart) and self.begin.index == piece.index
        return type(piece) is type(self.begin) and not isinstance(piece, CallStart)

    def add(self, text: str) -> BlockDelta:
        """What an event says of more text."""
        self._texts.append(text)
        if isinstance(self.begin, CallStart):
            return BlockDelta(type="input_json_delta", partial_json=text)
        if isinstance(self.begin, ReasoningText):
            return BlockDelta(type="thinking_delta", thinking=text)
        return BlockDelta(type="text_delta", text=text)

    @property
    def signature(self) -> str | None:
        """What thoughts are sent back with; None for other blocks."""
        if not isinstance(self.begin, ReasoningText):
            return None
        return hashlib.sha256("".join(self._texts).encode(errors="surrogatepass")).hexdigest()

    def block(self) -> OutputBlock:
        """The block as it is now."""
        text = "".join(self._texts)
        if isinstance(self.begin, CallStart):
            call_id, name = self.begin.call_id, self.begin.name
            return OutputToolUseBlock(type="tool_use", id=call_id, name=name, input=_object(text))
        if isinstance(self.begin, ReasoningText):
            signature = self.signature if text else ""
            return OutputThinkingBlock(type="thinking", thinking=text, signature=signature or "")
        return OutputTextBlock(type="text", text=text, citations=None)


def _object(text: str) -> dict[str, Any]:
    """The object whose JSON is `text`; as much of it as came, if the answer was cut."""
    try:
        value = from_json(text, allow_partial="trailing-strings")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


class MessagesFormat:
    """Writes one message; `add` and `end` are called once for each delta and at the end."""

    ping = PING

    def __init__(self, body: MessagesRequest, generation: Generation, request_id: str) -> None:
        self._body = body
        self._generation = generation
        self._request_id = request_id
        self._id = f"msg_{uuid.uuid4().hex}"
        self._done: list[OutputBlock] = []
        self._open: _OpenBlock | None = None
        self._finish_reason: FinishReason | None = None
        self._stop_reason: str | int | None = None

    def whole(self, choices: Sequence[ChoiceDelta], usage: Usage) -> MessageObject:
        """The message; raises UnavailableError if it was cut off by the end of the server."""
        self.add(choices[0])
        self._end_block()
        if self._finish_reason == "abort":
            raise _shutdown()
        message = self._message(_usage(usage))
        message.content = self._done
        message.stop_reason, message.stop_sequence = self._reason(), self._sequence()
        return message

    def begin(self) -> list[MessageEvent]:
        """What comes before everything else. What was found in the cache is known only at the end."""
        num_tokens = sum(len(prompt.token_ids) for prompt in self._generation.plan.prompts)
        usage = _message_usage(num_tokens, 0, 0, 0)
        return [MessageEvent(type="message_start", message=self._message(usage)), MessageEvent(type="ping")]

    def add(self, delta: ChoiceDelta) -> list[MessageEvent]:
        """The events of a delta."""
        self._finish_reason, self._stop_reason = delta.finish_reason, delta.stop_reason
        return [event for piece in delta.pieces for event in self._write(piece)]

    def end(self, usage: Usage) -> list[MessageEvent]:
        """The last events."""
        events = self._end_block()
        if self._finish_reason == "abort":
            return [*events, *self.failed(_shutdown(), usage)]
        delta = MessageDelta(stop_reason=self._reason(), stop_sequence=self._sequence(), stop_details=None)
        events.append(MessageEvent(type="message_delta", delta=delta, usage=_usage(usage)))
        return [*events, MessageEvent(type="message_stop")]

    def failed(self, error: ApiError, usage: Usage) -> list[MessageEvent]:  # noqa: ARG002 - nobody is told
        """What ends a stream that can't go on."""
        told = anthropic_error(error.message, error.status, self._request_id)
        return [MessageEvent.model_validate(told)]

    def _write(self, piece: Piece) -> list[MessageEvent]:
        events = []
        if self._open is None or not self._open.goes_on_with(piece):
            events += self._end_block()
            self._open = _OpenBlock(piece)
            events.append(self._event("content_block_start", content_block=self._open.block()))
        if isinstance(piece, CallStart):
            return events
        return [*events, self._event("content_block_delta", delta=self._open.add(piece.text))]

    def _end_block(self) -> list[MessageEvent]:
        if self._open is None:
            return []
        events = []
        if (signature := self._open.signature) is not None:
            delta = BlockDelta(type="signature_delta", signature=signature)
            events.append(self._event("content_block_delta", delta=delta))
        events.append(self._event("content_block_stop"))
        self._done.append(self._open.block())
        self._open = None
        return events

    def _event(self, kind: str, **fields: Any) -> MessageEvent:  # noqa: ANN401 - pydantic checks them
        """An event about the open block."""
        return MessageEvent(type=kind, index=len(self._done), **fields)

    def _message(self, usage: MessageUsage) -> MessageObject:
        return MessageObject(
            id=self._id,
            type="message",
            role="assistant",
            model=self._body.model,
            content=[],
            stop_reason=None,
            stop_sequence=None,
            stop_details=None,
            usage=usage,
        )

    def _reason(self) -> StopReason:
        if self._finish_reason == "length":
            allowed = self._generation.plan.requests[0].max_tokens
            return "max_tokens" if self._body.max_tokens <= allowed else "model_context_window_exceeded"
        if self._finish_reason == "tool_calls":
            return "tool_use"
        return "end_turn" if self._stop_reason is None else "stop_sequence"

    def _sequence(self) -> str | None:
        """The stop sequence that came; of a token that was asked for by its id, the id."""
        return None if self._reason() != "stop_sequence" else str(self._stop_reason)


def _shutdown() -> UnavailableError:
    return UnavailableError("the server is shutting down", "server_draining")


def _usage(usage: Usage) -> MessageUsage:
    cached = usage.prompt_tokens_details.cached_tokens
    thoughts = usage.completion_tokens_details.reasoning_tokens or 0
    return _message_usage(usage.prompt_tokens - cached, cached, usage.completion_tokens, thoughts)


def _message_usage(num_input: int, num_cached: int, num_output: int, num_thoughts: int) -> MessageUsage:
    return MessageUsage(
        input_tokens=num_input,
        cache_creation_input_tokens=0,
        cache_read_input_tokens=num_cached,
        output_tokens=num_output,
        output_tokens_details=ThinkingDetails(thinking_tokens=num_thoughts),
    )
