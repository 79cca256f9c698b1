"""What chat templates do with tools is read from them; the formats of their models too."""

import json

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from server.output.formats import FORMATS, output_formats
from server.template_tools import ToolPlaces, in_general_words, tool_places, with_text_arguments
from tests.loose import Json

LOOP = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}<CALL>{% endfor %}{% endfor %}"


def with_calls(source: str) -> str:
    return LOOP.replace("<CALL>", source)


@pytest.mark.parametrize(
    ("source", "places"),
    [
        ("{{ messages[0]['content'] }}", ToolPlaces(False, False, False)),
        ("{% if tools %}{{ tools }}{% endif %}", ToolPlaces(True, False, False)),
        (
            "{% if not tools is defined %}{% set tools = none %}{% endif %}{{ tools }}",
            ToolPlaces(True, False, False),
        ),
        ("{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}", ToolPlaces(True, False, False)),
        ("{% for tools in messages %}{{ tools }}{% endfor %}", ToolPlaces(False, False, False)),
        (with_calls("{{ c.function.arguments | tojson }}"), ToolPlaces(False, True, False)),
        (
            with_calls("{% for k, v in c.arguments | items %}{{ k }}{% endfor %}"),
            ToolPlaces(False, True, False),
        ),
        (with_calls("{{ '{' + c['function']['arguments'] + '}' }}"), ToolPlaces(False, True, True)),
        (with_calls("{{ c.function.name ~ c.function.arguments }}"), ToolPlaces(False, True, True)),
        (with_calls("{{ c.function.arguments }}"), ToolPlaces(False, True, True)),
        (
            with_calls(
                "{% if c.arguments is string %}{{ c.arguments }}{% else %}"
                "{{ c.arguments | tojson }}{% endif %}"
            ),
            ToolPlaces(False, True, False),
        ),
    ],
    ids=lambda value: str(value)[-60:],
)
def test_places_for_tools_are_found(source: str, places: ToolPlaces) -> None:
    assert tool_places(ImmutableSandboxedEnvironment(), source) == places


def test_arguments_become_texts_without_a_change_of_the_message() -> None:
    message = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "f", "arguments": {"a": "世"}}}],
    }
    before = json.dumps(message)
    assert with_text_arguments(message)["tool_calls"][0]["function"]["arguments"] == '{"a": "世"}'
    assert json.dumps(message) == before
    assert with_text_arguments({"role": "user", "content": "a"}) == {"role": "user", "content": "a"}


def test_without_tools_general_words_leave_a_conversation_alone() -> None:
    messages: Json = [{"role": "system", "content": ["a", "b"]}, {"role": "user", "content": "c"}]
    assert in_general_words(messages, []) == messages
    described = in_general_words(messages, [{"function": {"name": "f"}}])
    assert described[0]["content"].startswith("a\n\nb\n\nYou can call")
    assert described[1:] == messages[1:]


@pytest.mark.parametrize(
    ("options", "template", "tokens", "thinks", "form"),
    [
        (("auto", "auto"), "", [], False, None),
        (("auto", "auto"), "{{ x }}</think>", [], True, None),
        (("auto", "auto"), "", ["</think>"], True, None),
        (("none", "auto"), "</think>", ["</think>"], False, None),
        (("think", "auto"), "", [], True, None),
        (("auto", "auto"), "<tool_call>", [], False, "hermes"),
        (("auto", "auto"), "<tool_call><function=", [], False, "qwen3_coder"),
        (("auto", "none"), "<tool_call><function=", [], False, None),
        (("auto", "qwen3_coder"), "<tool_call>", [], False, "qwen3_coder"),
    ],
)
def test_formats_are_those_that_a_template_shows(
    options: Json, template: str, tokens: list[str], thinks: bool, form: str | None
) -> None:
    found = output_formats(
        *options, template=template, describes_tools=False, added_tokens=tokens, special_tokens=tokens
    )
    assert found.thinks == thinks
    assert found.tools is (FORMATS[form] if form else None)
    assert found.special == frozenset(tokens)


def test_general_words_ask_for_hermes() -> None:
    found = output_formats(
        "auto", "auto", template="", describes_tools=True, added_tokens=(), special_tokens=()
    )
    assert found.tools is FORMATS["hermes"]
