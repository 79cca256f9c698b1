"""The command `serve`: its options, one for each setting, and what they come to.

Also `python -m server`. Imports no web framework before the server starts: `--help` is quick. Invariant: a
wrong option, or a model that isn't there, is one line on stderr and exit status 2.
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from model.checkpoint.hub import HubError, model_folder
from server.settings import ENV_PREFIX, Settings, SettingsError
from server.version import package_version

USAGE_ERROR = 2
INTERRUPTED = 130  # a shell's status for Ctrl-C

DESCRIPTION = "Serves a model over OpenAI's API. Each option is an environment variable too: [NAME]."
USAGE = "%(prog)s [options] [MODEL]"


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options, and the model as an argument of its own."""
    parser.add_argument(
        "checkpoint", nargs="?", metavar="MODEL", help="the same as --model: a folder or a Hugging Face id"
    )
    add_settings(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serves until a signal arrives; returns the exit status. Raises UsageError."""
    if args.checkpoint is not None:
        if args.model is not None:
            raise UsageError(f"the model is given twice: {args.checkpoint} and --model {args.model}")
        args.model = args.checkpoint
    settings = local_model(read_settings(args))
    # Here, lest `speed --help` wait a second for the web framework.
    from server.serve import serve  # noqa: PLC0415

    try:
        return serve(settings)
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
