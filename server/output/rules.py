"""How the answers of one request are taken apart: what a plan carries from the prompt to the parsers."""

from collections.abc import Callable
from dataclasses import dataclass

from server.output.calls import CLOSING
from server.output.pieces import OutputParser, PassThrough
from server.text import Checker, StopMatch


@dataclass(frozen=True)
class OutputRules:
    """Rules of one request.

    `parser` makes a new parser for each choice; `tags` it must see even where they are special tokens.
    """

    parser: Callable[[], OutputParser] = PassThrough
    tags: tuple[str, ...] = ()
    finds_thoughts: bool = False
    ends_behind_calls: bool = False  # when the parser is done, for want of a grammar that ends the text


PLAIN_TEXT = OutputRules()


class CallEnd:
    """A stop checker that ends a text behind the last call that is wanted as well. Called token by token."""

    def __init__(self, checker: Checker, watch: OutputParser) -> None:
        self._checker = checker
        self._watch = watch

    def push(self, text: str) -> StopMatch:
        """Adds text; after a match nothing more may be pushed."""
        match = self._checker.push(text)
        for end, character in enumerate(match.text, 1):
            self._watch.push(character)
            if self._watch.is_done:
                return StopMatch(match.text[:end], CLOSING)
        return match

    def flush(self) -> str:
        """What is held back: no stop string after all. Call once, at the end."""
        return self._checker.flush()
