"""What pyproject.toml can't say: the native library is compiled into the wheel, nothing of an earlier one is.

Without ziglang, with SPEED_NATIVE=0 or when the compiler refuses, the wheel has no library: torch runs the
passes then, and the server says so at its start.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from model.passes.native.build import GLIBC, BuildError  # noqa: E402
from model.passes.native.build import build as compile_levels  # noqa: E402
from model.passes.native.library import LEVELS, PLACE, VARIABLE, machine  # noqa: E402


class CleanBuild(build):
    """Builds into an empty folder: setuptools packs all of build/lib, with files that were deleted since."""

    def run(self) -> None:
        """Empties the folder first."""
        if Path(self.build_lib).exists():
            shutil.rmtree(self.build_lib)
        super().run()


class BuildWithLibrary(build_py):
    """The Python files, and the library for this kind of machine where it can be compiled."""

    def run(self) -> None:
        """Builds both, or says why there is no library."""
        super().run()
        levels = [level for level in LEVELS if level.machine == machine()]
        if self.editable_mode or sys.platform != "linux" or not levels or os.environ.get(VARIABLE) == "0":
            return
        try:
            compile_levels(levels, Path(self.build_lib) / PLACE.relative_to(ROOT))
        except BuildError as error:
            print(f"no native library, torch will run all passes: {error}", file=sys.stderr)


class WheelOfThisPlatform(bdist_wheel):
    """For any Python 3, and for this kind of machine alone if the library is inside."""

    def get_tag(self) -> tuple[str, str, str]:
        """See bdist_wheel."""
        built = Path(self.get_finalized_command("build").build_lib)
        if not any(built.rglob("speed_*.so")):
            return "py3", "none", "any"
        return "py3", "none", f"manylinux_{GLIBC.replace('.', '_')}_{machine()}"


setup(cmdclass={"build": CleanBuild, "build_py": BuildWithLibrary, "bdist_wheel": WheelOfThisPlatform})
