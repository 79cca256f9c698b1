"""Messages to the text of a prompt, by the Jinja template that comes with a chat model.

Renders as `transformers`' `apply_chat_template` does (which imports torch, so it is not used): the same
sandbox, tags, filters and variables. Invariant: a template sees plain JSON data alone, and whatever goes
wrong in it is the request's error, never the server's.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NoReturn

from jinja2 import TemplateError
from jinja2 import nodes as jinja_nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model.checkpoint.hub import LfsPointerError, read_file
from server.content_format import ContentFormat, content_use
from server.errors import InvalidRequestError, quote
from server.settings import SettingsError
from server.template_tools import tool_places

TEMPLATE_FILE = "chat_template.jinja"
END_OF_THOUGHTS = "</think>"
MOST_READS = 8  # of a prompt from end to end, for texts that are not in it as they were sent
DEFAULT = "default"  # the name of the template to use where a model has several


class ChatTemplateError(SettingsError):
    """A template that cannot be read or compiled; the message says what is wrong with which file."""


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's text for training; here it only shows it."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: Parser) -> list[jinja_nodes.Node]:
        """The body alone."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: object) -> NoReturn:
    raise TemplateError(str(message))


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment


class ChatTemplate:
    """A compiled template with the special tokens it may write. Threads may share it.

    `trusts_content`: whether special tokens in the texts of messages are meant, and not only quoted.
    `describes_tools`: whether tools are told to the model in general words, not by the template.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        *,
        content_format: Literal["auto"] | ContentFormat = "auto",
        trusts_content: bool = False,
        describes_tools: bool = False,
    ) -> None:
        """Raises ChatTemplateError if `source` is no template."""
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            use = content_use(environment.parse(source))
            self.places = tool_places(environment, source)
        except TemplateError as error:
            raise ChatTemplateError(f"the chat template is not Jinja: {error}") from None
        self._special_tokens = dict(special_tokens or {})
        self.source = source
        self.trusts_content = trusts_content
        self.describes_tools = describes_tools
        self.content_format: ContentFormat = "openai" if use.loops else "string"
        # A template that asks whether a content is a text shows a text as its maker meant it.
        self._splits_strings = not use.asks_for_strings
        if content_format != "auto":
            self.content_format, self._splits_strings = content_format, True

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text. The content of a message is a text, or a list of the texts of its parts.

        Raises InvalidRequestError if the template refuses or drops a message.
        """
        known = {
            "messages": [{**message, "content": self._shaped(message["content"])} for message in messages],
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = self._template.render({**self._special_tokens, **(variables or {}), **known})
        except Exception as error:  # templates are programs: they fail in every way that Python code can
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {quote(str(error))}", param="messages"
            ) from None
        check_nothing_lost(messages, text)
        return text

    def _shaped(self, content: str | list[str]) -> str | list[dict[str, str]]:
        """The content as the template wants it; in one text parts stand on lines of their own, as in vLLM."""
        if self.content_format == "string":
            return content if isinstance(content, str) else "\n".join(content)
        if isinstance(content, str):
            if not self._splits_strings:
                return content
            content = [content]
        return [{"type": "text", "text": text} for text in content]


def check_nothing_lost(messages: Sequence[Mapping[str, Any]], text: str) -> None:
    """Raises InvalidRequestError if `text`, which a template made of `messages`, lacks one of their texts.

    A text that the template has changed (escaped, in capitals) counts as shown if its longest word is. Each
    search begins where the last one of the same role ended, so that all of them together read `text` once, or
    a few times if the template changes texts: after `MOST_READS` only the longest words are looked for.
    """
    exact, words = _Search(text), _Search(text.casefold())
    for number, message in enumerate(messages):
        role, content = message["role"], message["content"]
        for part in [content] if isinstance(content, str) else content:
            shown = part.strip()
            if role == "assistant":  # templates drop the thoughts of earlier answers
                shown = shown.rpartition(END_OF_THOUGHTS)[2].strip()
            if not exact.has(role, shown) and not words.has(role, _longest_word(shown)):
                reason = "has no role 'developer'; use 'system'" if role == "developer" else "leaves it out"
                raise InvalidRequestError(
                    f"messages.{number} (role {role!r}): the model's chat template {reason}", param="messages"
                )


class _Search:
    """Finds texts one after the other, for each role in their order."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._begins: dict[str, int] = {}
        self._reads_left = MOST_READS * len(text)  # characters that may be looked through in vain

    def has(self, role: str, part: str) -> bool:
        """Whether `part` comes next of this role; no longer looked for when too much was read in vain."""
        start = self._begins.get(role, 0)
        if self._reads_left < 0:
            return False
        begin = self._text.find(part, start)
        if begin < 0:
            self._reads_left -= len(self._text) - start
            return False
        self._begins[role] = begin + len(part)
        return True


def _longest_word(text: str) -> str:
    """The longest word, its case folded; the text itself if there is none."""
    words = re.findall(r"[^\W_]+", text)
    return max(words, key=len).casefold() if words else text


def load_chat_template(
    folder: Path,
    file: Path | None = None,
    *,
    content_format: Literal["auto"] | ContentFormat = "auto",
    trusts_content: bool = False,
    describes_tools: bool = False,
) -> ChatTemplate | None:
    """The template in `file`, else the one of the model in `folder`, else None.

    Raises ChatTemplateError.
    """
    config = _read_json(folder / "tokenizer_config.json")
    source = _read_text(file) if file is not None else _own_source(folder, config)
    if source is None:
        return None
    special_tokens = _special_tokens(folder, config)
    return ChatTemplate(
        source,
        special_tokens,
        content_format=content_format,
        trusts_content=trusts_content,
        describes_tools=describes_tools,
    )


def _own_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    if (folder / TEMPLATE_FILE).is_file():
        return _read_text(folder / TEMPLATE_FILE)
    template = config.get("chat_template")
    if template is None or isinstance(template, str):
        return template
    named = _named_templates(folder, template)
    if DEFAULT not in named and len(named) > 1:
        names = ", ".join(sorted(named))
        raise ChatTemplateError(
            f"none of the model's chat templates ({names}) is the default: choose with --chat-template FILE"
        )
    source: str | None = named.get(DEFAULT, next(iter(named.values()), None))
    return source


def _named_templates(folder: Path, templates: object) -> dict[str, str]:
    """Name -> source of several templates; raises ChatTemplateError for what is no such list."""
    entries = templates if isinstance(templates, list) else [None]
    named = {}
    for entry in entries:
        name, source = (entry.get(key) if isinstance(entry, dict) else None for key in ("name", "template"))
        if not isinstance(name, str) or not isinstance(source, str):
            raise ChatTemplateError(
                f"{folder / 'tokenizer_config.json'}: chat_template is {quote(templates)}; a string, or a "
                "list of objects with a name and a template, is wanted (--chat-template FILE replaces it)"
            )
        named[name] = source
    return named


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token` and their like, as templates write them."""
    tokens = {}
    for entries in (_read_json(folder / "special_tokens_map.json"), config):
        for name, value in entries.items():
            text = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(text, str):
                tokens[name] = text
    return tokens


def _read_text(path: Path) -> str:
    try:
        return read_file(path).decode()
    except LfsPointerError as error:
        raise ChatTemplateError(str(error)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ChatTemplateError(f"the chat template {path} cannot be read: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(read_file(path))
    except LfsPointerError as error:
        raise ChatTemplateError(str(error)) from None
    except (OSError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ChatTemplateError(f"{path} is not a JSON object")
    return value
