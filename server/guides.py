"""What a chat request makes of an answer: the grammar that guides it, and the rules that take it apart.

Checks both against the model's formats. Synchronous, and slow for a grammar not seen lately.
"""

import logging
from bisect import bisect_left
from collections.abc import Callable, Mapping
from typing import NamedTuple

from model.grammar.check import CheckUnavailableError, GrammarError, check_grammar
from model.protocol import Grammar
from server.errors import InvalidRequestError, UnavailableError, quote
from server.output import calls, reasoning
from server.output.calls import CallParser, ToolSignature
from server.output.formats import OutputFormats
from server.output.grammar import MOST_CALLS, AnswerShape, Thoughts, UncombinableError, any_of
from server.output.pieces import OutputParser, PassThrough
from server.output.reasoning import ReasoningParser
from server.output.rules import OutputRules
from server.schemas.chat import ChatRequest, ToolUse
from server.schemas.tools import FunctionDefinition

logger = logging.getLogger(__name__)


class Guide(NamedTuple):
    """The grammar of a request's answers, the field that asks for it, and how they are taken apart."""

    grammar: Grammar | None
    grammar_field: str | None
    rules: OutputRules
    functions: Mapping[int, FunctionDefinition]  # whose schemas are in the grammar, by their index in `tools`


def check_tools(body: ChatRequest, formats: OutputFormats) -> None:
    """Raises InvalidRequestError for tools where it isn't known how the model calls them."""
    if body.tool_use.allowed and formats.tools is None:
        raise InvalidRequestError(
            "tools: this server does not know how the model calls tools; it can be told with "
            "--tool-call-parser, or the model with --tool-template generic",
            param="tools",
        )


def output_of(body: ChatRequest, formats: OutputFormats, *, opens_thoughts: bool) -> Guide:
    """What a request that passed `check_tools` makes of its answers.

    `opens_thoughts`: the prompt ends within thoughts. Raises InvalidRequestError for tools and formats that
    can't be combined.
    """
    use = body.tool_use
    thoughts: Thoughts = "none"
    if formats.thinks:
        thoughts = "have begun" if opens_thoughts else "may come"
    guided = bool(use.allowed) and (use.is_guided or body.grammar is not None)
    grammar, field = body.grammar, body.format_field
    if guided:
        grammar, field = _with_calls(body, formats, use, thoughts), "tools"
    elif grammar is not None and thoughts != "none":
        grammar, thoughts = _behind_thoughts(grammar, formats, thoughts)
    rules = _rules(formats, use, thoughts, is_guided=guided)
    return Guide(grammar, field, rules, _places(body, use) if guided else {})


def check_guide(guide: Guide) -> None:
    """Raises InvalidRequestError for a grammar that can't be followed; names the tool that is at fault."""
    assert guide.grammar_field is not None
    try:
        check_now(guide.grammar, guide.grammar_field)
    except InvalidRequestError:
        if (index := _first_at_fault(guide.functions)) is not None:
            function = guide.functions[index]
            schema = Grammar(kind="json_schema", text=function.json_schema)
            check_now(schema, "tools", f"tools.{index}.function.parameters (of {quote(function.name)})")
        raise


def _first_at_fault(functions: Mapping[int, FunctionDefinition]) -> int | None:
    """The index of the first tool with which the schemas up to it can't be followed, or None.

    Found by halves: each check takes a process of its own, and there may be 128 tools.
    """
    schemas = [function.object_schema for function in functions.values()]

    def fails(last: int) -> bool:
        try:
            check_now(any_of(schemas[: last + 1]), "tools")
        except InvalidRequestError:
            return True
        return False

    found = bisect_left(range(len(schemas)), True, key=fails)
    return [*functions, None][found]


def _places(body: ChatRequest, use: ToolUse) -> dict[int, FunctionDefinition]:
    """The functions that may be called, by their index in the request's `tools`."""
    allowed = {function.name for function in use.allowed}
    return {i: tool.function for i, tool in enumerate(body.tools) if tool.function.name in allowed}


def check_now(grammar: Grammar | None, param: str, place: str | None = None) -> None:
    """Raises InvalidRequestError for a grammar that no engine could follow."""
    if grammar is None:
        return
    place = place or param
    try:
        check_grammar(grammar)
    except GrammarError as error:
        raise InvalidRequestError(f"{place}: {quote(str(error))}", param=param) from None
    except CheckUnavailableError as error:
        logger.warning("a grammar could not be checked: %s", error)
        raise UnavailableError(f"{place} could not be checked; try again", "check_unavailable") from error


def _signatures(functions: list[FunctionDefinition]) -> list[ToolSignature]:
    return [ToolSignature(function.name, function.object_schema) for function in functions]


def _with_calls(body: ChatRequest, formats: OutputFormats, use: ToolUse, thoughts: Thoughts) -> Grammar:
    shape = AnswerShape(
        thoughts=thoughts,
        answer=None if use.must_call else body.grammar,
        form=formats.tools,
        tools=_signatures(use.allowed),
        must_call=use.must_call,
        most_calls=use.most_calls or MOST_CALLS,
        special=formats.special,
    )
    try:
        return shape.to_grammar()
    except UncombinableError as error:
        field = body.format_field
        raise InvalidRequestError(f"{field} can't go with tools: {error}", param=field) from None
    except RecursionError:
        raise InvalidRequestError("tools: a schema is nested too deeply", param="tools") from None


def _behind_thoughts(
    grammar: Grammar, formats: OutputFormats, thoughts: Thoughts
) -> tuple[Grammar, Thoughts]:
    """The grammar with thoughts before it; where that can't be, the same one, and no thoughts."""
    try:
        return AnswerShape(thoughts, grammar, special=formats.special).to_grammar(), thoughts
    except UncombinableError:
        return grammar, "none"
    except RecursionError:
        raise InvalidRequestError("the schema is nested too deeply") from None


def _rules(formats: OutputFormats, use: ToolUse, thoughts: Thoughts, *, is_guided: bool) -> OutputRules:
    signatures = _signatures(use.allowed)

    def answer_parser() -> OutputParser:
        if not use.allowed:
            return PassThrough()
        assert formats.tools is not None
        return CallParser(formats.tools, signatures, is_certain=is_guided, most_calls=use.most_calls)

    def thought_parser() -> OutputParser:
        return ReasoningParser(answer_parser(), starts_inside=thoughts == "have begun")

    finds_thoughts = thoughts != "none"
    parser: Callable[[], OutputParser] = thought_parser if finds_thoughts else answer_parser
    tags: tuple[str, ...] = (reasoning.OPENING, reasoning.CLOSING) if finds_thoughts else ()
    if use.allowed:
        tags = (*tags, calls.OPENING, calls.CLOSING)
    ends_behind_calls = use.most_calls is not None and not is_guided
    return OutputRules(parser, tags, finds_thoughts, ends_behind_calls)
