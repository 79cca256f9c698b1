"""Answers of /v1/responses: the events of a stream, and the whole response that they come to.

Invariant: whole or streamed, a response has the same items, because both are made by the same writer.
"""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from server.choices import ChoiceDelta, FinishReason, Generation, ShownToken
from server.errors import ApiError
from server.formats.token_scores import token_logprobs
from server.output.pieces import CallArguments, CallStart, ContentText, Piece, ReasoningText
from server.schemas.chat import TokenLogprob
from server.schemas.responses import (
    FunctionTool,
    IncompleteDetails,
    InputTokensDetails,
    OutputCall,
    OutputItem,
    OutputMessage,
    OutputReasoning,
    OutputText,
    OutputThought,
    OutputTokensDetails,
    ResponseError,
    ResponseEvent,
    ResponseObject,
    ResponsesRequest,
    ResponseUsage,
    Status,
    ToolChoice,
)
from server.schemas.usage import Usage
from server.sse import COMMENT
from server.tokenizer import TextCodec


@dataclass
class _OpenItem:
    """The item that is being written. `begin` says what it is; a call's arguments are its text."""

    id: str
    begin: Piece
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All that was written of it."""
        return "".join(self.texts)

    def goes_on_with(self, piece: Piece) -> bool:
        """Whether `piece` is a part of this item."""
        if isinstance(piece, CallArguments):
            return isinstance(self.begin, CallStart) and self.begin.index == piece.index
        return type(piece) is type(self.begin) and not isinstance(piece, CallStart)

    def item(self, status: Status, *, is_empty: bool = False) -> OutputItem:
        """The item as it is now; `is_empty`: as it begins."""
        text = "" if is_empty else self.text
        if isinstance(self.begin, CallStart):
            call_id, name = self.begin.call_id, self.begin.name
            return OutputCall(
                id=self.id, type="function_call", status=status, call_id=call_id, name=name, arguments=text
            )
        if isinstance(self.begin, ReasoningText):
            thoughts = [] if is_empty else [OutputThought(type="reasoning_text", text=text)]
            return OutputReasoning(id=self.id, type="reasoning", status=status, summary=[], content=thoughts)
        parts = [] if is_empty else [self.output_text()]
        return OutputMessage(id=self.id, type="message", status=status, role="assistant", content=parts)

    def output_text(self) -> OutputText:
        """The text of a message."""
        return OutputText(type="output_text", text=self.text, annotations=[], logprobs=self.logprobs)


class ResponsesFormat:
    """Writes one response; `add` and `end` are called once for each delta and at the end."""

    ping = COMMENT

    def __init__(self, body: ResponsesRequest, generation: Generation, codec: TextCodec) -> None:
        self._body = body
        self._generation = generation
        self._codec = codec
        self._id = f"resp_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._num_events = 0
        self._done: list[OutputItem] = []
        self._open: _OpenItem | None = None
        self._finish_reason: FinishReason | None = None
        self._tokens: list[ShownToken] = []  # whose log-probabilities are still to be told

    def whole(self, choices: Sequence[ChoiceDelta], usage: Usage) -> ResponseObject:
        """The response."""
        self.add(choices[0])
        event = self.end(usage)[-1]
        assert event.response is not None
        return event.response

    def begin(self) -> list[ResponseEvent]:
        """What comes before everything else."""
        response = self._response("in_progress", None)
        return [
            self._event("response.created", response=response),
            self._event("response.in_progress", response=response),
        ]

    def add(self, delta: ChoiceDelta) -> list[ResponseEvent]:
        """The events of a delta."""
        self._finish_reason = delta.finish_reason
        if self._body.shows_logprobs:
            self._tokens += delta.tokens
        return [event for piece in delta.pieces for event in self._write(piece)]

    def end(self, usage: Usage) -> list[ResponseEvent]:
        """The last events."""
        is_cut = self._finish_reason == "length"
        events = []
        if self._open is None and not self._done:  # a message without a text, lest there be no answer at all
            events += self._begin_item(ContentText(""))
        events += self._end_item(
            "completed" if self._finish_reason in ("stop", "tool_calls") else "incomplete"
        )
        if self._finish_reason == "abort":
            error = ResponseError(code="server_error", message="the server is shutting down")
            return [*events, self._last("failed", usage, error)]
        return [*events, self._last("incomplete" if is_cut else "completed", usage)]

    def failed(self, error: ApiError, usage: Usage) -> list[ResponseEvent]:
        """What ends a stream that can't go on."""
        code = "server_error" if error.status >= 500 else "invalid_prompt"
        events = [] if self._num_events else self.begin()
        events += self._end_item("incomplete")
        return [*events, self._last("failed", usage, ResponseError(code=code, message=error.message))]

    def _write(self, piece: Piece) -> list[ResponseEvent]:
        events = []
        if self._open is None or not self._open.goes_on_with(piece):
            events += self._end_item("completed")
            events += self._begin_item(piece)
        if isinstance(piece, CallStart):
            return events
        assert self._open is not None
        self._open.texts.append(piece.text)
        if isinstance(piece, ContentText):
            logprobs = self._new_logprobs()
            self._open.logprobs += logprobs
            more: dict[str, Any] = {"content_index": 0, "logprobs": logprobs}
            return [*events, self._item_event("response.output_text.delta", delta=piece.text, **more)]
        if isinstance(piece, ReasoningText):
            named = "response.reasoning_text.delta"
            return [*events, self._item_event(named, delta=piece.text, content_index=0)]
        return [*events, self._item_event("response.function_call_arguments.delta", delta=piece.text)]

    def _new_logprobs(self) -> list[TokenLogprob]:
        """Log-probabilities of the tokens behind the thoughts that weren't told yet."""
        end = self._generation.choices[0].thoughts_end or 0
        tokens = [token for token in self._tokens if token.start >= end]
        self._tokens.clear()
        return token_logprobs(tokens, self._codec)

    def _begin_item(self, piece: Piece) -> list[ResponseEvent]:
        prefix = {ContentText: "msg", ReasoningText: "rs"}.get(type(piece), "fc")
        self._open = _OpenItem(f"{prefix}_{uuid.uuid4().hex}", piece)
        item = self._open.item("in_progress", is_empty=True)
        added = self._event("response.output_item.added", output_index=len(self._done), item=item)
        if isinstance(piece, CallStart):
            return [added]
        part = self._part()
        return [added, self._item_event("response.content_part.added", content_index=0, part=part)]

    def _end_item(self, status: Status) -> list[ResponseEvent]:
        if self._open is None:
            return []
        text = self._open.text
        if isinstance(self._open.begin, CallStart):
            name = self._open.begin.name
            events = [self._item_event("response.function_call_arguments.done", name=name, arguments=text)]
        else:
            if isinstance(self._open.begin, ContentText):  # tokens that show no text, such as the last one
                self._open.logprobs += self._new_logprobs()
            events = [self._text_done(text)]
            part = self._part()
            events.append(self._item_event("response.content_part.done", content_index=0, part=part))
        item = self._open.item(status)
        events.append(self._event("response.output_item.done", output_index=len(self._done), item=item))
        self._done.append(item)
        self._open = None
        return events

    def _text_done(self, text: str) -> ResponseEvent:
        assert self._open is not None
        if isinstance(self._open.begin, ReasoningText):
            return self._item_event("response.reasoning_text.done", content_index=0, text=text)
        logprobs = self._open.logprobs
        return self._item_event("response.output_text.done", content_index=0, text=text, logprobs=logprobs)

    def _part(self) -> OutputText | OutputThought:
        """The only part of the open item as it is now."""
        assert self._open is not None
        if isinstance(self._open.begin, ReasoningText):
            return OutputThought(type="reasoning_text", text=self._open.text)
        return self._open.output_text()

    def _item_event(self, kind: str, **fields: Any) -> ResponseEvent:  # noqa: ANN401 - pydantic checks them
        """An event about the open item."""
        assert self._open is not None
        return self._event(kind, item_id=self._open.id, output_index=len(self._done), **fields)

    def _event(self, kind: str, **fields: Any) -> ResponseEvent:  # noqa: ANN401 - pydantic checks them
        number, self._num_events = self._num_events, self._num_events + 1
        return ResponseEvent(type=kind, sequence_number=number, **fields)

    def _last(self, status: Status, usage: Usage, error: ResponseError | None = None) -> ResponseEvent:
        response = self._response(status, usage, error)
        return self._event(f"response.{status}", response=response)

    def _response(
        self, status: Status, usage: Usage | None, error: ResponseError | None = None
    ) -> ResponseObject:
        body, fields = self._body, self._generation.fields
        is_cut = status == "incomplete"
        return ResponseObject(
            id=self._id,
            object="response",
            created_at=self._created,
            completed_at=int(time.time()) if status == "completed" else None,
            status=status,
            error=error,
            incomplete_details=IncompleteDetails(reason="max_output_tokens") if is_cut else None,
            background=False,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            max_tool_calls=body.max_tool_calls,
            metadata=body.metadata,
            model=body.model,
            output=[*self._done],
            parallel_tool_calls=body.parallel_tool_calls,
            previous_response_id=None,
            prompt_cache_key=body.prompt_cache_key,
            reasoning={"effort": body.reasoning.effort, "summary": None},
            safety_identifier=body.safety_identifier,
            service_tier="default",
            store=False,
            temperature=fields.temperature,
            text=_text_settings(body),
            tool_choice=_dumped(body.tool_choice),
            tools=[_dumped_tool(tool) for tool in body.tools if isinstance(tool, FunctionTool)],
            top_logprobs=body.top_logprobs,
            top_p=fields.top_p,
            truncation=body.truncation,
            usage=None if usage is None else _usage(usage),
            user=body.user,
        )


def _usage(usage: Usage) -> ResponseUsage:
    details = usage.completion_tokens_details
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputTokensDetails(
            cached_tokens=usage.prompt_tokens_details.cached_tokens, cache_write_tokens=0
        ),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokensDetails(
            reasoning_tokens=details.reasoning_tokens or 0,
            accepted_prediction_tokens=details.accepted_prediction_tokens,
            rejected_prediction_tokens=details.rejected_prediction_tokens,
            decode_passes=details.decode_passes,
        ),
        total_tokens=usage.total_tokens,
    )


def _text_settings(body: ResponsesRequest) -> dict[str, Any]:
    asked = body.text.format
    if asked is None or asked.type != "json_schema":
        return {"format": {"type": "text" if asked is None else asked.type}}
    return {"format": asked.model_dump(by_alias=True, exclude_none=True)}


def _dumped(choice: ToolChoice) -> Any:  # noqa: ANN401 - a word or an object
    return choice if isinstance(choice, str) else choice.model_dump(exclude_unset=True)


def _dumped_tool(tool: FunctionTool) -> dict[str, Any]:
    """A tool as the request sent it, with the fields that OpenAI always has."""
    empty = {"description": None, "parameters": None, "strict": None}
    return empty | tool.model_dump(by_alias=True, exclude_unset=True)
