"""`speed complete`: a text that goes on from a prompt, which is an argument or comes from standard input."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cli.arguments import fill
from cli.asking import add_options, fields_of

if TYPE_CHECKING:
    from cli.arguments import Commands

MAX_TOKENS = 128  # unless another number is asked for


def add_to(commands: "Commands", given: Sequence[str]) -> None:
    """Adds the command; `given` is the command line."""
    parser = commands.add_parser("complete", help="continue a text in the terminal")
    fill(parser, ["complete"], given, _add_arguments)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="default: all of standard input")
    add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Continues the prompt; 1 if that was interrupted or failed. Raises UsageError."""
    # Here, lest `speed --help` take half as long again for the HTTP client (0.2 s).
    from cli.answers import Shown  # noqa: PLC0415
    from cli.connection import connected  # noqa: PLC0415

    prompt = args.prompt
    if prompt is None:
        if sys.stdin.isatty():
            print("(the prompt, and Ctrl-D at its end)", file=sys.stderr)
        prompt = sys.stdin.read()
    with connected(args.model, args.url) as connection:
        body = {"prompt": prompt, "max_tokens": MAX_TOKENS, **fields_of(args)}
        return 0 if Shown().show(connection.stream("/v1/completions", body)) else 1
