"""The command `serve`: its options, one for each setting, and what they come to.

Also `python -m server`. Imports no web framework before the server starts: `--help` is quick. Invariant: a
wrong option, or a model that isn't there, is one line on stderr and exit status 2.
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from model.checkpoint.hub import HubError, model_folder
from server.settings import ENV_PREFIX, Settings, SettingsError
from server.version import package_version

USAGE_ERROR = 2
INTERRUPTED = 130  # a shell's status for Ctrl-C

DESCRIPTION = "Serves models over OpenAI's API. Each option is an environment variable too: [NAME]."
USAGE = "%(prog)s [options] [MODEL ...]"


class UsageError(Exception):
    """What the user asked for can't be done; the message is one line."""


def _extra(name: str) -> Mapping[str, object]:
    """What the settings say about an option besides its type: group, flag, repeat, secret."""
    extra = Settings.model_fields[name].json_schema_extra
    assert isinstance(extra, dict)
    return extra


def _flag(name: str) -> str:
    return str(_extra(name).get("flag", "--" + name.replace("_", "-")))


def _help(name: str, field: FieldInfo) -> str:
    known = field.default_factory is None and field.default not in (None, "")
    default = f"; default: {field.default}" if known else ""
    return f"{field.description}{default} [{ENV_PREFIX}{name.upper()}]".replace("%", "%%")


def add_settings(parser: argparse.ArgumentParser) -> None:
    """One flag for each field of `Settings`, grouped. Values stay strings: `Settings` judges them."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, field in Settings.model_fields.items():
        title = str(_extra(name)["group"])
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        if field.annotation in (bool, bool | None):
            options: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        else:
            repeat = bool(_extra(name).get("repeat"))
            metavar = _flag(name).removeprefix("--").replace("-", "_").upper()
            options = {"action": "append" if repeat else "store", "metavar": metavar}
        groups[title].add_argument(_flag(name), dest=name, default=None, help=_help(name, field), **options)


def _origin(name: str, flag: str | None) -> str:
    """The option and its value as the user wrote them; a secret's value is left out."""
    variable = ENV_PREFIX + name.upper()
    value = os.environ.get(variable) if flag is None else flag
    shown = _flag(name) if _extra(name).get("secret") else f"{_flag(name)} {value}"
    return shown if flag is not None else f"{shown} (from {variable})"


def _given(args: argparse.Namespace, name: str) -> str | None:
    """A flag's value as the environment would say it: several are one with commas."""
    value = getattr(args, name)
    return ",".join(value) if isinstance(value, list) else value


def read_settings(args: argparse.Namespace) -> Settings:
    """Flags over environment over defaults; raises UsageError naming the option, its value and limit."""
    given: dict[str, Any] = {name: _given(args, name) for name in Settings.model_fields}
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        message = first["msg"].removeprefix("Value error, ")
        raise UsageError(f"{_origin(name, given[name])} is not valid: {message}") from None


def local_model(settings: Settings) -> Settings:
    """The settings with the model's folder, downloaded if need be, and its names as the user wrote them.

    Raises UsageError if there is no such model.
    """
    try:
        folder = model_folder(settings.model, settings.revision)
    except HubError as error:
        raise UsageError(f"--model: {error}") from None
    if not (folder / "config.json").is_file():
        raise UsageError(f"--model: the folder {str(folder)!r} has no config.json")
    return settings.model_copy(update={"model": str(folder), "served_model_name": settings.model_names})


def is_named(settings: Settings, words: Sequence[str]) -> bool:
    """Whether a model is named by itself, not by `--model-dir` alone: the first is loaded at once then."""
    return bool(words) or settings.model_dir is None or "model" in settings.model_fields_set


def served_models(settings: Settings, words: Sequence[str]) -> list[Settings]:
    """The settings of each model: those that are named, by `words` or the settings, then those of a folder.

    Downloads what isn't here. Raises UsageError for a model that can't be served, and for names that clash.
    """
    named = [_named(settings, word) for word in words]
    if not named and is_named(settings, words):
        named = [settings]
    for name in ("served_model_name", "revision"):
        if len(named) != 1 and getattr(settings, name) is not None:
            raise UsageError(f"{_flag(name)} is of one model, but {len(named)} are named one by one")
    models = [local_model(each) for each in named]
    known = {Path(each.model).resolve() for each in models}
    models += [each for each in _models_in_folder(settings) if Path(each.model).resolve() not in known]
    _check_names(models)
    most = min(settings.max_loaded or max(1, len(named)), len(models))
    return [each.model_copy(update={"max_loaded": most}) for each in models]


def _named(settings: Settings, word: str) -> Settings:
    """The settings of the model that a word of the command line means: MODEL or NAME=MODEL."""
    names, equals, model = word.partition("=")
    if not equals or Path(word).is_dir():
        return settings.model_copy(update={"model": word})
    if settings.served_model_name is not None:
        raise UsageError(f"the model's name is given twice: {word} and --served-model-name")
    found = [name.strip() for name in names.split(",")]
    if not all(found):
        raise UsageError(f"{word} has an empty name before =")
    return settings.model_copy(update={"model": model, "served_model_name": found})


def _models_in_folder(settings: Settings) -> list[Settings]:
    """Those of `--model-dir`, by name."""
    folder = settings.model_dir
    if folder is None:
        return []
    if not folder.is_dir():
        raise UsageError(f"--model-dir: there is no folder {str(folder)!r}")
    found = sorted(path.parent for path in folder.glob("*/config.json"))
    if not found:
        raise UsageError(f"--model-dir: no subfolder of {str(folder)!r} has a config.json")
    return [
        settings.model_copy(update={"model": str(path), "served_model_name": [path.name]}) for path in found
    ]


def _check_names(models: Sequence[Settings]) -> None:
    owners: dict[str, str] = {}
    for each in models if len(models) > 1 else ():
        for name in each.model_names:
            if name in owners:
                raise UsageError(
                    f"{owners[name]} and {each.model} are both named {name!r}; NAME=MODEL gives another name"
                )
            owners[name] = each.model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options, and the model as an argument of its own."""
    parser.add_argument(
        "checkpoint",
        nargs="*",
        metavar="MODEL",
        help="the same as --model: a folder or a Hugging Face id. Of several the first is loaded at once, "
        "each other by the first request for it. NAME=MODEL serves it under that name, A,B=MODEL under two",
    )
    add_settings(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serves until a signal arrives; returns the exit status. Raises UsageError."""
    words: list[str] = args.checkpoint
    if words and args.model is not None:
        raise UsageError(f"the model is given twice: {words[0]} and --model {args.model}")
    settings = read_settings(args)
    models = served_models(settings, words)
    # Here, lest `speed --help` wait a second for the web framework.
    from server.serve import serve  # noqa: PLC0415

    try:
        return serve(models, starts_first=is_named(settings, words))
    except SettingsError as error:
        raise UsageError(str(error)) from None


def wide_help(prog: str) -> argparse.HelpFormatter:
    """Help with room for long options beside their text."""
    return argparse.HelpFormatter(prog, max_help_position=34)


def exit_status(command: Callable[[], int]) -> int:
    """What `command` returns; 2, and a line on stderr, for what a user can mend; 130 for Ctrl-C."""
    try:
        return command()
    except (UsageError, HubError) as error:
        print(f"speed: error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:  # before the server's own handling of signals, or in another command
        return INTERRUPTED


def main(argv: list[str] | None = None) -> int:
    """`python -m server`; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m server", usage=USAGE, description=DESCRIPTION, formatter_class=wide_help
    )
    parser.add_argument("--version", action="version", version=f"speed {package_version()}")
    add_arguments(parser)
    return exit_status(lambda: run(parser.parse_args(argv)))
