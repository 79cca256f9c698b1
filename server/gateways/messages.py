"""A request to /v1/messages as a request to the chat API."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from server.errors import ContextLengthError, InvalidRequestError, TextTooLongError, quote
from server.gateways.translation import Names, Translated, Turns, chat_request
from server.schemas.chat import ChatRequest
from server.schemas.messages import (
    AnthropicMessage,
    AnthropicTool,
    MessagesRequest,
    PromptFields,
    RedactedThinkingBlock,
    TextBlock,
    ThinkingBlock,
    ToolUseBlock,
)
from server.schemas.sampling import TokenFields

FIELDS = {
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
    "continue_final_message": "messages",
}
CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class CutChat(ChatRequest):
    """A conversation whose answer may be shorter than was asked for, where the context has no more room."""

    @property
    def may_be_cut(self) -> bool:
        """The context's end ends the answer, as it does at Anthropic's."""
        return True


def messages_to_chat(body: PromptFields) -> Translated:
    """The request; raises InvalidRequestError. A body without a limit is one whose tokens are counted."""
    turns = _turns(body)
    custom = {f"tools.{i}": tool for i, tool in enumerate(body.tools) if isinstance(tool, AnthropicTool)}
    skipped = [tool["type"] for tool in body.tools if isinstance(tool, dict)]
    names = Names(FIELDS, "input_schema", turns.places, list(custom))
    fields: dict[str, Any] = {"model": body.model, "messages": turns.messages}
    if isinstance(body, MessagesRequest):
        fields |= body.model_dump(include=set(TokenFields.model_fields), exclude_unset=True)
        fields |= {"max_tokens": body.max_tokens, "stop": body.stop_sequences, "stream": body.stream}
    fields |= _template_fields(body)
    if turns.is_begun:
        fields |= {"add_generation_prompt": False, "continue_final_message": True}
    if wanted := body.output_config.format or body.output_format:
        named = {"name": "output", "schema": wanted.json_schema}
        fields["response_format"] = {"type": "json_schema", "json_schema": named}
    if custom:
        fields["tools"] = [_tool(tool) for tool in custom.values()]
    fields |= _choice(body, list(custom.values()))
    return Translated(chat_request(fields, names, CutChat), names, skipped)


@contextmanager
def in_anthropics_words() -> Iterator[None]:
    """A prompt that doesn't fit is told in the words by which clients know that they must shorten it."""
    try:
        yield
    except ContextLengthError as error:
        counts = f"{error.num_prompt_tokens} tokens > {error.max_model_len - 1} maximum"
        error.message = (
            f"prompt is too long: {counts} (the context has {error.max_model_len}, one for an answer)"
        )
        raise
    except TextTooLongError as error:
        error.message = f"prompt is too long: {error.message}"
        raise


def _turns(body: PromptFields) -> Turns:
    turns = Turns()
    system = [body.system] if isinstance(body.system, str) else [block.text for block in body.system]
    if any(system):
        turns.add_system(system, "system")
    for index, message in enumerate(body.messages):
        _add(turns, message, f"messages.{index}")
    return turns


def _add(turns: Turns, message: AnthropicMessage, place: str) -> None:
    """The blocks of a message in their order; texts side by side are one."""
    texts: list[str] = []
    if not message.blocks:
        _say(turns, message.role, [""], place)
    for block in message.blocks:
        if isinstance(block, TextBlock):
            texts.append(block.text)
            continue
        _say(turns, message.role, texts, place)
        texts = []
        if isinstance(block, ThinkingBlock):
            turns.add_thought(block.thinking, place)
        elif isinstance(block, ToolUseBlock):
            turns.add_call(block.id, block.name, block.input, place)
        elif not isinstance(block, RedactedThinkingBlock):
            turns.add_result(block.tool_use_id, block.texts, place)
    _say(turns, message.role, texts, place)


def _say(turns: Turns, role: str, texts: list[str], place: str) -> None:
    if not texts:
        return
    if role == "user":
        turns.add_user(texts, place)
    elif role == "assistant":
        turns.add_answer(texts, place)
    else:
        turns.add_system(texts, place)


def _template_fields(body: PromptFields) -> dict[str, Any]:
    variables = dict(body.chat_template_kwargs)
    if body.thinking is not None:
        variables.setdefault("enable_thinking", body.thinking.type != "disabled")
    effort = body.output_config.effort
    return ({"chat_template_kwargs": variables} if variables else {}) | (
        {} if effort is None else {"reasoning_effort": effort}
    )


def _choice(body: PromptFields, tools: list[AnthropicTool]) -> dict[str, Any]:
    choice = body.tool_choice
    if choice.type in ("any", "tool") and not tools:
        raise InvalidRequestError(
            f"tool_choice is {choice.type!r}, but tools has no tool that the client runs", param="tool_choice"
        )
    if choice.type == "tool" and choice.name not in [tool.name for tool in tools]:
        raise InvalidRequestError(
            f"tool_choice names {quote(choice.name)}, but tools has no tool of that name", param="tool_choice"
        )
    if not tools:
        return {}
    wanted = CHOICES.get(choice.type) or {"type": "function", "function": {"name": choice.name}}
    return {"tool_choice": wanted, "parallel_tool_calls": not choice.disable_parallel_tool_use}


def _tool(tool: AnthropicTool) -> dict[str, Any]:
    function = tool.model_dump(include={"name", "description", "strict"}, exclude_none=True)
    return {"type": "function", "function": function | {"parameters": tool.input_schema}}
