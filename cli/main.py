"""The command `speed`: puts the commands together, one module each, and runs the one that is asked for.

Invariant: a wrong option, or a model that isn't there, is one line on stderr and exit status 2.
"""

import argparse
import sys
from collections.abc import Iterable
from typing import NoReturn

import shtab

from cli import bench, chat, complete, export, inspect, serve, train
from cli.arguments import COMPLETION
from server.command import UsageError, exit_status
from server.version import package_version

__all__ = ["UsageError", "build_parser", "main"]


def build_parser(argv: Iterable[str]) -> argparse.ArgumentParser:
    """The parser; arguments of a command are added only if `argv` names it, since some import torch."""
    given = list(argv)
    parser = argparse.ArgumentParser(prog="speed", description="A server for looped language models.")
    parser.add_argument("--version", action="version", version=f"speed {package_version()}")
    shtab.add_argument_to(parser, COMPLETION, help="print what makes a shell complete this command's options")
    commands = parser.add_subparsers(metavar="command", required=True)
    for command in (serve, chat, complete, inspect, export, train, bench):
        command.add_to(commands, given)
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
