"""An answer in the terminal: its text while it comes, and in the end what it took.

The text goes to standard output and all else to standard error, so that a pipe gets the text alone. What a
model writes can't move the cursor or ring the bell of a terminal.
"""

import os
import sys
import time
from collections.abc import Generator, Mapping
from typing import Any, TextIO

from cli.connection import AnswerError

# Controls that a terminal acts upon, but for the tab and the line feed.
CONTROLS = {
    code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if code not in (9, 10)
}
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


class Shown:
    """Writes the chunks of one answer and notes what they say of its cost."""

    def __init__(self, output: TextIO | None = None) -> None:
        self._output = sys.stdout if output is None else output
        self._is_terminal = self._output.isatty()
        self._began = time.perf_counter()
        self._first: float | None = None
        self._last = 0.0
        self._usage: Mapping[str, Any] = {}
        self._is_thinking = False
        self._is_in_line = False  # behind something that a line feed must end
        self.text = ""

    def show(self, chunks: Generator[dict[str, Any], None, None]) -> bool:
        """Writes all chunks; false if it was interrupted, by Ctrl-C or by what the server said."""
        try:
            for chunk in chunks:
                self._add(chunk)
        except KeyboardInterrupt:
            self._tell("stopped")
            return False
        except AnswerError as error:
            self._tell(f"error: {error}")
            return False
        except BrokenPipeError:  # as of `| head -1`: what is still in the buffer must go somewhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._output.fileno())
            return False
        finally:
            self._think(False)
            chunks.close()  # which ends the request
        self._tell(self.cost())
        return True

    def cost(self) -> str:
        """Tokens, passes per token where the server counts them, tokens/s and the time before the first."""
        num_tokens = self._usage.get("completion_tokens")
        if num_tokens is None or self._first is None:
            return "no tokens"
        parts = [f"{num_tokens} token{'s' * (num_tokens != 1)}"]
        details = self._usage.get("completion_tokens_details") or {}
        passes, seconds = details.get("decode_passes"), self._last - self._first
        if num_tokens > 1:
            if passes is not None:
                parts.append(f"{passes / (num_tokens - 1):.2f} passes per token")
            if seconds > 0:
                parts.append(f"{(num_tokens - 1) / seconds:.1f} tokens/s")
        return ", ".join([*parts, f"the first after {self._first - self._began:.2f} s"])

    def _add(self, chunk: Mapping[str, Any]) -> None:
        self._usage = chunk.get("usage") or self._usage
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
            thought = delta.get("reasoning_content") or ""
            text = choice.get("text") or delta.get("content") or ""
            if thought or text:
                self._last = time.perf_counter()
                self._first = self._last if self._first is None else self._first
            if thought and self._is_terminal:
                self._think(True)
                self._write(thought)
            if text:
                self._think(False)
                self.text += text
                self._write(text)

    def _think(self, thinks: bool) -> None:
        """Thoughts are shown on a terminal, dimmed; who reads a pipe wants the answer."""
        if thinks != self._is_thinking:
            self._is_thinking = thinks
            self._end_line()
            self._output.write(DIM if thinks else PLAIN)

    def _write(self, text: str) -> None:
        self._output.write(text.translate(CONTROLS) if self._is_terminal else text)
        self._output.flush()
        self._is_in_line = not text.endswith("\n")

    def _end_line(self) -> None:
        if self._is_in_line:
            self._write("\n")

    def _tell(self, text: str) -> None:
        self._end_line()
        print(f"({text})", file=sys.stderr, flush=True)
