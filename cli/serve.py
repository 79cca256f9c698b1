"""`speed serve`: a model over OpenAI's API."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cli.arguments import fill
from server import command
from server.command import wide_help

if TYPE_CHECKING:
    from cli.arguments import Commands


def add_to(commands: "Commands", given: Sequence[str]) -> None:
    """Adds the command; `given` is the command line."""
    parser = commands.add_parser(
        "serve",
        help="serve a model over OpenAI's API",
        usage=command.USAGE,
        description=command.DESCRIPTION,
        formatter_class=wide_help,
    )
    fill(parser, ["serve"], given, command.add_arguments)
