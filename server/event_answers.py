"""Answers of APIs whose streams are events with names: /v1/responses and /v1/messages.

What `server.answers` is for chunks of choices. Invariant: a stream that has begun ends with the event that
the API has for its end, also if the generation fails.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Protocol

from fastapi import Request
from pydantic import BaseModel
from starlette.responses import Response

from server.answers import Stream, is_short, respond, usage_of
from server.choices import ChoiceDelta, Generation
from server.errors import MAX_QUOTE, ApiError
from server.lanes import Lane
from server.schemas.usage import Usage
from server.sse import Frame, StreamStyle, named_frame
from server.state import ServerState

WARNING_HEADER = "X-Speed-Warning"
MAX_NAMED = 8  # types of tools that a warning names


class Event(Protocol):
    """A body with the name of its event."""

    type: str

    def model_dump_json(self, *, exclude_unset: bool) -> str:
        """Its JSON."""


class EventFormat(Protocol):
    """How an endpoint writes its one choice."""

    ping: bytes

    def whole(self, choices: Sequence[ChoiceDelta], usage: Usage) -> BaseModel:
        """The answer; `choices` has one entry."""

    def begin(self) -> Sequence[Event]:
        """What comes before everything else."""

    def add(self, delta: ChoiceDelta) -> Sequence[Event]:
        """The events of a delta; may be none."""

    def end(self, usage: Usage) -> Sequence[Event]:
        """The last events."""

    def failed(self, error: ApiError, usage: Usage) -> Sequence[Event]:
        """What ends a stream that can't go on, whether or not it has begun."""


async def answer_events(
    request: Request, generation: Generation, form: EventFormat, state: ServerState, skipped: Sequence[str]
) -> Response:
    """The whole answer or the beginning of a stream; takes over the generation.

    `skipped` are the types of tools that were sent and aren't served: a header says so.
    """
    style = StreamStyle(
        filler=None,
        ping=form.ping,
        last=(),
        failure=lambda error: [_frame(event) for event in form.failed(error, usage_of(generation))],
    )
    items = _events(generation, form, state.lanes.answers)
    response = await respond(request, generation, form, state, Stream(items, style))
    if skipped:
        response.headers[WARNING_HEADER] = skipped_tools(skipped)
    return response


def skipped_tools(types: Sequence[str]) -> str:
    """What a header says of tools that were left out; the types are the client's own words."""
    names = [ascii(name[:MAX_QUOTE]) for name in dict.fromkeys(types)]
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return f"tools of these types were left out: {', '.join(names[:MAX_NAMED])}{more}"


async def _events(generation: Generation, form: EventFormat, lane: Lane) -> AsyncGenerator[Frame, None]:
    """The frames of a stream that goes well."""
    has_begun = False
    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            for event in [] if has_begun else form.begin():
                yield _frame(event)
            has_begun = True
            if is_short([delta], generation):
                frames = _write(form, delta)
            else:
                frames = await lane.run(partial(_write, form, delta))
            for frame in frames:
                yield frame
    for event in form.end(usage_of(generation)):
        yield _frame(event)


def _write(form: EventFormat, delta: ChoiceDelta) -> list[Frame]:
    return [_frame(event) for event in form.add(delta)]


def _frame(event: Event) -> Frame:
    return named_frame(event.type, event.model_dump_json(exclude_unset=True))
