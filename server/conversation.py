"""A conversation in the words of chat templates: what they get of messages and tools, and what clients meant.

Control tokens in whatever clients wrote are disguised here, names of parameters included. Invariant: nothing
of a conversation is dropped in silence.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from server.chat_template import ChatTemplate
from server.disguise import Disguise
from server.errors import InvalidRequestError, quote
from server.output import reasoning
from server.output.calls import read_json
from server.schemas.chat import Message
from server.schemas.tools import CalledFunction, FunctionDefinition
from server.template_tools import in_general_words, with_text_arguments

# Stands behind the last message where that is to be continued. Unicode never gives it a meaning.
_MARK = "\U0010ffff"


class TemplateInput(NamedTuple):
    """What a template gets. `is_disguised`: there are control tokens in it that are text."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None
    variables: Mapping[str, Any]
    is_disguised: bool


def template_input(
    messages: Sequence[Message],
    tools: Sequence[FunctionDefinition],
    variables: Mapping[str, Any],
    disguise: Disguise | None,
) -> TemplateInput:
    """Messages and tools as templates know them: arguments of calls as objects, contents as texts or parts.

    Raises InvalidRequestError for arguments that are no object.
    """
    told: list[Any] = [
        [[message.texts, message.name, message.thoughts, message.tool_call_id] for message in messages],
        list(variables.values()),
    ]
    named: list[Any] = [
        [_calls(number, message) for number, message in enumerate(messages)],
        [[tool.name, tool.description, tool.parameters] for tool in tools],
    ]
    (texts, values), (calls, definitions) = told, named
    if disguise is not None:
        texts, values = disguise.hide(told)
        calls, definitions = disguise.hide(named, with_names=True)
    return TemplateInput(
        [_message(*parts) for parts in zip(messages, texts, calls, strict=True)],
        [_tool(tool, *parts) for tool, parts in zip(tools, definitions, strict=True)] or None,
        dict(zip(variables, values, strict=True)),
        is_disguised=texts is not told[0] or values is not told[1] or calls is not named[0],
    )


def _message(message: Message, texts: list[Any], calls: list[Any]) -> dict[str, Any]:
    content, name, thoughts, call_id = texts
    optional = {"name": name, "reasoning_content": thoughts or None, "tool_call_id": call_id}
    seen = {"role": message.role, "content": content}
    seen |= {key: value for key, value in optional.items() if value is not None}
    if calls:
        seen["tool_calls"] = [
            {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
            for call_id, name, arguments in calls
        ]
    return seen


def _calls(number: int, message: Message) -> list[list[Any]]:
    return [
        [call.id, call.function.name, _arguments(f"messages.{number}.tool_calls.{index}", call.function)]
        for index, call in enumerate(message.tool_calls)
    ]


def _arguments(place: str, function: CalledFunction) -> dict[str, Any]:
    """The arguments as an object, which most templates want."""
    arguments: object = function.arguments or {}
    try:
        if isinstance(arguments, str):
            arguments = read_json(arguments)
        json.dumps(arguments, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise InvalidRequestError(
            f"{place}.function.arguments must be the text of a JSON object, not {quote(function.arguments)}",
            param="messages",
        )
    return arguments


def _tool(tool: FunctionDefinition, name: str, description: str | None, parameters: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
    function = {"name": name, "description": description or ""}
    if tool.parameters is not None:
        function["parameters"] = parameters
    return {"type": "function", "function": function}


def render_conversation(
    template: ChatTemplate, given: TemplateInput, *, add_generation_prompt: bool, continue_final: bool
) -> str:
    """The prompt's text. Raises InvalidRequestError for whatever the template has no place for."""
    messages, tools = given.messages, given.tools
    if template.describes_tools:
        messages, tools = in_general_words(messages, tools or []), None
    else:
        _check_places(template, given)
        if template.places.arguments_as_text:
            messages = [with_text_arguments(message) for message in messages]
    if continue_final:
        messages = [*messages[:-1], _marked(messages[-1])]
    text = template.render(
        messages, tools=tools, add_generation_prompt=add_generation_prompt, variables=given.variables
    )
    _check_names(given, text)
    return _before_mark(text) if continue_final else text


def opens_thoughts(text: str, final: Mapping[str, Any] | None) -> bool:
    """Whether what follows a prompt's text is thoughts; `final` is the message that is to be continued."""
    if final is None:
        return text.rstrip().endswith(reasoning.OPENING)
    content = final["content"]
    last = content if isinstance(content, str) else "\n".join(content)
    begun = last.rfind(reasoning.OPENING)
    return begun >= 0 and reasoning.CLOSING not in last[begun:]


def _check_places(template: ChatTemplate, given: TemplateInput) -> None:
    hint = "the server can describe tools to such a model if started with --tool-template generic"
    if given.tools and not template.places.tools:
        raise InvalidRequestError(f"tools: the model's chat template has no tools; {hint}", param="tools")
    for number, message in enumerate(given.messages):
        if message.get("tool_calls") and not template.places.calls:
            raise InvalidRequestError(
                f"messages.{number}.tool_calls: the model's chat template leaves calls out; {hint}",
                param="messages",
            )


def _check_names(given: TemplateInput, text: str) -> None:
    """Templates may have a place for tools that they don't use in every conversation."""
    for tool in given.tools or ():
        if tool["function"]["name"] not in text:
            name = quote(tool["function"]["name"])
            raise InvalidRequestError(f"tools: the chat template leaves the tool {name} out", param="tools")
    for number, message in enumerate(given.messages):
        for call in message.get("tool_calls", ()):
            if call["function"]["name"] not in text:
                raise InvalidRequestError(
                    f"messages.{number}.tool_calls: the chat template leaves calls out", param="messages"
                )


def _marked(message: Mapping[str, Any]) -> Mapping[str, Any]:
    if message.get("tool_calls"):
        raise InvalidRequestError(
            "continue_final_message: the last message has tool_calls, which can't be continued",
            param="continue_final_message",
        )
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": content + _MARK}
    return {**message, "content": [*content[:-1], (content[-1] if content else "") + _MARK]}


def _before_mark(text: str) -> str:
    end = text.rfind(_MARK)
    if end < 0:
        raise InvalidRequestError(
            "continue_final_message: the chat template changes the last message, which can't be continued",
            param="continue_final_message",
        )
    return text[:end]
