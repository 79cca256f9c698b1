"""Answers against OpenAI's own types, as the `openai` package declares them, strictly.

Left out is an echo with log-probabilities: its first token has none, and OpenAI sends null against its types.
"""

from collections.abc import AsyncIterator

import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from tests.contract.conftest import Served
from tests.contract.test_chat import answer, chatting, chunks
from tests.contract.test_completions import varied
from tests.fake_engine import FakeEngine
from tests.loose import Json

VARIANTS = [
    {},
    {"n": 2, "stop": "st"},
    {"stop_token_ids": [0xE4]},
    {"return_token_ids": True},
]


def conforms(kind: type[BaseModel], body: dict[str, Json]) -> None:
    """Every required field with its type; what the type doesn't know is ours and documented."""
    kind.model_validate(body, strict=True)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with chatting(FakeEngine(varied)) as one:
        yield one


@pytest.mark.parametrize("fields", [*VARIANTS, {"logprobs": 2}, {"best_of": 3}, {"echo": True}], ids=str)
async def test_completions(served: Served, fields: dict[str, Json]) -> None:
    body = (await served.post(**fields)).json()
    conforms(Completion, body)
    assert {"id", "choices", "created", "model", "object"} <= set(body)
    assert all({"finish_reason", "index", "logprobs", "text"} <= set(choice) for choice in body["choices"])


@pytest.mark.parametrize("fields", [*VARIANTS, {"logprobs": 2}], ids=str)
async def test_streamed_completions(served: Served, fields: dict[str, Json]) -> None:
    *parts, last = await served.chunks(stream_options={"include_usage": True}, **fields)
    conforms(Completion, last)
    for part in parts:
        # OpenAI declares one type for whole answers and chunks, and sends null here itself.
        for choice in part["choices"]:
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        conforms(Completion, part)


@pytest.mark.parametrize("fields", [*VARIANTS, {"logprobs": True, "top_logprobs": 2}], ids=str)
async def test_chat(served: Served, fields: dict[str, Json]) -> None:
    conforms(ChatCompletion, await answer(served, **fields))
    for part in await chunks(served, stream_options={"include_usage": True}, **fields):
        conforms(ChatCompletionChunk, part)


async def test_models(served: Served) -> None:
    body = (await served.client.get("/v1/models")).json()
    for card in body["data"]:
        conforms(Model, card)
