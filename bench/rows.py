"""`python -m bench.rows --model FOLDER`: what further rows of a native pass cost, by type of weights.

One loop of the block and the head at the beginning of a text, so that what is left is the reading of the
weights, which rows in flight share. Use a model that is larger than the CPU's caches.
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench.bandwidth import weight_bytes_of_a_pass
from bench.options import count, reporting
from model.checkpoint.hub import model_folder
from model.checkpoint.loader import DTYPES, load_model, load_skeleton
from model.machine import usable_cores
from model.passes.native.backend import NativeOptions, NativePasses, RowArrays

ROWS = (1, 2, 4, 8, 16)
REPEATS = 15
PAGE = 16


class Kind(NamedTuple):
    """How the weights are held."""

    name: str
    dtype: str = "float32"
    int8: bool = False
    int4: bool = False
    bytes_per_weight: float = 4.0


KINDS = (
    Kind("float32"),
    Kind("bfloat16", dtype="bfloat16", bytes_per_weight=2.0),
    Kind("int8", int8=True, bytes_per_weight=1.0),
    Kind("int4", int4=True, bytes_per_weight=0.5625),  # a half, and 16 bits for 32 of them
)


def passes_of(folder: Path, kind: Kind, threads: int) -> NativePasses:
    """A model, and room for as many texts as the largest pass has rows."""
    model = load_model(folder, "cpu", kind.dtype, int8=kind.int8).model
    return NativePasses(model, ROWS[-1] * PAGE, PAGE, NativeOptions(threads=threads, int4=kind.int4))


def pass_seconds(passes: NativePasses, num_rows: int) -> float:
    """The least time of a last loop and a readout of so many rows, the first ones of texts of their own."""
    nothing, all_rows = np.zeros(num_rows, np.int32), np.arange(num_rows, dtype=np.int32)
    last = np.full(num_rows, passes.config.num_loops - 1, np.int32)
    ends = np.ones(num_rows, np.uint8)
    rows = RowArrays(nothing, nothing, last, tables=all_rows, pages=all_rows, ends=ends)
    best = float("inf")
    for _ in range(REPEATS):
        started = time.perf_counter()
        passes.run(rows, all_rows, np.full(num_rows, -1, np.int32))
        best = min(best, time.perf_counter() - started)
    return best


@reporting("python -m bench.rows")
def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.rows", description="Times passes of one to sixteen rows."
    )
    parser.add_argument("--model", required=True, help="folder or Hugging Face id")
    parser.add_argument("--threads", type=count, default=0, help="CPU threads (default: all)")
    args = parser.parse_args()
    folder = model_folder(args.model)
    print(f"{'weights':<10}{'GB':>7}" + "".join(f"{rows:>8} rows" for rows in ROWS) + "   (ms)")
    size = weight_bytes_of_a_pass(load_skeleton(folder), DTYPES["float32"], "none") / 4e9
    for kind in KINDS:
        passes = passes_of(folder, kind, args.threads or usable_cores())
        times = "".join(f"{pass_seconds(passes, rows) * 1e3:>13.2f}" for rows in ROWS)
        print(f"{kind.name:<10}{size * kind.bytes_per_weight:>7.2f}{times}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
