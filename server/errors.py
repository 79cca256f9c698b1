"""Every way a request can fail, each with its status, type and code.

    ApiError
    ├── InvalidRequestError         400  a field is wrong (param names it)
    │   ├── UnsupportedFieldError   400  unsupported_field: of OpenAI's API, but not served here
    │   ├── UnknownFieldError       400  unknown_field
    │   ├── ContextLengthError      400  context_length_exceeded
    │   ├── TextTooLongError        400  context_length_exceeded: seen before all of it was tokenised
    │   ├── NoTokenizerError        400  no_tokenizer: the model is served by token ids
    │   └── RefusedError            400  request_refused: the engine can't go on with it, and says why
    ├── AuthenticationError         401  invalid_api_key, WWW-Authenticate
    ├── ForbiddenOriginError        403  forbidden_origin: a browser asks for a page that may not call
    ├── ForbiddenHostError          403  forbidden_host: a browser may have been led here by another's name
    ├── ModelNotFoundError          404  model_not_found
    ├── BodyTooLargeError           413  request_entity_too_large
    ├── UnsupportedMediaTypeError   415  unsupported_media_type
    ├── QueueFullError              429  queue_full, Retry-After
    ├── EngineFailureError          500  engine_error: it failed while running the request
    └── UnavailableError            503  engine_loading, engine_unavailable, server_draining,
                                         check_unavailable, models_busy, Retry-After

Before a request is whole, `connections` answers by itself, in the same shape: 400 bad_request, 408
request_timeout, 431 headers_too_large, 503 too_many_connections.

Invariant: a message quotes at most `MAX_QUOTE` characters of the input, and says nothing about the inside of
the server. How an error is written is `server.error_answers`' to say.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from reprlib import Repr
from typing import Any, ClassVar, Literal

from model.rules import RuleError

MAX_QUOTE = 200
_QUOTE = Repr()  # of lists and objects the beginnings, lest eight megabytes be written out
_QUOTE.maxlevel, _QUOTE.maxlist, _QUOTE.maxdict = 3, 20, 20
_QUOTE.maxstring = _QUOTE.maxlong = _QUOTE.maxother = MAX_QUOTE


def quote(value: object) -> str:
    """`value` as it may appear in a message: one line, at most `MAX_QUOTE` characters.

    `repr` also escapes lone surrogates, which JSON can carry in but UTF-8 cannot carry back.
    """
    text = repr(value[:MAX_QUOTE]) if isinstance(value, str) else _QUOTE.repr(value)
    return text if len(text) <= MAX_QUOTE else text[: MAX_QUOTE - 1] + "…"


class ApiError(Exception):
    """An answer other than success. Subclasses fix the status; `param` names the field at fault."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    @property
    def headers(self) -> dict[str, str]:
        """Headers that belong to the answer."""
        return {}

    def body(self) -> dict[str, Any]:
        """The answer's body; also the content of an error frame in a stream."""
        return error_body(self.message, self.type, self.param, self.code)


class InvalidRequestError(ApiError):
    """The request breaks a rule of the API."""

    status = 400
    type = "invalid_request_error"


class UnsupportedFieldError(InvalidRequestError):
    """The field exists in the API, but this server doesn't serve it."""

    code = "unsupported_field"

    def __init__(self, field: str, place: str = "", hint: str = "") -> None:
        """`hint` says what to send instead."""
        super().__init__(f"{place}{field} is not supported by this server{hint and ': '}{hint}", param=field)


class UnknownFieldError(InvalidRequestError):
    """No such field."""

    code = "unknown_field"

    def __init__(self, field: str, place: str = "") -> None:
        where = f" in {place.removesuffix('.')}" if place else ""
        super().__init__(
            f"unknown field {quote(field)}{where}; the server was started without --allow-unknown-fields",
            param=field[:MAX_QUOTE],
        )


class NoTokenizerError(InvalidRequestError):
    """The field means text, but the model came without a tokenizer."""

    code = "no_tokenizer"

    def __init__(self, field: str) -> None:
        super().__init__(
            f"{field}: the model came without a tokenizer.json, so this server knows token ids only: send "
            "prompt as a list of ids, and return_token_ids: true to get ids back",
            param=field,
        )


class RefusedError(InvalidRequestError):
    """The engine took the request, but cannot do what it asks; in a stream this may come late.

    A grammar whose lexer needs too many states is one: how many it needs depends on the text.
    """

    code = "request_refused"

    def __init__(self, reason: str) -> None:
        super().__init__(f"the request cannot be completed: {quote(reason)}")


class ContextLengthError(InvalidRequestError):
    """Prompt and completion do not fit the model."""

    code = "context_length_exceeded"

    def __init__(
        self, num_prompt_tokens: int, max_tokens: int | None, max_model_len: int, *, prompt_param: str
    ) -> None:
        self.num_prompt_tokens, self.max_tokens, self.max_model_len = (
            num_prompt_tokens,
            max_tokens,
            max_model_len,
        )
        completion, where = (1, "at least to be generated")
        if max_tokens is not None:
            completion, where = max_tokens, "in max_tokens"
        at_fault = max_tokens is None or num_prompt_tokens > max_model_len
        super().__init__(
            # Clients and gateways know the error by the first of these words, which are OpenAI's.
            f"This model's maximum context length is {max_model_len} tokens. However, you requested "
            f"{num_prompt_tokens + completion} tokens: {num_prompt_tokens} in the prompt and {completion} "
            f"{where}. Please reduce the length of the {prompt_param} or the completion.",
            param=prompt_param if at_fault else "max_tokens",
        )


class TextTooLongError(InvalidRequestError):
    """A text that cannot fit the model's context, whatever its exact number of tokens."""

    code = "context_length_exceeded"

    def __init__(self, num_characters: int, max_model_len: int, *, param: str) -> None:
        super().__init__(
            f"This model's maximum context length is {max_model_len} tokens, but the text of {param} has "
            f"{num_characters} characters, which are more tokens than that",
            param=param,
        )


@contextmanager
def rules_as_refusals(**names: str | None) -> Iterator[None]:
    """Turns a broken rule of the model into an answer that names the field at fault.

    `names` says what clients call a field, where the engine has another name for it.
    """
    try:
        yield
    except RuleError as error:
        field = names.get(error.field)
        message = str(error) if field is None else f"{field}: {error}"
        raise InvalidRequestError(message, param=field or error.field) from None


class AuthenticationError(ApiError):
    """No key, or one that opens nothing. `ask_browser`: the client is one that can ask its user for it."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"

    def __init__(self, *, ask_browser: bool) -> None:
        super().__init__(
            "a valid API key is needed: send it as 'Authorization: Bearer KEY' or as 'x-api-key: KEY'"
        )
        self._ask_browser = ask_browser

    @property
    def headers(self) -> dict[str, str]:
        """Basic authentication is offered to browsers only: they would ask users of other pages too."""
        return {"WWW-Authenticate": 'Basic realm="speed"' if self._ask_browser else "Bearer"}


class ForbiddenOriginError(ApiError):
    """A browser asks whether a page of another origin may call, and it may not."""

    status = 403
    type = "invalid_request_error"
    code = "forbidden_origin"


class ForbiddenHostError(ApiError):
    """The request is addressed to a name that this server doesn't go by."""

    status = 403
    type = "invalid_request_error"
    code = "forbidden_host"

    def __init__(self, host: str) -> None:
        super().__init__(
            f"this server is not addressed as {quote(host)}; if it should be, start it with --allowed-hosts"
        )


class ModelNotFoundError(ApiError):
    """No model of that name is served."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"

    def __init__(self, name: str) -> None:
        super().__init__(f"the model {quote(name)} does not exist", param="model")


class BodyTooLargeError(ApiError):
    """The body has more bytes than a request that the model can serve."""

    status = 413
    type = "invalid_request_error"
    code = "request_entity_too_large"

    def __init__(self, most: int) -> None:
        super().__init__(
            f"the body is larger than {most} bytes, the most that this route takes with this model's context"
        )


class UnsupportedMediaTypeError(ApiError):
    """The body isn't announced as JSON."""

    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"


class QueueFullError(ApiError):
    """Too much is in flight; `reason` says of what."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"

    def __init__(self, message: str, reason: Literal["requests", "tokens"]) -> None:
        super().__init__(message)
        self.reason = reason

    @property
    def headers(self) -> dict[str, str]:
        """A second is a few hundred tokens: room is likely by then."""
        return {"Retry-After": "1"}


class EngineFailureError(ApiError):
    """The engine failed while it ran the request. What exactly happened is in the log only."""

    code = "engine_error"

    def __init__(self) -> None:
        super().__init__("the engine failed while running this request")


class UnavailableError(ApiError):
    """Nothing can be served now: the engine is loading or dead, or the server is shutting down."""

    status = 503

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code

    @property
    def headers(self) -> dict[str, str]:
        """Loading a model and restarting an engine take seconds."""
        return {"Retry-After": "5"}


def error_body(message: str, type_: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's API writes it."""
    return {"error": {"message": message, "type": type_, "param": param, "code": code}}
