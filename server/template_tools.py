"""Tools in chat templates: what a template does with them, and a general text for those that do nothing.

Whether a template has a place for tools, for calls in the history and for their arguments is decided by its
syntax tree. The general text asks for calls in the format of `server.output.hermes`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jinja2 import Environment, meta, nodes

from server.output.calls import CLOSING, OPENING

Message = Mapping[str, Any]
_RESULT_OPENING, _RESULT_CLOSING = "<tool_response>", "</tool_response>"


class ToolPlaces(NamedTuple):
    """What a template has a place for. `arguments_as_text`: it writes those of calls as they are."""

    tools: bool
    calls: bool
    arguments_as_text: bool


def tool_places(environment: Environment, source: str) -> ToolPlaces:
    """What the template `source`, which must be valid, does with tools."""
    tree = environment.parse(source)
    return ToolPlaces(
        tools="tools" in meta.find_undeclared_variables(tree),
        calls=any(_names(node, "tool_calls") for node in tree.find_all((nodes.Getattr, nodes.Getitem))),
        arguments_as_text=_writes_arguments(tree),
    )


def _names(node: nodes.Node, name: str) -> bool:
    """Whether an expression is `owner.name` or `owner['name']`."""
    if isinstance(node, nodes.Getattr):
        return node.attr == name
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        return bool(node.arg.value == name)
    return False


def _writes_arguments(tree: nodes.Template) -> bool:
    """Whether arguments are written or joined to texts as they are, and never made a text of."""
    asks = any(test.name == "string" and _names(test.node, "arguments") for test in tree.find_all(nodes.Test))
    filtered = any(
        part.node is not None and _names(part.node, "arguments") for part in tree.find_all(nodes.Filter)
    )
    if asks or filtered:
        return False
    joined = [operand for node in tree.find_all((nodes.Add, nodes.Concat)) for operand in _operands(node)]
    shown = [part for output in tree.find_all(nodes.Output) for part in output.nodes]
    return any(_names(part, "arguments") for part in [*joined, *shown])


def _operands(node: nodes.Node) -> list[nodes.Node]:
    if isinstance(node, nodes.Concat):
        return [*node.nodes]
    assert isinstance(node, nodes.Add)
    return [node.left, node.right]


def with_text_arguments(message: Message) -> Message:
    """The message with the arguments of its calls as JSON texts."""
    if not message.get("tool_calls"):
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": _json(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def in_general_words(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The conversation for a template without tools: they are described, calls and results are texts."""
    told = [_without_calls(message) for message in _joined_results(messages)]
    if not tools:
        return told
    description = _description(tools)
    if told and told[0]["role"] in ("system", "developer"):
        content = told[0]["content"]
        parts = [content] if isinstance(content, str) else content
        whole = "\n\n".join([*parts, description])
        return [{**told[0], "content": whole}, *told[1:]]
    return [{"role": "system", "content": description}, *told]


def _description(tools: Sequence[Mapping[str, Any]]) -> str:
    lines = "\n".join(_json(tool["function"]) for tool in tools)
    example = f'{OPENING}\n{{"name": "NAME", "arguments": {{"PARAMETER": "VALUE"}}}}\n{CLOSING}'
    return (
        "You can call these functions. Each line describes one as JSON, its parameters by a JSON schema:\n"
        f"<tools>\n{lines}\n</tools>\n\n"
        "To call a function, write its name and its arguments as JSON between these tags, for several calls "
        f"one after the other:\n{example}\n"
        f"The results come back between {_RESULT_OPENING} and {_RESULT_CLOSING}. "
        "If no function is needed, answer in words."
    )


def _without_calls(message: Message) -> Message:
    calls = message.get("tool_calls")
    if not calls:
        return message
    content = message["content"]
    texts = [part for part in ([content] if isinstance(content, str) else content) if part]
    texts += [f"{OPENING}\n{_call(call['function'])}\n{CLOSING}" for call in calls]
    kept = {name: value for name, value in message.items() if name != "tool_calls"}
    return {**kept, "content": "\n".join(texts)}


def _call(function: Mapping[str, Any]) -> str:
    return _json({"name": function["name"], "arguments": function["arguments"]})


def _joined_results(messages: Sequence[Message]) -> list[Message]:
    """Results of tools as what a user says, those of one turn in one message."""
    told: list[Message] = []
    was_result = False
    for message in messages:
        is_result = message["role"] == "tool"
        if not is_result:
            told.append(message)
        else:
            content = message["content"]
            text = content if isinstance(content, str) else "\n".join(content)
            shown = f"{_RESULT_OPENING}\n{text}\n{_RESULT_CLOSING}"
            if was_result:
                told[-1] = {"role": "user", "content": f"{told[-1]['content']}\n{shown}"}
            else:
                told.append({"role": "user", "content": shown})
        was_result = is_result
    return told


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
