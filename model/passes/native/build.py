"""`python -m model.passes.native.build`: compiles the library with the compiler in PyPI's ziglang.

Needs no system compiler and no headers of one: the sources are freestanding C++, and only libc is linked, of
a version that every distribution since 2019 has. Knows nothing of the package around it (it also runs before
that is installed). Invariant: a library is put in place whole or not at all.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from model.passes.native.library import LEVELS, Level, machine

SOURCES = Path(__file__).parent / "src"
GLIBC = "2.28"
FLAGS = [
    *("-std=c++20", "-shared", "-fPIC", "-fvisibility=hidden", "-nostdlib++"),
    *("-fno-exceptions", "-fno-rtti", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-psabi"),
]
FAST = ["-O3", "-s"]
# The compiler brings a runtime for undefined behaviour, which ends the process at the first one. That for
# addresses is GCC's libasan, to be preloaded: see scripts/sanitize.
SANITIZED = ["-O1", "-g", "-fno-omit-frame-pointer"]
SANITIZERS = ("address", "undefined")


class BuildError(RuntimeError):
    """The compiler is missing or refused; the message is what it said."""


def build(levels: Sequence[Level], folder: Path | None = None, sanitizer: str | None = None) -> list[Path]:
    """Compiles the levels side by side, into `folder` or each to its place; the files.

    With one of SANITIZERS the library checks itself while it runs, many times slower.

    Raises BuildError with all that went wrong.
    """
    if importlib.util.find_spec("ziglang") is None:
        raise BuildError("the Python package ziglang, which brings the compiler, is not installed")
    targets = [folder / level.path.name if folder else level.path for level in levels]
    with tempfile.TemporaryDirectory() as cache, ThreadPoolExecutor(os.cpu_count()) as pool:
        flags = [*SANITIZED, f"-fsanitize={sanitizer}"] if sanitizer else FAST
        problems = list(
            pool.map(lambda level, target: _compile(level, target, Path(cache), flags), levels, targets)
        )
    if found := [problem for problem in problems if problem]:
        raise BuildError("\n".join(found))
    return targets


def _compile(level: Level, target: Path, cache: Path, flags: list[str]) -> str:
    """What went wrong, or nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    command = [
        *(sys.executable, "-m", "ziglang", "c++", "-target", f"{level.machine}-linux-gnu.{GLIBC}"),
        *(f"-mcpu={level.cpu}", f'-DLEVEL="{level.name}"', *FLAGS, *flags),
        *(str(path) for path in sorted(SOURCES.glob("*.cpp"))),
        *("-lpthread", "-o", str(partial)),
    ]
    environment = dict(os.environ)
    environment.setdefault("ZIG_GLOBAL_CACHE_DIR", str(cache / "global"))
    environment.setdefault("ZIG_LOCAL_CACHE_DIR", str(cache / level.path.stem))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"{level.name} for {level.machine}: {done.stderr.strip()}"
    os.replace(partial, target)
    return ""


def main() -> int:
    """Compiles levels; 0 if all went well."""
    parser = argparse.ArgumentParser(prog="python -m model.passes.native.build", description=__doc__)
    names = sorted({level.name for level in LEVELS})
    parser.add_argument("--level", action="append", choices=names, help="default: all")
    parser.add_argument("--machine", action="append", help="x86_64 or aarch64; default: this one's")
    parser.add_argument("--sanitize", choices=SANITIZERS, help="a slow library that checks itself")
    parser.add_argument("--folder", type=Path, help="default: in the source tree, where it is looked for")
    args = parser.parse_args()
    levels = [
        level
        for level in LEVELS
        if (not args.level or level.name in args.level) and level.machine in (args.machine or [machine()])
    ]
    started = time.perf_counter()
    try:
        for path in build(levels, args.folder, args.sanitize):
            print(f"{path.name}: {path.stat().st_size / 1e3:.0f} KB")
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{time.perf_counter() - started:.1f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
