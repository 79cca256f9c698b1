"""In which format a model writes thoughts and calls: what the options say, or what its template shows."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from server.output import calls, reasoning
from server.output.calls import ToolFormat
from server.output.hermes import Hermes
from server.output.qwen3_coder import Qwen3Coder

FORMATS: dict[str, ToolFormat] = {"hermes": Hermes(), "qwen3_coder": Qwen3Coder()}


@dataclass(frozen=True)
class OutputFormats:
    """What one model's answers are searched for.

    `tools` is None where the format of calls isn't known. `special` are the tags that are special tokens.
    """

    thinks: bool = False
    tools: ToolFormat | None = None
    special: frozenset[str] = frozenset()


PLAIN = OutputFormats()


def output_formats(
    reasoning_parser: Literal["auto", "none", "think"],
    tool_call_parser: Literal["auto", "none", "hermes", "qwen3_coder"],
    *,
    template: str,
    describes_tools: bool,
    added_tokens: Collection[str],
    special_tokens: Collection[str],
) -> OutputFormats:
    """The formats of a model with such a chat template and such tokens.

    `describes_tools`: the model is told in general words how to call them, and that is as in `hermes`.
    """
    thinks = reasoning.CLOSING in template or reasoning.CLOSING in added_tokens
    if reasoning_parser != "auto":
        thinks = reasoning_parser == "think"
    name = tool_call_parser
    if name == "auto":
        name = "hermes" if describes_tools else _format_in(template)
    tags = (reasoning.OPENING, reasoning.CLOSING, calls.OPENING, calls.CLOSING)
    return OutputFormats(thinks, FORMATS.get(name), frozenset(tag for tag in tags if tag in special_tokens))


def _format_in(template: str) -> Literal["none", "hermes", "qwen3_coder"]:
    """The format that a template shows to its model."""
    if calls.OPENING not in template:
        return "none"
    return "qwen3_coder" if "<function=" in template else "hermes"
