"""Calls as Qwen3-Coder and Nanbeige write them: a tag for the function and one for each parameter.

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>

A parameter that the tool's schema calls a string is written as it is, every other one as JSON.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from model.grammar.schemas import embedded_schema
from server.output.calls import (
    CLOSING,
    CallReader,
    State,
    ToolSignature,
    WithheldReader,
    read_json,
    write_json,
)
from server.output.hermes import GrowingJsonReader, Hermes, JsonScanner, WholeJsonReader

_FUNCTION = re.compile(r"\s*<function=([^<>\n]+)>")
_PARAMETER = re.compile(r"\s*<parameter=([^<>\n]+)>")
_VALUE_END = "</parameter>"
_END = re.compile(rf"\s*</function>\s*{CLOSING}")
_KEY = re.compile(r"[^<>\n\s][^<>\n]*")
# Of a schema whose values can be written as they are, these keywords say nothing more about them.
_PLAIN_KEYWORDS = {"type", "title", "description", "default", "examples", "enum", "const"}
# Of the schema of all parameters these are followed by the rules; others need one grammar for all of it.
_FOLLOWED = {"type", "properties", "required", "additionalProperties", "$defs", "definitions"}
_FOLLOWED |= {"title", "description", "default", "examples", "$schema", "$id"}
_WORDS = {"true": "true", "false": "false", "none": "null", "null": "null"}  # as Python writes them too


class Qwen3Coder:
    """The format. Tools whose parameters can't be written one by one are called as in `hermes`."""

    def reader(self, tools: Sequence[ToolSignature], *, is_certain: bool) -> CallReader:
        """A reader of tags, or of JSON if the call turns out to be written so."""
        if is_certain:
            return TagReader(tools, GrowingJsonReader(), is_certain=True)
        return WithheldReader(TagReader(tools, WholeJsonReader(), is_certain=False))

    def rule(self, tool: ToolSignature, name: str) -> list[str]:
        """All required parameters and any of the others, in the order of the schema."""
        if not _can_be_followed(tool):
            return Hermes().rule(tool, name)
        properties = tool.parameters.get("properties", {})
        required = set(tool.parameters.get("required", []))
        parts, rules = [json.dumps(f"\n<function={tool.name}>\n")], []
        for number, (key, schema) in enumerate(properties.items()):
            part = f"{name}_{number}"
            parts.append(part if key in required else f"{part}?")
            rules += _parameter_rules(part, key, schema, tool.parameters)
        parts.append(json.dumps("</function>\n"))
        return [f"{name}: {' '.join(parts)}", *rules]


def _parameter_rules(name: str, key: str, schema: object, root: Mapping[str, Any]) -> list[str]:
    opening, closing = json.dumps(f"<parameter={key}>\n"), json.dumps(f"\n{_VALUE_END}\n")
    if not _is_plain_text(schema):
        defined = {word: root[word] for word in ("$defs", "definitions") if word in root}
        whole = {**schema, **defined} if isinstance(schema, Mapping) else schema
        return [f"{name}: {opening} {name}_value {closing}", f"{name}_value: %json {embedded_schema(whole)}"]
    choices = _choices(schema)
    if choices is not None:
        value = " | ".join(json.dumps(choice) for choice in choices)
        return [f"{name}: {opening} ({value}) {closing}"]
    end = _VALUE_END.replace("/", r"\/")
    return [f"{name}: {opening} {name}_value", rf"{name}_value[lazy]: /(?s:.*)\n{end}\n/"]


def _is_plain_text(schema: object) -> bool:
    """Whether the values are texts that stand as they are, since nothing but a list limits them."""
    if not isinstance(schema, Mapping) or not schema.keys() <= _PLAIN_KEYWORDS:
        return False
    choices = _choices(schema)
    if choices is not None:
        return schema.get("type", "string") == "string" and bool(choices) and all(map(_can_stand, choices))
    return schema.get("type") == "string"


def _choices(schema: Any) -> list[Any] | None:  # noqa: ANN401 - JSON
    """The only values that a schema allows, if it lists them."""
    if "const" in schema:
        return [schema["const"]]
    return schema["enum"] if isinstance(schema.get("enum"), list) else None


def _can_stand(choice: object) -> bool:
    """Whether a value can be written as it is, and is read as what it was."""
    return isinstance(choice, str) and choice == choice.strip("\n") and _VALUE_END not in choice


def _can_be_followed(tool: ToolSignature) -> bool:
    """Whether parameters that are right one by one are right together."""
    schema = tool.parameters
    properties = schema.get("properties", {})
    if not schema.keys() <= _FOLLOWED or not isinstance(properties, Mapping):
        return False
    names = [*properties, tool.name]
    return set(schema.get("required", [])) <= properties.keys() and all(map(_KEY.fullmatch, names))


class TagReader:
    """Shows a call parameter by parameter; what begins as JSON is left to the reader `of_json`."""

    def __init__(self, tools: Sequence[ToolSignature], of_json: CallReader, *, is_certain: bool) -> None:
        self._is_certain = is_certain
        self.name = ""
        self.state: State = "open"
        self.rest = ""
        self._tools = {tool.name: tool for tool in tools}
        self._of_json = of_json
        self._is_json = False
        self._held = ""
        self._key: str | None = None  # of the parameter whose value comes
        self._num_parameters = 0

    def push(self, text: str) -> str:
        """The parameters that are whole now."""
        text, self._held = self._held + text, ""
        if self._is_json or (not self.name and text.lstrip().startswith("{")):
            self._is_json = True
            return self._json(self._of_json.push(text))
        shown = ""
        while self.state == "open" and (step := self._step(text)) is not None:
            part, text = step
            shown += part
        if self.state == "broken":
            self.rest = text
        elif self.state == "open":
            self._held = text
        return shown

    def flush(self) -> str:
        """Returns the rest of the arguments' JSON when no more text will come."""
        return self._json(self._of_json.flush()) if self._is_json else ""

    def _json(self, arguments: str) -> str:
        reader = self._of_json
        self.name, self.state, self.rest = reader.name, reader.state, reader.rest
        return arguments

    def _step(self, text: str) -> tuple[str, str] | None:
        """The next part of the arguments and the text behind it; None if more text is needed for one."""
        if not self.name:
            return self._begin(text)
        if self._key is not None:
            return self._value(text)
        parameter = _PARAMETER.match(text)
        if parameter is not None:
            self._key = parameter[1].strip()
            return "", text[parameter.end() :]
        end = _END.match(text)
        if end is not None:
            self.state, self.rest = "whole", text[end.end() :]
            return ("}" if self._num_parameters else "{}"), ""
        if not any(_may_become(text, tag) for tag in ("<parameter=", f"</function>{CLOSING}")):
            self.state = "broken"
        return None

    def _begin(self, text: str) -> tuple[str, str] | None:
        function = _FUNCTION.match(text)
        if function is None:
            if not _may_become(text, "<function="):
                self.state = "broken"
            return None
        self.name = function[1].strip()
        return "", text[function.end() :]

    def _value(self, text: str) -> tuple[str, str] | None:
        assert self._key is not None
        is_json = self._is_certain and not self._is_plain(self._key)
        end = _end_behind_json(text) if is_json else text.find(_VALUE_END)
        if end < 0:
            return None
        value, rest = text[:end], text[end + len(_VALUE_END) :]
        value = value.removeprefix("\n").removesuffix("\n")
        shown = f"{write_json(self._key)}: {self._typed(value, is_plain=self._is_plain(self._key))}"
        self._key = None
        self._num_parameters += 1
        return ("{" if self._num_parameters == 1 else ", ") + shown, rest

    def _is_plain(self, key: str) -> bool:
        """Whether the values of a parameter are texts; those of one that is not declared are."""
        tool = self._tools.get(self.name)
        properties = {} if tool is None else tool.parameters.get("properties", {})
        return key not in properties or _is_plain_text(properties[key])

    def _typed(self, value: str, *, is_plain: bool) -> str:
        """The JSON of a value."""
        if is_plain:
            return write_json(value)
        try:
            return write_json(read_json(_WORDS.get(value.strip().lower(), value)))
        except ValueError:
            return write_json(value)


def _end_behind_json(text: str) -> int:
    """Where the first closing tag stands that is not part of a JSON string; -1 if nowhere."""
    scanner, scanned = JsonScanner(), 0
    end = text.find(_VALUE_END)
    while end >= 0:
        scanner.push(text[scanned:end])
        if not scanner.in_string:
            return end
        scanned, end = end, text.find(_VALUE_END, end + 1)
    return -1


def _may_become(text: str, tag: str) -> bool:
    """Whether `text`, without blanks, is a beginning of `tag`, or goes on behind one that ends with "="."""
    text = "".join(text.split())
    return tag.startswith(text) or (tag.endswith("=") and text.startswith(tag) and ">" not in text)
