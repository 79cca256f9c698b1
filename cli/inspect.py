"""`speed inspect`: what a model is, what fits in memory, how good its loops are."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cli.arguments import fill

if TYPE_CHECKING:
    from cli.arguments import Commands


def add_to(commands: "Commands", given: Sequence[str]) -> None:
    """Adds the command; `given` is the command line."""
    parser = commands.add_parser(
        "inspect", help="what a model is, what fits in memory, how good its loops are"
    )
    fill(parser, ["inspect"], given, _add_arguments)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    from model.study import facts  # noqa: PLC0415

    facts.add_arguments(parser)
    parser.set_defaults(run=facts.run)
