"""Grammars of whole answers: thoughts, then calls of tools or what a format asks for.

Invariant: a text that follows the grammar of an `AnswerShape` is taken apart by the parsers of this package
into calls that match their schemas, as many as are allowed.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from model.grammar.schemas import embedded_schema
from model.protocol import Grammar
from server.output import calls, reasoning
from server.output.calls import ToolFormat, ToolSignature

MOST_CALLS = 16  # of an answer that a grammar guides: a model may not know when to end
Thoughts = Literal["none", "may come", "have begun"]
_TEXT = "TEXT: /(?s:.*)/"
_GAP = r"GAP: /\n{1,2}/"


class UncombinableError(ValueError):
    """A format that can't be a part of a larger grammar."""


@dataclass(frozen=True)
class AnswerShape:
    """What an answer must be.

    `tools` may be called, at most `most_calls` times; `must_call`: at least once. Otherwise the answer may
    be a text, of the format `answer` if there is one. `special` are the tags that are special tokens.
    """

    thoughts: Thoughts = "none"
    answer: Grammar | None = None
    form: ToolFormat | None = None
    tools: Sequence[ToolSignature] = ()
    must_call: bool = False
    most_calls: int = MOST_CALLS
    special: frozenset[str] = frozenset()

    def to_grammar(self) -> Grammar:
        """The shape as a grammar of the engine.

        Raises UncombinableError for an `answer` in Lark's notation, whose names may be ours as well, and
        RecursionError for schemas that are nested too deeply.
        """
        thoughts, thought_rules = self._thoughts()
        answer, answer_rules = self._answer()
        lines = [f"start: {thoughts} {answer}", _TEXT, _GAP, *thought_rules, *answer_rules]
        used = tuple(sorted(tag for tag in self.special if any(tag in line for line in lines)))
        return Grammar(kind="lark", text="\n".join(lines), special_tokens=used)

    def _thoughts(self) -> tuple[str, list[str]]:
        if self.thoughts == "none":
            return "", []
        body, rules = self._until(reasoning.CLOSING, "thoughts")
        if self.thoughts == "have begun":
            return f"{body} GAP?", rules
        return f"({self._tag(reasoning.OPENING)} {body} GAP?)?", rules

    def _answer(self) -> tuple[str, list[str]]:
        if not self.tools:
            assert self.answer is not None
            return "answer", _answer_rules(self.answer)
        if self.must_call:
            return "calls", self._calls(self._tag(calls.OPENING))
        if self.answer is not None:
            rules = [*_answer_rules(self.answer), *self._calls(self._tag(calls.OPENING))]
            return "(answer | calls)", rules
        head, rules = self._until(calls.OPENING, "head")
        other, other_rules = self._text_without(calls.OPENING)
        return f"({other} | calls)", [*rules, *other_rules, *self._calls(head)]

    def _calls(self, head: str) -> list[str]:
        """Rules of calls, the first of which begins as `head` says."""
        assert self.form is not None
        names = [f"call_{number}" for number in range(len(self.tools))]
        again = f'("\\n" {self._tag(calls.OPENING)} call)'
        more = f" {again}{{0,{self.most_calls - 1}}}" if self.most_calls > 1 else ""
        rules = [f"calls: {head} call{more}", f"call: ({' | '.join(names)}) {self._tag(calls.CLOSING)}"]
        for name, tool in zip(names, self.tools, strict=True):
            rules += self.form.rule(tool, name)
        return rules

    def _tag(self, tag: str) -> str:
        return tag if tag in self.special else json.dumps(tag)

    def _until(self, tag: str, name: str) -> tuple[str, list[str]]:
        """What matches any text with the first `tag` at its end, and the rules for it."""
        if tag in self.special:
            return f"TEXT {tag}", []
        return name, [f"{name}[lazy]: /(?s:.*){_escaped(tag)}/"]

    def _text_without(self, tag: str) -> tuple[str, list[str]]:
        if tag in self.special:
            return "TEXT", []
        return "OTHER", [f"OTHER: /(?s:.*)/ & ~/(?s:.*){_escaped(tag)}(?s:.*)/"]


def any_of(schemas: Sequence[object]) -> Grammar:
    """A grammar of JSON that matches one of the schemas: whether they can be followed side by side.

    Raises RecursionError for schemas that are nested too deeply.
    """
    names = [f"schema_{number}" for number in range(len(schemas))]
    rules = [f"{name}: %json {embedded_schema(schema)}" for name, schema in zip(names, schemas, strict=True)]
    return Grammar(kind="lark", text="\n".join([f"start: {' | '.join(names)}", *rules]))


def _escaped(tag: str) -> str:
    return tag.replace("/", r"\/")


def _answer_rules(grammar: Grammar) -> list[str]:
    """A format as the rule `answer`."""
    if grammar.kind == "json_object":
        return [f"answer: %json {embedded_schema({'type': 'object'})}"]
    if grammar.kind == "json_schema":
        return [f"answer: %json {embedded_schema(_value(grammar.text))}"]
    if grammar.kind == "choice":
        return [f"answer: {' | '.join(json.dumps(choice) for choice in _value(grammar.text))}"]
    if grammar.kind == "regex":
        return [f"answer: /{_delimited(grammar.text)}/"]
    raise UncombinableError("a grammar in Lark's notation can't be a part of another one")


def _value(text: str) -> Any:  # noqa: ANN401 - JSON
    try:
        return json.loads(text)
    except ValueError as error:
        raise UncombinableError(f"the schema is not valid JSON: {error}") from error


def _delimited(expression: str) -> str:
    """A regular expression as it stands between slashes on one line."""
    escaped = False
    parts = []
    for character in expression:
        parts.append("\\/" if character == "/" and not escaped else character)
        escaped = character == "\\" and not escaped
    return "".join(parts).replace("\n", "\\n")
