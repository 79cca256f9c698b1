"""The server through the `openai` package: what users write works, streamed as well as whole."""

import json
import math
import re
from collections.abc import Iterator
from typing import Annotated

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from pydantic import BaseModel, Field

from tests.e2e.conftest import ServerProcess
from tests.loose import Json

PROMPT = "import os\nimport "
GREEDY = {"temperature": 0, "extra_body": {"repetition_penalty": 1}}  # a model may have other defaults
MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Grüße, 世界 🙂"}]


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as one:
        yield one


def complete(client: openai.OpenAI, **fields: Json) -> Json:
    """A completion, or with `stream` its chunks."""
    defaults: dict[str, Json] = {"model": "default", "prompt": PROMPT, "temperature": 0}
    return client.completions.create(**defaults | fields)


def chat(client: openai.OpenAI, **fields: Json) -> Json:
    """A chat completion, or with `stream` its chunks."""
    defaults: dict[str, Json] = {
        "model": "default",
        "messages": MESSAGES,
        "temperature": 0,
        "max_completion_tokens": 24,
    }
    return client.chat.completions.create(**defaults | fields)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "seed": 3}], ids=["greedy", "sampled"])
def test_completions_with_logprobs_whole_and_streamed(
    client: openai.OpenAI, sampling: dict[str, Json]
) -> None:
    fields = {"logprobs": 3, "echo": True, "max_tokens": 24, "n": 2, "stop": "\n\n", **sampling}
    whole = complete(client, **fields)
    joined: dict[int, dict[str, Json]] = {}
    for chunk in complete(client, stream=True, stream_options={"include_usage": True}, **fields):
        usage = chunk.usage
        for part in chunk.choices:
            choice = joined.setdefault(part.index, {"text": "", "tokens": [], "token_logprobs": []})
            choice["text"] += part.text
            choice["tokens"] += part.logprobs.tokens
            choice["token_logprobs"] += part.logprobs.token_logprobs
            choice["finish_reason"] = part.finish_reason
    assert usage.completion_tokens == whole.usage.completion_tokens
    for choice in whole.choices:
        streamed, logprobs = joined[choice.index], choice.logprobs
        assert streamed["text"] == choice.text
        assert streamed["tokens"] == logprobs.tokens
        assert streamed["finish_reason"] == choice.finish_reason
        assert logprobs.token_logprobs[0] is None
        # Not equal to the last digit: the two ran beside different other work.
        assert streamed["token_logprobs"][1:] == pytest.approx(logprobs.token_logprobs[1:], abs=1e-4)
        for token, logprob, top in zip(
            logprobs.tokens[1:], logprobs.token_logprobs[1:], logprobs.top_logprobs[1:], strict=True
        ):
            assert top[token] == logprob <= max(top.values())
            assert 3 <= len(top) <= 4


def test_greedy_tokens_are_the_likeliest(client: openai.OpenAI) -> None:
    choice = complete(client, logprobs=1, max_tokens=16, **GREEDY).choices[0]
    for logprob, top in zip(choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True):
        assert max(top.values()) == logprob


def test_best_of_is_the_likeliest_of_the_candidates(client: openai.OpenAI) -> None:
    fields = {"temperature": 1.0, "seed": 7, "max_tokens": 12, "extra_body": {"ignore_eos": True}}
    every = complete(client, n=5, logprobs=0, **fields).choices
    means = [math.fsum(c.logprobs.token_logprobs) / len(c.logprobs.token_logprobs) for c in every]
    best = complete(client, n=2, best_of=5, **fields)
    order = sorted(range(5), key=lambda i: -means[i])
    assert [choice.text for choice in best.choices] == [every[i].text for i in order[:2]]


def test_chat(client: openai.OpenAI) -> None:
    answer = chat(client, logprobs=True, top_logprobs=2)
    (choice,) = answer.choices
    assert (choice.message.role, choice.finish_reason) in {("assistant", "length"), ("assistant", "stop")}
    content = choice.logprobs.content
    assert len(content) == answer.usage.completion_tokens
    text = b"".join(bytes(token.bytes) for token in content).decode(errors="replace")
    assert text.startswith(choice.message.content)
    assert all(len(token.top_logprobs) == 2 for token in content)


def test_chat_streaming(client: openai.OpenAI) -> None:
    whole = chat(client)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    # What is cached or drafted may differ: the first request leaves pages and experience to the second.
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(chunks[-1].usage, name) == getattr(whole.usage, name)


def test_chat_answers_until_the_context_is_full(client: openai.OpenAI) -> None:
    """A long prompt, cut to leave little of the context to generate."""
    context = client.models.retrieve("default").model_dump()["max_model_len"]
    fields = {"ignore_eos": True, "truncate_prompt_tokens": context - 100}
    messages = [{"role": "user", "content": "river " * context}]
    answer = chat(client, messages=messages, max_completion_tokens=None, extra_body=fields)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == context
    assert answer.usage.completion_tokens == 100


class Point(BaseModel):
    """With bounds: a model without sense may write digits for ever."""

    x: Annotated[int, Field(ge=0, le=999)]
    y: Annotated[int, Field(ge=0, le=999)]


SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["cat", "dog"]},
        "size": {"type": "integer", "minimum": 0, "maximum": 999},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["kind", "size", "tags"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_structured_output(client: openai.OpenAI, temperature: float) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "animal", "strict": True, "schema": SCHEMA}}
    fields = {"response_format": form, "max_completion_tokens": 200, "temperature": temperature, "seed": 1}
    with_drafts, without = (chat(client, extra_body={"speculation": on}, **fields) for on in (True, False))
    assert with_drafts.choices[0].message.content == without.choices[0].message.content
    assert with_drafts.choices[0].finish_reason == "stop"
    value = json.loads(with_drafts.choices[0].message.content)
    assert set(value) == {"kind", "size", "tags"}
    assert value["kind"] in {"cat", "dog"}
    assert 0 <= value["size"] <= 999
    assert set(value["tags"]) <= {"a", "b"}


def test_parse_returns_the_class(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="default", messages=MESSAGES, response_format=Point, temperature=0, max_completion_tokens=100
    )
    assert isinstance(answer.choices[0].message.parsed, Point)


@pytest.mark.parametrize(
    ("structured", "pattern"),
    [
        ({"regex": "[a-c]{3}-[0-9]{2}"}, "[a-c]{3}-[0-9]{2}"),
        ({"choice": ["yes", "no", "世界"]}, "yes|no|世界"),
        ({"grammar": 'start: "(" /[0-9]/ ("," /[0-9]/)~1..2 ")"'}, r"\([0-9](,[0-9]){1,2}\)"),
    ],
    ids=["regex", "choice", "grammar"],
)
def test_structured_completions(client: openai.OpenAI, structured: dict[str, Json], pattern: str) -> None:
    for stream in (False, True):
        answer = complete(client, max_tokens=40, stream=stream, extra_body={"structured_outputs": structured})
        chunks = answer if stream else [answer]
        choices = [choice for chunk in chunks for choice in chunk.choices]
        assert re.fullmatch(pattern, "".join(choice.text for choice in choices))
        assert choices[-1].finish_reason == "stop"


def test_a_bad_grammar_is_an_answer_and_the_engine_lives(
    client: openai.OpenAI, server: ServerProcess
) -> None:
    worker = server.worker.pid
    for structured in ({"regex": "("}, {"grammar": "start: nobody"}, {"json": {"type": "cat"}}):
        with pytest.raises(openai.BadRequestError) as caught:
            complete(client, extra_body={"structured_outputs": structured})
        assert caught.value.param == "structured_outputs"
    assert complete(client, max_tokens=2).choices
    assert server.worker.pid == worker


async def test_asynchronous_client(server: ServerProcess) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        fields: dict[str, Json] = {"model": "default", "prompt": PROMPT, "temperature": 0, "max_tokens": 12}
        whole = await client.completions.create(**fields)
        stream = await client.completions.create(stream=True, **fields)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == whole.choices[0].text


class GetWeather(BaseModel):
    """The weather of a city."""

    city: Annotated[str, Field(max_length=12)]
    days: Annotated[int, Field(ge=1, le=9)]


TOOL = openai.pydantic_function_tool(GetWeather)


def test_tools_there_and_back(client: openai.OpenAI) -> None:
    """A call that a grammar makes, its result, and an answer; then the same streamed."""
    fields: dict[str, Json] = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    fields |= {"temperature": 1.0, "seed": 4, "max_completion_tokens": 300}
    (choice,) = chat(client, **fields).choices
    (call,) = choice.message.tool_calls
    assert (choice.finish_reason, call.function.name) == ("tool_calls", "GetWeather")
    arguments = GetWeather.model_validate_json(call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "content": f"Rain in {arguments.city}."}
    history = [*MESSAGES, choice.message, result]
    answer = chat(client, messages=history, tools=[TOOL], tool_choice="none")
    assert answer.usage.prompt_tokens > 0
    with client.chat.completions.stream(model="default", messages=MESSAGES, **fields) as stream:
        events = [event.type for event in stream]
        (streamed,) = stream.get_final_completion().choices
    (function,) = [one.function for one in streamed.message.tool_calls or []]
    assert function.arguments == call.function.arguments
    assert function.parsed_arguments == arguments
    assert events.count("tool_calls.function.arguments.delta") > 1


def test_calls_are_the_same_with_and_without_speculation(client: openai.OpenAI) -> None:
    named = {"type": "function", "function": {"name": "GetWeather"}}
    fields = {"tools": [TOOL], "tool_choice": named, "n": 4, "temperature": 1.0, "seed": 5}
    on, off = (
        [
            choice.message.tool_calls[0].function.arguments
            for choice in chat(
                client, max_completion_tokens=300, extra_body={"speculation": speculation}, **fields
            ).choices
        ]
        for speculation in (True, False)
    )
    assert on == off
    assert all(GetWeather.model_validate_json(arguments) for arguments in on)
