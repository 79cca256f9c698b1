"""What `speed chat` does once it is asked for: reads what the user says, and shows what the model answers.

Ctrl-C stops an answer, and not the program. Without a terminal each line of standard input is a message, and
the exit status tells whether all were answered.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from cli.answers import Shown
from cli.asking import fields_of
from cli.connection import Connection, connected

with suppress(ImportError):  # line editing and a history, where Python has it
    import readline  # noqa: F401

PROMPT = "> "
HELP = "/clear forgets the conversation, /quit or Ctrl-D ends, Ctrl-C stops an answer"


def talk(args: argparse.Namespace) -> int:
    """Talks until the user has enough; 1 if a message was not answered. Raises UsageError."""
    with connected(args.model, args.url) as connection:
        if _is_terminal():
            print(f"{connection.model}. {HELP}.", file=sys.stderr)
        conversation = Conversation(connection, fields_of(args), args.system)
        answered = [conversation.say(line) for line in _lines(conversation)]
    return 0 if all(answered) or _is_terminal() else 1


def _is_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


class Conversation:
    """What was said so far. A message that was not answered at all is taken back."""

    def __init__(self, connection: Connection, fields: dict[str, Any], system: str | None) -> None:
        self._connection = connection
        self._fields = fields
        self._first = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self._first)

    def clear(self) -> None:
        """Forgets all but what the model was told at first."""
        self.messages = list(self._first)

    def say(self, text: str) -> bool:
        """Shows the answer to `text`; whether it came to its end."""
        messages = [*self.messages, {"role": "user", "content": text}]
        shown = Shown()
        body = {"messages": messages, **self._fields}
        try:
            finished = shown.show(self._connection.stream("/v1/chat/completions", body))
        except KeyboardInterrupt:  # a second one, while the first was being obeyed
            finished = False
        if finished or shown.text:
            self.messages = [*messages, {"role": "assistant", "content": shown.text}]
        return finished


def _lines(conversation: Conversation) -> Iterator[str]:
    """The user's messages; obeys the commands among them."""
    is_terminal = _is_terminal()
    while True:
        try:
            line = (input(PROMPT) if is_terminal else input()).strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print(f"\n({HELP})", file=sys.stderr)
            continue
        if line == "/quit":
            return
        if line == "/clear":
            conversation.clear()
        elif line.startswith("/") and line[1:].isalpha() and is_terminal:
            print(f"({HELP})", file=sys.stderr)
        elif line:
            yield line
