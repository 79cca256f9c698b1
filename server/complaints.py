"""What is wrong with a body, in words: the field with its place in lists, what it must be, what it is.

Takes pydantic's complaints apart, whose own texts and paths name the functions and classes of this
program. Invariant: nothing but the client's own names and values, and our words, gets into a message.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import ValidationError

from server.errors import MAX_QUOTE, InvalidRequestError, quote

Path = tuple[str | int, ...]

# Wrong types. Where a value may be one of several, all are named.
KINDS = {
    "string_type": "a string",
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
}
# Limits, with the names that pydantic gives their numbers.
LIMITS = {
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "too_short": "must have at least {min_length} entries",
    "too_long": "must have at most {max_length} entries",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "must match {pattern}",
    "literal_error": "must be {expected}",
}
LENGTHS = {"too_short", "too_long", "string_too_short", "string_too_long"}
CUSTOM = "request."  # types of complaints that our own validators make: their text is for clients


class _Complaint(NamedTuple):
    """One of pydantic's, at a place of the body that exists (or, for a field that is missing, should)."""

    path: Path
    kind: str
    text: str
    value: Any
    numbers: Mapping[str, Any]


def complaint(error: ValidationError, body: object) -> InvalidRequestError:
    """The first thing that is wrong with `body`."""
    found = [
        _Complaint(_path(e["loc"], e["type"], body), e["type"], e["msg"], e["input"], e.get("ctx", {}))
        for e in error.errors(include_url=False)
    ]
    first, *others = _of_one_value(found)
    path = ".".join(str(part)[:MAX_QUOTE] for part in first.path) or "the body"
    param = first.path[0] if first.path and isinstance(first.path[0], str) else None
    return InvalidRequestError(f"{path} {_words(first, others)}", param=param and param[:MAX_QUOTE])


def _path(location: Sequence[str | int], kind: str, body: Any) -> Path:  # noqa: ANN401 - any JSON
    """The parts of `location` that are in the body: pydantic adds names of types to it."""
    path: list[str | int] = []
    for part in location:
        if _holds(body, part):
            body = body[part]
        elif kind != "missing" or part is not location[-1]:
            continue
        path.append(part)
    return tuple(path)


def _holds(body: object, part: str | int) -> bool:
    if isinstance(body, dict):
        return part in body
    return isinstance(body, list) and isinstance(part, int) and part < len(body)


def _of_one_value(found: Sequence[_Complaint]) -> list[_Complaint]:
    """The complaints about the first value that is at fault, the one to tell first.

    A value that may be of several types gets a complaint for each. The one that goes deepest into the value
    is of the type that was meant, and so is one that isn't about the type.
    """
    first = found[0].path
    related = [c for c in found if c.path[: len(first)] == first or first[: len(c.path)] == c.path]
    deepest = max((c.path for c in related), key=len)
    here = [c for c in related if c.path == deepest]
    return [c for c in here if c.kind not in KINDS][:1] or here


def _words(first: _Complaint, others: Sequence[_Complaint]) -> str:
    if first.kind == "missing":
        return "is required"
    if first.kind in KINDS:
        kinds = dict.fromkeys(KINDS[c.kind] for c in (first, *others))
        return f"must be {' or '.join(kinds)}, not {quote(first.value)}"
    if first.kind in LIMITS:
        numbers = {name: _plain(number) for name, number in first.numbers.items()}
        value = len(first.value) if first.kind in LENGTHS else quote(first.value)
        return f"{LIMITS[first.kind].format_map(numbers)}, not {value}"
    if first.kind.startswith(CUSTOM):
        return first.text
    return f"has a value that is not allowed: {quote(first.value)}"


def _plain(number: object) -> object:
    """2.0 as 2."""
    return int(number) if isinstance(number, float) and number.is_integer() else number
