"""POST /v1/chat/completions: templates, fields, answers, and the stream that says the same."""

import json
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager

import httpx
import pytest

from server.chat_template import ChatTemplate
from tests.contract.conftest import TEXT, Served, serving
from tests.contract.test_completions import varied
from tests.contract.test_errors import FORMAT_ERRORS, error_of
from tests.fake_engine import EOS, INFO, FakeEngine, logprobs_of
from tests.loose import Field, Json
from tests.text_tools import ids_of

TEMPLATE = """\
{% for message in messages %}
{% if message.role == 'developer' %}{% continue %}{% endif %}
{{ message.role[0] }}:{{ message.content }}{{ eos_token }}{% endfor %}
{% if add_generation_prompt %}a:{% endif %}"""
MESSAGES = [{"role": "system", "content": "Be."}, {"role": "user", "content": "hi 世"}]
PROMPT = "s:Be.<eos>u:hi 世<eos>a:"
PROMPT_IDS = [*ids_of("s:Be."), EOS, *ids_of("u:hi 世"), EOS, *ids_of("a:")]


def chatting(engine: FakeEngine | None = None, **options: Field) -> AbstractAsyncContextManager[Served]:
    template = ChatTemplate(TEMPLATE, {"eos_token": "<eos>"})
    return serving(engine, chat_template=template, **options)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with chatting() as one:
        yield one


async def chat(served: Served, **fields: Json) -> httpx.Response:
    absent = {"prompt": ..., "max_tokens": ...}
    return await served.post("/v1/chat/completions", **absent | {"messages": MESSAGES} | fields)


async def answer(served: Served, **fields: Json) -> dict[str, Json]:
    response = await chat(served, **fields)
    assert response.status_code == 200, response.text
    body: dict[str, Json] = response.json()
    return body


async def chunks(served: Served, **fields: Json) -> list[dict[str, Json]]:
    return served.frames(await chat(served, stream=True, **fields))


def joined(parts: list[dict[str, Json]]) -> dict[int, dict[str, Json]]:
    """Choices of a stream by index, in the shape of whole ones."""
    choices: dict[int, dict[str, Json]] = {}
    for part in (choice for chunk in parts for choice in chunk["choices"]):
        index, delta = part["index"], part["delta"]
        if index not in choices:
            assert delta == {"role": "assistant", "content": ""}, "the role comes first, alone"
            choices[index] = {"content": "", "logprobs": None, "token_ids": [], "finish_reason": None}
        choice = choices[index]
        assert choice["finish_reason"] is None, "nothing follows a finish reason"
        choice["content"] += delta.get("content", "")
        choice["finish_reason"] = part["finish_reason"]
        choice["token_ids"] += part.get("token_ids", [])
        if part["logprobs"] is not None:
            choice["logprobs"] = (choice["logprobs"] or []) + part["logprobs"]["content"]
    return choices


async def test_whole_answer(served: Served) -> None:
    body = await answer(served, seed=5)
    num_tokens = len(ids_of(TEXT))
    assert body["id"].startswith("chatcmpl-")
    assert body == {
        "id": body["id"],
        "object": "chat.completion",
        "created": body["created"],
        "model": "default",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": TEXT, "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": len(PROMPT_IDS),
            "completion_tokens": num_tokens,
            "total_tokens": len(PROMPT_IDS) + num_tokens,
            "prompt_tokens_details": {"cached_tokens": 1},
            "completion_tokens_details": {
                "accepted_prediction_tokens": 2,
                "rejected_prediction_tokens": 1,
                "decode_passes": 3,
            },
        },
    }
    (request,) = served.engine.requests
    assert request.prompt_token_ids == PROMPT_IDS
    assert request.sampling.seed == 5


async def test_without_a_limit_the_context_is_the_limit(served: Served) -> None:
    await answer(served)
    assert served.engine.requests[0].max_tokens == INFO.max_model_len - len(PROMPT_IDS)
    for name in ("max_tokens", "max_completion_tokens"):
        await answer(served, **{name: 7})
    await answer(served, max_tokens=7, max_completion_tokens=7)
    assert [request.max_tokens for request in served.engine.requests[1:]] == [7, 7, 7]


async def test_every_field_reaches_the_engine() -> None:
    sampling = {"temperature": 0.5, "top_p": 0.9, "min_p": 0.1, "presence_penalty": 1, "seed": -7}
    others = {
        "min_tokens": 3,
        "stop_token_ids": [7, 8],
        "ignore_eos": True,
        "speculation": False,
        "num_loops": 2,
        "priority": 4,
        "cache_salt": "mine",
        "draft_policy": "earliest",
    }
    async with chatting(allow_priority=True) as served:
        await answer(served, top_k=3, logit_bias={"65": 1.5}, max_tokens=9, **sampling, **others)
    (request,) = served.engine.requests
    assert {name: getattr(request, name) for name in others} == others
    assert {name: getattr(request.sampling, name) for name in sampling} == sampling
    assert (request.sampling.top_k, request.sampling.logit_bias) == (3, {65: 1.5})


async def test_content_may_be_text_parts(served: Served) -> None:
    parts = [{"type": "text", "text": "hi"}, {"type": "text", "text": "you"}]
    await answer(served, messages=[{"role": "user", "content": parts, "name": "me"}])
    assert served.engine.requests[0].prompt_token_ids == [*ids_of("u:hi\nyou"), EOS, *ids_of("a:")]


async def test_an_answer_can_be_sent_back_as_it_came(served: Served) -> None:
    message = (await answer(served))["choices"][0]["message"]
    message |= {"tool_calls": None, "annotations": [], "audio": None, "function_call": None}
    await answer(served, messages=[*MESSAGES, message, MESSAGES[1]], max_tokens=5)


async def test_no_generation_prompt_and_further_variables() -> None:
    template = ChatTemplate(
        "{{ greeting }} {{ messages[0].content }}{% if add_generation_prompt %}!{% endif %}"
    )
    async with serving(chat_template=template) as served:
        first = {"messages": MESSAGES[:1]}
        await answer(served, chat_template_kwargs={"greeting": "ho"}, **first)
        await answer(served, add_generation_prompt=False, **first)
        prompts = [bytes(request.prompt_token_ids).decode() for request in served.engine.requests]
    assert prompts == ["ho Be.!", " Be."]


async def test_truncated_prompt(served: Served) -> None:
    await answer(served, truncate_prompt_tokens=4, return_token_ids=True)
    assert served.engine.requests[0].prompt_token_ids == PROMPT_IDS[-4:]


async def test_logprobs_with_bytes() -> None:
    async with chatting(FakeEngine(lambda _: ids_of("aé"))) as served:
        body = await answer(served, logprobs=True, top_logprobs=2)
        plain = await answer(served, logprobs=True)
    content = body["choices"][0]["logprobs"]["content"]
    entries = [logprobs_of(token, len(PROMPT_IDS) + i, 2) for i, token in enumerate(ids_of("aé"))]
    assert [entry["bytes"] for entry in content] == [[token] for token in ids_of("aé")]
    assert [entry["token"] for entry in content] == ["a", "\ufffd", "\ufffd"]
    assert [entry["logprob"] for entry in content] == [entry.logprob for entry in entries]
    for shown, entry in zip(content, entries, strict=True):
        assert [top["logprob"] for top in shown["top_logprobs"]] == [logprob for _, logprob in entry.top]
    assert [entry["top_logprobs"] for entry in plain["choices"][0]["logprobs"]["content"]] == [[], [], []]


async def test_return_token_ids(served: Served) -> None:
    body = await answer(served, return_token_ids=True)
    assert body["prompt_token_ids"] == PROMPT_IDS
    assert body["choices"][0]["token_ids"] == ids_of(TEXT)
    first, *rest = await chunks(served, return_token_ids=True)
    assert first["prompt_token_ids"] == PROMPT_IDS
    assert all("prompt_token_ids" not in chunk for chunk in rest)


VARIANTS = [
    {},
    {"n": 3, "max_tokens": 9},
    {"logprobs": True, "top_logprobs": 3, "n": 2},
    {"logprobs": True, "stop": ["世🙂", "zzz"], "include_stop_str_in_output": True},
    {"logprobs": True, "stop": "op\na", "max_tokens": 11},
    {"stop_token_ids": [0xE4], "n": 2},
    {"max_completion_tokens": 3, "logprobs": True},
]


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
@pytest.mark.parametrize("tokens_per_event", [1, 5])
async def test_joined_stream_is_the_whole_answer(fields: dict[str, Json], tokens_per_event: int) -> None:
    async with chatting(FakeEngine(varied, tokens_per_event=tokens_per_event)) as served:
        fields = {"seed": 3, "return_token_ids": True} | fields
        whole = await answer(served, **fields)
        parts = await chunks(served, stream_options={"include_usage": True}, **fields)
    choices = joined(parts)
    assert len(choices) == len(whole["choices"])
    for choice in whole["choices"]:
        streamed = choices[choice["index"]]
        assert streamed["content"] == choice["message"]["content"]
        assert streamed["logprobs"] == (choice["logprobs"] and choice["logprobs"]["content"])
        assert streamed["finish_reason"] == choice["finish_reason"]
        assert streamed["token_ids"] == choice["token_ids"]
    assert (parts[-1]["choices"], parts[-1]["usage"]) == ([], whole["usage"])
    assert all(part["usage"] is None for part in parts[:-1])


async def test_chunks_of_a_stream(served: Served) -> None:
    parts = await chunks(served)
    assert len({(part["id"], part["created"], part["model"], part["object"]) for part in parts}) == 1
    assert parts[0]["object"] == "chat.completion.chunk"
    assert parts[0]["choices"][0] == {
        "index": 0,
        "delta": {"role": "assistant", "content": ""},
        "logprobs": None,
        "finish_reason": None,
    }
    assert all("usage" not in part for part in parts)
    counts = [
        part["usage"]["completion_tokens"]
        for part in await chunks(served, stream_options={"continuous_usage_stats": True})
    ]
    assert counts == sorted(counts)
    assert counts[-1] == len(ids_of(TEXT))


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "u", "metadata": {"a": "b"}, "safety_identifier": "x", "prompt_cache_key": "k"},
        {"store": False, "service_tier": "auto", "parallel_tool_calls": True, "modalities": ["text"]},
        {"tools": [], "tool_choice": "none", "functions": None, "reasoning_effort": None},
        {"logprobs": False, "response_format": {"type": "text"}},
        {"prompt_cache_retention": "24h", "verbosity": "low", "function_call": "none"},
        {"store": True, "service_tier": "priority", "reasoning_effort": "high"},
    ],
    ids=str,
)
async def test_fields_that_change_nothing_are_taken(served: Served, fields: dict[str, Json]) -> None:
    assert (await answer(served, **fields))["choices"][0]["message"]["content"] == TEXT


UNSUPPORTED: list[dict[str, Json]] = [
    {"functions": [{"name": "f"}]},
    {"function_call": "auto"},
    {"audio": {"voice": "alloy", "format": "wav"}},
    {"modalities": ["text", "audio"]},
    {"prediction": {"type": "content", "content": "a"}},
    {"web_search_options": {}},
]


@pytest.mark.parametrize("fields", UNSUPPORTED, ids=str)
@pytest.mark.parametrize("allow", [False, True])
async def test_unsupported_field_is_never_ignored(fields: dict[str, Json], allow: bool) -> None:
    async with chatting(allow_unknown_fields=allow) as served:
        error = error_of(await chat(served, **fields), 400)
        assert (error["param"], error["code"]) == (next(iter(fields)), "unsupported_field")
        assert "not supported" in error["message"]
        await answer(served)


def user(content: Json, **fields: Json) -> dict[str, Json]:
    return {"messages": [{"role": "user", "content": content, **fields}]}


BAD_FIELDS: list[tuple[dict[str, Json], str]] = [
    ({"model": None}, "model"),
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [3]}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages"),
    ({"messages": [{"content": "hi"}]}, "messages"),
    ({"messages": [{"role": "robot", "content": "hi"}]}, "messages"),
    ({"messages": [{"role": "tool", "tool_call_id": "a"}]}, "messages"),
    ({"messages": [{"role": "function", "content": "hi", "name": "a"}]}, "messages"),
    ({"messages": [{"role": "developer", "content": "hi"}]}, "messages"),  # the template skips it
    (user(None), "messages"),
    (user(3), "messages"),
    (user([{"type": "image_url", "image_url": {"url": "http://a"}}]), "messages"),
    (user([{"type": "text"}]), "messages"),
    (user([{"text": "hi"}]), "messages"),
    (user(["hi"]), "messages"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_tokens": 190}, "max_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
    ({"max_tokens": 5, "min_tokens": 6}, "min_tokens"),
    ({"logprobs": 1}, "logprobs"),
    ({"top_logprobs": 1}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"temperature": 2.1}, "temperature"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"logit_bias": {"257": 1}}, "logit_bias"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"metadata": {"a": 1}}, "metadata"),
    ({"metadata": {"a" * 65: "b"}}, "metadata"),
    ({"num_loops": 5}, "num_loops"),
    ({"draft_policy": "x"}, "draft_policy"),
    ({"add_generation_prompt": 1}, "add_generation_prompt"),
    ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    *FORMAT_ERRORS,
]


@pytest.mark.parametrize(("fields", "param"), BAD_FIELDS, ids=lambda value: str(value)[:60])
async def test_bad_field(served: Served, fields: dict[str, Json], param: str) -> None:
    error = error_of(await chat(served, **fields), 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert param in error["message"]
    assert served.engine.requests == []
    await answer(served)


async def test_unknown_field(served: Served) -> None:
    assert error_of(await chat(served, prompt_tokens=1), 400)["code"] == "unknown_field"
    error = error_of(await chat(served, **user("hi", colour="red")), 400)
    assert (error["code"], error["param"]) == ("unknown_field", "colour")
    async with chatting(allow_unknown_fields=True) as relaxed:
        await answer(relaxed, prompt_tokens=1)


async def test_unknown_model(served: Served) -> None:
    assert error_of(await chat(served, model="gpt-7"), 404)["code"] == "model_not_found"


async def test_too_long_a_conversation_says_both_numbers(served: Served) -> None:
    error = error_of(await chat(served, **user("x" * 250)), 400)
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "messages"
    assert str(INFO.max_model_len) in error["message"]
    await answer(served)


async def test_a_base_model_says_that_it_has_no_template() -> None:
    async with serving() as served:
        error = error_of(await chat(served), 400)
        assert error["param"] == "messages"
        assert "--chat-template" in error["message"]
        assert (await served.post()).status_code == 200


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content }}", "refuses these messages"),
        ("{{ 1 // 0 }}", "refuses these messages"),
        ("{{ messages.append(1) }}", "refuses these messages"),
        ("{{ ''.__class__.__mro__ }}", "refuses these messages"),
        ("{% for i in range(10**9) %}{% endfor %}", "refuses these messages"),
        ("{{ messages[0].content }}", "messages.1"),
    ],
)
async def test_a_template_that_fails_is_the_requests_error(source: str, words: str) -> None:
    async with serving(chat_template=ChatTemplate(source)) as served:
        error = error_of(await chat(served), 400)
        assert error["param"] == "messages"
        assert words in error["message"]


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", None),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": {"type": "array"}},
                }
            },
            "json_schema",
            {"type": "array"},
        ),
        ({"structured_outputs": {"json": {"type": "string"}}}, "json_schema", {"type": "string"}),
        ({"structured_outputs": {"json": '{"type": "null"}'}}, "json_schema", {"type": "null"}),
        ({"structured_outputs": {"choice": ["a", "世"]}}, "choice", ["a", "世"]),
    ],
    ids=str,
)
async def test_formats_become_grammars(
    served: Served, fields: dict[str, Json], kind: str, text: dict[str, str] | list[str] | None
) -> None:
    await answer(served, **fields)
    assert (await served.post(**fields)).status_code == 200
    for request in served.engine.requests:
        assert request.grammar is not None
        assert request.grammar.kind == kind
        assert (json.loads(request.grammar.text) if text else None) == text


@pytest.mark.parametrize(("name", "kind"), [("regex", "regex"), ("grammar", "lark")])
async def test_expressions_and_grammars_are_passed_on(served: Served, name: str, kind: str) -> None:
    text = 'start: "a"' if name == "grammar" else "[ab]+"
    await answer(served, structured_outputs={name: text})
    (request,) = served.engine.requests
    assert request.grammar is not None
    assert (request.grammar.kind, request.grammar.text) == (kind, text)
