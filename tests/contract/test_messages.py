"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API, its stream and its errors."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import httpx
import httpx2
import pytest
from anthropic.types import Message, MessageTokensCount, RawMessageStreamEvent
from pydantic import TypeAdapter

from model.protocol import EngineState
from tests.contract.conftest import TEXT, Served, until
from tests.contract.test_access import bearer
from tests.contract.test_chat import PROMPT_IDS, chatting
from tests.contract.test_responses import saying
from tests.contract.test_tools import PARAMETERS, call, prompt_of
from tests.fake_engine import EOS, INFO, STATS, FakeEngine
from tests.loose import Json
from tests.text_tools import ids_of

EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
TOOL = {"name": "get_weather", "description": "The weather.", "input_schema": PARAMETERS}
USER = {"role": "user", "content": "Weather?"}


async def send(served: Served, path: str = "/v1/messages", **fields: Json) -> httpx.Response:
    body = {"prompt": ..., "max_tokens": 150, "messages": [USER]} | fields
    return await served.post(path, **body)


async def whole(served: Served, **fields: Json) -> dict[str, Json]:
    response = await send(served, **fields)
    assert response.status_code == 200, response.text
    body: dict[str, Json] = response.json()
    Message.model_validate(body, strict=True)
    return body


def events_of(response: httpx.Response) -> list[dict[str, Json]]:
    """The events of a stream but pings, each checked for its form and Anthropic's type."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    found = []
    for name, data in (part.split("\n") for part in response.text.split("\n\n") if part):
        event = json.loads(data.removeprefix("data: "))
        assert (name, data[:6]) == (f"event: {event['type']}", "data: ")
        if event["type"] == "error":
            found.append(event)
        elif event["type"] != "ping":
            EVENT.validate_python(event, strict=True)
            found.append(event)
    return found


async def streamed(served: Served, **fields: Json) -> list[dict[str, Json]]:
    return events_of(await send(served, stream=True, **fields))


def retold(events: list[dict[str, Json]]) -> dict[str, Json]:
    """The message that a stream tells, put together as Anthropic's documents say."""
    begin, *middle, end, stop = events
    assert (begin["type"], end["type"], stop) == ("message_start", "message_delta", {"type": "message_stop"})
    message: dict[str, Json] = begin["message"]
    inputs: list[str] = []
    is_open = False
    for event in middle:
        if event["type"] == "content_block_start":
            assert (is_open, event["index"]) == (False, len(message["content"]))
            message["content"].append(event["content_block"])
            inputs.append("")
            is_open = True
            continue
        assert (is_open, event["index"]) == (True, len(message["content"]) - 1)
        if event["type"] == "content_block_stop":
            is_open = False
            continue
        kind, block = event["delta"].pop("type"), message["content"][-1]
        for name, text in event["delta"].items():
            if kind == "input_json_delta":
                inputs[-1] += text
            else:
                block[name] += text
    assert not is_open
    for block, text in zip(message["content"], inputs, strict=True):
        if block["type"] == "tool_use":
            block["input"] = json.loads(text) if text else {}
    return {**message, **end["delta"], "usage": end["usage"]}


def shape(message: dict[str, Json]) -> dict[str, Json]:
    """Without what differs from one message to the next."""
    blocks = [{name: part for name, part in block.items() if name != "id"} for block in message["content"]]
    return {name: part for name, part in message.items() if name != "id"} | {"content": blocks}


def told_by(response: httpx.Response, status: int, kind: str) -> str:
    """The message of an error, whose shape and id are checked."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"type", "error", "request_id"}
    assert (body["type"], set(body["error"])) == ("error", {"type", "message"})
    assert body["error"]["type"] == kind
    assert body["request_id"] == response.headers["x-request-id"]
    message: str = body["error"]["message"]
    return message


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with chatting() as one:
        yield one


# ---- answers --------------------------------------------------------------------------------------


async def test_a_whole_message(served: Served) -> None:
    body = await whole(
        served, system="Be.", messages=[{"role": "user", "content": "hi 世"}], temperature=0.5, seed=5
    )
    assert served.engine.requests[0].prompt_token_ids == PROMPT_IDS
    assert served.engine.requests[0].sampling.seed == 5
    num_cached = STATS.cached_prompt_tokens
    assert body["id"].startswith("msg_")
    assert shape(body) == {
        "type": "message",
        "role": "assistant",
        "model": "default",
        "content": [{"type": "text", "text": TEXT, "citations": None}],
        "stop_reason": "max_tokens",
        "stop_sequence": None,
        "stop_details": None,
        "usage": {
            "input_tokens": len(PROMPT_IDS) - num_cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": num_cached,
            "output_tokens": len(ids_of(TEXT)),
            "output_tokens_details": {"thinking_tokens": 0},
        },
    }


@pytest.mark.parametrize(
    ("fields", "text", "reason", "sequence"),
    [
        ({}, "abcd", "end_turn", None),
        ({"max_tokens": 3}, "abc", "max_tokens", None),
        ({"max_tokens": 1}, "a", "max_tokens", None),
        ({"stop_sequences": ["zz", "cd"]}, "ab", "stop_sequence", "cd"),
        ({"stop_sequences": ["<eos>"]}, "abcd", "stop_sequence", "<eos>"),
    ],
    ids=str,
)
async def test_why_a_message_ends(
    fields: dict[str, Json], text: str, reason: str, sequence: str | None
) -> None:
    async with chatting(FakeEngine(lambda _: [*ids_of("abcd"), EOS])) as served:
        for body in (await whole(served, **fields), retold(await streamed(served, **fields))):
            assert body["content"][0]["text"] == text
            assert (body["stop_reason"], body["stop_sequence"]) == (reason, sequence)


async def test_a_limit_beyond_the_context_is_no_error() -> None:
    """Clients send the limit that Anthropic's largest models have."""
    async with chatting(FakeEngine(lambda _: ids_of("a" * 500))) as served:
        body = await whole(served, max_tokens=64000)
        room = INFO.max_model_len - len(served.engine.requests[0].prompt_token_ids)
        assert (body["stop_reason"], body["usage"]["output_tokens"]) == (
            "model_context_window_exceeded",
            room,
        )
        body = await whole(served, max_tokens=room)
        assert (body["stop_reason"], body["usage"]["output_tokens"]) == ("max_tokens", room)


async def test_a_message_without_a_text_has_no_block() -> None:
    async with chatting(FakeEngine(lambda _: [EOS])) as served:
        body = await whole(served)
        assert (body["content"], body["stop_reason"]) == ([], "end_turn")
        assert shape(retold(await streamed(served))) == shape(body)


THOUGHT = f"<think>\nHm. {{}}\n</think>\n\nI see.\n{call()}\n{call('Bergen')}"
SAYINGS = [
    TEXT,
    call(),
    f"Look.\n{call('世')}",
    THOUGHT,
    f"<think>only thoughts{call()}",
    f"<think>Hm.</think>{call()} and more",
    "<tool_call>\n{broken\n</tool_call>",
]


@pytest.mark.parametrize("text", SAYINGS)
@pytest.mark.parametrize("tokens_per_event", [1, 7, 1000])
@pytest.mark.parametrize("limit", [2000, 40])
async def test_a_stream_says_what_the_whole_message_says(
    text: str, tokens_per_event: int, limit: int
) -> None:
    async with saying(text, tokens_per_event=tokens_per_event, reasoning_parser="think") as served:
        fields = {"tools": [TOOL], "max_tokens": limit}
        assert shape(retold(await streamed(served, **fields))) == shape(await whole(served, **fields))


async def test_thoughts_and_calls() -> None:
    async with saying(THOUGHT, reasoning_parser="think") as served:
        body = await whole(served, tools=[TOOL], max_tokens=2000)
    thought, text, first, second = body["content"]
    assert (thought["type"], thought["thinking"]) == ("thinking", "Hm. {}")
    assert len(thought["signature"]) == 64
    assert text["text"] == "I see."
    assert [block["input"] for block in (first, second)] == [{"city": "Oslo"}, {"city": "Bergen"}]
    assert first["id"] != second["id"]
    assert body["stop_reason"] == "tool_use"
    assert body["usage"]["output_tokens_details"]["thinking_tokens"] > 5


async def test_events_come_in_anthropics_order(served: Served) -> None:
    response = await send(served, stream=True)
    names = [line for line in response.text.split("\n") if line.startswith("event: ")]
    middle = ["event: content_block_delta"] * (len(names) - 6)
    assert names == [
        "event: message_start",
        "event: ping",
        "event: content_block_start",
        *middle,
        "event: content_block_stop",
        "event: message_delta",
        "event: message_stop",
    ]
    assert len(middle) > 5
    assert response.text.endswith("\n\n")


# ---- what the model reads -------------------------------------------------------------------------


async def test_a_history_with_calls_and_thoughts() -> None:
    use = {"type": "tool_use", "name": "get_weather"}
    history = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "One", "cache_control": {"type": "ephemeral"}}],
        },
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "any"},
                {"type": "redacted_thinking", "data": "xyz"},
                {"type": "text", "text": "Look."},
                use | {"id": "c1", "input": {"city": "Oslo"}},
                use | {"id": "c2", "input": {"city": "世"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "c1", "content": "rain", "is_error": True},
                {"type": "tool_result", "tool_use_id": "c2", "content": [{"type": "text", "text": "sun"}]},
                {"type": "text", "text": "And?"},
            ],
        },
    ]
    system = [{"type": "text", "text": "Be."}, {"type": "text", "text": "Brief."}]
    async with saying("Well.") as served:
        await whole(served, system=system, messages=history, tools=[TOOL])
        assert prompt_of(served).partition(";")[2] == (
            "system:Be.\nBrief.;user:One\nWeather?;assistant:Look."
            '<tool_call>get_weather{"city": "Oslo"}</tool_call><tool_call>get_weather{"city": "世"}'
            "</tool_call>;tool:rain;tool:sun;user:And?;a:"
        )
        async with client_of(served) as client:
            messages: Json = history
            tools: Json = [TOOL]
            counted = await client.messages.count_tokens(
                model="default", system="Be.\nBrief.", messages=messages, tools=tools
            )
        assert counted.input_tokens == len(served.engine.requests[-1].prompt_token_ids)


async def test_a_message_comes_back_as_it_was_sent() -> None:
    async with saying(THOUGHT, reasoning_parser="think") as served:
        content = (await whole(served, tools=[TOOL], max_tokens=2000))["content"]
        results = [
            {"type": "tool_result", "tool_use_id": block["id"], "content": "rain"}
            for block in content
            if block["type"] == "tool_use"
        ]
        again = [USER, {"role": "assistant", "content": content}, {"role": "user", "content": results}]
        await whole(served, messages=again, tools=[TOOL])
        assert '<tool_call>get_weather{"city": "Oslo"}' in prompt_of(served)


async def test_an_answer_goes_on_where_the_last_message_ends(served: Served) -> None:
    await whole(served, messages=[USER, {"role": "assistant", "content": "The answer is ("}])
    assert served.engine.requests[0].prompt_token_ids[-16:] == ids_of("a:The answer is (")[-16:]


@pytest.mark.parametrize(
    ("choice", "must_call"),
    [
        ({"type": "auto"}, False),
        ({"type": "none"}, False),
        ({"type": "any"}, True),
        ({"type": "tool", "name": "get_weather"}, True),
    ],
    ids=str,
)
async def test_choices_of_tools(choice: dict[str, Json], must_call: bool) -> None:
    tools = [TOOL, TOOL | {"name": "f"}]
    async with saying(call()) as served:
        await whole(served, tools=tools, tool_choice=choice, max_tokens=1000)
        assert ("get_weather" in prompt_of(served)) == (choice["type"] != "none")
        await whole(served, tools=tools, tool_choice={"type": "any", "disable_parallel_tool_use": True})
        first, one_call = [request.grammar for request in served.engine.requests]
    assert (first is not None) == must_call
    assert one_call not in (None, first)


async def test_tools_of_anthropics_own_are_left_out_and_named() -> None:
    others = [
        {"type": "web_search_20250305", "name": "web_search"},
        {"type": "bash_20250124", "name": "bash"},
    ]
    async with saying("Well.") as served:
        response = await send(served, tools=[*others, TOOL | {"type": "custom"}])
        assert response.status_code == 200
        assert "'web_search_20250305', 'bash_20250124'" in response.headers["x-speed-warning"]
        assert "web_search" not in prompt_of(served)


async def test_what_changes_no_text_is_taken(served: Served) -> None:
    taken: dict[str, Json] = {
        "metadata": {"user_id": "u"},
        "service_tier": "auto",
        "cache_control": {"type": "ephemeral"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "output_config": {"effort": "high"},
        "mcp_servers": [],
        "container": None,
        "inference_geo": "eu",
        "tools": [],
        "tool_choice": {"type": "auto"},
        "speed": "fast",
    }
    plain = await whole(served)
    assert shape(await whole(served, **taken)) == shape(plain)
    first, second = served.engine.requests
    assert first.prompt_token_ids == second.prompt_token_ids


async def test_thinking_is_a_variable_of_the_template() -> None:
    template = (
        "{{ messages[0].content }} {{ enable_thinking is defined and enable_thinking }}{{ reasoning_effort }}"
    )
    async with saying("x", template) as served:
        await whole(served, thinking={"type": "adaptive"}, output_config={"effort": "low"})
        assert prompt_of(served) == "Weather? Truelow"
        await whole(served, thinking={"type": "disabled"})
        assert prompt_of(served) == "Weather? False"


async def test_a_format(served: Served) -> None:
    wanted = {"type": "json_schema", "schema": PARAMETERS}
    for fields in ({"output_config": {"format": wanted}}, {"output_format": wanted}):
        await whole(served, **fields)
        grammar = served.engine.requests[-1].grammar
        assert grammar is not None
        assert json.loads(grammar.text) == PARAMETERS


# ---- what is refused ------------------------------------------------------------------------------

IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
REFUSED: list[tuple[dict[str, Json], str]] = [
    ({"max_tokens": ...}, "max_tokens is required"),
    ({"max_tokens": 0}, "max_tokens must be at least 1, not 0"),
    ({"max_tokens": "5"}, "max_tokens must be an integer, not '5'"),
    ({"messages": []}, "messages must have at least 1 entries, not 0"),
    (
        {"messages": [{"role": "tool", "content": ""}]},
        "messages.0.role must be 'user', 'assistant' or 'system'",
    ),
    ({"messages": [USER, {"role": "user", "content": [IMAGE]}]}, "messages.1.content.0 has the type 'image'"),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]}
            ]
        },
        "messages.0.content has a block of the type 'tool_use', which a message of the role 'user' can't",
    ),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": [IMAGE]}]}
            ]
        },
        "messages.0.content.0.content.0 has the type 'image', which is not supported: text is",
    ),
    ({"messages": [USER | {"colour": 1}]}, "unknown field 'colour' in messages.0"),
    ({"system": [{"type": "image"}]}, "system.0 has the type 'image'"),
    ({"temperature": 3}, "temperature must be at most 2, not 3"),
    ({"stop_sequences": ["a"] * 17}, "stop_sequences must have at most 16 entries, not 17"),
    ({"tools": [{"name": "f"}]}, "tools.0.input_schema is required"),
    ({"tools": [TOOL | {"name": "a b"}]}, "tools.0.name must match"),
    ({"tools": [TOOL | {"input_schema": {"type": "array"}}]}, "tools.0.input_schema must be of the type"),
    ({"tools": [TOOL] * 129}, "tools must have at most 128 entries, not 129"),
    ({"tools": [{"type": 3}]}, "tools.0 has the type 3"),
    ({"tool_choice": {"type": "any"}}, "tool_choice is 'any', but tools has no tool"),
    ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice names 'g'"),
    ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice needs a name"),
    ({"mcp_servers": [{"url": "x"}]}, "mcp_servers is not supported"),
    ({"container": "c"}, "container is not supported"),
    ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management.edits.0"),
    ({"n": 2}, "unknown field 'n'"),
    ({"output_config": {"format": {"type": "json_schema", "schema": {"type": 3}}}}, "output_config.format"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens (9)"),
]


@pytest.mark.parametrize(("fields", "words"), REFUSED, ids=lambda value: str(value)[:60])
async def test_what_is_refused_is_named(served: Served, fields: dict[str, Json], words: str) -> None:
    for stream in (False, True):
        response = await send(served, stream=stream, **fields)
        assert words in told_by(response, 400, "invalid_request_error")
    assert not served.engine.requests


async def test_a_prompt_that_is_too_long_has_the_words_that_clients_look_for(served: Served) -> None:
    num_tokens = len("u:") + 300 + 1 + len("a:")
    for path in ("/v1/messages",):
        message = told_by(
            await send(served, path, messages=[USER | {"content": "x" * 300}]), 400, "invalid_request_error"
        )
        assert message.startswith(
            f"prompt is too long: {num_tokens} tokens > {INFO.max_model_len - 1} maximum"
        )
    endless = await send(served, messages=[USER | {"content": "x" * 10**6}])
    assert told_by(endless, 400, "invalid_request_error").startswith("prompt is too long: ")


async def test_errors_of_every_status(served: Served) -> None:
    client = served.client
    told_by(await send(served, model="gpt"), 404, "not_found_error")
    told_by(await client.post("/v1/messages/batches", json={}), 404, "not_found_error")
    told_by(await client.get("/v1/messages"), 405, "invalid_request_error")
    told_by(await client.put("/v1/messages/count_tokens"), 405, "invalid_request_error")
    told_by(await client.post("/v1/messages", content=b"{"), 415, "invalid_request_error")
    json_type = {"content-type": "application/json"}
    told_by(await client.post("/v1/messages", content=b"{", headers=json_type), 400, "invalid_request_error")
    packed = json_type | {"content-encoding": "br"}
    told_by(await client.post("/v1/messages", content=b"{}", headers=packed), 415, "invalid_request_error")
    told_by(
        await client.post("/v1/messages", content=b" " * 2**24, headers=json_type), 413, "request_too_large"
    )
    foreign = json_type | {"host": "evil.example"}
    told_by(await client.post("/v1/messages", content=b"{}", headers=foreign), 403, "permission_error")
    other = await client.post("/v1/messagesx", json={})
    assert other.json()["error"]["code"] == "not_found"


@pytest.mark.parametrize("state", ["loading", "dead"])
async def test_without_an_engine(served: Served, state: EngineState) -> None:
    served.engine.state = state
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        fields: dict[str, Json] = {} if path == "/v1/messages" else {"max_tokens": ...}
        response = await send(served, path, **fields)
        told_by(response, 503, "overloaded_error")
        assert int(response.headers["retry-after"]) > 0


async def test_a_full_queue() -> None:
    engine = FakeEngine(lambda _: ids_of("ab" * 20), delay=0.01)
    async with chatting(engine, max_queued_requests=1) as served:
        first = asyncio.create_task(send(served))
        await until(lambda: engine.requests)
        response = await send(served)
        told_by(response, 429, "rate_limit_error")
        assert response.headers["retry-after"] == "1"
        assert (await first).status_code == 200


async def test_a_failure_in_a_stream_is_its_last_event() -> None:
    async with chatting(FakeEngine(lambda _: ids_of("ab" * 50), delay=0.005)) as served:
        asked = asyncio.create_task(send(served, stream=True))
        await until(lambda: served.engine.requests)
        await asyncio.sleep(0.1)
        served.engine.fail()
        response = await asked
    begin, *_, last = events_of(response)
    assert begin["type"] == "message_start"
    assert (last["type"], last["error"]["type"]) == ("error", "api_error")
    assert last["request_id"] == response.headers["x-request-id"]
    assert "secret" not in response.text


async def test_a_failure_of_a_whole_message() -> None:
    async with chatting(FakeEngine(lambda _: ids_of("ab" * 50), delay=0.005)) as served:
        asked = asyncio.create_task(send(served))
        await until(lambda: served.engine.requests)
        served.engine.fail()
        told_by(await asked, 500, "api_error")


async def test_a_shutdown_is_told() -> None:
    engine = FakeEngine(lambda _: ids_of("ab" * 50), delay=0.005)
    async with chatting(engine) as served:
        for stream in (False, True):
            asked = asyncio.create_task(send(served, stream=stream))
            await until(lambda: engine._running)
            await asyncio.sleep(0.05)
            served.app.state.server.batcher.abort_all()
            response = await asked
            if stream:
                assert events_of(response)[-1]["error"]["type"] == "overloaded_error"
            else:
                told_by(response, 503, "overloaded_error")


async def test_a_key_opens_under_either_name() -> None:
    async with chatting(api_keys="first,second") as served:
        body = {"model": "default", "max_tokens": 5, "messages": [USER]}
        for headers in ({}, {"x-api-key": "no"}, {"x-api-key": ""}, bearer("no")):
            response = await served.client.post("/v1/messages", json=body, headers=headers)
            assert "x-api-key" in told_by(response, 401, "authentication_error")
        opening = ({"x-api-key": "first"}, bearer("first"), {"x-api-key": "first"} | bearer("no"))
        for headers in opening:
            assert (await served.client.post("/v1/messages", json=body, headers=headers)).status_code == 200
        models = await served.client.get("/v1/models", headers={"x-api-key": "second"})
        assert models.status_code == 200
        assert len({request.tenant for request in served.engine.requests}) == 1


# ---- counting -------------------------------------------------------------------------------------


async def test_tokens_are_counted(served: Served) -> None:
    fields = {"system": "Be.", "messages": [{"role": "user", "content": "hi 世"}], "max_tokens": ...}
    response = await send(served, "/v1/messages/count_tokens", **fields)
    MessageTokensCount.model_validate(response.json(), strict=True)
    assert response.json() == {"input_tokens": len(PROMPT_IDS)}
    assert not served.engine.requests
    long = await send(
        served, "/v1/messages/count_tokens", messages=[USER | {"content": "x" * 300}], max_tokens=...
    )
    assert long.json()["input_tokens"] > INFO.max_model_len
    bad = await send(served, "/v1/messages/count_tokens", messages=[], max_tokens=...)
    told_by(bad, 400, "invalid_request_error")


# ---- the anthropic package ------------------------------------------------------------------------


def client_of(served: Served) -> anthropic.AsyncAnthropic:
    transport = httpx2.ASGITransport(served.app)
    http_client = httpx2.AsyncClient(transport=transport)
    return anthropic.AsyncAnthropic(api_key="none", base_url="http://localhost", http_client=http_client)


async def test_the_anthropic_package() -> None:
    tools: Json = [TOOL]
    messages: Json = [USER]
    async with saying(THOUGHT, reasoning_parser="think") as served, client_of(served) as client:
        answer = await client.messages.create(
            model="default", max_tokens=2000, messages=messages, tools=tools
        )
        async with client.messages.stream(
            model="default", max_tokens=2000, messages=messages, tools=tools
        ) as stream:
            text = "".join([part async for part in stream.text_stream])
            final = await stream.get_final_message()
        assert text == "I see."
        assert shape(final.to_dict()) == shape(answer.to_dict())
        used = [block.input for block in final.content if block.type == "tool_use"]
        assert used == [{"city": "Oslo"}, {"city": "Bergen"}]
        with pytest.raises(anthropic.BadRequestError, match="max_tokens must be at least 1"):
            await client.messages.create(model="default", max_tokens=0, messages=messages)
        with pytest.raises(anthropic.NotFoundError):
            await client.messages.create(model="claude", max_tokens=5, messages=messages)


async def test_the_anthropic_package_is_told_of_a_failure() -> None:
    engine = FakeEngine(lambda _: ids_of("ab" * 50), delay=0.005)
    messages: Json = [USER]
    async with chatting(engine) as served, client_of(served) as client:

        async def fail() -> None:
            await until(lambda: engine.requests)
            await asyncio.sleep(0.1)
            engine.fail()

        failing = asyncio.create_task(fail())
        with pytest.raises(anthropic.APIStatusError, match="the engine failed"):
            async with client.messages.stream(model="default", max_tokens=150, messages=messages) as stream:
                await stream.until_done()
        await failing
