"""Every kernel of the cuda backend goes through Triton's compiler and ptxas, which need no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.loose import Json

ROOT = Path(__file__).resolve().parents[2]
SHARED = 163840  # bytes of shared memory that a program may have on an A100; an H100 gives more
KERNELS = {
    "product",
    "gated",
    "join",
    "rotate",
    "attend",
    "combine",
    "noise",
    "best_of_blocks",
    "best_of_all",
}


def test_kernels_are_compiled_for_an_h100_in_the_shapes_of_ouro(tmp_path: Path) -> None:
    """In a process of its own: this one has Triton's interpreter. What is compiled is told line by line."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.compile_kernels", "90", "bf16", "int8"],
        cwd=ROOT,
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    compiled: list[Json] = list(map(json.loads, done.stdout.splitlines()))
    assert {kernel["kernel"] for kernel in compiled} == KERNELS
    assert all(kernel["spilled"] == 0 for kernel in compiled)
    assert max(kernel["shared"] for kernel in compiled) <= SHARED
