"""A model with an encoder over HTTP: the prompt is a source, and what makes no sense there is refused."""

from collections.abc import AsyncIterator

import msgspec
import pytest

from server.chat_template import ChatTemplate
from tests.contract.conftest import Served, serving
from tests.fake_engine import INFO, FakeEngine
from tests.loose import Json
from tests.text_tools import ids_of

TEXT = " and so on"


@pytest.fixture
async def encoding() -> AsyncIterator[Served]:
    info = msgspec.structs.replace(
        INFO, is_encoder_decoder=True, prompt_scores_problem="its encoder predicts no token"
    )
    engine = FakeEngine(lambda _: ids_of(TEXT), info=info)
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    async with serving(engine, chat_template=template) as one:
        yield one


async def test_the_prompt_is_the_source_and_decoder_prompt_the_beginning(encoding: Served) -> None:
    for given in ("To be", ids_of("To be")):
        answer = await encoding.post(prompt="Sein", decoder_prompt=given, return_token_ids=True)
        assert answer.status_code == 200, answer.text
        request = encoding.engine.requests[-1]
        assert request.prompt_token_ids == ids_of("Sein")
        assert request.decoder_prompt == ids_of("To be")
        choice = answer.json()["choices"][0]
        assert (choice["text"], choice["prompt_token_ids"]) == (TEXT, ids_of("Sein"))
        assert answer.json()["usage"]["prompt_tokens"] == len("Sein")


async def test_several_sources_share_a_beginning(encoding: Served) -> None:
    answer = await encoding.post(prompt=["a", "longer"], decoder_prompt="x", n=2)
    assert [len(request.prompt_token_ids) for request in encoding.engine.requests] == [1, 1, 6, 6]
    assert all(request.decoder_prompt == ids_of("x") for request in encoding.engine.requests)
    assert len(answer.json()["choices"]) == 4


async def test_chat_reads_the_conversation_as_a_source(encoding: Served) -> None:
    body: dict[str, Json] = {"messages": [{"role": "user", "content": "Sein"}], "prompt": ...}
    answer = await encoding.post("/v1/chat/completions", **body)
    assert answer.json()["choices"][0]["message"]["content"] == TEXT
    assert encoding.engine.requests[-1].prompt_token_ids == ids_of("Sein")
    for field, value in {"decoder_prompt": "x", "continue_final_message": True}.items():
        told = {**body, field: value, "add_generation_prompt": False}
        refused = await encoding.post("/v1/chat/completions", **told)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({"echo": True}, "echo", "source of another text"),
        ({"echo": True, "logprobs": 0, "max_tokens": 0}, "echo", "source of another text"),
        ({"prompt_logprobs": 1}, "prompt_logprobs", "predicts no token"),
        ({"suffix": "end"}, "suffix", "filling in the middle"),
        ({"decoder_prompt": [257]}, "decoder_prompt", "257 is no token id; ids are 0 to 256"),
        ({"decoder_prompt": 5}, "decoder_prompt", "a string or a list of token ids"),
        ({"decoder_prompt": ["a"]}, "decoder_prompt", "decoder_prompt.0 must be an integer"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": "a" * 100, "decoder_prompt": "b" * 100}, "prompt", "200 tokens"),
        ({"decoder_prompt": "b" * 1000}, "decoder_prompt", "length is 200 tokens"),
        ({"prompt": "a" * 10, "max_tokens": 190}, "max_tokens", "200 tokens"),
    ],
)
async def test_refusals_name_the_field_and_the_reason(
    encoding: Served, fields: dict[str, Json], param: str, reason: str
) -> None:
    answer = await encoding.post(**fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert reason in error["message"]


async def test_source_start_token_and_beginning_count_against_the_context(encoding: Served) -> None:
    """Of 200 tokens: 100, one that every text begins with, 9, and so 90 are left; -1 cuts to what fits."""
    await encoding.post(prompt="a" * 100, decoder_prompt="b" * 9, max_tokens=None)
    assert encoding.engine.requests[-1].max_tokens == 90
    await encoding.post(prompt="a" * 300, decoder_prompt="b" * 9, max_tokens=40, truncate_prompt_tokens=-1)
    assert len(encoding.engine.requests[-1].prompt_token_ids) == 150


async def test_a_model_without_an_encoder_refuses_it(served: Served) -> None:
    answer = await served.post(decoder_prompt="x")
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "decoder_prompt")
    assert "goes on where prompt ends" in error["message"]
