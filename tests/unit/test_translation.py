"""Conversations of other APIs as chats: turns, and in whose words complaints are told."""

import pytest

from server.errors import ContextLengthError, InvalidRequestError
from server.gateways.messages import messages_to_chat
from server.gateways.responses import responses_to_chat
from server.gateways.translation import Names, Turns
from server.schemas.chat import ChatRequest
from server.schemas.messages import MessagesRequest
from server.schemas.responses import ResponsesRequest
from tests.loose import Json


def test_an_assistants_turn_is_one_message() -> None:
    turns = Turns()
    turns.add_system(["a"], "instructions")
    turns.add_system(["b", "c"], "input.0")
    turns.add_user(["d"], "input.1")
    turns.add_thought("e", "input.2")
    turns.add_thought("f", "input.3")
    turns.add_answer(["g"], "input.4")
    turns.add_call("1", "h", "{}", "input.5")
    turns.add_call("2", "i", "{}", "input.6")
    turns.add_result("1", ["j"], "input.7")
    turns.add_answer(["k"], "input.8")
    turns.add_answer(["l"], "input.9")
    turns.add_thought("m", "input.10")
    assert turns.messages == [
        {"role": "system", "content": [{"type": "text", "text": text} for text in "abc"]},
        {"role": "user", "content": "d"},
        {
            "role": "assistant",
            "content": "g",
            "reasoning_content": "ef",
            "tool_calls": [
                {"id": id_, "type": "function", "function": {"name": name, "arguments": "{}"}}
                for id_, name in (("1", "h"), ("2", "i"))
            ],
        },
        {"role": "tool", "content": "j", "tool_call_id": "1"},
        {"role": "assistant", "content": "k"},
        {"role": "assistant", "content": "l"},
        {"role": "assistant", "content": None, "reasoning_content": "m"},
    ]
    assert turns.places[2] == ["input.2", "input.5", "input.6"]


def test_a_system_message_behind_others_stays_where_it_is() -> None:
    turns = Turns()
    turns.add_user(["a"], "0")
    turns.add_system(["b"], "1")
    turns.add_system(["c"], "2")
    assert [message["role"] for message in turns.messages] == ["user", "system", "system"]


NAMES = Names(
    {"messages": "input", "max_tokens": "max_output_tokens", "response_format": "text.format"},
    "input_schema",
    [["instructions"], ["input.4", "input.5", "input.6"]],
    ["tools.2"],
)


@pytest.mark.parametrize(
    ("message", "param", "told", "named"),
    [
        ("messages.1 (role 'x'): no", "messages", "input.4 (role 'x'): no", "input"),
        ("messages.0.content must be", "messages", "instructions.content must be", "instructions"),
        ("messages.1.tool_calls.1.function.name is", "messages", "input.6.name is", "input"),
        ("messages.1.tool_calls must have", "messages", "input.4.tool_calls must have", "input"),
        ("tools.0.function.parameters must be", "tools", "tools.2.input_schema must be", "tools"),
        ("tools.0.function.name must be", "tools", "tools.2.name must be", "tools"),
        ("messages: no text", "messages", "input: no text", "input"),
        ("response_format: bad", "response_format", "text.format: bad", "text.format"),
        ("max_tokens is 0", "max_tokens", "max_output_tokens is 0", "max_output_tokens"),
        ("seed must be 'messages'", "seed", "seed must be 'messages'", "seed"),
        ("nothing is named", None, "nothing is named", None),
    ],
)
def test_complaints_are_told_in_the_clients_names(
    message: str, param: str | None, told: str, named: str | None
) -> None:
    with pytest.raises(InvalidRequestError) as caught, NAMES.told():
        raise InvalidRequestError(message, param=param)
    assert (caught.value.message, caught.value.param) == (told, named)


def test_a_context_overflow_names_the_clients_fields() -> None:
    with pytest.raises(ContextLengthError) as caught, NAMES.told():
        raise ContextLengthError(10, 20, 15, prompt_param="messages")
    assert "20 in max_output_tokens" in caught.value.message
    assert "length of the input" in caught.value.message
    assert caught.value.param == "max_output_tokens"


def test_turns_of_as_many_entries_as_a_body_may_have() -> None:
    messages: list[Json] = [{"role": "user", "content": "x"}] * 1024
    chat = messages_to_chat(
        MessagesRequest.model_validate({"model": "m", "max_tokens": 1, "messages": messages})
    ).chat
    assert len(chat.messages) == 1
    items: list[Json] = [{"type": "reasoning", "content": [{"type": "reasoning_text", "text": "x"}]}] * 4096
    body = ResponsesRequest.model_validate({"model": "m", "input": items})
    (message,) = responses_to_chat(body).chat.messages
    assert message.thoughts == "x" * 4096


def chat_of(**fields: Json) -> ChatRequest:
    """The chat request that a request to /v1/messages is made into."""
    body = {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": "x"}]} | fields
    return messages_to_chat(MessagesRequest.model_validate(body)).chat


@pytest.mark.parametrize("system", ["", [], [{"type": "text", "text": ""}]], ids=str)
def test_a_system_text_that_says_nothing_is_no_message(system: Json) -> None:
    assert [message.role for message in chat_of(system=system).messages] == ["user"]


@pytest.mark.parametrize("is_one", [True, False])
def test_at_most_one_call_is_asked_for_where_more_are_disabled(is_one: bool) -> None:
    tools = [{"name": "f", "input_schema": {"type": "object"}}]
    for kind in ("auto", "any"):
        choice = {"type": kind, "disable_parallel_tool_use": is_one}
        assert chat_of(tools=tools, tool_choice=choice).parallel_tool_calls is not is_one


def test_a_variable_of_the_template_that_is_named_goes_before_thinking() -> None:
    named = {"enable_thinking": False}
    chat = chat_of(thinking={"type": "enabled", "budget_tokens": 1024}, chat_template_kwargs=named)
    assert chat.chat_template_kwargs == named


def test_an_answer_that_ended_with_a_call_is_not_to_go_on() -> None:
    said: Json = {"type": "text", "text": "Well."}
    call: Json = {"type": "tool_use", "id": "a", "name": "f", "input": {}}
    for blocks, goes_on in (([said], True), ([said, call], False), ([call], False)):
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": blocks}]
        assert chat_of(messages=messages).continue_final_message is goes_on
