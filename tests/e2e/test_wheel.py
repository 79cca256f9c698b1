"""Wheels hold the files that are there, and no others."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
BUILD = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"


def modules_of_a_wheel(tree: Path) -> set[str]:
    """Builds the wheel of a source tree, in the tree, and lists its modules."""
    command = [sys.executable, "-c", BUILD, str(tree / "wheels")]
    environment = {**os.environ, "SPEED_NATIVE": "0"}  # nothing is compiled here, which takes half a minute
    done = subprocess.run(command, cwd=tree, env=environment, check=True, capture_output=True, text=True)
    with zipfile.ZipFile(tree / "wheels" / done.stdout.split()[-1]) as wheel:
        return {name for name in wheel.namelist() if name.endswith(".py")}


def test_a_file_that_was_deleted_is_not_in_the_next_wheel(tmp_path: Path) -> None:
    """It came back through build/lib."""
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("model/__init__.py", "model/passes/__init__.py"):  # what setup.py imports
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    native = Path("model/passes/native")
    shutil.copytree(
        ROOT / native, tmp_path / native, ignore=shutil.ignore_patterns("compiled", "__pycache__")
    )
    (tmp_path / "server").mkdir()
    for name in ("__init__", "stays", "goes"):
        (tmp_path / "server" / f"{name}.py").write_text("")
    before = modules_of_a_wheel(tmp_path)
    assert {"server/stays.py", "server/goes.py"} <= before
    (tmp_path / "server" / "goes.py").unlink()
    assert modules_of_a_wheel(tmp_path) == before - {"server/goes.py"}


def test_what_compiles_the_library_needs_no_package() -> None:
    """`pip install .` runs it before any dependency is there; an import of numpy let every install fail."""
    command = [sys.executable, "-S", "-c", "import model.passes.native.build"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
