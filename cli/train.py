"""`speed train`: a looped model from a corpus, and with `speed train distill` from a teacher."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cli.arguments import fill
from cli.checkout import need

if TYPE_CHECKING:
    from cli.arguments import Commands


def add_to(commands: "Commands", given: Sequence[str]) -> None:
    """Adds the command; `given` is the command line."""
    parser = commands.add_parser("train", help="train a looped model; `train distill`: from a teacher")
    if list(given[:2]) == ["train", "distill"]:
        parser = parser.add_subparsers(metavar="way", required=True).add_parser("distill")
        fill(parser, ["train"], given, _add_distill)
    else:
        fill(parser, ["train"], given, _add_train)


def _add_train(parser: argparse.ArgumentParser) -> None:
    need("training")
    from training import main  # noqa: PLC0415

    main.add_arguments(parser)
    parser.set_defaults(run=main.run)


def _add_distill(parser: argparse.ArgumentParser) -> None:
    need("training")
    from training.distill import main  # noqa: PLC0415

    main.add_arguments(parser)
