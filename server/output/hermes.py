"""Calls as Hermes and Qwen write them: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""

import json
import re
from collections.abc import Sequence

from model.grammar.schemas import embedded_schema
from server.output.calls import (
    CLOSING,
    CallReader,
    State,
    ToolSignature,
    read_json,
    write_json,
)
from server.output.tags import begun

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"((?:[^"\\]|\\.)*)"\s*,\s*"arguments"\s*:\s*(?=\{)')
_MARKS = re.compile(r'[\\"{}\[\]]')


class Hermes:
    """The format."""

    def reader(self, tools: Sequence[ToolSignature], *, is_certain: bool) -> CallReader:  # noqa: ARG002
        """A reader of JSON: of the form that the grammar has, or of any."""
        return GrowingJsonReader() if is_certain else WholeJsonReader()

    def rule(self, tool: ToolSignature, name: str) -> list[str]:
        """Name and arguments, in this order."""
        head = f'\n{{"name": {json.dumps(tool.name)}, "arguments": '
        return [
            f"{name}: {json.dumps(head)} {name}_arguments {json.dumps('}' + chr(10))}",
            f"{name}_arguments: %json {embedded_schema(tool.parameters)}",
        ]


class JsonScanner:
    """How deep in a JSON text one is, and whether within a string. Judges nothing else."""

    def __init__(self) -> None:
        self.depth = 0
        self.in_string = False
        self._is_escaped = False  # a backslash was the last character

    def push(self, text: str) -> int | None:
        """Takes text up to the end of the value, an object or a list; where in `text` that is, if it came."""
        skipped = 1 if self._is_escaped else 0
        if text:
            self._is_escaped = False
        for match in _MARKS.finditer(text, skipped):
            mark, end = match[0], match.end()
            if match.start() < skipped:
                continue
            if self.in_string:
                if mark == "\\":
                    skipped = end + 1
                    self._is_escaped = end == len(text)
                self.in_string = mark != '"'
            elif mark == '"':
                self.in_string = True
            else:
                self.depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(mark, 0)
                if self.depth <= 0:
                    return end
        return None


class WholeJsonReader:
    """Waits for the closing tag and reads what stands before it, in any order and layout."""

    def __init__(self) -> None:
        self.name = ""
        self.state: State = "open"
        self.rest = ""
        self._body = ""
        self._scanner = JsonScanner()
        self._num_scanned = 0
        self._has_begun = False

    def push(self, text: str) -> str:
        """All of the arguments, when the call is whole."""
        start = max(self._num_scanned, len(self._body) - len(CLOSING) + 1)
        self._body += text
        if not self._has_begun and not self._begin():
            return ""
        while (end := self._body.find(CLOSING, start)) >= 0:
            self._scanner.push(self._body[self._num_scanned : end])
            self._num_scanned = start = end
            if not self._scanner.in_string:
                self.rest = self._body[end + len(CLOSING) :]
                return self._read(self._body[:end])
            start += 1
        return ""

    def _begin(self) -> bool:
        """Whether the text has begun as an object does."""
        begin = self._body.lstrip()
        self._has_begun = begin.startswith("{")
        if begin and not self._has_begun:
            self.state, self.rest = "broken", begin
        return self._has_begun

    def flush(self) -> str:
        """Returns the rest of the arguments when no more text will come: some models omit the closing tag."""
        return self._read(self._body[: len(self._body) - begun(self._body, CLOSING)])

    def _read(self, body: str) -> str:
        self.state = "broken"
        try:
            call = read_json(body)
            name, arguments = _parts(call)
            shown = write_json(arguments)
            name.encode()
        except ValueError:  # UnicodeEncodeError is one
            return ""
        self.name, self.state = name, "whole"
        return shown


def _parts(call: object) -> tuple[str, dict[str, object]]:
    """Name and arguments; raises ValueError where they are missing."""
    if not isinstance(call, dict):
        raise ValueError("no object")
    name, arguments = call.get("name"), call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = read_json(arguments)
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise ValueError("no name or no arguments")
    return name, arguments


class GrowingJsonReader:
    """Shows a call while it grows, because a grammar makes it so: the name first, then the arguments."""

    def __init__(self) -> None:
        self.name = ""
        self.state: State = "open"
        self.rest = ""
        self._held = ""
        self._scanner = JsonScanner()
        self._has_ended = False  # the arguments are whole

    def push(self, text: str) -> str:
        """The next part of the arguments."""
        text, self._held = self._held + text, ""
        if not self.name:
            head = _HEAD.match(text)
            if head is None:
                self._held = text
                return ""
            self.name, text = json.loads(f'"{head[1]}"'), text[head.end() :]
        shown = ""
        if not self._has_ended:
            end = self._scanner.push(text)
            if end is None:
                return text
            shown, text, self._has_ended = text[:end], text[end:], True
        _, found, rest = text.partition(CLOSING)
        if found:
            self.state, self.rest = "whole", rest
        else:
            self._held = text
        return shown

    def flush(self) -> str:
        """Nothing: whatever is certain was shown."""
        return ""
