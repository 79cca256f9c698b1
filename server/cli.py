"""The command `speed`: serve, inspect, train, bench. Parses options; a command is imported when it runs.

Invariant: a wrong option, or a model that isn't there, is one line on stderr and exit status 2.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from model.hub import HubError, model_folder
from server.settings import ENV_PREFIX, Settings, SettingsError

USAGE_ERROR = 2


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


def _serve(args: argparse.Namespace) -> int:
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


def _wide(prog: str) -> argparse.HelpFormatter:
    """Help with room for long options beside their text."""
    return argparse.HelpFormatter(prog, max_help_position=34)


def _add_train(parser: argparse.ArgumentParser) -> None:
    from model.training import main as training  # noqa: PLC0415

    training.add_arguments(parser)
    parser.set_defaults(run=training.run)


def _add_distill(parser: argparse.ArgumentParser) -> None:
    from model.training.distill import main as distill  # noqa: PLC0415

    distill.add_arguments(parser)


def _add_latency(parser: argparse.ArgumentParser) -> None:
    from bench import latency  # noqa: PLC0415

    latency.add_arguments(parser)
    parser.set_defaults(run=latency.run)


def _add_throughput(parser: argparse.ArgumentParser) -> None:
    from bench import throughput  # noqa: PLC0415

    throughput.add_arguments(parser)
    parser.set_defaults(run=throughput.run)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    from model import inspect  # noqa: PLC0415

    inspect.add_arguments(parser)
    parser.set_defaults(run=inspect.run)


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", nargs="?", metavar="MODEL", help="the same as --model: a folder or a Hugging Face id"
    )
    add_settings(parser)
    parser.set_defaults(run=_serve)


def build_parser(argv: Iterable[str]) -> argparse.ArgumentParser:
    """The parser; arguments of a command are added only if `argv` names it, since some import torch."""
    given = list(argv)
    words = [word for word in given if not word.startswith("-")]
    parser = argparse.ArgumentParser(prog="speed", description="A server for looped language models.")
    commands = parser.add_subparsers(metavar="command", required=True)
    serve = commands.add_parser(
        "serve",
        help="serve a model over OpenAI's API",
        usage="%(prog)s [options] [MODEL]",
        description="Serves a model over OpenAI's API. Each option is an environment variable too: [NAME].",
        formatter_class=_wide,
    )
    inspect = commands.add_parser(
        "inspect", help="what a model is, what fits in memory, how good its loops are"
    )
    train = commands.add_parser("train", help="train a looped model; `train distill`: from a teacher")
    bench = commands.add_parser("bench", help="measure")
    benchmarks = bench.add_subparsers(metavar="benchmark", required=True)
    latency = benchmarks.add_parser("latency", help="passes and time per token, with and without speculation")
    throughput = benchmarks.add_parser("throughput", help="tokens/s over the number of requests at once")
    distill = given[:2] == ["train", "distill"]
    if distill:
        train = train.add_subparsers(metavar="way", required=True).add_parser("distill")
    for name, subparser, add in (
        (["serve"], serve, _add_serve),
        (["inspect"], inspect, _add_inspect),
        (["train"], train, _add_distill if distill else _add_train),
        (["bench", "latency"], latency, _add_latency),
        (["bench", "throughput"], throughput, _add_throughput),
    ):
        if words[: len(name)] == name:
            add(subparser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    args = build_parser(arguments).parse_args(arguments)
    try:
        status: int = args.run(args)
    except (UsageError, HubError) as error:
        print(f"speed: error: {error}", file=sys.stderr)
        return USAGE_ERROR
    return status


def _exit() -> NoReturn:
    sys.exit(main())


if __name__ == "__main__":
    _exit()
