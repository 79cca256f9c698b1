"""Thoughts at the beginning of an answer, `<think>`...`</think>`, as many models write them.

Blanks around thoughts are not shown: models put line breaks between tags and texts. A tag that comes later
is text, since an answer may speak of tags.
"""

from server.output.pieces import OutputParser, Piece, ReasoningText
from server.output.tags import certain

OPENING, CLOSING = "<think>", "</think>"


class ReasoningParser:
    """Splits thoughts off; what follows is for the parser `rest`.

    `starts_inside`: the prompt has opened the thoughts already, so that only their end can come.
    """

    def __init__(self, rest: OutputParser, *, starts_inside: bool = False) -> None:
        self._rest = rest
        self._held = ""
        self._num_characters = 0  # of all text
        self._has_begun = False  # whether it is known what the text begins with
        self._is_blank = True  # nothing of the present part was shown
        self.has_thoughts = starts_inside
        self.thoughts_end: int | None = None

    @property
    def is_done(self) -> bool:
        """Whether nothing that may follow is wanted."""
        return self._rest.is_done

    def push(self, text: str) -> list[Piece]:
        """The pieces that are certain now that `text` has come."""
        self._num_characters += len(text)
        text, self._held = self._held + text, ""
        if not self._has_begun:
            return self._begin(text)
        return self._think(text) if self.thoughts_end is None else self._answer(text)

    def flush(self) -> list[Piece]:
        """The rest, when no more text will come."""
        held, self._held = self._held, ""
        if self.has_thoughts and self.thoughts_end is None:
            return [*self._thought(held.rstrip()), *self._rest.flush()]
        if self.thoughts_end is None:
            self.thoughts_end = 0
        return [*self._rest.push(held), *self._rest.flush()]

    def _begin(self, text: str) -> list[Piece]:
        """The first text: a tag, or none. A model may repeat the tag that its prompt ends with."""
        begin = text.lstrip()
        if OPENING.startswith(begin) and begin != OPENING:
            self._held = text
            return []
        self._has_begun = True
        if begin.startswith(OPENING):
            self.has_thoughts = True
            return self._think(begin[len(OPENING) :])
        if self.has_thoughts:
            return self._think(text)
        self.thoughts_end = 0
        return self._rest.push(text)

    def _think(self, text: str) -> list[Piece]:
        """Text within the thoughts, perhaps with their end."""
        thought, found, answer = text.partition(CLOSING)
        if not found:
            shown_to = certain(text, CLOSING)
            self._held = text[shown_to:]
            return self._thought(text[:shown_to])
        self.thoughts_end = self._num_characters - len(answer)
        pieces = self._thought(thought.rstrip())
        self._is_blank = True
        return [*pieces, *self._answer(answer)]

    def _thought(self, text: str) -> list[Piece]:
        shown = self._without_first_blanks(text)
        return [ReasoningText(shown)] if shown else []

    def _answer(self, text: str) -> list[Piece]:
        """Text behind the thoughts, if there were any."""
        return self._rest.push(self._without_first_blanks(text) if self.has_thoughts else text)

    def _without_first_blanks(self, text: str) -> str:
        """The text without the blanks that the present part begins with."""
        text = text.lstrip() if self._is_blank else text
        self._is_blank = self._is_blank and not text
        return text
