"""Wheels hold the files that are there, and no others."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
BUILD = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"


def modules_of_a_wheel(tree: Path) -> set[str]:
    """Builds the wheel of a source tree, in the tree, and lists its modules."""
    done = subprocess.run(
        [sys.executable, "-c", BUILD, tree / "wheels"], cwd=tree, check=True, capture_output=True, text=True
    )
    with zipfile.ZipFile(tree / "wheels" / done.stdout.split()[-1]) as wheel:
        return {name for name in wheel.namelist() if name.endswith(".py")}


def test_a_file_that_was_deleted_is_not_in_the_next_wheel(tmp_path):
    """It came back through build/lib."""
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "server").mkdir()
    for name in ("__init__", "stays", "goes"):
        (tmp_path / "server" / f"{name}.py").write_text("")
    before = modules_of_a_wheel(tmp_path)
    assert {"server/stays.py", "server/goes.py"} <= before
    (tmp_path / "server" / "goes.py").unlink()
    assert modules_of_a_wheel(tmp_path) == before - {"server/goes.py"}
