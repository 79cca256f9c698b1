"""The native library of this checkout, in place before the first test that needs it.

Tests import model/ from the checkout, where no installation has left a library. It is taken from the
installed package where that was built from the same sources, as in CI; else it is compiled, once for each
change of a source. With SPEED_NATIVE=0 there is none: torch runs all passes, and tests marked `native` are
skipped.
"""

import os
import shutil
import sys
from importlib import metadata
from pathlib import Path

import pytest
from filelock import FileLock

from model.passes.native import build
from model.passes.native.library import FOLDER, LEVELS, VARIABLE, Level

HAS_LIBRARY = sys.platform == "linux" and os.environ.get(VARIABLE) != "0"
PACKAGE = build.SOURCES.parent  # not FOLDER's: SPEED_NATIVE_FOLDER may lie elsewhere


def put_in_place() -> None:
    """Every level that runs on this CPU; ends the run, with the command to give, where that can't be."""
    if not HAS_LIBRARY:
        return
    FOLDER.mkdir(exist_ok=True)
    with FileLock(FOLDER / "lock"):  # tests run in several processes
        _put_in_place()


def _put_in_place() -> None:
    missing = [level for level in LEVELS if level.runs_here and not is_fresh(level)]
    missing = [level for level in missing if not copy_installed(level)]
    if not missing:
        return
    try:
        build.build(missing)
    except build.BuildError as error:
        pytest.exit(
            f"no native library for the tests: {error}\n"
            "`pip install '.[native]'` and `python -m model.passes.native.build` compile it; "
            f"with {VARIABLE}=0 torch runs all passes",
            returncode=pytest.ExitCode.USAGE_ERROR,
        )


def inputs(package: Path) -> list[Path]:
    """All that a library is made of."""
    return sorted([*(package / "src").iterdir(), package / "build.py", package / "library.py"])


def is_fresh(level: Level) -> bool:
    """Whether the library was compiled since any source was changed."""
    newest = max(path.stat().st_mtime for path in inputs(PACKAGE))
    return level.path.is_file() and level.path.stat().st_mtime >= newest


def copy_installed(level: Level) -> bool:
    """Whether the installed package had a library of the same sources, which is here now."""
    try:
        installed = Path(str(metadata.distribution("speed-serve").locate_file("model/passes/native")))
    except metadata.PackageNotFoundError:
        return False
    library = installed / FOLDER.name / level.path.name
    if installed == PACKAGE or not library.is_file():
        return False
    ours, theirs = (
        {path.name: path.read_bytes() for path in inputs(package)} for package in (PACKAGE, installed)
    )
    if ours != theirs:
        return False
    partial = level.path.with_suffix(".partial")
    shutil.copyfile(library, partial)
    partial.replace(level.path)
    return True
