"""Compiles the cuda backend's kernels, without a GPU: `python -m tests.compile_kernels ARCH KIND...`.

Triton's compiler and ptxas need no device; only its driver is asked for one, and a stand-in answers. The
shapes are those of Ouro-1.4B. Prints a line of JSON for each kernel: its name, the architecture, and bytes of
shared memory and of registers that were spilled to memory.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from model.network.config import LoopedConfig
from model.network.layers import Rotary
from model.passes.cuda.operations import (
    Asked,
    Cache,
    Norms,
    Parts,
    Places,
    Shape,
    Tile,
    TritonOperations,
)
from model.passes.cuda.weights import Matrix

ROWS, HIDDEN, INNER, VOCAB = 4, 2048, 5632, 49152


class NoDevice:
    """What Triton's driver says where there is no device, for one architecture."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    map_python_to_cpp_type = CudaDriver.map_python_to_cpp_type


def compiling(compiled: list[Any]) -> Callable[[JITFunction, object], Callable[..., None]]:
    """What stands for `kernel[grid]`: compiles where it would launch."""

    def instead(kernel: JITFunction, grid: object) -> Callable[..., None]:
        def compile_it(*args: object, **kwargs: object) -> None:
            compiled.append(kernel.run(*args, grid=grid, warmup=True, **kwargs))

        return compile_it

    return instead


def launch_all(kind: str) -> None:
    """Launches every operation in the shapes of Ouro-1.4B, with weights of a kind."""
    config = LoopedConfig(
        family="ouro",
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_heads=16,
        num_kv_heads=16,
        head_dim=128,
        num_block_layers=24,
        num_loops=4,
        max_positions=64,
    )
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    cosines, sines = (table.flatten(1) for table in Rotary(config)(torch.arange(64), torch.float32))
    run = TritonOperations(Shape(config, dtype, cosines, sines, 16), Tile(), widen=False)

    def matrix(outputs: int, inputs: int) -> Matrix:
        stored = torch.empty(outputs, inputs, dtype=torch.int8 if kind == "int8" else dtype)
        return Matrix(stored, torch.empty(outputs) if kind == "int8" else None, None)

    x, state, norm = (
        torch.empty(ROWS, HIDDEN, dtype=dtype),
        torch.empty(ROWS, HIDDEN),
        torch.empty(HIDDEN, dtype=dtype),
    )
    column = torch.zeros(ROWS, dtype=torch.int64)
    places, cache = Places(*[column] * 6), Cache(*torch.empty(2, 64, 16, 128, dtype=dtype))
    queries = run.rotate(run.product(x, matrix(3 * HIDDEN, HIDDEN)), None, places, cache)
    attended = run.attend(queries, places, cache, 0)
    run.join(run.product(attended, matrix(HIDDEN, HIDDEN)), state, Norms(norm, None, norm))
    inside = run.gated(x, matrix(2 * INNER, HIDDEN))
    run.join(run.product(inside, matrix(HIDDEN, INNER)), state, Norms(norm, norm, None))
    run.join(None, state, Norms(next=norm))
    logits = Parts(torch.empty(1, ROWS, VOCAB), matrix(VOCAB, HIDDEN))
    run.choose(logits, Asked(column, column, torch.zeros(ROWS)))
    run.noise(column, column)


def compile_for(arch: int, kinds: list[str]) -> Iterator[dict[str, object]]:
    """All kernels, with weights of these kinds: fp32, bf16 or int8."""
    driver.set_active(NoDevice(arch))
    compiled: list[Any] = []
    JITFunction.__getitem__ = compiling(compiled)
    for kind in kinds:
        launch_all(kind)
    for kernel in {kernel.hash: kernel for kernel in compiled}.values():
        name, shared = kernel.metadata.name, kernel.metadata.shared
        yield {"kernel": name, "arch": arch, "shared": shared, "spilled": spilled(kernel.asm["cubin"])}


def spilled(code: bytes) -> int:
    """Bytes of a program's registers that lie in memory, by cuobjdump, which Triton brings along."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+) .*LOCAL:(\d+)", said)
    assert found, said
    return int(found[1]) + int(found[2])


if __name__ == "__main__":
    for line in compile_for(int(sys.argv[1]), sys.argv[2:]):
        print(json.dumps(line), flush=True)
