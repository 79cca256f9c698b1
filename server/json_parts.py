"""Large answers as JSON, written in small parts: no call into the serialiser takes longer than a few
milliseconds, so that a thread that writes one leaves room for the event loop. The same text as
`model_dump_json(exclude_unset=True)`.
"""

import json
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, TypeAdapter

SLICE = 128  # entries of a list that are written together; one may hold 20 others
_LEVELS = 3  # of models within models that are taken apart: answer, choice, log-probabilities
_ANYTHING: TypeAdapter[Any] = TypeAdapter(Any)


def json_bytes(model: BaseModel) -> bytes:
    """The JSON of the fields of `model` that were set."""
    return b"".join(_parts(model, _LEVELS))


def _parts(value: object, levels: int) -> Iterator[bytes]:
    if isinstance(value, BaseModel) and levels:
        yield from _fields(value, levels - 1)
    elif isinstance(value, list) and levels and any(isinstance(entry, BaseModel) for entry in value[:1]):
        yield from _joined((_parts(entry, levels) for entry in value), b"[", b"]")
    elif isinstance(value, list) and len(value) > SLICE:
        slices = (value[start : start + SLICE] for start in range(0, len(value), SLICE))
        yield from _joined(([_dump(part)[1:-1]] for part in slices), b"[", b"]")
    else:
        yield _dump(value)


def _fields(model: BaseModel, levels: int) -> Iterator[bytes]:
    names = [name for name in type(model).model_fields if name in model.model_fields_set]
    written = (_named(name, getattr(model, name), levels) for name in names)
    yield from _joined(written, b"{", b"}")


def _named(name: str, value: object, levels: int) -> Iterator[bytes]:
    yield json.dumps(name).encode() + b":"
    yield from _parts(value, levels)


def _joined(entries: Iterator[Any], begin: bytes, end: bytes) -> Iterator[bytes]:
    yield begin
    for index, entry in enumerate(entries):
        if index:
            yield b","
        yield from entry
    yield end


def _dump(value: object) -> bytes:
    return _ANYTHING.dump_json(value, exclude_unset=True)
