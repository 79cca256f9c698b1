"""litellm: its OpenAI, text-completion, vLLM and Anthropic providers, and its classes of errors."""

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks a host for prices


import litellm
from pydantic import BaseModel

from tests.clients.checks import MODEL, TOO_LONG, TOOL, USER, Server, assert_call, raising
from tests.loose import Json

PROMPT = "import os\nimport "
ONE_CALL: dict[str, Json] = {
    "tools": [TOOL],
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "max_tokens": 200,
}


class Place(BaseModel):
    """A structured answer."""

    x: int
    is_far: bool


def chat(server: Server, provider: str = "openai", **fields: Json) -> Json:
    """A chat by one of its providers, greedy."""
    base = server.url if provider == "anthropic" else server.openai_url
    asked = {"messages": USER, "temperature": 0, "max_tokens": 24, "num_retries": 0} | fields
    return litellm.completion(model=f"{provider}/{MODEL}", api_base=base, api_key="none", **asked)


def joined(stream: Json) -> str:
    """The text of a stream."""
    return "".join(part.choices[0].delta.content or "" for part in stream if part.choices)


def assert_called(answer: Json) -> Json:
    """The one call of an answer, which is as the tool's schema says."""
    (call,) = answer.choices[0].message.tool_calls
    assert_call(call.function.name, call.function.arguments)
    return call


def check_chat(server: Server) -> None:
    """Chat, whole and streamed, with usage"""
    whole = chat(server)
    assert whole.choices[0].message.content == server.chat()
    assert whole.usage.completion_tokens == 24
    parts = list(chat(server, stream=True, stream_options={"include_usage": True}))
    assert joined(parts) == server.chat()
    assert [part.usage.completion_tokens for part in parts if getattr(part, "usage", None)] == [24]


async def check_chat_asynchronously(server: Server) -> None:
    """The same asynchronously"""
    answer = await litellm.acompletion(
        model=f"openai/{MODEL}",
        api_base=server.openai_url,
        api_key="none",
        messages=USER,
        temperature=0,
        max_tokens=24,
    )
    assert answer.choices[0].message.content == server.chat()


def check_tools(server: Server) -> None:
    """Tools with `required`, whole and streamed, and their results sent back"""
    whole = chat(server, **ONE_CALL)
    call = assert_called(whole)
    assert whole.choices[0].finish_reason == "tool_calls"
    rebuilt = litellm.stream_chunk_builder(list(chat(server, stream=True, **ONE_CALL)), messages=USER)
    (streamed,) = rebuilt.choices[0].message.tool_calls
    assert streamed.function.arguments == call.function.arguments
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    history = [*USER, whole.choices[0].message.model_dump(), result]
    assert chat(server, messages=history, tools=[TOOL], tool_choice="none").choices[0].message.content


def check_schemas(server: Server) -> None:
    """Structured output by json_schema"""
    answer = chat(server, response_format=Place, max_tokens=200)
    Place.model_validate_json(answer.choices[0].message.content)


def check_completions(server: Server) -> None:
    """Completions, with log-probabilities"""
    answer = litellm.text_completion(
        model=f"text-completion-openai/{MODEL}",
        api_base=server.openai_url,
        api_key="none",
        prompt=PROMPT,
        max_tokens=8,
        temperature=0,
        logprobs=2,
    )
    direct = server.post("/v1/completions", prompt=PROMPT, max_tokens=8, temperature=0)
    assert answer.choices[0].text == direct["choices"][0]["text"]
    assert len(answer.choices[0].logprobs.token_logprobs) == 8


def check_vllm(server: Server) -> None:
    """Its provider for vLLM"""
    assert chat(server, "hosted_vllm").choices[0].message.content == server.chat()
    assert_called(chat(server, "hosted_vllm", **ONE_CALL))


def check_responses(server: Server) -> None:
    """Responses"""
    answer = litellm.responses(
        model=f"openai/{MODEL}",
        api_base=server.openai_url,
        api_key="none",
        input=USER[0]["content"],
        temperature=0,
        max_output_tokens=24,
    )
    assert answer.output[0].content[0].text == server.chat()


def check_messages(server: Server) -> None:
    """Messages by its Anthropic provider, whole, streamed and with a tool"""
    assert chat(server, "anthropic").choices[0].message.content == server.chat()
    assert joined(chat(server, "anthropic", stream=True)) == server.chat()
    assert_called(chat(server, "anthropic", **ONE_CALL))


def check_errors(server: Server) -> None:
    """Errors by their classes: a prompt beyond the context is a ContextWindowExceededError"""
    long = [{"role": "user", "content": TOO_LONG}]
    for provider in ("openai", "hosted_vllm", "anthropic"):
        with raising(litellm.ContextWindowExceededError, "2048"):
            chat(server, provider, messages=long)
    with raising(litellm.ContextWindowExceededError, "2048"):
        chat(server, max_tokens=5000)
    with raising(litellm.BadRequestError, "temperature"):
        chat(server, temperature=3)
    with raising(litellm.NotFoundError, "does not exist"):
        litellm.completion(model="openai/other", api_base=server.openai_url, api_key="none", messages=USER)
