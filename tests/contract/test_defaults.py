"""generation_config.json: the model's values for fields that a client leaves out."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from server.chat_template import ChatTemplate
from server.defaults import NO_DEFAULTS, SamplingDefaults, load_defaults
from server.settings import SettingsError
from tests.contract.conftest import Served, serving
from tests.loose import Json

CONFIG = {
    "_from_model_config": True,
    "do_sample": True,
    "eos_token_id": [0, 2],
    "max_new_tokens": 5,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "min_p": None,
    "repetition_penalty": 1.05,
    "transformers_version": "4.55.0",
}


def defaults(folder: Path, content: Json) -> SamplingDefaults:
    (folder / "generation_config.json").write_text(
        content if isinstance(content, str) else json.dumps(content)
    )
    return load_defaults(folder)


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(defaults=defaults(tmp_path, CONFIG)) as one:
        yield one


async def sampling(
    served: Served, path: str = "/v1/completions", **fields: Json
) -> tuple[float, int, float, float, float]:
    response = await served.post(path, **fields)
    assert response.status_code == 200, response.text
    params = served.engine.requests[-1].sampling
    return params.temperature, params.top_k, params.top_p, params.min_p, params.repetition_penalty


async def test_what_the_client_leaves_out_is_the_models(served: Served) -> None:
    assert await sampling(served) == (0.6, 20, 0.95, 0.0, 1.05)
    assert await sampling(served, temperature=None) == (0.6, 20, 0.95, 0.0, 1.05)


def test_a_whole_number_is_an_integer_however_it_is_written(tmp_path: Path) -> None:
    assert type(defaults(tmp_path, {"top_k": 20.0}).values["top_k"]) is int


async def test_what_the_client_sends_wins_even_if_it_is_the_apis_default(served: Served) -> None:
    assert await sampling(served, temperature=0, top_p=1.0) == (0, 20, 1.0, 0.0, 1.05)
    assert await sampling(served, top_k=0, min_p=0.1, repetition_penalty=1) == (0.6, 0, 0.95, 0.1, 1)


async def test_chats_have_the_same_defaults(tmp_path: Path) -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    async with serving(defaults=defaults(tmp_path, CONFIG), chat_template=template) as served:
        messages = [{"role": "user", "content": "hi"}]
        absent = {"prompt": ..., "max_tokens": ...}
        values = await sampling(served, "/v1/chat/completions", messages=messages, **absent)
        assert values == (0.6, 20, 0.95, 0.0, 1.05)


async def test_without_the_file_the_apis_own(served: Served, tmp_path: Path) -> None:
    assert load_defaults(tmp_path / "elsewhere") is NO_DEFAULTS
    async with serving() as plain:
        assert await sampling(plain) == (1.0, 0, 1.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "not a JSON object"),
        ("[]", "not a JSON object"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 9\n", "Git LFS pointer"),
    ],
)
def test_a_file_that_is_no_object_is_an_error_at_the_start(tmp_path: Path, content: str, part: str) -> None:
    with pytest.raises(SettingsError, match=part) as caught:
        defaults(tmp_path, content)
    assert "generation_config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1), ("temperature", "0,7"), ("top_p", "high"), ("top_k", 2.5), ("min_p", [0.1])],
)
def test_a_value_that_no_client_could_send_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, value: float | list[float] | str
) -> None:
    assert defaults(tmp_path, {"repetition_penalty": 1.1, name: value}).values == {"repetition_penalty": 1.1}
    assert f"{name} is {value!r}" in caplog.text
