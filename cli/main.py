"""The command `speed`: serve, inspect, train, bench. Parses options; a command is imported when it runs.

Invariant: a wrong option, or a model that isn't there, is one line on stderr and exit status 2.
"""

import argparse
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import NoReturn

import shtab

from cli.checkout import need
from server import command as serving
from server.command import UsageError, exit_status, wide_help
from server.version import package_version

__all__ = ["UsageError", "build_parser", "main"]

COMPLETION = "--print-completion"


def _add_train(parser: argparse.ArgumentParser) -> None:
    need("training")
    from training import main as training  # noqa: PLC0415

    training.add_arguments(parser)
    parser.set_defaults(run=training.run)


def _add_distill(parser: argparse.ArgumentParser) -> None:
    need("training")
    from training.distill import main as distill  # noqa: PLC0415

    distill.add_arguments(parser)


def _add_latency(parser: argparse.ArgumentParser) -> None:
    need("bench")
    from bench import latency  # noqa: PLC0415

    latency.add_arguments(parser)
    parser.set_defaults(run=latency.run)


def _add_throughput(parser: argparse.ArgumentParser) -> None:
    need("bench")
    from bench import throughput  # noqa: PLC0415

    throughput.add_arguments(parser)
    parser.set_defaults(run=throughput.run)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    from model.study import facts as inspect  # noqa: PLC0415

    inspect.add_arguments(parser)
    parser.set_defaults(run=inspect.run)


def build_parser(argv: Iterable[str]) -> argparse.ArgumentParser:
    """The parser; arguments of a command are added only if `argv` names it, since some import torch."""
    given = list(argv)
    words = [word for word in given if not word.startswith("-")]
    parser = argparse.ArgumentParser(prog="speed", description="A server for looped language models.")
    parser.add_argument("--version", action="version", version=f"speed {package_version()}")
    shtab.add_argument_to(parser, COMPLETION, help="print what makes a shell complete this command's options")
    commands = parser.add_subparsers(metavar="command", required=True)
    serve = commands.add_parser(
        "serve",
        help="serve a model over OpenAI's API",
        usage=serving.USAGE,
        description=serving.DESCRIPTION,
        formatter_class=wide_help,
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
        (["serve"], serve, serving.add_arguments),
        (["inspect"], inspect, _add_inspect),
        (["train"], train, _add_distill if distill else _add_train),
        (["bench", "latency"], latency, _add_latency),
        (["bench", "throughput"], throughput, _add_throughput),
    ):
        if words[: len(name)] == name:
            add(subparser)
        elif COMPLETION in given:
            with suppress(UsageError):  # a command that only a checkout has
                add(subparser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit status."""
    arguments = sys.argv[1:] if argv is None else argv

    def command() -> int:
        args = build_parser(arguments).parse_args(arguments)
        status: int = args.run(args)
        return status

    return exit_status(command)


def _exit() -> NoReturn:
    sys.exit(main())


if __name__ == "__main__":
    _exit()
