"""The pieces that a model's text is made of, and the interface of whatever finds them.

Invariants of every `OutputParser`: pieces depend on the text alone, not on how it is cut into pushes, once
neighbours of one kind are joined (`join_pieces`); a call begins with its `CallStart`, calls are numbered
from 0 in their order, and the arguments of one are never continued after another has begun; nothing raises.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ContentText:
    """A part of the answer itself."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningText:
    """A part of the model's thoughts, without their tags."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call of a tool begins. `index` counts the calls of one answer; `call_id` names it to clients."""

    index: int
    call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A part of the arguments of the call `index`; all of them joined are the text of a JSON object."""

    index: int
    text: str


Piece = ContentText | ReasoningText | CallStart | CallArguments


class OutputParser(Protocol):
    """Takes one answer apart while it grows. Stateful: one for each choice."""

    @property
    def has_thoughts(self) -> bool:
        """Whether the text, as far as it is known, begins with thoughts."""

    @property
    def thoughts_end(self) -> int | None:
        """Characters of the text, counted from its beginning, that are thoughts and their tags.

        0 where there are none. None as long as all that came is thoughts, or may turn out to be.
        """

    @property
    def is_done(self) -> bool:
        """Whether nothing that may follow is wanted: as many calls as may be have come."""

    def push(self, text: str) -> list[Piece]:
        """The pieces that are certain now that `text` has come; may be none."""

    def flush(self) -> list[Piece]:
        """The rest, when no more text will come. Call once, at the end."""


class PassThrough:
    """The parser of a text that is all answer."""

    has_thoughts = False
    thoughts_end = 0
    is_done = False

    def push(self, text: str) -> list[Piece]:
        """The text itself."""
        return [ContentText(text)] if text else []

    def flush(self) -> list[Piece]:
        """Nothing: no text is held back."""
        return []


@dataclass
class ToolCall:
    """A call as an answer shows it. `arguments` is the text of a JSON object, unless the text was cut off."""

    call_id: str
    name: str
    arguments: str = ""


@dataclass
class ParsedMessage:
    """What all pieces of an answer come to."""

    content: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)


def parsed_message(pieces: Iterable[Piece]) -> ParsedMessage:
    """The message that `pieces`, all those of one answer, are parts of."""
    content, reasoning, calls = [], [], []
    arguments: list[list[str]] = []
    for piece in pieces:
        if isinstance(piece, ContentText):
            content.append(piece.text)
        elif isinstance(piece, ReasoningText):
            reasoning.append(piece.text)
        elif isinstance(piece, CallStart):
            calls.append(ToolCall(piece.call_id, piece.name))
            arguments.append([])
        else:
            arguments[piece.index].append(piece.text)
    for call, parts in zip(calls, arguments, strict=True):
        call.arguments = "".join(parts)
    return ParsedMessage("".join(content), "".join(reasoning), calls)


def join_pieces(pieces: Sequence[Piece]) -> list[Piece]:
    """Joins neighbours of one kind into one piece each."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if isinstance(piece, CallStart) or last is None or _kind(piece) != _kind(last):
            joined.append(piece)
        else:
            assert not isinstance(last, CallStart)
            joined[-1] = replace(last, text=last.text + piece.text)
    return joined


def _kind(piece: Piece) -> tuple[type, int]:
    """What two neighbours share if they can be one piece."""
    return type(piece), piece.index if isinstance(piece, CallArguments) else 0
