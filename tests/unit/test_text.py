"""Detokenisation and stop strings, against the tokenizer and the obvious definition."""

from collections.abc import Sequence
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from server.text import (
    MAX_HELD_TOKENS,
    REPLACEMENT,
    CompletionText,
    Detokenizer,
    StopChecker,
    StopPattern,
    token_starts,
)
from server.tokenizer import TextCodec
from tests.text_tools import byte_codec, ids_of

CODEC = byte_codec()
decode = partial(CODEC.decode, skip_special_tokens=True)
decode_all = partial(CODEC.decode, skip_special_tokens=False)


def sentencepiece_codec() -> TextCodec:
    """Pieces that carry their leading space, and byte tokens for everything else, as in Llama 2."""
    pieces = ["▁Hello", "▁world", "!", "<s>"]
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab | {piece: 256 + i for i, piece in enumerate(pieces)}, merges=[])
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    tokenizer.add_special_tokens(["<s>"])
    return TextCodec(tokenizer)


def deltas(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


@given(st.lists(st.integers(0, 256), max_size=MAX_HELD_TOKENS - 1), st.booleans())
def test_joined_deltas_are_the_decoded_ids(ids: list[int], skip: bool) -> None:
    """Any bytes, also those that are no UTF-8, and a special token anywhere."""
    one_decode = partial(CODEC.decode, skip_special_tokens=skip)
    assert "".join(deltas(Detokenizer(one_decode), ids)) == one_decode(ids)


@given(st.text())
def test_no_replacement_character_within_text(text: str) -> None:
    parts = deltas(Detokenizer(decode), ids_of(text))
    assert "".join(parts) == text
    assert all(REPLACEMENT not in part for part in parts) or REPLACEMENT in text


def test_each_character_is_shown_with_its_last_byte() -> None:
    assert deltas(Detokenizer(decode), ids_of("aé🙂")) == ["a", "", "é", "", "", "", "🙂", ""]


def test_incomplete_character_is_flushed_at_the_end() -> None:
    assert deltas(Detokenizer(decode), ids_of("🙂")[:3]) == ["", "", "", REPLACEMENT]


def test_endless_garbage_is_not_held_for_ever() -> None:
    """DecodeStream held it, and decoded it all anew at each token: 4 s for 8000 tokens."""
    calls = []

    def counting(ids: Sequence[int]) -> str:
        calls.append(len(ids))
        return decode(ids)

    parts = deltas(Detokenizer(counting), [0xC3] * 500)
    assert "".join(parts) == REPLACEMENT * 500
    assert max(calls) <= 2 * MAX_HELD_TOKENS
    assert parts[MAX_HELD_TOKENS] != parts[MAX_HELD_TOKENS - 1]


def test_invisible_tokens_do_not_pile_up() -> None:
    sizes = []

    def counting(ids: Sequence[int]) -> str:
        sizes.append(len(ids))
        return decode(ids)

    assert "".join(deltas(Detokenizer(counting), [*ids_of("a"), *[256] * 100, *ids_of("b")])) == "ab"
    assert max(sizes) <= 3


def test_context_keeps_the_leading_space() -> None:
    """A SentencePiece decoder strips the space of the first piece it sees."""
    codec = sentencepiece_codec()
    one_decode = partial(codec.decode, skip_special_tokens=True)
    hello, world, bang, bos = 256, 257, 258, 259
    assert "".join(deltas(Detokenizer(one_decode), [bos, hello, world, bang])) == "Hello world!"
    assert "".join(deltas(Detokenizer(one_decode, [hello]), [world, bang])) == " world!"


def test_byte_fallback_survives_an_invalid_run() -> None:
    """DecodeStream raised "Invalid prefix": one bad byte makes the decoder take the whole run back."""
    codec = sentencepiece_codec()
    parts = deltas(Detokenizer(partial(codec.decode, skip_special_tokens=True)), [*ids_of("é中"), 0xE4, 258])
    assert "".join(parts).startswith("é中")
    assert parts[-2].endswith("!")


def first_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    """(end, stop) of the stop string that is complete first; the longest at a tie."""
    for end in range(len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            return end, max(matches, key=len)
    return None


def expected(text: str, stops: list[str], include_stop: bool) -> tuple[str, str | None]:
    found = first_stop(text, stops)
    if found is None:
        return text, None
    end, stop = found
    return text[: end if include_stop else end - len(stop)], stop


def cut_by_checker(pieces: list[str], stops: list[str], include_stop: bool) -> tuple[str, str | None]:
    checker = StopChecker([StopPattern(stop) for stop in stops], include_stop=include_stop)
    shown = ""
    for piece in pieces:
        match = checker.push(piece)
        shown += match.text
        if match.stop is not None:
            return shown, match.stop
    return shown + checker.flush(), None


stop_lists = st.lists(st.text("ab€", min_size=1, max_size=5), max_size=4)
piece_lists = st.lists(st.text("ab€", max_size=4), max_size=12)


@given(piece_lists, stop_lists, st.booleans())
def test_stop_strings_do_not_depend_on_token_borders(
    pieces: list[str], stops: list[str], include_stop: bool
) -> None:
    assert cut_by_checker(pieces, stops, include_stop) == expected("".join(pieces), stops, include_stop)


@given(piece_lists, stop_lists)
def test_no_partial_match_leaks_and_no_more_is_held_than_may_match(
    pieces: list[str], stops: list[str]
) -> None:
    checker = StopChecker([StopPattern(stop) for stop in stops], include_stop=False)
    shown = seen = ""
    for piece in pieces:
        match = checker.push(piece)
        shown, seen = shown + match.text, seen + piece
        if match.stop is not None:
            return
        begins = [seen[i:] for i in range(len(seen)) if any(stop.startswith(seen[i:]) for stop in stops)]
        assert seen == shown + max(begins, key=len, default="")


@pytest.mark.parametrize(
    ("stops", "text", "shown", "stop"),
    [
        (["b", "abc"], "xabc", "xa", "b"),
        (["bc", "abc"], "xabc", "x", "abc"),
        (["aab"], "aaab", "a", "aab"),
        ([], "abc", "abc", None),
    ],
)
def test_first_complete_stop_string_wins(stops: list[str], text: str, shown: str, stop: str | None) -> None:
    assert cut_by_checker([text], stops, False) == (shown, stop)
    assert cut_by_checker(list(text), stops, False) == (shown, stop)


def completion(stops: list[str], min_tokens: int = 0) -> CompletionText:
    checker = StopChecker([StopPattern(stop) for stop in stops], include_stop=False)
    return CompletionText(Detokenizer(decode), checker, min_tokens)


def test_tokens_after_the_stop_string_do_not_count() -> None:
    assert completion(["cd"]).push(ids_of("abcdef")) == ("ab", [0, 1, 2, 3], 4, "cd")


def test_stop_strings_sleep_until_min_tokens() -> None:
    text = completion(["a"], min_tokens=4)
    assert text.push(ids_of("aabbba")) == ("aabbb", [0, 1, 2, 3, 4, 5], 6, "a")


def test_held_text_is_shown_if_the_completion_ends() -> None:
    text = completion(["xyz"])
    assert text.push(ids_of("abxy")) == ("ab", [0, 1], 4, None)
    assert text.flush() == ("xy", [2, 3], 0, None)


def test_stop_string_completed_by_the_flushed_character() -> None:
    text = completion([REPLACEMENT])
    assert text.push([*ids_of("a"), 0xC3]).text == "a"
    assert text.flush().text == ""


@given(st.text("ab€🙂", max_size=20), stop_lists, st.integers(0, 6))
def test_a_token_is_out_with_its_text_and_not_before(text: str, stops: list[str], min_tokens: int) -> None:
    """Every token once, in order; what is out is all text before the first token that waits."""
    one, ids = completion(stops, min_tokens), ids_of(text)
    shown, starts = "", list[int]()
    for pushed, token_id in enumerate(ids, 1):
        delta = one.push([token_id])
        shown, starts = shown + delta.text, starts + delta.starts
        if delta.stop is not None:
            assert len(starts) == pushed
            break
        whole = bytes(ids[: len(starts)]).decode()  # never half a character
        assert shown == whole
    else:
        assert len(starts + one.flush().starts) == len(ids)
    expected_starts = [len(bytes(ids[:i]).decode(errors="ignore")) for i in range(len(starts))]
    assert starts == expected_starts


@given(st.text("aé🙂", max_size=12))
def test_token_starts_point_into_the_text(text: str) -> None:
    ids = ids_of(text)
    assert token_starts(decode, ids) == [len(bytes(ids[:i]).decode(errors="ignore")) for i in range(len(ids))]


def test_special_token_is_text_only_if_not_skipped() -> None:
    assert "".join(deltas(Detokenizer(decode_all), [97, 256])) == "a<eos>"
    assert "".join(deltas(Detokenizer(decode), [97, 256])) == "a"
