"""`speed export MODEL --gguf FILE`: a looped model as llama.cpp reads it."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cli.arguments import fill
from server.command import USAGE_ERROR

if TYPE_CHECKING:
    from cli.arguments import Commands


def add_to(commands: "Commands", given: Sequence[str]) -> None:
    """Adds the command; `given` is the command line."""
    parser = commands.add_parser("export", help="write a model of Nanbeige's layout as a GGUF file")
    fill(parser, ["export"], given, _add_arguments)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    from model.checkpoint.gguf_file import MATRIX_TYPES  # noqa: PLC0415

    parser.add_argument("model", help="folder or Hugging Face id")
    parser.add_argument("--revision", default=None, help="branch, tag or commit of a Hugging Face id")
    parser.add_argument("--gguf", type=Path, required=True, metavar="FILE", help="file to write")
    parser.add_argument("--type", default="q8_0", choices=MATRIX_TYPES, help="of matrices (default: q8_0)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command; 2 for what the user can mend."""
    from model.checkpoint.gguf_file import write_gguf  # noqa: PLC0415
    from model.checkpoint.hub import model_folder  # noqa: PLC0415

    try:
        size = write_gguf(model_folder(args.model, args.revision), args.gguf, args.type)
    except ModuleNotFoundError as error:
        print(f"speed: error: {error}; pip install '.[export]' brings it", file=sys.stderr)
        return USAGE_ERROR
    except (ValueError, OSError) as error:
        print(f"speed: error: {error}", file=sys.stderr)
        return USAGE_ERROR
    print(f"{args.gguf}: {size / 1e6:.1f} MB")
    return 0
