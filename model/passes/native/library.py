"""Finding and loading the compiled library: one file for each level of CPU instructions.

Knows nothing about models. Invariant: a library that `load` returns has the interface that this package was
written for, and runs on this CPU.
"""

import ctypes
import os
import platform
from functools import cache
from pathlib import Path
from typing import NamedTuple

from model.passes.native import structs

PLACE = Path(__file__).parent / "compiled"
FOLDER = Path(os.environ.get("SPEED_NATIVE_FOLDER") or PLACE)  # another one: libraries that check themselves
VARIABLE = "SPEED_NATIVE"  # 0: no native passes; a level's name: this one


class NativeUnavailableError(RuntimeError):
    """There is no library that can run here, or not for this model; the message says why."""


class Level(NamedTuple):
    """A set of CPU instructions that the library is compiled for."""

    name: str
    machine: str  # as platform.machine() says it
    flags: str  # of /proc/cpuinfo, all of which are needed
    cpu: str  # for the compiler

    @property
    def path(self) -> Path:
        """Where the compiled library lies."""
        return FOLDER / f"speed_{self.machine}_{self.name}.so"

    @property
    def runs_here(self) -> bool:
        """Whether this CPU has all of its instructions."""
        return machine() == self.machine and set(self.flags.split()) <= _cpu_flags()


_AVX2 = "avx avx2 bmi1 bmi2 f16c fma movbe"
_AVX512 = f"{_AVX2} avx512f avx512bw avx512cd avx512dq avx512vl avx512_vnni avx512_bf16"
LEVELS = (  # the best first
    Level("avx512", "x86_64", _AVX512, "x86_64_v4+avx512vnni+avx512bf16"),
    Level("avx2", "x86_64", _AVX2, "x86_64_v3"),
    Level("portable", "x86_64", "", "x86_64"),
    Level("portable", "aarch64", "", "generic"),
)


def usable_levels() -> list[Level]:
    """The levels that are compiled and run on this CPU, the best first."""
    return [level for level in LEVELS if level.runs_here and level.path.is_file()]


def choose(name: str | None = None) -> Level:
    """The level called `name`, else the one that the environment names, else the best one.

    Raises NativeUnavailableError, with the reason, where there is none.
    """
    name = name or os.environ.get(VARIABLE) or None
    if name == "0":
        raise NativeUnavailableError(f"{VARIABLE} is 0")
    known = sorted({level.name for level in LEVELS})
    if name and name not in known:
        raise NativeUnavailableError(f"native level {name!r} is not known; {', '.join(known)} are")
    for level in LEVELS:
        if level.runs_here and name in {None, level.name} and level.path.is_file():
            return level
    what = f"level {name!r}" if name else "library"
    raise NativeUnavailableError(
        f"no native {what} for this {machine()} CPU in {FOLDER.name}/; "
        "`python -m model.passes.native.build` compiles it"
    )


@cache
def load(level: Level) -> ctypes.CDLL:
    """The library of a level. Raises NativeUnavailableError if it can't be loaded or doesn't fit."""
    try:
        library = ctypes.CDLL(str(level.path))  # its functions run without the interpreter's lock
        structs.declare(library)
    except (OSError, AttributeError) as error:
        raise NativeUnavailableError(f"the native library {level.path.name} is of no use: {error}") from error
    wanted = [*structs.SIZES, *structs.SAMPLING_SIZES]
    sizes = (ctypes.c_int32 * len(wanted))()
    interface = library.speed_interface()
    if interface == structs.INTERFACE:
        library.speed_sizes(sizes)
        offset = len(structs.SIZES) * ctypes.sizeof(ctypes.c_int32)
        library.speed_sampling_sizes(
            (ctypes.c_int32 * len(structs.SAMPLING_SIZES)).from_buffer(sizes, offset)
        )
    if interface != structs.INTERFACE or list(sizes) != wanted:
        raise NativeUnavailableError(
            f"the native library {level.path.name} has interface {interface} and structures of {list(sizes)} "
            f"bytes; {structs.INTERFACE} and {wanted} are wanted: compile it again"
        )
    return library


def machine() -> str:
    """This machine's kind of CPU, by one of its names."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


@cache
def _cpu_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return frozenset()
    lines = (line.partition(":") for line in text.splitlines())
    flags = next((value for key, _, value in lines if key.strip() == "flags"), "")
    return frozenset(flags.split())
