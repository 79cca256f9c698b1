"""Thoughts split off: pieces depend on the text alone, wherever it is cut."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.output.pieces import ContentText, PassThrough, Piece, ReasoningText, join_pieces, parsed_message
from server.output.reasoning import CLOSING, OPENING, ReasoningParser

PARTS = ["<think>", "</think>", "<", "</", "think>", "</think", " ", "\n", "a", "bc", "世"]
texts = st.lists(st.sampled_from(PARTS), max_size=10).map("".join)


def pieces_of(text: str, cuts: set[int], *, starts_inside: bool = False) -> list[Piece]:
    parser = ReasoningParser(PassThrough(), starts_inside=starts_inside)
    borders = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    pieces: list[Piece] = []
    for start, end in pairwise(borders):
        pieces += parser.push(text[start:end])
    return join_pieces(pieces + parser.flush())


def expected(text: str, *, starts_inside: bool) -> tuple[str, str]:
    """Reasoning and content by the obvious definition, on the whole text."""
    begin = text.lstrip()
    if begin.startswith(OPENING):
        begin = begin.removeprefix(OPENING)
    elif not starts_inside:
        return "", text
    thought, _, answer = begin.partition(CLOSING)
    return thought.strip(), answer.lstrip()


@given(texts, st.sets(st.integers(1, 60)), st.booleans())
def test_pieces_are_those_of_the_whole_text_wherever_it_is_cut(
    text: str, cuts: set[int], starts_inside: bool
) -> None:
    pieces = pieces_of(text, cuts, starts_inside=starts_inside)
    message = parsed_message(pieces)
    assert (message.reasoning, message.content) == expected(text, starts_inside=starts_inside)
    assert [type(piece) for piece in pieces] == [
        kind for kind, part in ((ReasoningText, message.reasoning), (ContentText, message.content)) if part
    ]


@given(st.text(), st.text(), st.sets(st.integers(1, 60)))
def test_any_thought_and_answer_come_back(thought: str, answer: str, cuts: set[int]) -> None:
    thought, answer = thought.replace(CLOSING, "").strip(), answer.strip()
    message = parsed_message(pieces_of(f"<think>\n{thought}\n</think>\n\n{answer}", cuts))
    assert (message.reasoning, message.content) == (thought, answer)


@pytest.mark.parametrize(
    ("text", "starts_inside", "end"),
    [
        ("hello", False, 0),
        ("<think>a</think> b", False, 16),
        ("  <think>a</think> b", False, 18),
        ("a</think>b", True, 9),
        ("<think>a", False, None),
        ("a", True, None),
        ("<thin", False, 0),
        ("", False, 0),
    ],
)
def test_it_is_known_where_thoughts_end(text: str, starts_inside: bool, end: int | None) -> None:
    parser = ReasoningParser(PassThrough(), starts_inside=starts_inside)
    for character in text:
        parser.push(character)
    parser.flush()
    assert parser.thoughts_end == end
    assert parser.has_thoughts == (end != 0)


def test_nothing_is_held_back_that_is_certain() -> None:
    parser = ReasoningParser(PassThrough())
    assert parser.push("<think>ab") == [ReasoningText("ab")]
    assert parser.push(" c </th") == [ReasoningText(" c")]
    assert parser.push("e") == [ReasoningText(" </the")]
    assert parser.push("</think> d") == [ContentText("d")]
    assert parser.push(" ") == [ContentText(" ")]
