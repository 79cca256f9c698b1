"""The tokens that end a text, from whichever of a checkpoint's files knows them."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from model.checkpoint.ending import ending_tokens
from model.checkpoint.families import ouro
from model.checkpoint.files import CheckpointError, read_json
from tests.loose import Json
from tests.tiny_models import tiny_config

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"


def added(**tokens: int) -> dict[str, Json]:
    return {"added_tokens": [{"id": i, "content": text} for text, i in tokens.items()]}


def endings(
    folder: Path, eos: tuple[int, ...] = (0,), family: str = "nanbeige", listen: bool = True, **files: Json
) -> tuple[int, ...]:
    """Endings of a folder with these files in it."""
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    config = tiny_config(family=family, eos_token_ids=eos)
    turn_end = {"ouro": ouro.FAMILY.turn_end}.get(family)
    return ending_tokens(folder, config, read_json, turn_end, generation_config=listen)


def test_config_alone(tmp_path: Path) -> None:
    assert endings(tmp_path, (3, 5)) == (3, 5)
    assert endings(tmp_path, ()) == ()


@pytest.mark.parametrize(("value", "ids"), [(7, (0, 7)), ([7, 0, 9], (0, 7, 9)), (None, (0,)), ([], (0,))])
def test_generation_config_adds_its_own_unless_told_not_to(
    tmp_path: Path, value: int | list[int] | None, ids: tuple[int, ...]
) -> None:
    files: dict[str, Json] = {"generation_config": {"eos_token_id": value}}
    assert endings(tmp_path, **files) == ids
    assert endings(tmp_path, **files, listen=False) == (0,)


@pytest.mark.parametrize("eos", ["<|im_end|>", {"content": "<|im_end|>", "lstrip": False}])
def test_the_tokenizers_end(tmp_path: Path, eos: dict[str, object] | str) -> None:
    files: dict[str, Json] = {"tokenizer_config": {"eos_token": eos}, "tokenizer": added(**{"<|im_end|>": 2})}
    assert endings(tmp_path, **files) == (0, 2)


def test_the_end_of_a_turn_in_the_chat_template(tmp_path: Path) -> None:
    tokenizer = added(**{"<|im_start|>": 1, "<|im_end|>": 4, "<|eot_id|>": 6})
    assert endings(tmp_path, tokenizer=tokenizer) == (0,)
    assert endings(tmp_path, tokenizer=tokenizer, tokenizer_config={"chat_template": CHATML}) == (0, 4)


def test_a_template_in_its_own_file(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    decoder = {"added_tokens_decoder": {"5": {"content": "<|im_end|>"}}}
    assert endings(tmp_path, tokenizer_config=decoder) == (0, 5)


def test_ouro_stops_at_the_end_of_a_document_and_of_a_turn(tmp_path: Path) -> None:
    """Its published configs say 0 only, and its chats went on and on after <|im_end|>."""
    assert endings(tmp_path, family="ouro") == (0, 2)
    assert endings(tmp_path, (0, 5), family="ouro") == (0, 5)
    assert endings(tmp_path, family="ouro", tokenizer=added(**{"<|im_end|>": 9})) == (0,)


def test_an_id_beyond_the_vocabulary_is_left_out(tmp_path: Path) -> None:
    assert endings(tmp_path, generation_config={"eos_token_id": [3, 61]}) == (0, 3)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_file_that_is_no_object_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        endings(tmp_path)


@pytest.mark.parametrize(("value", "ids"), [("</s>", (0,)), ([-1], (0,)), ([7, None, 2.0], (0, 7))])
def test_an_odd_value_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, value: Sequence[object] | str, ids: tuple[int, ...]
) -> None:
    assert endings(tmp_path, generation_config={"eos_token_id": value}) == ids
    assert f"eos_token_id is {value!r}" in caplog.text
