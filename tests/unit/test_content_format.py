"""Which content a template wants, by its syntax tree."""

import pytest

from server.chat_template import ChatTemplate
from tests.loose import Json

STRING = [
    "{% for m in messages %}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{{ m['content'] | trim }}{% for t in m.calls %}{{ t }}{% endfor %}{% endfor %}",
    "{% for m in messages %}{% for line in m.content.split('\\n') %}{{ line }}{% endfor %}{% endfor %}",
    "{% for m in messages %}{% for t in tools %}{{ t.content }}{% endfor %}{{ m.content }}{% endfor %}",
    "{% set first = messages[0] %}{% for word in first.role %}{{ word }}{% endfor %}{{ first.content }}",
    "{{ messages }}",
]
PARTS = [
    "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}",
    "{% for m in messages %}{% for p in m['content'] %}{{ p.text }}{% endfor %}{% endfor %}",
    "{% set rest = messages[1:] if messages[0].role == 'system' else messages %}"
    "{% for m in rest %}{% set c = m.content %}{% for p in c %}{{ p.text }}{% endfor %}{% endfor %}",
    "{% for m in messages | list %}{% for p in m.content | selectattr('type', 'equalto', 'text') %}"
    "{{ p.text }}{% endfor %}{% endfor %}",
    "{% macro show(content) %}{% for p in content %}{{ p.text }}{% endfor %}{% endmacro %}"
    "{% for m in messages %}{{ show(m.content) }}{% endfor %}",
    "{% macro show(content) %}{% for p in content %}{{ p.text }}{% endfor %}{% endmacro %}"
    "{% for m in messages %}{{ show(content=m['content']) }}{% endfor %}",
    "{% for p in messages[0].content %}{{ p.text }}{% endfor %}",
]
EITHER = (
    "{% for m in messages %}{% if m.content is string %}<{{ m.content }}>"
    "{% else %}{% for p in m.content %}({{ p.text }}){% endfor %}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("source", STRING)
def test_texts(source: str) -> None:
    assert ChatTemplate(source).content_format == "string"


@pytest.mark.parametrize("source", [*PARTS, EITHER])
def test_parts(source: str) -> None:
    assert ChatTemplate(source).content_format == "openai"


@pytest.mark.parametrize("source", PARTS)
@pytest.mark.parametrize("content", ["hello", ["hello"]], ids=str)
def test_both_contents_are_shown_by_templates_that_want_parts(source: str, content: list[str] | str) -> None:
    messages: list[dict[str, Json]] = [{"role": "user", "content": content}]
    assert ChatTemplate(source).render(messages, add_generation_prompt=False) == "hello"


def test_a_template_that_takes_either_gets_what_was_sent() -> None:
    template = ChatTemplate(EITHER)
    messages: list[dict[str, Json]] = [
        {"role": "user", "content": "a"},
        {"role": "user", "content": ["b", "c"]},
    ]
    assert template.render(messages, add_generation_prompt=False) == "<a>(b)(c)"
