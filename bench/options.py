"""What the command lines of the benchmarks share: types of options, and errors told in one line.

Invariant: what can't be had is said before anything is measured, and with exit status 2.
"""

import argparse
import re
import sys
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import ParamSpec

P = ParamSpec("P")
USAGE_ERROR = 2


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option that is a whole number with a lower limit."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return value

    return number


positive, count = at_least(1), at_least(0)


def numbers(text: str) -> list[int]:
    """The type of an option that is several whole numbers, each at least 1, with commas between them."""
    return [positive(part) for part in text.split(",")]


def share(text: str) -> float:
    """The type of an option that is a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def rows(text: str) -> int | None:
    """The type of `--row-budget`: None for "auto"."""
    return None if text == "auto" else positive(text)


def device(text: str) -> str:
    """The type of `--device`."""
    if re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not auto, cpu, cuda or cuda:N")
    return text


def output_file(text: str) -> Path:
    """The type of a file to be written, in a folder that is there."""
    file = Path(text)
    if not file.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(file.parent)!r} to write {file.name!r} to")
    return file


def plot_file(text: str) -> Path:
    """The type of a plot to be written, which matplotlib must be there for."""
    if find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError(
            "a plot needs matplotlib, which is not installed: pip install '.[bench]'"
        )
    return output_file(text)


def study_parser(recipe: Path, description: str | None, runs: str, items: str) -> argparse.ArgumentParser:
    """What a study that trains its models and measures them is asked; `recipe` is named like its module.

    `runs` says what the folder of all runs holds, and `items` over what rounds of a measurement go.
    """
    parser = argparse.ArgumentParser(prog=f"python -m bench.{recipe.stem}", description=description)
    parser.add_argument("action", choices=("train", "measure"))
    parser.add_argument("--runs", type=Path, required=True, help=f"folder of {runs}")
    parser.add_argument("--recipe", type=Path, default=recipe)
    parser.add_argument("--threads", type=count, default=0, help="CPU threads (default: all)")
    parser.add_argument(
        "--max-minutes", type=float, default=24 * 60.0, help="train: of each model in this slice"
    )
    parser.add_argument(
        "--rounds", type=positive, default=3, help=f"measure: over all {items}; the median counts for each"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).with_name("results"),
        help="measure: folder of table and plot",
    )
    return parser


class Extra:
    """A package that not everybody has, imported at its first use; ValueError says what to install."""

    def __init__(self, name: str, extra: str = "bench") -> None:
        """`extra`: of this project, which brings the package."""
        self._name, self._extra = name, extra

    def __getattr__(self, attribute: str) -> object:
        try:
            found: object = getattr(import_module(self._name), attribute)
        except ImportError:
            raise ValueError(
                f"{self._name} is needed, which is not installed: pip install '.[{self._extra}]'"
            ) from None
        return found


def reporting(prog: str) -> Callable[[Callable[P, int]], Callable[P, int]]:
    """Wraps a command so that what a user can mend is one line on stderr and exit status 2."""

    def decorate(command: Callable[P, int]) -> Callable[P, int]:
        @wraps(command)
        def reported(*args: P.args, **kwargs: P.kwargs) -> int:
            try:
                return command(*args, **kwargs)
            except (OSError, ValueError) as error:
                print(f"{prog}: error: {error}", file=sys.stderr)
                return USAGE_ERROR

        return reported

    return decorate
