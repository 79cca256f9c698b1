"""Every refusal: status, shape, param and code, and the next request works."""

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import pytest
from starlette.types import Message

from model.protocol import EngineState, GenerationRequest
from tests.contract.conftest import TEXT, Served, serving, until
from tests.fake_engine import INFO, FakeEngine
from tests.loose import Json
from tests.text_tools import ids_of

FORMAT_ERRORS: list[tuple[dict[str, Json], str]] = [
    ({"response_format": "json"}, "response_format"),
    ({"response_format": {}}, "response_format"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_object", "json_schema": {"name": "a"}}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a b"}}}, "response_format"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "x"}}}},
        "response_format",
    ),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
    ({"structured_outputs": {"regex": ""}}, "structured_outputs"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs"),
    ({"structured_outputs": {"choice": [3]}}, "structured_outputs"),
    ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs"),
    ({"structured_outputs": {"json": {"type": 3}}}, "structured_outputs"),
    (
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        "structured_outputs",
    ),
]
BAD_FIELDS = [
    ({"model": None}, "model"),
    ({"model": 3}, "model"),
    ({"prompt": None}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [""]}, "prompt"),
    ({"prompt": ["a", ""]}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [[1], []]}, "prompt"),
    ({"prompt": 3}, "prompt"),
    ({"prompt": {"text": "a"}}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [1, True]}, "prompt"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": [[1, 1.5]]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [257]}, "prompt"),
    ({"prompt": [[1], [257]]}, "prompt"),
    ({"prompt": [2**70]}, "prompt"),
    ({"prompt": ["a"] * 300, "max_tokens": 1}, "prompt"),
    ({"prompt": ["a"] * 10, "n": 100, "max_tokens": 1}, "n"),
    ({"max_tokens": -2}, "max_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
    ({"max_completion_tokens": -2, "max_tokens": ...}, "max_completion_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": 1e300}, "max_tokens"),
    ({"max_tokens": float("inf")}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"echo": "yes"}, "echo"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": 3}, "stop"),
    ({"stop_token_ids": 3}, "stop_token_ids"),
    ({"stop_token_ids": [1] * 257}, "stop_token_ids"),
    ({"stop_token_ids": [1] * 5000}, "stop_token_ids"),
    ({"stop_token_ids": [257]}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"include_stop_str_in_output": 1}, "include_stop_str_in_output"),
    ({"ignore_eos": "no"}, "ignore_eos"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 101}, "min_tokens"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": float("inf")}, "temperature"),
    ({"top_p": -0.1}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": -0.1}, "min_p"),
    ({"min_p": 1.1}, "min_p"),
    ({"presence_penalty": 2.1}, "presence_penalty"),
    ({"frequency_penalty": -2.1}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": 10.1}, "repetition_penalty"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {"1": "a"}}, "logit_bias"),
    ({"logit_bias": {"257": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"seed": 2**63}, "seed"),
    ({"seed": -(2**63) - 1}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options"),
    ({"stream": True, "stream_options": 3}, "stream_options"),
    ({"user": 3}, "user"),
    ({"priority": "high"}, "priority"),
    ({"priority": -1}, "priority"),  # nobody said --allow-priority
    ({"return_token_ids": 1}, "return_token_ids"),
    ({"skip_special_tokens": "no"}, "skip_special_tokens"),
    ({"speculation": "on"}, "speculation"),
    ({"num_loops": 0}, "num_loops"),
    ({"num_loops": 5}, "num_loops"),
    ({"init_scale": -0.1}, "init_scale"),
    ({"init_scale": 1.0}, "init_scale"),  # the fake model's state starts from its input
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"best_of": 0}, "best_of"),
    ({"best_of": 129}, "best_of"),
    ({"best_of": True}, "best_of"),
    ({"best_of": 2, "n": 3}, "best_of"),
    ({"best_of": 2, "stream": True}, "best_of"),
    ({"best_of": 100, "prompt": ["a"] * 10}, "best_of"),
    ({"suffix": 3}, "suffix"),
    ({"suffix": "a"}, "suffix"),  # this tokenizer cannot fill in the middle
    ({"suffix": "a", "echo": True}, "echo"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"cache_salt": 3}, "cache_salt"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": 201}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": "3"}, "truncate_prompt_tokens"),
    ({"draft_policy": "fastest"}, "draft_policy"),
    ({"draft_policy": 3}, "draft_policy"),
    *FORMAT_ERRORS,
]


def error_of(response: httpx.Response, status: int) -> dict[str, Json]:
    """The error of an answer, checked for its shape."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert set(body) == {"error"}
    error: dict[str, Json] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["code"] is None or isinstance(error["code"], str)
    return error


async def works(served: Served) -> None:
    response = await served.post()
    assert response.status_code == 200
    assert response.json()["choices"][0]["text"] == TEXT


@pytest.mark.parametrize(("fields", "param"), BAD_FIELDS, ids=lambda value: str(value)[:60])
async def test_bad_field(served: Served, fields: dict[str, Json], param: str) -> None:
    error = error_of(await served.post(**fields), 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert param in error["message"]
    assert served.engine.requests == []
    await works(served)


@pytest.mark.parametrize(
    "fields",
    [
        {"logprobs": None, "suffix": None, "best_of": None, "response_format": None},
        {"best_of": 2, "n": 2},
        {"response_format": {"type": "text"}},
        {"response_format": {"type": "text"}, "structured_outputs": {"regex": "a+"}},
        {"suffix": ""},
        {"max_tokens": None, "temperature": None, "stop": None, "logit_bias": None, "stream_options": None},
        {"stream": True, "stream_options": {"include_usage": False, "include_obfuscation": False}},
        {"stop": [], "top_k": -1, "logit_bias": {}, "user": "u", "seed": -(2**63)},
    ],
    ids=str,
)
async def test_neutral_values_are_accepted(served: Served, fields: dict[str, Json]) -> None:
    assert (await served.post(**fields)).status_code == 200


@pytest.mark.parametrize("value", [1, None])
async def test_unknown_field(served: Served, value: int | None) -> None:
    error = error_of(await served.post(temprature=value), 400)
    assert (error["param"], error["code"]) == ("temprature", "unknown_field")
    options = {"include_usagee": value}
    assert error_of(await served.post(stream=True, stream_options=options), 400)["param"] == "include_usagee"
    await works(served)


async def test_unsupported_option_of_a_stream(served: Served) -> None:
    for value in (True, 0):
        options = {"include_obfuscation": value}
        error = error_of(await served.post(stream=True, stream_options=options), 400)
        assert error["code"] == "unsupported_field"


async def test_unknown_field_with_a_name_that_is_no_utf8(served: Served) -> None:
    fields: dict[str, Json] = {"\ud800": 1}
    error_of(await served.post(**fields), 400)


async def test_unknown_fields_may_be_allowed() -> None:
    async with serving(allow_unknown_fields=True) as served:
        assert (await served.post(temprature=1)).status_code == 200


async def test_unknown_model(served: Served) -> None:
    error = error_of(await served.post(model="gpt-7"), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    error = error_of(await served.client.get("/v1/models/gpt-7"), 404)
    assert error["code"] == "model_not_found"
    await works(served)


async def test_context_length_names_both_numbers(served: Served) -> None:
    error = error_of(await served.post(prompt="x" * 150, max_tokens=51), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "max_tokens")
    assert "150 in the prompt and 51 in max_tokens" in error["message"]
    assert str(INFO.max_model_len) in error["message"]
    assert error_of(await served.post(prompt="x" * 201, max_tokens=0), 400)["param"] == "prompt"
    assert (await served.post(prompt="x" * 150, max_tokens=50)).status_code == 200


async def test_messages_quote_little_of_the_input(served: Served) -> None:
    for fields in (
        {"temperature": "h" * 10**5},
        {"temperature": {"h": "h" * 10**5}},
        {"model": "m" * 10**5},
        {"u" * 10**5: 1},
    ):
        body = {"model": "default", "prompt": "a"} | fields
        response = await served.client.post("/v1/completions", json=body)
        assert len(response.json()["error"]["message"]) < 400
        assert len(response.content) < 1000


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"a"', b"null", b"\xff", b"[" * 10**5, b"1" * 10**4])
async def test_body_that_is_no_json_object(served: Served, body: bytes) -> None:
    response = await served.client.post(
        "/v1/completions", content=body, headers={"content-type": "application/json"}
    )
    assert error_of(response, 400)["param"] is None
    await works(served)


@pytest.mark.parametrize("depth", [100, 450, 900, 5000])
async def test_deeply_nested_schema(served: Served, depth: int) -> None:
    """However deep: the parser, the encoder or the grammar says no, and none of them by an overflow."""
    schema = '{"items":' * depth + "{}" + "}" * depth
    body = '{"model": "default", "prompt": "a", "structured_outputs": {"json": ' + schema + "}}"
    response = await served.client.post(
        "/v1/completions", content=body, headers={"content-type": "application/json"}
    )
    if depth > 100:
        error_of(response, 400)
    await works(served)


@pytest.mark.parametrize(
    "fields", [{"prompt": "a\ud800"}, {"stop": ["\udc00"]}, {"logit_bias": {"\ud800": 1}}]
)
async def test_half_a_character_is_no_json(served: Served, fields: dict[str, Json]) -> None:
    """UTF-8 could not carry it back; the message says at which character of the body it stands."""
    error = error_of(await served.post(**fields), 400)
    assert "surrogate" in error["message"]
    assert "column" in error["message"]
    await works(served)


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_wrong_content_type(served: Served, content_type: str) -> None:
    response = await served.client.post(
        "/v1/completions", content=b"{}", headers={"content-type": content_type}
    )
    assert error_of(response, 415)["code"] == "unsupported_media_type"
    await works(served)


async def test_unknown_route_and_method(served: Served) -> None:
    assert error_of(await served.client.get("/v1/nothing"), 404)["code"] == "not_found"
    response = await served.client.get("/v1/completions")
    assert error_of(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"


async def test_body_limit() -> None:
    async with serving(body_limit=1000) as served:
        assert error_of(await served.post(prompt="x" * 1000), 413)["code"] == "request_entity_too_large"

        async def chunked() -> AsyncIterator[bytes]:
            yield json.dumps({"model": "default", "prompt": "x" * 1000}).encode()

        response = await served.client.post(
            "/v1/completions", content=chunked(), headers={"content-type": "application/json"}
        )
        assert error_of(response, 413)["code"] == "request_entity_too_large"
        await works(served)


async def test_announced_length_is_refused_before_the_body_is_read() -> None:
    async def receive() -> Message:
        raise AssertionError("the body was read")

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json"), (b"content-length", b"100000000")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
    async with serving() as served:
        await served.app(scope, receive, send)
    assert sent[0]["status"] == 413


@pytest.mark.parametrize("stream", [False, True])
async def test_queue_full(stream: bool) -> None:
    engine = FakeEngine(lambda r: ids_of(TEXT), delay=1000)
    async with serving(engine, max_queued_requests=2) as served:
        first = asyncio.create_task(served.post(n=2))
        await until(lambda: len(engine.requests) == 2)
        response = await served.post(stream=stream)
        error = error_of(response, 429)
        assert (error["code"], error["type"]) == ("queue_full", "rate_limit_error")
        assert int(response.headers["retry-after"]) >= 1
        first.cancel()
        await until(lambda: len(engine.aborted) == 2)
        engine.delay = 0
        await works(served)


@pytest.mark.parametrize(("state", "code"), [("loading", "engine_loading"), ("dead", "engine_unavailable")])
@pytest.mark.parametrize("stream", [False, True])
async def test_engine_that_is_not_ready(served: Served, state: EngineState, code: str, stream: bool) -> None:
    served.engine.state = state
    for response in (await served.post(stream=stream), await served.client.get("/ready")):
        assert error_of(response, 503)["code"] == code
        assert int(response.headers["retry-after"]) >= 1
    assert (await served.client.get("/health")).status_code == 200
    served.engine.state = "ready"
    assert (await served.client.get("/ready")).status_code == 200
    await works(served)


async def test_bug_leaks_nothing(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(request: GenerationRequest) -> None:
        raise ValueError("/secret/path")

    monkeypatch.setattr(served.engine, "submit", broken)
    response = await served.post()
    assert error_of(response, 500)["code"] == "internal_error"
    assert "secret" not in response.text
