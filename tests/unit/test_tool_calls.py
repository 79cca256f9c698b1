"""Calls in answers: found wherever the text is cut, and what is no call comes back to the letter."""

import json
from collections.abc import Iterable
from itertools import count, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.output.calls import CallParser, ToolFormat, ToolSignature
from server.output.formats import FORMATS
from server.output.pieces import (
    CallArguments,
    CallStart,
    ContentText,
    ParsedMessage,
    Piece,
    join_pieces,
    parsed_message,
)
from server.output.reasoning import ReasoningParser
from tests.loose import Json
from tests.unit.test_reasoning import expected

TOOLS = [
    ToolSignature("f", {"type": "object", "properties": {"a": {"type": "string"}, "n": {"type": "integer"}}}),
    ToolSignature("g", {"type": "object", "properties": {}}),
]
HERMES, CODER = FORMATS["hermes"], FORMATS["qwen3_coder"]
JSON_PARTS = [
    "<tool_call>",
    "</tool_call>",
    '{"name": "f", "arguments": {"a": "</tool_call>"}}',
    '{"name": "g"}',
]
JSON_PARTS += ["{", "}", '"', "\\", " ", "\n", "x", "<tool", "</tool_", "世"]
XML_PARTS = ["<tool_call>", "</tool_call>", "<function=f>", "</function>", "<parameter=a>", "<parameter=n>"]
XML_PARTS += ["</parameter>", "</function></tool_call>", '{"name": "g"}', "<", " ", "\n", "3", "世", "<param"]


def pieces_of(form: ToolFormat, text: str, cuts: Iterable[int] = (), **options: Json) -> list[Piece]:
    ids = count()
    parser = CallParser(form, TOOLS, new_id=lambda: f"id{next(ids)}", **options)
    borders = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    pieces: list[Piece] = []
    for start, end in pairwise(borders):
        pieces += parser.push(text[start:end])
    return join_pieces(pieces + parser.flush())


def calls_of(form: ToolFormat, text: str, **options: Json) -> list[tuple[str, Json]]:
    message = parsed_message(pieces_of(form, text, **options))
    return [(call.name, json.loads(call.arguments)) for call in message.calls]


def texts(parts: list[str]) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(parts), max_size=12).map("".join)


@pytest.mark.parametrize("form", [HERMES, CODER], ids=["hermes", "qwen3_coder"])
@given(data=st.data(), cuts=st.sets(st.integers(1, 120)), most=st.sampled_from([None, 1]))
def test_pieces_are_those_of_the_whole_text_wherever_it_is_cut(
    form: ToolFormat, data: st.DataObject, cuts: set[int], most: int | None
) -> None:
    text = data.draw(texts(JSON_PARTS if form is HERMES else XML_PARTS))
    whole = pieces_of(form, text, most_calls=most)
    assert pieces_of(form, text, cuts, most_calls=most) == whole
    assert pieces_of(form, text, set(range(len(text))), most_calls=most) == whole
    for call in parsed_message(whole).calls:
        assert isinstance(json.loads(call.arguments), dict)
    if not any(isinstance(piece, CallStart) for piece in whole):
        assert parsed_message(whole).content == text


WRITTEN = [
    (
        HERMES,
        'Yes. \n<tool_call>\n{"name": "f", "arguments": {"a": "\\\\\\"}</tool_call>世"}}\n</tool_call>\n',
    ),
    (HERMES, '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call> <tool_call>no</tool_call>'),
    (CODER, "<tool_call>\n<function=f>\n<parameter=a>\n</param\n</parameter>\n</function>\n</tool_call>"),
    (CODER, "a<tool_call>\n<function=f>\n<parameter=n>\n3\n</parameter>\n</function>\n</tool_call> b"),
]


@pytest.mark.parametrize(("form", "text"), WRITTEN, ids=lambda value: str(value)[:20])
@pytest.mark.parametrize("certain", [False, True])
def test_one_cut_at_every_place_changes_nothing(form: ToolFormat, text: str, certain: bool) -> None:
    whole = pieces_of(form, text, is_certain=certain)
    assert parsed_message(whole).calls
    for cut in range(1, len(text)):
        assert pieces_of(form, text, [cut], is_certain=certain) == whole, text[:cut]


THOUGHTFUL = st.lists(st.sampled_from([*JSON_PARTS, "<think>", "</think>", "think>", "</thi"]), max_size=12)


@given(parts=THOUGHTFUL, cuts=st.sets(st.integers(1, 120)), inside=st.booleans())
def test_calls_behind_thoughts_are_those_of_the_answer_alone(
    parts: list[str], cuts: set[int], inside: bool
) -> None:
    """Within the thoughts there are none, wherever all of it is cut."""

    def told(borders: set[int]) -> ParsedMessage:
        parser = ReasoningParser(CallParser(HERMES, TOOLS, new_id=lambda: "id"), starts_inside=inside)
        ends = [*sorted(cut for cut in borders if cut < len(text)), len(text)]
        pieces = [piece for begin, end in pairwise([0, *ends]) for piece in parser.push(text[begin:end])]
        return parsed_message([*pieces, *parser.flush()])

    text = "".join(parts)
    whole = told(set())
    assert told(cuts) == told(set(range(1, len(text)))) == whole
    thought, answer = expected(text, starts_inside=inside)
    alone = parsed_message(pieces_of(HERMES, answer))
    assert (whole.reasoning, whole.content) == (thought, alone.content)
    assert [call.arguments for call in whole.calls] == [call.arguments for call in alone.calls]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
ARGUMENTS = st.dictionaries(st.text(), VALUES, max_size=4)
CALLS = st.lists(st.tuples(st.sampled_from(["f", "g", "other"]), ARGUMENTS), min_size=1, max_size=3)


@given(calls=CALLS, before=st.text(), cuts=st.sets(st.integers(1, 200)), indent=st.sampled_from([None, 2]))
def test_any_calls_in_json_come_back(
    calls: list[tuple[str, Json]], before: str, cuts: set[int], indent: int | None
) -> None:
    before = before.replace("<tool_call>", "").strip()
    written = [json.dumps({"name": name, "arguments": value}, indent=indent) for name, value in calls]
    text = before + "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in written)
    for certain in (False, True):
        pieces = pieces_of(HERMES, text, cuts, is_certain=certain)
        assert pieces == pieces_of(HERMES, text, is_certain=certain)
        message = parsed_message(pieces)
        assert [(call.name, json.loads(call.arguments)) for call in message.calls] == calls
        assert message.content == before
        assert [call.call_id for call in message.calls] == [f"id{i}" for i in range(len(calls))]


PLAIN_VALUES = st.text().filter(lambda text: "</parameter>" not in text)


@given(value=PLAIN_VALUES, number=st.integers(), cuts=st.sets(st.integers(1, 200)))
def test_any_parameters_in_tags_come_back(value: str, number: int, cuts: set[int]) -> None:
    text = (
        f"<tool_call>\n<function=f>\n<parameter=a>\n{value}\n</parameter>\n<parameter=n>\n{number}\n"
        "</parameter>\n</function>\n</tool_call>"
    )
    for certain in (False, True):
        pieces = pieces_of(CODER, text, cuts, is_certain=certain)
        assert pieces == pieces_of(CODER, text, is_certain=certain)
        message = parsed_message(pieces)
        assert [json.loads(call.arguments) for call in message.calls] == [{"a": value, "n": number}]


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', [("f", {"a": 1})]),
        ('<tool_call>{"name": "f", "parameters": {"a": 1}}</tool_call>', [("f", {"a": 1})]),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', [("f", {"a": 1})]),
        ('<tool_call>{"name": "f"}</tool_call>', [("f", {})]),
        ('<tool_call>{"name": "f", "arguments": {}}', [("f", {})]),  # it ended before the tag
        ('<tool_call>{"name": "f", "arguments": {}}\n</tool_', [("f", {})]),
        ('<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}</tool_call>', [("f", {"a": "\ud800"})]),
    ],
)
def test_what_models_write_for_a_call(text: str, calls: list[tuple[str, Json]]) -> None:
    assert calls_of(HERMES, text) == calls
    assert calls_of(CODER, text) == calls, "a model of the other format may fall back on JSON"


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>hello</tool_call>",
        '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call> ',
        '<tool_call>{"name": 3}</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": 1e999}}</tool_call>',
        '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>',
        '<tool_call>{"a": ' + "[" * 100_000,
        '<tool_call>{"a": ' + "9" * 10_000 + "}</tool_call>",
        "<tool_call>",
        " <tool_call>\n\n",
        "<tool_call><function=f></tool_call>",
        "<tool_call><function=f><parameter=a>x",
        "<tool_call><function=f>x</function></tool_call>",
        "<tool_call><function=></function></tool_call>",
        "  ",
        "a <tool_call",
    ],
    ids=lambda text: text[:60],
)
def test_what_is_no_call_is_text_to_the_letter(text: str) -> None:
    for form in (HERMES, CODER):
        assert pieces_of(form, text) == [ContentText(text)]


def test_text_between_broken_and_good_calls() -> None:
    good = '<tool_call>{"name": "g"}</tool_call>'
    pieces = pieces_of(HERMES, f"I say <tool_call> and\n{good}\n{good} then\n")
    kinds = [ContentText("I say <tool_call> and"), CallStart(0, "id0", "g"), CallArguments(0, "{}")]
    kinds += [CallStart(1, "id1", "g"), CallArguments(1, "{}"), ContentText(" then")]
    assert pieces == kinds


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        ("3", 3),
        (" 3 ", 3),
        ("three", "three"),
        ("True", True),
        ("None", None),
        ("[1,", "[1,"),
        ("1e999", "1e999"),
    ],
)
def test_values_in_tags_are_read_as_the_schema_says(value: str, meant: Json) -> None:
    written = f"<parameter=a>\n{value}\n</parameter>\n<parameter=n>{value}</parameter>"
    written += f"<parameter=x>{value}</parameter>"
    text = f"<tool_call><function=f>{written}</function></tool_call>"
    assert calls_of(CODER, text) == [("f", {"a": value, "n": meant, "x": value})]


def test_certain_calls_are_shown_while_they_grow() -> None:
    parser = CallParser(HERMES, TOOLS, is_certain=True, new_id=lambda: "id")
    assert parser.push('<tool_call>\n{"name": "f", "arg') == []
    assert parser.push('uments": {"a": "x') == [CallStart(0, "id", "f"), CallArguments(0, '{"a": "x')]
    assert parser.push('}"}') == [CallArguments(0, '}"}')]
    assert parser.push("}\n</tool_call>") == []
    parser = CallParser(CODER, TOOLS, is_certain=True, new_id=lambda: "id")
    assert parser.push("<tool_call>\n<function=f>\n") == [CallStart(0, "id", "f")]
    assert parser.push("<parameter=a>\nx\n</parameter>\n") == [CallArguments(0, '{"a": "x"')]
    assert parser.push("</function>\n</tool_call>") == [CallArguments(0, "}")]


def test_other_calls_are_withheld_until_they_are_whole() -> None:
    parser = CallParser(HERMES, TOOLS, new_id=lambda: "id")
    assert parser.push('Yes <tool_call>{"name": "f", "arguments": {}}') == [ContentText("Yes")]
    assert parser.push("</tool_call>") == [CallStart(0, "id", "f"), CallArguments(0, "{}")]


def test_reading_takes_time_by_the_length() -> None:
    """A closing tag within a string was looked behind from the beginning of the call each time."""
    text = '<tool_call>{"name": "f", "arguments": {"a": "' + "</tool_call>" * 20_000 + '"}}</tool_call>'
    ((name, arguments),) = calls_of(HERMES, text)
    assert (name, len(arguments["a"])) == ("f", 12 * 20_000)
