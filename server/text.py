"""From token ids to text, one token at a time: pure state machines without tokenizer, engine or clock.

Invariants: the deltas of a sequence joined are its text; no delta holds a U+FFFD that a later token
would have turned into a character; no delta holds a beginning of a stop string that may still match; a
token is reported with the delta that shows the last of its text, never before.

`tokenizers.decoders.DecodeStream` is not used: it cannot be flushed at the end, raises when bytes
before an error were already shown ("Invalid prefix"), and decodes an endless run of incomplete bytes
anew at every token (8000 tokens of 0xC3: 4 seconds).
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# So many tokens without a complete character at their end are garbage, not a character to wait for.
MAX_HELD_TOKENS = 32


class Detokenizer:
    """Text of a growing list of token ids, each id given once.

    Keeps the ids since the last complete character, after a few already shown ones as context: a
    SentencePiece decoder drops the leading space of whatever it decodes first.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._num_held = 0  # ids at the end of the window whose text has not been returned
        self._num_shown = 0  # characters of the window's text that are not news
        text = decode(context)
        if not text.endswith(REPLACEMENT):
            self._window, self._num_shown = list(context), len(text)

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        self._window.append(token_id)
        self._num_held += 1
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT) and self._num_held < MAX_HELD_TOKENS:
            return ""
        return self._take(text)

    @property
    def is_waiting(self) -> bool:
        """Whether the last token left a character incomplete."""
        return self._num_held > 0

    def flush(self) -> str:
        """What is still held back, incomplete characters as U+FFFD. Call once, at the end."""
        return self._decode(self._window)[self._num_shown :]

    def _take(self, text: str) -> str:
        delta = text[self._num_shown :]
        if delta:
            self._window = self._window[-self._num_held :]
            self._num_shown = len(self._decode(self._window))
        else:  # invisible tokens: useless as context, and there may be thousands of them
            del self._window[-self._num_held :]
        self._num_held = 0
        return delta


class StopPattern:
    """A stop string, prepared for matching character by character (Knuth, Morris, Pratt 1977)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._borders = [0]  # [i]: length of the longest proper border of text[:i + 1]
        for character in text[1:]:
            self._borders.append(self._extend(self._borders[-1], character))

    def _extend(self, matched: int, character: str) -> int:
        while matched and self.text[matched] != character:
            matched = self._borders[matched - 1]
        return matched + (self.text[matched] == character)

    def advance(self, matched: int, character: str) -> int:
        """How many characters of the stop string end the text after `character`; `matched` before it."""
        return self._extend(matched, character)


class StopMatch(NamedTuple):
    """Text that may be shown, and the stop string that ended it, if one did."""

    text: str
    stop: str | None


class StopChecker:
    """Cuts a text at the first stop string to be complete in it; at a tie at the longest.

    Which string wins doesn't depend on how the text is cut into deltas. Held back is exactly the
    longest end of the text that begins a stop string.
    """

    def __init__(self, patterns: Sequence[StopPattern], *, include_stop: bool) -> None:
        self._patterns = patterns
        self._include_stop = include_stop
        self._matched = [0] * len(patterns)
        self._held = ""

    def push(self, text: str) -> StopMatch:
        """Adds text; after a match nothing more may be pushed."""
        if not self._patterns:
            return StopMatch(text, None)
        buffer = self._held + text
        for end, character in enumerate(text, len(self._held) + 1):
            stop = self._advance(character)
            if stop is not None:
                self._held = ""
                return StopMatch(buffer[: end if self._include_stop else end - len(stop)], stop)
        num_safe = len(buffer) - max(self._matched, default=0)
        self._held = buffer[num_safe:]
        return StopMatch(buffer[:num_safe], None)

    def flush(self) -> str:
        """What is held back: no stop string after all. Call once, at the end."""
        return self._held

    def _advance(self, character: str) -> str | None:
        complete = []
        for i, pattern in enumerate(self._patterns):
            self._matched[i] = pattern.advance(self._matched[i], character)
            if self._matched[i] == len(pattern.text):
                complete.append(pattern.text)
        return max(complete, key=len, default=None)


class Checker(Protocol):
    """What may end a text: a StopChecker, or something around one."""

    def push(self, text: str) -> StopMatch:
        """Adds text; after a match nothing more may be pushed."""

    def flush(self) -> str:
        """What is held back. Call once, at the end."""


class TextDelta(NamedTuple):
    """What tokens add to a completion.

    `starts` are the tokens whose text is out with this delta, in order, each by the character of the
    completion at which it begins; earlier deltas may have left some of them waiting. `num_tokens` says
    how many of the pushed tokens belong to the completion; `stop` is the stop string that ended it.
    """

    text: str
    starts: list[int]
    num_tokens: int
    stop: str | None = None


class TokenBorders:
    """Where tokens begin in a text, and which of them have been shown.

    A token is out once every character that it has a part in is: one whose character is incomplete, or
    whose text may be the beginning of a stop string, waits.
    """

    def __init__(self) -> None:
        self.length = 0  # characters of the text so far
        self._whole: deque[tuple[int, int]] = deque()  # begin and end of tokens that are not out
        self._partial: list[int] = []  # begins of the tokens since the last complete character

    def add(self, num_characters: int, *, whole: bool) -> None:
        """One more token, which completes so many characters; `whole`: none of its bytes is left over."""
        self._partial.append(self.length)
        self.length += num_characters
        if whole:
            self._whole.extend((start, self.length) for start in self._partial)
            self._partial.clear()

    def take(self, num_shown: int) -> list[int]:
        """Begins of the tokens that are out now that so many characters of the text are."""
        starts = []
        while self._whole and self._whole[0][1] <= num_shown:
            starts.append(self._whole.popleft()[0])
        return starts

    def take_all(self) -> list[int]:
        """Begins of all tokens that were not out."""
        starts = [*(start for start, _ in self._whole), *self._partial]
        self._whole.clear()
        self._partial.clear()
        return starts


class CompletionText:
    """The text of one completion: detokenisation, then stop strings from token `min_tokens` on."""

    def __init__(self, detokenizer: Detokenizer, checker: Checker, min_tokens: int) -> None:
        self._detokenizer = detokenizer
        self._checker = checker
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._num_shown = 0
        self._borders = TokenBorders()

    @property
    def length(self) -> int:
        """Characters of the text so far, those that are held back included."""
        return self._borders.length

    def push(self, token_ids: Sequence[int]) -> TextDelta:
        """Adds tokens; those after the one that completes a stop string don't count."""
        texts = []
        for num_tokens, token_id in enumerate(token_ids, 1):
            text, stop = self._push(token_id)
            texts.append(text)
            if stop is not None:
                return TextDelta("".join(texts), self._borders.take_all(), num_tokens, stop)
        return TextDelta("".join(texts), self._borders.take(self._num_shown), len(token_ids))

    def flush(self) -> TextDelta:
        """The rest of a completion that no stop string ended. Call once, at the end."""
        match = self._checker.push(self._detokenizer.flush())
        text = match.text if match.stop is not None else match.text + self._checker.flush()
        return TextDelta(text, self._borders.take_all(), 0, match.stop)

    def _push(self, token_id: int) -> StopMatch:
        text = self._detokenizer.push(token_id)
        self._borders.add(len(text), whole=not self._detokenizer.is_waiting)
        self._num_tokens += 1
        match = StopMatch(text, None) if self._num_tokens < self._min_tokens else self._checker.push(text)
        self._num_shown += len(match.text)
        return match


def token_starts(decode: Callable[[Sequence[int]], str], token_ids: Sequence[int]) -> list[int]:
    """The character of the decoded text at which each token begins."""
    detokenizer, starts, length = Detokenizer(decode), [], 0
    for token_id in token_ids:
        starts.append(length)
        length += len(detokenizer.push(token_id))
    return starts
