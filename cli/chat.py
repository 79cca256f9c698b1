"""`speed chat`: a conversation in the terminal."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cli.arguments import fill
from cli.asking import add_options

if TYPE_CHECKING:
    from cli.arguments import Commands


def add_to(commands: "Commands", given: Sequence[str]) -> None:
    """Adds the command; `given` is the command line."""
    parser = commands.add_parser("chat", help="talk with a model in the terminal")
    fill(parser, ["chat"], given, _add_arguments)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Talks until the user has enough; 1 if a message was not answered. Raises UsageError."""
    # Here, lest `speed --help` take half as long again for the HTTP client (0.2 s).
    from cli.conversation import talk  # noqa: PLC0415

    return talk(args)
