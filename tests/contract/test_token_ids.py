"""A model without a tokenizer is served by token ids; whatever means text is a 400 that says why."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from server.chat_template import ChatTemplate
from server.settings import SettingsError
from server.tokenizer import TextCodec, TokenIdCodec, load_codec
from tests.contract.conftest import Served, serving
from tests.fake_engine import FakeEngine
from tests.text_tools import byte_tokenizer

IDS = [5, 6, 7, 8]
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    template = ChatTemplate("{{ messages[0].content }}")
    engine = FakeEngine(lambda _: IDS)
    async with serving(engine, codec=TokenIdCodec(), chat_template=template) as one:
        yield one


async def test_ids_go_in_and_ids_come_out(served: Served) -> None:
    answer = (await served.post(prompt=[[1, 2], [3]], return_token_ids=True)).json()
    assert [choice["token_ids"] for choice in answer["choices"]] == [IDS, IDS]
    assert [choice["prompt_token_ids"] for choice in answer["choices"]] == [[1, 2], [3]]
    assert [choice["text"] for choice in answer["choices"]] == ["", ""]
    assert answer["usage"]["prompt_tokens"] == 3


async def test_a_stream_says_the_same(served: Served) -> None:
    frames = await served.chunks(prompt=[1, 2], return_token_ids=True)
    choices = [choice for frame in frames for choice in frame["choices"]]
    assert [i for choice in choices for i in choice["token_ids"]] == IDS
    assert {choice["text"] for choice in choices} == {""}
    assert choices[-1]["finish_reason"] == "length"


async def test_an_id_to_stop_at_and_log_probabilities_need_no_text(served: Served) -> None:
    answer = (await served.post(prompt=[1], stop_token_ids=[7], logprobs=2, return_token_ids=True)).json()
    (choice,) = answer["choices"]
    assert (choice["token_ids"], choice["finish_reason"], choice["stop_reason"]) == ([5, 6, 7], "stop", 7)
    assert choice["logprobs"]["tokens"] == ["token_id:5", "token_id:6", "token_id:7"]
    assert all(len(top) >= 2 for top in choice["logprobs"]["top_logprobs"])


@pytest.mark.parametrize(
    ("path", "field", "fields"),
    [
        ("/v1/completions", "prompt", {"prompt": "text"}),
        ("/v1/completions", "prompt", {"prompt": ["text", "more"]}),
        ("/v1/completions", "stop", {"stop": "\n"}),
        ("/v1/completions", "echo", {"echo": True}),
        ("/v1/completions", "suffix", {"suffix": "end"}),
        ("/v1/completions", "response_format", {"response_format": {"type": "json_object"}}),
        ("/v1/completions", "response_format", {"response_format": SCHEMA}),
        ("/v1/completions", "structured_outputs", {"structured_outputs": {"regex": "a+"}}),
        (
            "/v1/chat/completions",
            "messages",
            {"prompt": ..., "messages": [{"role": "user", "content": "hi"}]},
        ),
        ("/tokenize", "prompt", {"prompt": "text", "max_tokens": ...}),
        ("/detokenize", "tokens", {"prompt": ..., "tokens": [1], "max_tokens": ...}),
    ],
)
async def test_text_is_refused_and_the_answer_says_why(
    served: Served, path: str, field: str, fields: dict[str, object]
) -> None:
    response = await served.post(path, **{"prompt": [1, 2], **fields})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "no_tokenizer", field)
    assert "without a tokenizer" in error["message"]
    assert not served.engine.requests


async def test_a_format_of_plain_text_asks_for_nothing(served: Served) -> None:
    assert (await served.post(prompt=[1], response_format={"type": "text"})).status_code == 200


def test_the_codec_is_what_the_folder_has(tmp_path: Path) -> None:
    assert isinstance(load_codec(tmp_path), TokenIdCodec)
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    assert type(load_codec(tmp_path)) is TextCodec
    (tmp_path / "tokenizer.json").write_text('{"model": "of another world"}')
    with pytest.raises(SettingsError, match=r"tokenizer\.json is not a readable tokenizer"):
        load_codec(tmp_path)
