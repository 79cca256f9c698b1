"""What pyproject.toml can't say: a wheel holds what is there now, nothing of an earlier build."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build import build


class CleanBuild(build):
    """Builds into an empty folder: setuptools packs all of build/lib, with files that were deleted since."""

    def run(self) -> None:
        """Empties the folder first."""
        if Path(self.build_lib).exists():
            shutil.rmtree(self.build_lib)
        super().run()


setup(cmdclass={"build": CleanBuild})
