# ruff: noqa: E501 - templates are one line
"""Chat templates: rendered as transformers renders them, found where checkpoints keep them."""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from server.chat_template import ChatTemplate, ChatTemplateError, check_nothing_lost, load_chat_template
from server.errors import InvalidRequestError
from tests.loose import Json
from tests.text_tools import byte_tokenizer

CHATML = """{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LLAMA = """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system = false %}{% endif %}{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% if loop.index0 == 0 and system %}{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content | trim + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{% generation %}{{ ' ' + content | trim + ' ' + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"""
ODD = """
{%- set ns = namespace(found=false, n=0) %}
{% for message in messages %}
    {%- if message.role == 'system' %}{{ message.content | upper }}{% continue %}{% endif %}
    {% set ns.n = ns.n + 1 %}
    {{ ns.n }}: {{ message | tojson }} {{ {"b": 1, "a": [message.content]} | tojson(indent=2) }}
    {% if ns.n == 3 %}{% break %}{% endif %}
{% endfor %}
{{ unknown_variable }}{{ tools is none }}{{ unk_token is defined }}
"""
CONVERSATION = [
    {"role": "system", "content": "Be <kind> & 'brief'."},
    {"role": "user", "content": "Grüße 世 \n"},
    {"role": "assistant", "content": "🙂"},
    {"role": "user", "content": "And {{ now }}?"},
]


@pytest.mark.parametrize("source", [CHATML, LLAMA, ODD], ids=["chatml", "llama", "odd"])
@pytest.mark.parametrize("messages", [CONVERSATION, CONVERSATION[1:], CONVERSATION[1:2]])
@pytest.mark.parametrize("generate", [False, True])
def test_rendered_as_transformers_does(source: str, messages: list[dict[str, str]], generate: bool) -> None:
    special = {"bos_token": "<s>", "eos_token": "<eos>"}
    reference = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), **special)
    expected = reference.apply_chat_template(
        messages, chat_template=source, tokenize=False, add_generation_prompt=generate
    )
    template = ChatTemplate(source, special)
    assert template.render(messages, add_generation_prompt=generate) == expected


def test_what_a_template_refuses_is_said() -> None:
    with pytest.raises(InvalidRequestError, match="roles must alternate"):
        ChatTemplate(LLAMA, {"bos_token": ""}).render(CONVERSATION[2:3], add_generation_prompt=True)


def test_developer_is_passed_on_where_the_template_takes_it() -> None:
    messages = [{"role": "developer", "content": "Be."}]
    assert "developer\nBe." in ChatTemplate(CHATML).render(messages, add_generation_prompt=False)
    with pytest.raises(InvalidRequestError, match="developer"):
        ChatTemplate("{{ bos_token }}").render(messages, add_generation_prompt=False)


@pytest.mark.parametrize(
    ("texts", "lost"),
    [
        ([], False),
        (["b", " d "], False),
        (["e"], True),
        (["b", "e"], True),
        (["B c", "ABCD"], True),
        ([""], False),
    ],
)
def test_a_text_that_is_not_shown_is_noticed(texts: list[str], lost: bool) -> None:
    messages = [{"role": "user", "content": text} for text in texts]
    with pytest.raises(InvalidRequestError, match="leaves it out") if lost else nullcontext():
        check_nothing_lost(messages, "abcd")


def test_looking_for_lost_texts_reads_the_prompt_once() -> None:
    """It was read from the beginning for each message: minutes for a megabyte of short ones."""
    starts = []

    class Watched(str):
        def find(self, part: str, start: int) -> int:  # type: ignore[override]
            starts.append(start)
            return super().find(part, start)

    check_nothing_lost([{"role": "user", "content": "ab"}] * 1000, Watched("ab" * 1000))
    assert starts == list(range(0, 2000, 2))


def test_texts_that_the_template_has_all_changed_are_looked_for_in_linear_time() -> None:
    """The whole prompt was read for each of them."""
    starts = []

    class Watched(str):
        def find(self, part: str, start: int) -> int:  # type: ignore[override]
            starts.append(start)
            return super().find(part, start)

    messages = [{"role": "user", "content": f"word{i} & more"} for i in range(1000)]
    check_nothing_lost(messages, Watched("".join(f"WORD{i} &amp; MORE" for i in range(1000))))
    assert len(starts) < 20
    with pytest.raises(InvalidRequestError, match=r"messages\.1000 .* leaves it out"):
        check_nothing_lost(
            [*messages, {"role": "user", "content": "lost"}], "".join(f"WORD{i}" for i in range(1000))
        )


def folder_with(path: Path, **files: Json) -> None:
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (path / name.replace("__", ".")).write_text(text, encoding="utf-8")


def text_of(template: ChatTemplate | None) -> str:
    assert template is not None
    return template.render([{"role": "user", "content": ""}], add_generation_prompt=True)


def test_a_model_without_a_template_has_none(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path) is None
    folder_with(tmp_path, tokenizer_config__json={"bos_token": "<s>"})
    assert load_chat_template(tmp_path) is None


def test_where_templates_are_found(tmp_path: Path) -> None:
    special = {"bos_token": {"content": "<s>"}, "eos_token": None, "extra_token": "<x>"}
    folder_with(
        tmp_path,
        special_tokens_map__json={"eos_token": "</s>", "bos_token": "<old>"},
        tokenizer_config__json={"chat_template": "{{ bos_token }}{{ eos_token }} config", **special},
        other__jinja="other",
    )
    assert text_of(load_chat_template(tmp_path)) == "<s></s> config"
    folder_with(tmp_path, chat_template__jinja="{{ extra_token }} file")
    assert text_of(load_chat_template(tmp_path)) == "<x> file"
    assert text_of(load_chat_template(tmp_path, tmp_path / "other.jinja")) == "other"


@pytest.mark.parametrize(
    ("templates", "expected"),
    [
        ([{"name": "tool_use", "template": "tool"}, {"name": "default", "template": "plain"}], "plain"),
        ([{"name": "only", "template": "one"}], "one"),
    ],
)
def test_of_several_templates_the_default(tmp_path: Path, templates: Sequence[object], expected: str) -> None:
    folder_with(tmp_path, tokenizer_config__json={"chat_template": templates})
    assert text_of(load_chat_template(tmp_path)) == expected


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"chat_template": [{"name": "a", "template": ""}, {"name": "b", "template": ""}]}, "a, b"),
        ({"chat_template": "{% if %}"}, "not Jinja"),
        ({"chat_template": 7}, "chat_template is 7"),
        ({"chat_template": {"name": "default", "template": ""}}, "chat_template is"),
        ({"chat_template": [{"name": "default"}]}, "chat_template is"),
        ({"chat_template": ["{{ messages }}"]}, "chat_template is"),
        ({"chat_template": [{"name": "default", "template": None}]}, "chat_template is"),
        ("version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        ("{", "tokenizer_config.json"),
        ("[]", "tokenizer_config.json"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, content: dict[str, object] | str, words: str) -> None:
    folder_with(tmp_path, tokenizer_config__json=content)
    with pytest.raises(ChatTemplateError, match=words):
        load_chat_template(tmp_path)


@pytest.mark.parametrize("content", [None, b"\xff"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "mine.jinja"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ChatTemplateError, match=r"mine\.jinja"):
        load_chat_template(tmp_path, file)
