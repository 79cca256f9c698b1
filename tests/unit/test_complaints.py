"""Complaints about bodies: place, limit and value in words, and nothing of the inside of the program."""

import re
from collections.abc import Sequence

import pytest
from pydantic import ValidationError

from server.complaints import complaint
from server.errors import InvalidRequestError
from server.schemas.base import RequestModel
from server.schemas.chat import ChatRequest
from server.schemas.completions import CompletionRequest
from server.schemas.tokenize import DetokenizeRequest, TokenizeRequest
from tests.loose import Json

USER = {"role": "user", "content": "hi"}
GOOD: dict[type[RequestModel], dict[str, Json]] = {
    CompletionRequest: {"model": "m", "prompt": "a"},
    ChatRequest: {"model": "m", "messages": [USER]},
    TokenizeRequest: {"prompt": "a"},
    DetokenizeRequest: {"tokens": [1]},
}
ODD: list[Json] = [
    *(None, True, 3, -(2**70), 1.5, float("nan"), "", "odd", "x" * 3000),
    *(
        [],
        [None],
        [True],
        [3, "a"],
        ["a", 3],
        [-1],
        [1.5],
        [[]],
        [["a"]],
        [{}],
        ["a"] * 5000,
        [1] * 2000,
        [[1], 2],
    ),
    *({}, {"a": 1}, {"type": "odd"}, {"a": None}, {"type": "json_schema", "json_schema": {"name": "a b"}}),
    *(
        [{"role": "odd", "content": []}],
        [{"role": "user", "content": [{"type": "image_url"}]}],
        [USER, {"role": 3}],
    ),
    *({str(i): 1 for i in range(2000)}, {"json": 3}, {"choice": [3]}, {"json": {"a": [[[]]]}, "regex": 3}),
]
INSIDES = re.compile(
    r"function-|0x[0-9a-f]|annotated|pydantic|valid|lambda|\[key\]|str\]|int\]|input|typing|<\w", re.I
)


def refusal(kind: type[RequestModel], **fields: Json) -> InvalidRequestError | None:
    body = GOOD[kind] | fields
    try:
        kind.model_validate(body)
    except ValidationError as error:
        return complaint(error, body)
    except InvalidRequestError as error:
        return error
    return None


@pytest.mark.parametrize("kind", list(GOOD), ids=lambda kind: kind.__name__)
def test_no_complaint_shows_the_inside_of_the_program(kind: type[RequestModel]) -> None:
    """Every field of every body, with every odd value: pydantic's own words were shown for unions."""
    num_refused = 0
    for name, field in kind.model_fields.items():
        for value in ODD:
            error = refusal(kind, **{field.alias or name: value})
            if error is None:
                continue
            num_refused += 1
            assert not INSIDES.search(error.message), error.message
            assert name in error.message
            assert len(error.message) < 500
    assert num_refused > 5 * len(kind.model_fields)


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        (
            ChatRequest,
            {"messages": [USER, USER, {"role": "user"}]},
            "messages.2 has no content, which is required of the role 'user'",
        ),
        (
            ChatRequest,
            {"messages": [USER, {**USER, "content": 5}]},
            "messages.1.content must be a string or a list, not 5",
        ),
        (
            ChatRequest,
            {"messages": [{**USER, "content": [{"type": "text", "text": 5}]}]},
            "messages.0.content.0.text must be a string, not 5",
        ),
        (
            ChatRequest,
            {"messages": [USER, {**USER, "content": [{"type": "text", "text": ""}, {"type": "audio"}]}]},
            "messages.1.content.1 has the type 'audio', which is not supported: only text is",
        ),
        (
            ChatRequest,
            {"messages": [USER, {"role": "function", "content": ""}]},
            "messages.1.role 'function' is not supported: results of tools have the role 'tool'",
        ),
        (
            ChatRequest,
            {"messages": [{"role": "x", "content": ""}]},
            "messages.0.role must be 'system', 'developer', 'user', 'assistant' or 'tool', not 'x'",
        ),
        (
            ChatRequest,
            {"metadata": {"k" * 65: "v"}},
            f"metadata.{'k' * 65} must have at most 64 characters, not 65",
        ),
        (CompletionRequest, {"stop": ["a"] * 17}, "stop must have at most 16 entries, not 17"),
        (CompletionRequest, {"stop": ["a", 3]}, "stop.1 must be a string, not 3"),
        (CompletionRequest, {"stop": 3}, "stop must be a string or a list, not 3"),
        (CompletionRequest, {"stop": ""}, "stop must have at least 1 characters, not 0"),
        (CompletionRequest, {"prompt": ["a", 3]}, "prompt.1 must be a string, not 3"),
        (CompletionRequest, {"prompt": [[1], [1, "a"]]}, "prompt.1.1 must be an integer, not 'a'"),
        (
            CompletionRequest,
            {"prompt": 3},
            "prompt must be a string, a list of strings, of token ids or of lists of token ids",
        ),
        (CompletionRequest, {"temperature": 3}, "temperature must be at most 2, not 3"),
        (CompletionRequest, {"top_k": 1.5}, "top_k must be an integer, not 1.5"),
        (CompletionRequest, {"logit_bias": {"7": 101}}, "logit_bias.7 must be at most 100, not 101"),
        (
            CompletionRequest,
            {"structured_outputs": {"json": 3}},
            "structured_outputs.json must be an object or a string, not 3",
        ),
        (
            CompletionRequest,
            {"response_format": {"type": "json_schema", "json_schema": {}}},
            "response_format.json_schema.name is required",
        ),
        (DetokenizeRequest, {"tokens": [1, -1]}, "tokens.1 must be at least 0, not -1"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_complaints_name_place_limit_and_value(
    kind: type[RequestModel], fields: dict[str, object], words: str
) -> None:
    error = refusal(kind, **fields)
    assert error is not None
    assert error.message == words
    assert error.param == next(iter(fields))


@pytest.mark.parametrize(
    ("kind", "name", "entry"),
    [
        (ChatRequest, "messages", {}),
        (CompletionRequest, "stop_token_ids", ""),
        (CompletionRequest, "prompt", {}),
        (CompletionRequest, "prompt", []),
        (DetokenizeRequest, "tokens", ""),
    ],
)
def test_the_first_bad_entry_ends_validation(
    kind: type[RequestModel], name: str, entry: Sequence[object] | dict[str, object] | str
) -> None:
    """Each of millions of entries had a complaint of its own, a kilobyte each."""
    body = GOOD[kind] | {name: [entry] * 200}
    if entry == []:
        body[name] = [[""]] * 200
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    assert caught.value.error_count() <= 2  # two fields of the first entry


def test_every_list_has_a_limit() -> None:
    """In the schema that clients read: no array, and no object that is free in its keys, without one."""
    unlimited = []
    for kind in GOOD:
        for path, part in _parts_of(kind.model_json_schema(), kind.__name__):
            if part.get("type") == "array" and "maxItems" not in part:
                unlimited.append(path)
    assert unlimited == []


def _parts_of(part: Json, path: str) -> list[tuple[str, dict[str, Json]]]:
    found = [(path, part)] if isinstance(part, dict) else []
    inner = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
    for name, value in inner:
        found += _parts_of(value, f"{path}.{name}")
    return found
