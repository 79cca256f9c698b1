"""Request bodies: read within limits, parsed and validated, without holding up the event loop.

The framework's own way is a parser that runs in the event loop to the end of whatever was sent, and a
validator that collects every complaint: eight megabytes of `{}` took 7 GB and half a minute. Here a body is
counted while it arrives and refused at the first byte too many, a large one is parsed in a thread, and the
first complaint ends it. Invariant: what parsing takes, in time and memory, is bounded by `BodyLimits`.
"""

from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar, get_type_hints

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope

from server.complaints import complaint
from server.errors import BodyTooLargeError, InvalidRequestError, quote
from server.limits import BodyLimits, body_limits
from server.models import Models, all_models
from server.schemas.base import RequestModel
from server.served import ServedModel
from server.sse import CLIENT_CLOSED_REQUEST, ClientDisconnectedError, unless_disconnected
from server.state import MODEL, STATE, ServerState, require_json
from server.waiting_streams import stream_when_loaded

Body = TypeVar("Body", bound=RequestModel)

SMALL_BODY = 2**14  # bytes that are parsed and validated in a few milliseconds, whatever they hold


class BodyCounter:
    """Counts the values of a JSON text while it arrives, chunk by chunk, without parsing it."""

    def __init__(self, limits: BodyLimits) -> None:
        self._limits = limits
        self._num_bytes = 0
        self._num_quotes = 0
        self._num_containers = 0
        self._num_commas = 0
        self._backslash = b""  # at the end of the last chunk, before the character that it escapes

    def feed(self, chunk: bytes) -> None:
        """Raises BodyTooLargeError or InvalidRequestError as soon as a limit is passed."""
        self._num_bytes += len(chunk)
        if self._num_bytes > self._limits.num_bytes:
            raise BodyTooLargeError(self._limits.num_bytes)
        outside = self._outside_of_strings(chunk)
        self._num_containers += outside.count(b"{") + outside.count(b"[")
        self._num_commas += outside.count(b",")
        num_parts = self._num_quotes // 2 + self._num_containers
        if num_parts > self._limits.num_parts:
            raise InvalidRequestError(
                f"the body has more than {self._limits.num_parts} strings, objects and lists"
            )
        if self._num_commas > self._limits.num_values:
            raise InvalidRequestError(f"the body has more than {self._limits.num_values} values")

    def _outside_of_strings(self, chunk: bytes) -> bytes:
        chunk = self._without_escapes(self._backslash + chunk)
        begins_inside = self._num_quotes % 2
        self._num_quotes += chunk.count(b'"')
        return b"".join(chunk.split(b'"')[begins_inside::2])

    def _without_escapes(self, chunk: bytes) -> bytes:
        """`chunk` without escaped quotes and backslashes: every quote left begins or ends a string."""
        num_backslashes = len(chunk) - len(chunk.rstrip(b"\\"))
        self._backslash = b"\\" * (num_backslashes % 2)
        if self._backslash:
            chunk = chunk[:-1]
        if b"\\" not in chunk:
            return chunk
        return chunk.replace(b"\\\\", b"").replace(b'\\"', b"")


async def read_body(request: Request, limits: BodyLimits) -> bytearray:
    """The body; raises BodyTooLargeError, InvalidRequestError or ClientDisconnect."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and (len(announced) > 18 or int(announced) > limits.num_bytes):
        raise BodyTooLargeError(limits.num_bytes)
    counter, body = BodyCounter(limits), bytearray()
    async for chunk in request.stream():
        counter.feed(chunk)
        body += chunk
    return body


def parse_body(body: bytes | bytearray, kind: type[Body], *, allow_unknown_fields: bool = False) -> Body:
    """The body as `kind`; raises InvalidRequestError with the first complaint."""
    try:
        data = from_json(body, cache_strings="keys")
    except ValueError as error:
        # Lone surrogates are what people meet: a text cut in the middle of an emoji.
        hint = " (half of a surrogate pair?)" if "hex escape" in str(error) else ""
        raise InvalidRequestError(f"the body is not valid JSON: {quote(str(error))}{hint}") from None
    if not isinstance(data, dict):
        raise InvalidRequestError("the body must be a JSON object")
    try:
        parsed = kind.model_validate(data)
    except ValidationError as error:
        raise complaint(error, data) from None
    parsed.reject_extra_fields(allow_unknown=allow_unknown_fields)
    return parsed


class _ParsedRequest(Request):
    """A request whose body the framework finds ready."""

    def __init__(self, scope: Scope, receive: Receive, parsed: RequestModel) -> None:
        super().__init__(scope, receive)
        self._parsed = parsed

    async def body(self) -> bytes:
        """Not the true one, but enough for the framework to ask for `json`."""
        return b"{}"

    async def json(self) -> RequestModel:
        """The validated body; validating it again gives the same object."""
        return self._parsed


async def _receive_parsed(request: Request, kind: type[RequestModel], models: Models) -> RequestModel:
    body = await read_body(request, _limits(models, kind))
    parse = partial(parse_body, body, kind, allow_unknown_fields=models.settings.allow_unknown_fields)
    if len(body) <= SMALL_BODY:
        return parse()
    return await unless_disconnected(request, models.lanes.bodies.run(parse))


def _limits(models: Models, kind: type[RequestModel]) -> BodyLimits:
    """Those of the model that takes most: which one a body is for is known when it was read."""
    each = [_limits_of(model, kind) for model in models]
    return BodyLimits(max(one.num_bytes for one in each), max(one.num_values for one in each))


def _limits_of(model: ServedModel, kind: type[RequestModel]) -> BodyLimits:
    settings, info = model.source.settings, model.info
    # Without facts the route will say so, once it knows that the request is a good one.
    longest_piece = 0 if info is None or model.state is None else model.state.codec.longest_piece
    max_prompts = settings.max_queued_requests if kind.has_many_prompts else 1
    return body_limits(info, longest_piece, max_prompts, settings.body_limit)


async def _loaded(request: Request, models: Models, model: ServedModel) -> ServerState:
    if models.must_wait(model):
        return await unless_disconnected(request, models.loaded(model))
    return await models.loaded(model)


class BodyRoute(APIRoute):
    """A route whose parameter `body`, a RequestModel, is received as this module says.

    The model that it names is loaded and in use until the answer is there, or has begun.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The framework's own, behind ours."""
        handle = super().get_route_handler()
        kind: type[RequestModel] = get_type_hints(self.endpoint)["body"]

        async def receive_and_handle(request: Request) -> Response:
            require_json(request)
            models = all_models(request)
            try:
                parsed = await _receive_parsed(request, kind, models)
                model = models.find(getattr(parsed, "model", None))
                request.scope[MODEL] = model.name

                async def answer(state: ServerState) -> Response:
                    request.scope[STATE] = state
                    return await handle(_ParsedRequest(request.scope, request.receive, parsed))

                if models.must_wait(model) and getattr(parsed, "stream", False):
                    return await stream_when_loaded(request, models, model, answer)
                with model.used():
                    return await answer(await _loaded(request, models, model))
            except (ClientDisconnect, ClientDisconnectedError):
                return Response(status_code=CLIENT_CLOSED_REQUEST)

        return receive_and_handle
