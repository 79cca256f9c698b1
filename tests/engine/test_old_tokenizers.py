"""Checkpoints whose tokenizer has an older form than tokenizer.json: converted once, then like any other."""

import io
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer, Tokenizer

from model.checkpoint import tokenizer as module
from model.checkpoint.convert_tokenizer import convert
from model.checkpoint.ending import ending_tokens
from model.checkpoint.files import read_json
from model.checkpoint.hub import LfsPointerError
from model.checkpoint.loader import load_config
from model.checkpoint.tokenizer import TokenizerError, tokenizer_file
from server.tokenizer import TokenIdCodec, load_codec
from tests.small_checkpoint import write_small_checkpoint

TEXT = "\n".join(topics.values())[:60_000]
SAMPLES = ["Hello world", "def f(x):\n    return 'héllo' 世 ", "  two  spaces ", "ﬁ ½", "a\tb", "🙂x", ""]


PROCESS = module._run


def in_this_process(folder: Path, result: Path) -> None:
    """The conversion without a process of its own, which takes seconds to import transformers anew."""
    try:
        result.write_text(convert(folder))
    except Exception as error:
        raise TokenizerError(f"the tokenizer can't be converted: {error}") from None


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder of this module's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(module, "_run", in_this_process)
        yield


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer.model that SentencePiece trained."""
    folder = tmp_path_factory.mktemp("pieces")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with vocab.json and merges.txt of byte pairs."""
    folder = tmp_path_factory.mktemp("pairs")
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([TEXT], vocab_size=400, special_tokens=["<|endoftext|>"])
    trained.save_model(str(folder))
    return folder


def converted(folder: Path) -> Tokenizer:
    file = tokenizer_file(folder)
    assert file is not None
    return Tokenizer.from_file(str(file))


def test_a_sentencepiece_model_gives_its_own_ids(pieces: Path) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(pieces / "tokenizer.model"))
    tokenizer = converted(pieces)

    @settings(max_examples=100, deadline=None)
    @given(st.text(max_size=40))
    def same(text: str) -> None:
        assert tokenizer.encode(text, add_special_tokens=False).ids == reference.encode(text)

    for sample in SAMPLES:
        assert tokenizer.encode(sample, add_special_tokens=False).ids == reference.encode(sample)
    same()


def test_byte_pairs_give_their_own_ids_and_texts(pairs: Path) -> None:
    reference = ByteLevelBPETokenizer(str(pairs / "vocab.json"), str(pairs / "merges.txt"))
    tokenizer = converted(pairs)
    for sample in SAMPLES:
        ids = tokenizer.encode(sample, add_special_tokens=False).ids
        assert ids == reference.encode(sample).ids
        assert tokenizer.decode(ids) == sample


def test_a_conversion_is_made_once_and_again_when_a_file_changes(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tokenizer_file(pairs)

    def convert(*_: object) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(module, "_convert", convert)
    assert tokenizer_file(pairs) == kept
    for file in pairs.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "added_tokens.json").write_text("{}")
    with pytest.raises(AssertionError, match="converted again"):
        tokenizer_file(tmp_path)


def test_the_folders_own_tokenizer_json_comes_first(pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("")
    own = tmp_path / "tokenizer.json"
    own.write_bytes((tokenizer_file(pairs) or own).read_bytes())
    assert tokenizer_file(tmp_path) == own


def test_a_model_without_any_has_none(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}")  # half of a pair
    assert tokenizer_file(tmp_path) is None


def test_the_process_converts_alike_and_says_in_one_line_what_it_cannot(pairs: Path, tmp_path: Path) -> None:
    PROCESS(pairs, tmp_path / "whole.json")
    here = convert(pairs)
    assert json.loads((tmp_path / "whole.json").read_text()) == json.loads(here)
    (tmp_path / "tokenizer.model").write_text("no model")
    with pytest.raises(TokenizerError, match="can't be converted") as raised:
        PROCESS(tmp_path, tmp_path / "none.json")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "none.json").exists()


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"tokenizer.model": "no model"}, "can't be converted"),
        ({"vocab.json": "[]", "merges.txt": "#"}, "can't be converted"),
        ({"vocab.txt": "a\nb", "tokenizer_config.json": "[]"}, "must hold an object"),
    ],
)
def test_what_cannot_be_converted_is_served_by_ids_with_a_warning(
    files: dict[str, str], told: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with caplog.at_level(logging.WARNING):
        assert isinstance(load_codec(tmp_path), TokenIdCodec)
    assert told in caplog.text


def test_what_cannot_be_converted_is_tried_once_in_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = 0

    def refuse(*_: object) -> None:
        nonlocal tries
        tries += 1
        raise TokenizerError("it can't be had")

    monkeypatch.setattr(module, "_run", refuse)
    (tmp_path / "tokenizer.model").write_text("damaged in its own way")
    for _ in range(3):
        with pytest.raises(TokenizerError, match="it can't be had"):
            tokenizer_file(tmp_path)
    assert tries == 1


def test_code_of_a_checkpoint_is_never_run(pairs: Path, tmp_path: Path) -> None:
    for file in pairs.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    names = {"tokenizer_class": "MineTokenizer", "auto_map": {"AutoTokenizer": ["mine.MineTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(TokenizerError):
        tokenizer_file(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(LfsPointerError, match=r"tokenizer\.model"):
        tokenizer_file(tmp_path)


def test_a_cache_that_cannot_be_written_is_a_reason(
    pairs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(module, "_refused", {})
    with pytest.raises(TokenizerError, match="Not a directory"):
        tokenizer_file(pairs)


def test_a_checkpoint_with_an_old_tokenizer_is_served_as_text(pairs: Path, tmp_path: Path) -> None:
    write_small_checkpoint(tmp_path)
    os.unlink(tmp_path / "tokenizer.json")
    for file in pairs.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    codec = load_codec(tmp_path)
    ids = codec.encode("the house")
    assert codec.decode(ids, skip_special_tokens=False) == "the house"
    assert 0 in ending_tokens(tmp_path, load_config(tmp_path), read_json)  # <|endoftext|> of vocab.json
