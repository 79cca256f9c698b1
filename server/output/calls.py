"""Calls of tools within an answer, in whatever format a model writes them: what is a call, and what is text.

Invariants: text that comes to no call is content, to the letter; blanks around calls are not shown. Where a
grammar makes sure of the calls they are shown while they grow. Otherwise a call is shown when it is whole,
because until then it may turn out to be text.
"""

import json
import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, Protocol

from server.output.pieces import CallArguments, CallStart, ContentText, Piece
from server.output.tags import certain

OPENING, CLOSING = "<tool_call>", "</tool_call>"  # of all formats that are known here
State = Literal["open", "whole", "broken"]


@dataclass(frozen=True)
class ToolSignature:
    """A tool as parsers and grammars see it; `parameters` is a JSON schema of an object."""

    name: str
    parameters: Mapping[str, Any]
    strict: bool = False


class CallReader(Protocol):
    """Reads one call, from behind its opening tag on."""

    @property
    def name(self) -> str:
        """That of the tool; empty until it is certain."""

    @property
    def state(self) -> State:
        """Whether more text is needed; if not, whether this is a call."""

    @property
    def rest(self) -> str:
        """Unless the state is "open": the text behind the call, or from where on it is none."""

    def push(self, text: str) -> str:
        """Takes text; returns what is certain of the arguments' JSON and was not returned before.

        Not to be called once the state is other than "open".
        """

    def flush(self) -> str:
        """Returns the rest of the JSON when no more text will come: the closing tag may be missing."""


class ToolFormat(Protocol):
    """How a family of models writes calls between the tags."""

    def reader(self, tools: Sequence[ToolSignature], *, is_certain: bool) -> CallReader:
        """A reader for the next call; if `is_certain`, of one that follows the grammar `rule`."""

    def rule(self, tool: ToolSignature, name: str) -> list[str]:
        """Rules of a grammar, `name` first, for what stands between the tags of a call of `tool`.

        Names of further rules begin with `name`.
        """


class CallParser:
    """An `OutputParser` for answers without thoughts, in which tools may be called."""

    has_thoughts = False
    thoughts_end = 0

    def __init__(
        self,
        form: ToolFormat,
        tools: Sequence[ToolSignature],
        *,
        is_certain: bool = False,
        most_calls: int | None = None,
        new_id: Callable[[], str] | None = None,
    ) -> None:
        """`is_certain`: a grammar makes calls well-formed. After `most_calls` all is content."""
        self._form = form
        self._tools = tools
        self._is_certain = is_certain
        self._most_calls = math.inf if most_calls is None else most_calls
        self._new_id = new_id or new_call_id
        self.num_calls = 0
        self._held = ""  # blanks, and the beginning of a tag
        self._reader: CallReader | None = None
        self._raw: list[str] = []  # the text of the present call, from the blanks before it on
        self._has_started = False  # the present call was shown
        self._has_content = False

    def push(self, text: str) -> list[Piece]:
        """The pieces that are certain now that `text` has come."""
        pieces: list[Piece] = []
        while text:
            text = self._read_call(text, pieces) if self._reader else self._read_content(text, pieces)
        return pieces

    def flush(self) -> list[Piece]:
        """The rest, when no more text will come."""
        pieces: list[Piece] = []
        if self._reader is not None:
            self._show_call(self._reader, self._reader.flush(), pieces)
            if self._reader.state != "whole" and not self._has_started:
                self._add_content("".join(self._raw), pieces)
        held, self._held = self._held, ""
        if held.strip() or not self.num_calls:
            self._add_content(held, pieces)
        return pieces

    @property
    def is_done(self) -> bool:
        """Whether nothing that may follow is wanted: as many calls as may be have come."""
        return self.num_calls >= self._most_calls and self._reader is None

    def _read_content(self, text: str, pieces: list[Piece]) -> str:
        """Takes text outside of calls; returns what is not taken."""
        text, self._held = self._held + text, ""
        content, found, rest = (text, "", "") if self.is_done else text.partition(OPENING)
        if not found:
            shown_to = len(text.rstrip()) if self.is_done else certain(text, OPENING)
            self._held = text[shown_to:]
            self._add_content(text[:shown_to], pieces)
            return ""
        shown = content.rstrip()
        self._add_content(shown, pieces)
        self._raw = [content[len(shown) :], OPENING]
        self._reader = self._form.reader(self._tools, is_certain=self._is_certain)
        self._has_started = False
        return rest

    def _read_call(self, text: str, pieces: list[Piece]) -> str:
        """Takes text within a call; returns what is not taken."""
        reader = self._reader
        assert reader is not None
        self._raw.append(text)
        self._show_call(reader, reader.push(text), pieces)
        if reader.state == "open":
            return ""
        self._reader = None
        if reader.state == "broken" and not self._has_started:
            raw = "".join(self._raw)
            self._add_content(raw[: len(raw) - len(reader.rest)], pieces)
        return reader.rest

    def _show_call(self, reader: CallReader, arguments: str, pieces: list[Piece]) -> None:
        if reader.name and not self._has_started:
            self._has_started = True
            pieces.append(CallStart(self.num_calls, self._new_id(), reader.name))
            self.num_calls += 1
        if arguments:
            pieces.append(CallArguments(self.num_calls - 1, arguments))

    def _add_content(self, text: str, pieces: list[Piece]) -> None:
        if self.num_calls and not self._has_content:
            text = text.lstrip()
        if text:
            self._has_content = True
            pieces.append(ContentText(text))


def new_call_id() -> str:
    """The name of a call, unlike all others."""
    return f"call_{uuid.uuid4().hex[:24]}"


class WithheldReader:
    """A reader that shows nothing before its call is whole, around one that shows it as it grows."""

    def __init__(self, inner: CallReader) -> None:
        self._inner = inner
        self._arguments: list[str] = []
        self.name = ""

    @property
    def state(self) -> State:
        """What the inner reader says of the call."""
        return self._inner.state

    @property
    def rest(self) -> str:
        """The text behind the call, as the inner reader says."""
        return self._inner.rest

    def push(self, text: str) -> str:
        """All of the arguments, when the call is whole."""
        return self._shown(self._inner.push(text))

    def flush(self) -> str:
        """All of the arguments if the call is whole now that no more text will come."""
        return self._shown(self._inner.flush())

    def _shown(self, arguments: str) -> str:
        self._arguments.append(arguments)
        if self.state != "whole":
            return ""
        self.name = self._inner.name
        return "".join(self._arguments)


def read_json(text: str) -> Any:  # noqa: ANN401 - JSON
    """The value of a JSON text; raises ValueError for all else, such as NaN or endless nesting."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def write_json(value: object) -> str:
    """JSON that every client can read; raises ValueError for numbers beyond it."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can say
        return json.dumps(value, allow_nan=False)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return text


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
