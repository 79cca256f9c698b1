"""POST /v1/responses: items in, items out, the events of a stream, and what is refused in words."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Any

import httpx
import httpx2
import msgspec
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from model.grammar.check import check_grammar
from server.chat_template import ChatTemplate
from tests.contract.conftest import TEXT, Served, serving, until
from tests.contract.test_chat import PROMPT_IDS, chatting
from tests.contract.test_errors import error_of
from tests.contract.test_tools import PARAMETERS, TEMPLATE, call, prompt_of
from tests.fake_engine import EOS, INFO, STATS, FakeEngine, Script, logprobs_of
from tests.loose import Field, Json
from tests.text_tools import ids_of

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
TOOL = {"type": "function", "name": "get_weather", "parameters": PARAMETERS, "strict": None}
USER = {"role": "user", "content": "Weather?"}


def saying(
    text: str | Script, template: str = TEMPLATE, *, tokens_per_event: int = 1, **options: Field
) -> AbstractAsyncContextManager[Served]:
    """A server whose model says `text` to the end, or what the script makes of a request."""
    script = text if callable(text) else lambda _: [*ids_of(text), EOS]
    info = msgspec.structs.replace(INFO, max_model_len=4000)
    engine = FakeEngine(script, tokens_per_event=tokens_per_event, info=info)
    return serving(engine, chat_template=ChatTemplate(template), **options)


async def respond(served: Served, **fields: Json) -> httpx.Response:
    absent = {"prompt": ..., "max_tokens": ...}
    return await served.post("/v1/responses", **absent | {"input": "Weather?"} | fields)


async def whole(served: Served, **fields: Json) -> dict[str, Json]:
    response = await respond(served, **fields)
    assert response.status_code == 200, response.text
    body: dict[str, Json] = response.json()
    Response.model_validate(body, strict=True)
    return body


def events_of(response: httpx.Response) -> list[dict[str, Json]]:
    """The events of a stream, each checked for its form, its number and OpenAI's type."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    frames = [part.split("\n") for part in response.text.split("\n\n") if part]
    found = []
    for name, data in frames:
        event = json.loads(data.removeprefix("data: "))
        assert (name, data[:6]) == (f"event: {event['type']}", "data: ")
        EVENT.validate_python(event, strict=True)
        found.append(event)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


async def streamed(served: Served, **fields: Json) -> list[dict[str, Json]]:
    return events_of(await respond(served, stream=True, **fields))


def shape(value: Json) -> Json:
    """Without what differs from one response to the next."""
    if isinstance(value, dict):
        drawn = ("id", "item_id", "call_id", "created_at", "completed_at")
        return {name: shape(part) for name, part in value.items() if name not in drawn}
    return [shape(part) for part in value] if isinstance(value, list) else value


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with chatting(FakeEngine(lambda _: [*ids_of(TEXT), EOS])) as one:
        yield one


# ---- answers --------------------------------------------------------------------------------------


async def test_a_whole_response(served: Served) -> None:
    items = [{"role": "user", "content": [{"type": "input_text", "text": "hi 世"}]}]
    body = await whole(served, instructions="Be.", input=items, seed=5, metadata={"a": "b"}, user="me")
    num_tokens = len(ids_of(TEXT)) + 1
    assert served.engine.requests[0].prompt_token_ids == PROMPT_IDS
    assert served.engine.requests[0].sampling.seed == 5
    (item,) = body["output"]
    assert (body["id"][:5], item["id"][:4]) == ("resp_", "msg_")
    assert shape(item) == {
        "type": "message",
        "status": "completed",
        "role": "assistant",
        "content": [{"type": "output_text", "text": TEXT, "annotations": [], "logprobs": []}],
    }
    assert body["usage"] == {
        "input_tokens": len(PROMPT_IDS),
        "input_tokens_details": {"cached_tokens": STATS.cached_prompt_tokens, "cache_write_tokens": 0},
        "output_tokens": num_tokens,
        "output_tokens_details": {
            "reasoning_tokens": 0,
            "accepted_prediction_tokens": STATS.accepted_drafts,
            "rejected_prediction_tokens": STATS.rejected_drafts,
            "decode_passes": STATS.passes,
        },
        "total_tokens": len(PROMPT_IDS) + num_tokens,
    }
    echoed = {"instructions": "Be.", "metadata": {"a": "b"}, "user": "me", "store": False, "model": "default"}
    assert {name: body[name] for name in echoed} == echoed


async def test_ends() -> None:
    async with chatting(FakeEngine(lambda _: [*ids_of("abcd"), EOS])) as served:
        body = await whole(served, max_output_tokens=5)
        assert (body["status"], body["incomplete_details"]) == ("completed", None)
        body = await whole(served, max_output_tokens=1)
        assert (body["status"], body["incomplete_details"]) == (
            "incomplete",
            {"reason": "max_output_tokens"},
        )
        assert shape(body["output"])[0]["status"] == "incomplete"
        assert (await streamed(served, max_output_tokens=1))[-1]["type"] == "response.incomplete"
        body = await whole(served, stop="c")
        assert (body["status"], body["output"][0]["content"][0]["text"]) == ("completed", "ab")


async def test_an_empty_answer_is_a_message() -> None:
    async with chatting(FakeEngine(lambda _: [EOS])) as served:
        body = await whole(served)
        assert body["output"][0]["content"][0]["text"] == ""
        assert shape((await streamed(served))[-1]["response"]) == shape(body)


async def test_the_events_of_a_text(served: Served) -> None:
    created, progress, added, part, *deltas, text, part_done, done, completed = await streamed(served)
    assert [event["type"] for event in (created, progress, added, part)] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert {event["type"] for event in deltas} == {"response.output_text.delta"}
    assert len(deltas) > 5
    assert "".join(event["delta"] for event in deltas) == TEXT
    assert [event["type"] for event in (text, part_done, done, completed)] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert added["item"] == done["item"] | {"status": "in_progress", "content": []}
    assert created["response"]["id"] == progress["response"]["id"] == completed["response"]["id"]
    assert created["response"]["status"] == progress["response"]["status"] == "in_progress"
    assert completed["response"]["output"] == [done["item"]]
    assert {event["item_id"] for event in (part, *deltas, text, part_done)} == {done["item"]["id"]}


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


def retold(events: list[dict[str, Json]]) -> list[dict[str, Json]]:
    """The items of a response, put together of the deltas alone."""
    items: list[dict[str, Json]] = []
    for event in events:
        if event["type"] == "response.output_item.added":
            assert event["output_index"] == len(items)
            items.append({"type": event["item"]["type"], "name": event["item"].get("name"), "text": ""})
        elif "delta" in event:
            assert event["output_index"] == len(items) - 1, "an item that has ended goes on"
            items[-1]["text"] += event["delta"]
    return items


def told(item: dict[str, Json]) -> dict[str, Json]:
    """An item of a whole response in the same shape."""
    text = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
    return {"type": item["type"], "name": item.get("name"), "text": text}


@pytest.mark.parametrize("text", SAYINGS)
@pytest.mark.parametrize("tokens_per_event", [1, 7, 1000])
@pytest.mark.parametrize("limit", [None, 40])
async def test_a_stream_says_what_the_whole_response_says(
    text: str, tokens_per_event: int, limit: int | None
) -> None:
    options: dict[str, Json] = {"tokens_per_event": tokens_per_event, "reasoning_parser": "think"}
    fields = {"tools": [TOOL], "max_output_tokens": limit}
    async with saying(text, **options) as served:
        body = await whole(served, **fields)
        events = await streamed(served, **fields)
    assert shape(events[-1]["response"]) == shape(body)
    assert retold(events) == [told(item) for item in body["output"]]
    added = [event for event in events if event["type"].endswith(".added")]
    done = [event for event in events if event["type"] == "response.output_item.done"]
    assert [event["item"] for event in done] == events[-1]["response"]["output"]
    assert len(added) == sum(1 if item["type"] == "function_call" else 2 for item in body["output"])


async def test_thoughts_and_calls() -> None:
    async with saying(THOUGHT, reasoning_parser="think") as served:
        body = await whole(served, tools=[TOOL])
    thought, message, first, second = body["output"]
    assert (thought["type"], thought["summary"]) == ("reasoning", [])
    assert thought["content"] == [{"type": "reasoning_text", "text": "Hm. {}"}]
    assert message["content"][0]["text"] == "I see."
    assert [json.loads(item["arguments"]) for item in (first, second)] == [
        {"city": "Oslo"},
        {"city": "Bergen"},
    ]
    assert first["call_id"] != second["call_id"]
    assert body["status"] == "completed"
    assert body["usage"]["output_tokens_details"]["reasoning_tokens"] > 5


async def test_logprobs_of_a_response(served: Served) -> None:
    fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "input": "hi"}
    body = await whole(served, **fields)
    (part,) = body["output"][0]["content"]
    start = len(served.engine.requests[0].prompt_token_ids)
    expected = [logprobs_of(token, start + i, 2) for i, token in enumerate([*ids_of(TEXT), EOS])]
    assert [entry["logprob"] for entry in part["logprobs"]] == [entry.logprob for entry in expected]
    assert {len(entry["top_logprobs"]) for entry in part["logprobs"]} == {2}
    events = await streamed(served, **fields)
    assert events[-1]["response"]["output"][0]["content"] == [part]
    deltas = [event["logprobs"] for event in events if event["type"] == "response.output_text.delta"]
    # The end of the text is a token without any: it is told when the text is done.
    assert [entry for entries in deltas for entry in entries] == part["logprobs"][:-1]


async def test_logprobs_are_those_of_the_text_behind_the_thoughts() -> None:
    async with saying("<think>Hm.</think>Yes.", reasoning_parser="think", tokens_per_event=3) as served:
        fields = {"include": ["message.output_text.logprobs"]}
        body = await whole(served, **fields)
        (part,) = body["output"][1]["content"]
        assert "".join(entry["token"] for entry in part["logprobs"]) == "Yes.<eos>"
        assert shape((await streamed(served, **fields))[-1]["response"]) == shape(body)


# ---- what the model reads -------------------------------------------------------------------------


async def test_a_history_with_calls_and_thoughts() -> None:
    history = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": "Weather?"},
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "Hm"}],
        },
        {"type": "reasoning", "summary": [], "content": None, "encrypted_content": "gAAA"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Look."}]},
        {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": '{"city": "Oslo"}'},
        {"type": "function_call", "call_id": "c2", "name": "get_weather", "arguments": '{"city": "Rome"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "sun"}]},
    ]
    async with saying("Well.") as served:
        await whole(served, instructions="Be.", input=history, tools=[TOOL])
        assert prompt_of(served).partition(";")[2] == (
            "system:Be.\nBe brief.;user:Weather?;assistant:Look."
            '<tool_call>get_weather{"city": "Oslo"}</tool_call><tool_call>get_weather{"city": "Rome"}'
            "</tool_call>;tool:rain;tool:sun;a:"
        )


async def test_an_answer_comes_back_as_it_was_sent() -> None:
    """What every client does: the output of one turn is a part of the next one's input."""
    async with saying(THOUGHT, reasoning_parser="think") as served:
        output = (await whole(served, tools=[TOOL]))["output"]
        results = [
            {"type": "function_call_output", "call_id": item["call_id"], "output": "rain"}
            for item in output
            if item["type"] == "function_call"
        ]
        await whole(served, input=[USER, *output, *results], tools=[TOOL])
        assert '<tool_call>get_weather{"city": "Oslo"}' in prompt_of(served)


async def test_tools_of_other_types_are_left_out_and_named() -> None:
    others = [{"type": "web_search"}, {"type": "namespace", "name": "x", "tools": [TOOL]}, {"type": "a\nb"}]
    async with saying("Well.") as served:
        for stream in (False, True):
            response = await respond(served, tools=[*others, TOOL, {"type": "web_search"}], stream=stream)
            assert response.status_code == 200
            warning = response.headers["x-speed-warning"]
            assert warning == "tools of these types were left out: 'web_search', 'namespace', 'a\\nb'"
        assert "x-speed-warning" not in (await respond(served, tools=[TOOL])).headers
        many = [{"type": f"t{i}"} for i in range(100)]
        assert (await respond(served, tools=many)).headers["x-speed-warning"].endswith("'t7' and 92 more")


@pytest.mark.parametrize(
    ("choice", "must_call"),
    [
        ("auto", False),
        ("none", False),
        ("required", True),
        ({"type": "function", "name": "get_weather"}, True),
        ({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "f"}]}, True),
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]}, False),
    ],
    ids=str,
)
async def test_choices_of_tools(choice: Json, must_call: bool) -> None:
    async with saying(call()) as served:
        body = await whole(served, tools=[TOOL, TOOL | {"name": "f"}], tool_choice=choice)
        (request,) = served.engine.requests
        prompt = prompt_of(served)
    assert body["tool_choice"] == choice
    assert ("get_weather" in prompt) == (choice != "none" and "mode" not in str(choice))
    if must_call:
        assert request.grammar is not None
        check_grammar(request.grammar)


async def test_fields_reach_the_engine(served: Served) -> None:
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": -3, "logit_bias": {"5": 1}}
    others = {"min_tokens": 2, "ignore_eos": True, "stop_token_ids": [9], "speculation": False}
    await whole(served, **fields, **others, draft_policy="single", num_loops=2)
    (request,) = served.engine.requests
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 7)
    assert (sampling.seed, sampling.logit_bias, request.min_tokens) == (-3, {5: 1}, 2)
    assert (request.ignore_eos, request.stop_token_ids) == (True, [9])
    assert (request.speculation, request.draft_policy, request.num_loops) == (False, "single", 2)


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


async def test_formats(served: Served) -> None:
    named = {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}
    for asked, kind in (
        (named, "json_schema"),
        ({"type": "json_object"}, "json_object"),
        ({"type": "text"}, None),
    ):
        body = await whole(served, text={"format": asked, "verbosity": "low"})
        grammar = served.engine.requests[-1].grammar
        assert (grammar and grammar.kind) == kind
        assert body["text"] == {"format": asked}


async def test_what_changes_no_text_is_taken(served: Served) -> None:
    taken = {
        "store": True,
        "previous_response_id": None,
        "conversation": None,
        "background": False,
        "include": ["reasoning.encrypted_content", "a.new.one"],
        "reasoning": {"effort": "high", "summary": "auto"},
        "parallel_tool_calls": False,
        "truncation": "disabled",
        "service_tier": "flex",
        "prompt_cache_key": "k",
        "prompt_cache_retention": "24h",
        "safety_identifier": "s",
        "max_tool_calls": 3,
        "stream_options": {"include_obfuscation": True},
        "client_metadata": {"x": "y"},
        "context_management": [],
        "tools": None,
        "text": {"verbosity": "high"},
    }
    plain = await whole(served)
    body = await whole(served, **taken)
    assert shape(body["output"]) == shape(plain["output"])
    first, second = served.engine.requests
    assert (first.prompt_token_ids, first.max_tokens) == (second.prompt_token_ids, second.max_tokens)


async def test_truncation_keeps_the_end(served: Served) -> None:
    error = error_of(await respond(served, input="x" * 300), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "input")
    assert "length of the input" in error["message"]
    await whole(served, input="x" * 300, truncation="auto", max_output_tokens=10)
    assert len(served.engine.requests[0].prompt_token_ids) == INFO.max_model_len - 10


# ---- what is refused ------------------------------------------------------------------------------

ANSWER = {"type": "message", "role": "assistant", "content": "ok"}
REFUSED: list[tuple[dict[str, Json], str, str]] = [
    ({"input": ...}, "input", "input is required"),
    ({"input": []}, "input", "input is empty"),
    ({"input": 5}, "input", "input must be"),
    ({"model": "gpt"}, "model", "does not exist"),
    ({"previous_response_id": "resp_1"}, "previous_response_id", "send the whole conversation in input"),
    ({"conversation": "conv_1"}, "conversation", "send the whole conversation in input"),
    ({"conversation": {"id": "c"}}, "conversation", "send the whole conversation in input"),
    ({"prompt": {"id": "p"}}, "prompt", "not supported"),
    ({"background": True}, "background", "not supported"),
    ({"n": 2}, "n", "unknown field 'n'"),
    ({"prompt_logprobs": 2}, "prompt_logprobs", "unknown field"),
    ({"response_format": {"type": "json_object"}}, "response_format", "unknown field"),
    ({"max_output_tokens": 0}, "max_output_tokens", "must be at least 1, not 0"),
    ({"max_output_tokens": 500}, "max_output_tokens", "500 in max_output_tokens"),
    ({"max_output_tokens": 5, "min_tokens": 6}, "min_tokens", "min_tokens (6)"),
    ({"temperature": 3}, "temperature", "must be at most 2, not 3"),
    ({"top_logprobs": 21}, "top_logprobs", "must be at most 20"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input", "input.0 has the type 'item_reference'"),
    ({"input": [USER, "x"]}, "input", "input.1 must be an object, not 'x'"),
    ({"input": [{"role": "tool", "content": ""}]}, "input", "input.0.role must be"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}]},
        "input",
        "input.0.content.0 has the type 'input_image', which is not supported: input_text, output_text",
    ),
    (
        {"input": [{"role": "user", "content": [{"type": "input_text"}]}]},
        "input",
        "input.0.content.0.text is",
    ),
    ({"input": [{"role": "user", "content": "a", "colour": 1}]}, "colour", "'colour' in input.0"),
    (
        {"input": [USER, {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{no"}]},
        "input",
        "input.1.arguments must be the text of a JSON object, not '{no'",
    ),
    (
        {
            "input": [
                USER,
                ANSWER,
                {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_file"}]},
            ]
        },
        "input",
        "input.2.output.0 has the type 'input_file'",
    ),
    (
        {"input": [{"type": "function_call", "call_id": "c", "name": "a b", "arguments": ""}]},
        "input",
        "input.0.name",
    ),
    ({"tools": [{"name": "f"}]}, "tools", "tools.0 has no type"),
    ({"tools": [TOOL | {"name": ""}]}, "tools", "tools.0.name must match"),
    (
        {"tools": [TOOL | {"parameters": {"type": "string"}}]},
        "tools",
        "tools.0.parameters must be of the type",
    ),
    ({"tools": [{"type": "x"}] * 129}, "tools", "tools must have at most 128 entries, not 129"),
    ({"tool_choice": "must"}, "tool_choice", "tool_choice is 'must'"),
    ({"tool_choice": "required"}, "tool_choice", "tools has no tool of the type function"),
    ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice", "names 'f'"),
    ({"tool_choice": {"type": "web_search"}}, "tool_choice", "has the type 'web_search'"),
    ({"text": {"format": {"type": "json_schema"}}}, "text", "needs a name and a schema"),
    (
        {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": 3}}}},
        "text.format",
        "text.format",
    ),
    ({"text": {"format": {"type": "xml"}}}, "text", "text.format.type must be"),
    ({"reasoning": {"effort": 3}}, "reasoning", "reasoning.effort must be a string"),
    ({"include": [""] * 65}, "include", "at most 64"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "the template's own variable"),
    ({"metadata": {"a": 1}}, "metadata", "metadata.a must be a string"),
]


@pytest.mark.parametrize(("fields", "param", "words"), REFUSED, ids=lambda value: str(value)[:60])
async def test_what_is_refused_is_named(
    served: Served, fields: dict[str, Json], param: str, words: str
) -> None:
    for stream in (False, True):
        response = await respond(served, stream=stream, **fields)
        error = error_of(response, 404 if "model" in fields else 400)
        assert words in error["message"]
        assert error["param"] == param
    assert not served.engine.requests


async def test_a_template_without_tools_is_a_400(served: Served) -> None:
    error = error_of(await respond(served, tools=[TOOL]), 400)
    assert (error["param"], "--tool-template" in error["message"]) == ("tools", True)


async def test_a_dropped_item_is_named_by_its_place() -> None:
    bare = "{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}"
    async with saying("x", bare) as served:
        items = [USER, {"type": "reasoning", "summary": []}, ANSWER, USER]
        error = error_of(await respond(served, input=items), 400)
    assert error["message"].startswith("input.2 (role 'assistant')")


# ---- faults ---------------------------------------------------------------------------------------


async def test_a_failure_in_a_stream_is_its_last_event() -> None:
    async with chatting(FakeEngine(lambda _: ids_of("ab" * 50), delay=0.005)) as served:
        stream = served.client.stream(
            "POST", "/v1/responses", json={"model": "default", "input": "hi", "stream": True}
        )

        # The transport gives an answer when it has ended: the engine fails meanwhile.
        async def fail() -> None:
            await until(lambda: served.engine.requests)
            await asyncio.sleep(0.1)
            served.engine.fail()

        failing = asyncio.create_task(fail())
        async with stream as response:
            await response.aread()
        await failing
        events = events_of(response)
    assert events[0]["type"] == "response.created"
    last = events[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"]["code"] == "server_error"
    assert "secret" not in response.text
    assert retold(events) == [told(item) for item in last["response"]["output"]]


async def test_a_shutdown_is_a_failure() -> None:
    engine = FakeEngine(lambda _: ids_of("ab" * 50), delay=0.005)
    async with chatting(engine) as served:
        for stream in (False, True):
            asked = asyncio.create_task(respond(served, stream=stream))
            await until(lambda: engine._running)
            await asyncio.sleep(0.05)
            served.app.state.server.batcher.abort_all()
            response = await asked
            body = events_of(response)[-1]["response"] if stream else response.json()
            assert (body["status"], body["error"]["code"]) == ("failed", "server_error")


# ---- the openai package ---------------------------------------------------------------------------


def client_of(served: Served) -> openai.AsyncOpenAI:
    transport = httpx2.ASGITransport(served.app)
    return openai.AsyncOpenAI(
        api_key="none", base_url="http://localhost/v1", http_client=httpx2.AsyncClient(transport=transport)
    )


class City(BaseModel):
    a: int


async def test_the_openai_package() -> None:
    async with saying(THOUGHT, reasoning_parser="think") as served, client_of(served) as client:
        tools: Json = [TOOL]
        answer = await client.responses.create(model="default", input="Weather?", tools=tools)
        calls = [item for item in answer.output if item.type == "function_call"]
        assert [json.loads(one.arguments)["city"] for one in calls] == ["Oslo", "Bergen"]
        assert answer.output_text == "I see."
        results = [
            {"type": "function_call_output", "call_id": one.call_id, "output": "rain"} for one in calls
        ]
        again: Json = [USER, *(item.to_dict() for item in answer.output), *results]
        async with client.responses.stream(model="default", input=again, tools=tools) as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_response()
        assert kinds[-1] == "response.completed"
        assert final.output_text == "I see."
        with pytest.raises(openai.BadRequestError) as caught:
            await client.responses.create(model="default", input="hi", previous_response_id="resp_1")
        assert caught.value.param == "previous_response_id"


async def test_the_openai_package_parses_formats() -> None:
    async with saying('{"a": 7}') as served, client_of(served) as client:
        parsed = await client.responses.parse(model="default", input="hi", text_format=City)
        assert parsed.output_parsed == City(a=7)
