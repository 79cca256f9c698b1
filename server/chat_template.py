"""Messages to the text of a prompt, by the Jinja template that comes with a chat model.

Renders as `transformers`' `apply_chat_template` does (which imports torch, so it is not used): the same
sandbox, tags, filters and variables. Invariant: a template sees plain JSON data alone, and whatever goes
wrong in it is the request's error, never the server's.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2 import nodes as jinja_nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from server.errors import InvalidRequestError, quote
from server.settings import SettingsError

TEMPLATE_FILE = "chat_template.jinja"
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
    """A compiled template with the special tokens it may write. Threads may share it."""

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        """Raises ChatTemplateError if `source` is no template."""
        try:
            self._template = _environment().from_string(source)
        except TemplateError as error:
            raise ChatTemplateError(f"the chat template is not Jinja: {error}") from None
        self._special_tokens = dict(special_tokens or {})

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text. Raises InvalidRequestError if the template refuses or drops a message."""
        known = {
            "messages": [dict(message) for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = self._template.render({**self._special_tokens, **(variables or {}), **known})
        except Exception as error:  # templates are programs: they fail in every way that Python code can
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {quote(str(error))}", param="messages"
            ) from None
        for message in messages:
            # Few templates know this role, and most of those that don't leave its messages out.
            if message["role"] == "developer" and message["content"].strip() not in text:
                raise InvalidRequestError(
                    "messages: the model's chat template has no role 'developer'; use 'system'",
                    param="messages",
                )
        return text


def load_chat_template(folder: Path, file: Path | None = None) -> ChatTemplate | None:
    """The template in `file`, else the one of the model in `folder`, else None.

    Raises ChatTemplateError.
    """
    config = _read_json(folder / "tokenizer_config.json")
    source = _read_text(file) if file is not None else _own_source(folder, config)
    return None if source is None else ChatTemplate(source, _special_tokens(folder, config))


def _own_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    if (folder / TEMPLATE_FILE).is_file():
        return _read_text(folder / TEMPLATE_FILE)
    template = config.get("chat_template")
    if not isinstance(template, list):
        return template
    named = {entry["name"]: entry["template"] for entry in template}
    if DEFAULT not in named and len(named) > 1:
        names = ", ".join(sorted(named))
        raise ChatTemplateError(
            f"none of the model's chat templates ({names}) is the default: choose with --chat-template FILE"
        )
    source: str | None = named.get(DEFAULT, next(iter(named.values()), None))
    return source


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
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ChatTemplateError(f"the chat template {path} cannot be read: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ChatTemplateError(f"{path} is not a JSON object")
    return value
