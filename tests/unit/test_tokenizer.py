"""Tokens as bytes, and prompts that ask for what stands between two texts."""

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, processors
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from server.settings import SettingsError, embedded_model
from server.tokenizer import TextCodec, load_codec, printable
from tests.text_tools import byte_codec, byte_tokenizer, ids_of
from tests.unit.test_text import sentencepiece_codec

EMBEDDED = TextCodec.from_folder(embedded_model())


@given(st.text())
def test_bytes_of_tokens_make_the_text(text: str) -> None:
    codec = byte_codec()
    assert b"".join(map(codec.token_bytes, codec.encode(text))).decode() == text


@given(st.text(st.characters(categories=["L", "M", "N", "P", "S", "Zs"], include_characters="\n\t")))
def test_bytes_of_the_default_models_tokens_make_what_people_write(text: str) -> None:
    """A trained tokenizer may lack bytes of control characters and of planes that nothing is assigned to."""
    assert b"".join(map(EMBEDDED.token_bytes, EMBEDDED.encode(text))).decode() == text


def test_bytes_of_sentencepiece_tokens() -> None:
    """The decoder drops a leading space, but the token has one."""
    codec = sentencepiece_codec()
    assert [codec.token_bytes(i) for i in (256, 257, 258, 0xC3, 259)] == [
        b" Hello",
        b" world",
        b"!",
        b"\xc3",
        b"<s>",
    ]


def test_tokens_in_print() -> None:
    assert [printable(b) for b in (b"a", "é".encode(), b"\xe4\xb8")] == ["a", "é", "bytes:\\xe4\\xb8"]


def test_ids_beyond_the_tokenizer_are_empty() -> None:
    """Models pad their vocabulary."""
    assert (byte_codec().piece(5000), byte_codec().token_bytes(5000)) == ("", b"")


def fim_codec(names: list[str], *, bos: bool = False) -> TextCodec:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([*names, "<s>"])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return TextCodec(tokenizer)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(
    "names",
    [
        ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"],
        ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"],
        ["▁<PRE>", "▁<SUF>", "▁<MID>"],
    ],
)
def test_filling_in_the_middle(names: list[str], bos: bool) -> None:
    codec = fim_codec(names, bos=bos)
    before, between, after = 257, 258, 259
    ids = codec.fill_in_the_middle(ids_of("def"), "end")
    assert ids == [*([260] if bos else []), before, *ids_of("def"), between, *ids_of("end"), after]


def test_most_tokenizers_cannot_fill_in_the_middle() -> None:
    assert byte_codec().fill_tokens is None
    assert fim_codec(["<fim_prefix>", "<fim_suffix>"]).fill_tokens is None


def test_special_tokens_only_if_wanted() -> None:
    codec = fim_codec([], bos=True)
    assert codec.encode("a") == [257, 97]
    assert codec.encode("a", add_special_tokens=False) == [97]


def test_a_tokenizer_without_decoder() -> None:
    codec = TextCodec(Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    assert codec.token_bytes(1).strip() == b"b"


BOS_ALREADY = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])


@pytest.mark.parametrize("post_processor", [None, BOS_ALREADY], ids=["plain", "adds_bos"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"bos_token": "<s>", "eos_token": "<eos>"},
        {"bos_token": "<s>", "add_bos_token": True},
        {"bos_token": {"content": "<s>", "__type": "AddedToken"}, "add_bos_token": True},
        {"bos_token": "<s>", "add_bos_token": False},
        {"bos_token": None, "add_bos_token": True},
        {"bos_token": "<s>", "eos_token": "<eos>", "add_bos_token": True, "add_eos_token": True},
        {"eos_token": "<eos>", "add_eos_token": True},
    ],
    ids=str,
)
def test_special_tokens_stand_where_transformers_puts_them(
    tmp_path: Path, post_processor: TemplateProcessing | None, config: dict[str, object]
) -> None:
    """By tokenizer.json's post-processor: beside it, transformers 5 does not listen to add_bos_token."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<s>"])
    if post_processor is not None:
        tokenizer.post_processor = post_processor
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    reference = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert TextCodec.from_folder(tmp_path).encode("hi") == reference.encode("hi")


def test_a_pointer_of_git_lfs_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n")
    with pytest.raises(SettingsError, match=r"tokenizer\.json is a Git LFS pointer"):
        load_codec(tmp_path)


def ticks_during(work: Callable[[], object]) -> int:
    """How often another thread gets to run meanwhile; counting stops well above what a fluke gives."""
    ticks, done = 0, threading.Event()

    def count() -> None:
        nonlocal ticks
        while not done.wait(0.001) and ticks < 1000:
            ticks += 1

    thread = threading.Thread(target=count)
    thread.start()
    work()
    done.set()
    thread.join()
    return ticks


LONG_TEXT = "hello world " * 30_000


def test_other_threads_run_while_a_long_text_is_tokenised() -> None:
    """The library's `encode` holds the lock for the whole 200 ms: every stream stood still for so long."""
    assert ticks_during(lambda: EMBEDDED.encode(LONG_TEXT)) >= 10


def test_other_threads_run_while_many_ids_are_decoded() -> None:
    ids = EMBEDDED.encode(LONG_TEXT) * 4
    assert ticks_during(lambda: EMBEDDED.decode_long(ids)) >= 10


@given(st.lists(st.integers(0, 300)))
def test_many_ids_are_decoded_like_few(ids: list[int]) -> None:
    assert EMBEDDED.decode_long(ids) == EMBEDDED.decode(ids, skip_special_tokens=False)
