"""A request to /v1/responses as a request to the chat API."""

from typing import Any

from server.errors import InvalidRequestError, quote
from server.gateways.translation import Names, Translated, Turns, chat_request
from server.schemas.chat import ChatRequest
from server.schemas.responses import (
    AllowedFunctions,
    ChosenFunction,
    FunctionCall,
    FunctionCallOutput,
    FunctionTool,
    InputItem,
    InputMessage,
    ResponsesRequest,
    TextFormat,
)
from server.schemas.sampling import TokenFields

FIELDS = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
SAME = ("model", "stream", "stop", "structured_outputs", "chat_template_kwargs", "user")


def responses_to_chat(body: ResponsesRequest) -> Translated:
    """The request; raises InvalidRequestError."""
    turns = _turns(body)
    tools = {f"tools.{i}": tool for i, tool in enumerate(body.tools) if isinstance(tool, FunctionTool)}
    skipped = [tool["type"] for tool in body.tools if isinstance(tool, dict)]
    tools = _allowed(tools, body)
    names = Names(FIELDS, "parameters", turns.places, list(tools))
    messages = turns.messages
    if not messages:
        raise InvalidRequestError("input is empty, and there are no instructions", param="input")
    fields = body.model_dump(include={*TokenFields.model_fields, *SAME}, exclude_unset=True, by_alias=True)
    fields |= {"messages": messages, **_format(body.text.format), **_logprobs(body)}
    if body.max_output_tokens is not None:
        fields["max_tokens"] = body.max_output_tokens
    if body.truncation == "auto":
        fields["truncate_prompt_tokens"] = -1
    if body.reasoning.effort is not None:
        fields["reasoning_effort"] = body.reasoning.effort
    if tools:
        fields["tools"] = [_tool(tool) for tool in tools.values()]
        fields |= {"tool_choice": _choice(body), "parallel_tool_calls": body.parallel_tool_calls}
    return Translated(chat_request(fields, names, ChatRequest), names, skipped)


def _turns(body: ResponsesRequest) -> Turns:
    turns = Turns()
    if body.instructions:
        turns.add_system([body.instructions], "instructions")
    is_list = isinstance(body.input, list)
    for index, item in enumerate(body.items):
        _add(turns, item, f"input.{index}" if is_list else "input")
    return turns


def _add(turns: Turns, item: InputItem, place: str) -> None:
    if isinstance(item, InputMessage):
        texts = [item.content] if isinstance(item.content, str) else [part.text for part in item.content]
        if item.role == "assistant":
            turns.add_answer(texts, place)
        elif item.role == "user":
            turns.add("user", texts, place)
        else:  # no template here knows a developer beside the system
            turns.add_system(texts, place)
    elif isinstance(item, FunctionCall):
        turns.add_call(item.call_id, item.name, item.arguments, place)
    elif isinstance(item, FunctionCallOutput):
        texts = [item.output] if isinstance(item.output, str) else [part.text for part in item.output]
        turns.add_result(item.call_id, texts, place)
    else:
        turns.add_thought("".join(part.text for part in item.content), place)


def _format(asked: TextFormat | None) -> dict[str, Any]:
    if asked is None or asked.type == "text":
        return {}
    if asked.type == "json_object":
        return {"response_format": {"type": "json_object"}}
    if asked.json_schema is None or asked.name is None:
        raise InvalidRequestError("text.format needs a name and a schema with type json_schema", param="text")
    named = {"name": asked.name, "schema": asked.json_schema, "strict": asked.strict}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def _logprobs(body: ResponsesRequest) -> dict[str, Any]:
    return {"logprobs": True, "top_logprobs": body.top_logprobs} if body.shows_logprobs else {}


def _allowed(tools: dict[str, FunctionTool], body: ResponsesRequest) -> dict[str, FunctionTool]:
    """The tools that may be called, by their places. Raises InvalidRequestError if one is missing."""
    choice = body.tool_choice
    if isinstance(choice, str):
        if choice == "required" and not tools:
            raise InvalidRequestError(
                "tool_choice is 'required', but tools has no tool of the type function", param="tool_choice"
            )
        return tools
    wanted = [choice.name] if isinstance(choice, ChosenFunction) else [tool.name for tool in choice.tools]
    known = {tool.name for tool in tools.values()}
    for name in wanted:
        if name not in known:
            raise InvalidRequestError(
                f"tool_choice names {quote(name)}, but tools has no function of that name",
                param="tool_choice",
            )
    if isinstance(choice, ChosenFunction):
        return tools
    return {place: tool for place, tool in tools.items() if tool.name in wanted}


def _choice(body: ResponsesRequest) -> str | dict[str, Any]:
    choice = body.tool_choice
    if isinstance(choice, AllowedFunctions):
        return choice.mode
    if isinstance(choice, ChosenFunction):
        return {"type": "function", "function": {"name": choice.name}}
    return choice


def _tool(tool: FunctionTool) -> dict[str, Any]:
    function = tool.model_dump(include={"name", "description", "parameters", "strict"}, exclude_none=True)
    return {"type": "function", "function": function}
