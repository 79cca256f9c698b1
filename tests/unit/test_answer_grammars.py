"""Grammars of answers: whatever follows one is taken apart into calls that match their schemas."""

import json
import random

import jsonschema_rs
import pytest
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from model.grammar.check import GrammarError, check_grammar, new_matcher
from model.protocol import Grammar
from server.output.calls import CallParser, ToolSignature
from server.output.formats import FORMATS
from server.output.grammar import AnswerShape, UncombinableError
from server.output.pieces import OutputParser, ParsedMessage, PassThrough, parsed_message
from server.output.reasoning import ReasoningParser
from tests.loose import Json

SPECIAL = ("<think>", "</think>", "<tool_call>", "</tool_call>")


class _Bytes:
    """A tokenizer of bytes, an end, and the tags as special tokens."""

    eos_token_id = 256
    bos_token_id = None
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>", *(tag.encode() for tag in SPECIAL))
    special_token_ids = tuple(range(256, 256 + 1 + len(SPECIAL)))

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


TOKENIZER = LLTokenizer(TokenizerWrapper(_Bytes()))


def ids_of(text: str, special: frozenset[str]) -> list[int]:
    """Ids of a text whose tags in `special` are tokens."""
    for number, tag in enumerate(SPECIAL):
        if tag in special and tag in text:
            before, _, behind = text.partition(tag)
            return [*ids_of(before, special), 257 + number, *ids_of(behind, special)]
    return list(text.encode())


def may_be(grammar: Grammar, text: str, special: frozenset[str] = frozenset()) -> bool:
    matcher = new_matcher(TOKENIZER, grammar)
    return all(matcher.consume_token(token) for token in ids_of(text, special)) and matcher.is_accepting()


def random_text(grammar: Grammar, seed: int, most: int = 4000) -> str:
    """Any text that follows the grammar; of several bytes those are likelier that lead to an end."""
    matcher, choice, text = new_matcher(TOKENIZER, grammar), random.Random(seed), bytearray()
    likely = [*b'"}]>\n<,:/']
    for _ in range(most):
        if matcher.is_stopped():
            return _decoded(text)
        for phrase in (b"\n</parameter>\n", b"<tool_call>"):
            ahead = matcher.deep_copy()
            if choice.random() < 0.1 and all(ahead.consume_token(byte) for byte in phrase):
                matcher, text = ahead, text + phrase
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        allowed = [token for token in range(257 + len(SPECIAL)) if mask >> token & 1]
        if 256 in allowed and choice.random() < 0.5:
            return _decoded(text)
        some = [token for token in allowed if token in likely] or [token for token in allowed if token != 256]
        token = choice.choice(some if choice.random() < 0.7 else [t for t in allowed if t != 256] or [256])
        if token == 256:
            return _decoded(text)
        assert matcher.consume_token(token)
        text += _Bytes.tokens[token]
    pytest.fail("no end")


def _decoded(text: bytearray) -> str:
    return text.decode(errors="replace")


def tool(name: str, **properties: Json) -> ToolSignature:
    schema = {"type": "object", "properties": properties, "required": sorted(properties)[:1]}
    return ToolSignature(name, schema | {"additionalProperties": False})


TOOLS = [
    tool("get_weather", city={"type": "string", "maxLength": 5}, unit={"enum": ["C", "F"]}),
    tool(
        "plain", text={"type": "string"}, tags={"type": "array", "items": {"type": "string"}, "maxItems": 2}
    ),
    tool(
        "numbers",
        a={"type": "integer", "minimum": -9, "maximum": 9},
        b={"anyOf": [{"type": "null"}, {"const": "x"}]},
    ),
    tool("nothing"),
    ToolSignature(
        "composed",
        {
            "type": "object",
            "$defs": {"P": {"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"]}},
            "properties": {"p": {"$ref": "#/$defs/P"}},
            "required": ["p"],
            "additionalProperties": False,
        },
    ),
    ToolSignature(
        "odd",
        {"type": "object", "patternProperties": {"^[ab]$": {"type": "null"}}, "additionalProperties": False},
    ),
]


def parse(form: str, text: str, *, thoughts: bool = False, inside: bool = False) -> ParsedMessage:
    parser: OutputParser = CallParser(FORMATS[form], TOOLS, is_certain=True)
    if thoughts:
        parser = ReasoningParser(parser, starts_inside=inside)
    return parsed_message([*parser.push(text), *parser.flush()])


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("must_call", [True, False], ids=["required", "auto"])
def test_every_text_is_calls_that_match_their_schemas(form: str, seed: int, must_call: bool) -> None:
    shape = AnswerShape(form=FORMATS[form], tools=TOOLS, must_call=must_call, most_calls=3)
    text = random_text(shape.to_grammar(), seed)
    message = parse(form, text)
    assert must_call <= len(message.calls) <= 3
    assert message.calls or message.content == text
    schemas = {one.name: one.parameters for one in TOOLS}
    for call in message.calls:
        jsonschema_rs.validate(dict(schemas[call.name]), json.loads(call.arguments))
    if must_call:
        assert not message.content


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("one", TOOLS, ids=lambda one: one.name)
def test_each_tool_can_be_called(form: str, one: ToolSignature) -> None:
    grammar = AnswerShape(form=FORMATS[form], tools=[one], must_call=True, most_calls=1).to_grammar()
    check_grammar(grammar)
    (call,) = parse(form, random_text(grammar, 5)).calls
    assert call.name == one.name
    jsonschema_rs.validate(dict(one.parameters), json.loads(call.arguments))


CALL = '<tool_call>\n{"name": "nothing", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize("special", [frozenset(), frozenset(SPECIAL)], ids=["text", "special tokens"])
@pytest.mark.parametrize(
    ("thoughts", "must_call", "good", "bad"),
    [
        (
            "none",
            True,
            [CALL, f"{CALL}\n{CALL}"],
            ["", "no", f"{CALL} ", f"no {CALL}", f"{CALL}\n{CALL}\n{CALL}"],
        ),
        ("none", False, ["", "no", "<tool", CALL, f"Yes: {CALL}"], ["<tool_call>", f"{CALL}no"]),
        ("have begun", True, [f"hm</think>{CALL}", f"</think>\n\n{CALL}"], [CALL, "hm</think>no", "hm"]),
        ("may come", True, [CALL, f"<think>hm</think>\n{CALL}"], ["<think>hm", f"hm</think>{CALL}"]),
        ("have begun", False, ["hm</think>", "hm</think>no", f"hm</think>no{CALL}"], ["hm"]),
    ],
)
def test_what_may_be_said(
    thoughts: Json, must_call: bool, good: list[str], bad: list[str], special: frozenset[str]
) -> None:
    shape = AnswerShape(thoughts, None, FORMATS["hermes"], [TOOLS[3]], must_call, 2, special)
    grammar = shape.to_grammar()
    check_grammar(grammar)
    assert [text for text in good if not may_be(grammar, text, special)] == []
    assert [text for text in bad if may_be(grammar, text, special)] == []


@pytest.mark.parametrize(
    ("kind", "text", "good", "bad"),
    [
        ("json_object", "", '{"a": 1}', "[1]"),
        ("json_schema", '{"type": "integer", "description": "d"}', "12", '"a"'),
        ("choice", '["yes", "n/o\\n"]', "n/o\n", "no"),
        ("regex", r"[a/]+\/\n", "a//\n", "b"),
    ],
)
def test_formats_behind_thoughts_and_beside_calls(kind: Json, text: str, good: str, bad: str) -> None:
    answer = Grammar(kind=kind, text=text)
    alone = AnswerShape("have begun", answer).to_grammar()
    beside = AnswerShape("none", answer, FORMATS["hermes"], [TOOLS[3]]).to_grammar()
    for grammar, before in ((alone, "hm</think>"), (beside, "")):
        check_grammar(grammar)
        assert may_be(grammar, before + good)
        assert not may_be(grammar, before + bad)
    assert may_be(beside, CALL)
    assert not may_be(alone, good)


def test_a_grammar_of_the_client_stays_alone() -> None:
    with pytest.raises(UncombinableError):
        AnswerShape("have begun", Grammar(kind="lark", text='start: "a"')).to_grammar()


def test_clients_cannot_name_special_tokens() -> None:
    with pytest.raises(GrammarError, match="special tokens"):
        check_grammar(Grammar(kind="lark", text="start: <tool_call>"))


def test_thoughts_and_special_tokens_are_seen_by_the_parsers() -> None:
    message = parse("hermes", f"hm</think>\n\n{CALL}", thoughts=True, inside=True)
    assert (message.reasoning, message.content, len(message.calls)) == ("hm", "", 1)
    parser = ReasoningParser(PassThrough())
    assert parsed_message([*parser.push("<think>a</think>b"), *parser.flush()]).content == "b"


def test_matchers_see_what_the_check_sees() -> None:
    grammar = AnswerShape(form=FORMATS["hermes"], tools=TOOLS, must_call=True).to_grammar()
    assert isinstance(new_matcher(TOKENIZER, grammar), LLMatcher)
