"""LangChain's standard tests of tools and of JSON, with a model that says what each of them asks for.

tests/e2e/test_langchain.py runs the whole suite with a model of noise, which can't: there these are expected
to fail.
"""

import json
import re
from collections.abc import AsyncIterator

import httpx
import msgspec
import pytest
from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests

from model.protocol import GenerationRequest
from server.chat_template import ChatTemplate
from tests.contract.conftest import serving_thread
from tests.contract.test_tools import TEMPLATE
from tests.fake_engine import EOS, INFO, FakeEngine
from tests.loose import Json
from tests.text_tools import ids_of

pytestmark = pytest.mark.filterwarnings("default")  # the suite's own, and its libraries'
# By words of the prompt, the likeliest last: what a test's question makes the model say.
CALLS: dict[str, tuple[str, dict[str, Json]]] = {
    "magic_function(3)": ("magic_function", {"input": 3}),
    "Pirate greeting": ("greeting_generator", {"answer_style": "pirate"}),
    "San Francisco": ("get_weather", {"location": "San Francisco"}),
}


class Suite(ChatModelIntegrationTests):
    """The standard suite, of which the tests below take one each."""

    __test__ = False

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI


def said(request: GenerationRequest) -> list[int]:
    """A call of the tool that the prompt speaks of, and behind its result, or without one, a text."""
    prompt = bytes(request.prompt_token_ids).decode()
    text = "It is sunny."
    if "joke" in prompt:
        text = json.dumps({"setup": "Why?", "punchline": "Cats."})
    elif "tool:" not in prompt:
        name, arguments = _call(prompt)
        asked = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
        text = f"<tool_call>\n{asked}\n</tool_call>"
    return [*ids_of(text), EOS]


def _call(prompt: str) -> tuple[str, dict[str, Json]]:
    if named := re.search("Create a customer named '([^']*)'", prompt):  # in several scripts
        return "unicode_customer", {"customer_name": named[1], "description": "a company"}
    known = [call for words, call in CALLS.items() if words in prompt]
    return known[0] if known else ("unknown", {"prompt": prompt})


@pytest.fixture(params=[{}, {"output_version": "v1"}], ids=str)
async def model(request: pytest.FixtureRequest) -> AsyncIterator[ChatOpenAI]:
    engine = FakeEngine(said, tokens_per_event=3, info=msgspec.structs.replace(INFO, max_model_len=4000))
    with serving_thread(engine, ChatTemplate(TEMPLATE)) as url, httpx.Client() as client:
        async with httpx.AsyncClient() as async_client:
            connection: dict[str, Json] = {"model": "default", "base_url": f"{url}/v1", "api_key": "none"}
            clients: dict[str, Json] = {"http_client": client, "http_async_client": async_client}
            yield ChatOpenAI(**connection, **clients, max_retries=0, **request.param)


def test_tool_calling(model: BaseChatModel) -> None:
    Suite().test_tool_calling(model)


async def test_tool_calling_async(model: BaseChatModel) -> None:
    await Suite().test_tool_calling_async(model)


def test_unicode_tool_call(model: BaseChatModel) -> None:
    Suite().test_unicode_tool_call_integration(model)


def test_bind_runnables_as_tools(model: BaseChatModel) -> None:
    Suite().test_bind_runnables_as_tools(model)


def test_agent_loop(model: BaseChatModel) -> None:
    Suite().test_agent_loop(model)


def test_json_mode(model: BaseChatModel) -> None:
    Suite().test_json_mode(model)
