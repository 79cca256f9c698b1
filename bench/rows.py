"""`python -m bench.rows --model FOLDER`: what further rows of a pass cost, by dtype and quantisation.

One loop of the block and the head, as a pass runs them, without attention: what is left is the reading of
the weights, which rows in flight share. Use a model that is larger than the CPU's caches.
"""

import argparse
import statistics
import time
from typing import NamedTuple

import torch
from torch import Tensor

from bench.bandwidth import weight_bytes_of_a_pass
from bench.options import positive, reporting
from model.checkpoint.hub import model_folder
from model.checkpoint.loader import DTYPES, load_model, load_skeleton
from model.network.int8 import quantize_linears
from model.network.looped import LoopedTransformer
from model.network.packed import pack_linears

ROWS = (1, 2, 4, 8, 16)
REPEATS = 7


class Kind(NamedTuple):
    """How the weights are held: a dtype of activations, and of weights unless they are quantised."""

    dtype: str
    quantization: str


KINDS = (Kind("float32", "none"), Kind("bfloat16", "none"), Kind("float32", "int8"), Kind("bfloat16", "int8"))


@torch.inference_mode()
def pass_seconds(model: LoopedTransformer, rows: int) -> float:
    """The median time of a loop and a readout of so many rows."""
    angles = model.angles(torch.arange(rows))
    state = torch.randn(rows, model.config.hidden_size).to(model.dtype)
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        model.readout(model.loop(state, state, angles, _no_attention), angles, _no_attention)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _no_attention(_layer: int, q: Tensor, _k: Tensor, _v: Tensor) -> Tensor:
    return q


@reporting("python -m bench.rows")
def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.rows", description="Times passes of one to sixteen rows."
    )
    parser.add_argument("--model", required=True, help="folder or Hugging Face id")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = model_folder(args.model)
    print(f"{'weights':<18}{'GB':>7}" + "".join(f"{rows:>8} rows" for rows in ROWS) + "   (ms)")
    for kind in KINDS:
        size = weight_bytes_of_a_pass(load_skeleton(folder), DTYPES[kind.dtype], kind.quantization)
        model = load_model(folder, "cpu", kind.dtype).model
        if kind.quantization == "int8":
            quantize_linears(model)
        pack_linears(model)
        times = "".join(f"{pass_seconds(model, rows) * 1e3:>13.1f}" for rows in ROWS)
        name = kind.dtype if kind.quantization == "none" else f"int8 ({kind.dtype})"
        print(f"{name:<18}{size / 1e9:>7.2f}{times}", flush=True)
        del model
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
