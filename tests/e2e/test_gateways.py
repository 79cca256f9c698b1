"""The real server through the packages of both gateways: the text is that of the chat behind them."""

from collections.abc import Iterator

import anthropic
import openai
import pytest

from tests.e2e.conftest import ServerProcess
from tests.loose import Json

TEXT = "Grüße, 世界 🙂"
SAMPLING: list[dict[str, Json]] = [{"temperature": 0}, {"temperature": 0.9, "extra_body": {"seed": 3}}]
TOOL = {
    "name": "get_weather",
    "parameters": {
        "type": "object",
        "properties": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["days"],
    },
}


@pytest.fixture
def openai_client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as one:
        yield one


@pytest.fixture
def anthropic_client(server: ServerProcess) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as one:
        yield one


@pytest.mark.parametrize("sampling", SAMPLING, ids=["greedy", "sampled"])
def test_all_three_apis_give_one_text(
    openai_client: openai.OpenAI, anthropic_client: anthropic.Anthropic, sampling: dict[str, Json]
) -> None:
    fields: dict[str, Json] = {"model": "default", **sampling}
    system, user = {"role": "system", "content": "Be."}, {"role": "user", "content": TEXT}
    create: Json = openai_client.chat.completions.create
    text = create(messages=[system, user], max_tokens=24, **fields).choices[0].message.content
    asked: dict[str, Json] = {"input": TEXT, "instructions": "Be.", "max_output_tokens": 24, **fields}
    respond: Json = openai_client.responses.create
    answer = respond(**asked)
    assert (answer.output_text, answer.usage.output_tokens) == (text, 24)
    assert "".join(e.delta for e in respond(stream=True, **asked) if e.type.endswith("text.delta")) == text
    extra = {"temperature": sampling["temperature"], **sampling.get("extra_body", {})}  # it has no such names
    asked = {"model": "default", "messages": [user], "system": "Be.", "max_tokens": 24, "extra_body": extra}
    send: Json = anthropic_client.messages
    message = send.create(**asked)
    assert (message.content[0].text, message.usage.output_tokens) == (text, 24)
    with send.stream(**asked) as stream:
        assert "".join(stream.text_stream) == text
        assert stream.get_final_message().stop_reason == "max_tokens"
    counted = send.count_tokens(model="default", messages=[user], system="Be.")
    usage = message.usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
    assert counted.input_tokens == answer.usage.input_tokens


def test_calls_that_must_be_made(openai_client: openai.OpenAI, anthropic_client: anthropic.Anthropic) -> None:
    """A grammar makes them, whatever the model knows of tools."""
    respond: Json = openai_client.responses.create
    answer = respond(
        model="default",
        input="hi",
        tools=[{"type": "function", "strict": True, **TOOL}, {"type": "web_search"}],
        tool_choice={"type": "function", "name": "get_weather"},
        parallel_tool_calls=False,
    )
    (item,) = answer.output
    assert (item.type, item.name) == ("function_call", "get_weather")
    create: Json = anthropic_client.messages.create
    message = create(
        model="default",
        max_tokens=200,
        messages=[{"role": "user", "content": "hi"}],
        tools=[{"name": "get_weather", "input_schema": TOOL["parameters"]}],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
    )
    (block,) = message.content
    assert (block.type, message.stop_reason) == ("tool_use", "tool_use")
    assert 1 <= block.input["days"] <= 9


def test_errors_are_those_of_each_package(
    openai_client: openai.OpenAI, anthropic_client: anthropic.Anthropic
) -> None:
    respond: Json = openai_client.responses.create
    with pytest.raises(openai.BadRequestError, match="send the whole conversation in input"):
        respond(model="default", input="hi", previous_response_id="resp_1")
    create: Json = anthropic_client.messages.create
    picture = {"type": "image", "source": {"type": "url", "url": "x"}}
    with pytest.raises(anthropic.BadRequestError, match=r"messages\.0\.content\.0 has the type") as caught:
        create(model="default", max_tokens=5, messages=[{"role": "user", "content": [picture]}])
    body: Json = caught.value.body
    assert body["error"]["type"] == "invalid_request_error"
