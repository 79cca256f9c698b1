"""What a pass of the cuda backend takes, against one reading of its weights: `python -m bench.gpu_pass`.

Random weights in the sizes of a preset, made on the device. A case is a number of rows, each of a sequence
of its own at its last loop, with so many tokens before it, all read out; it runs as a CUDA graph and, for
comparison, kernel by kernel. Cases take turns, so that a slow moment falls on all; the time of a case is the
median of its rounds. The bandwidth is what a sum over memory reaches. Without a GPU plain operations run
instead of kernels: those times say nothing.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import triton
from tqdm import tqdm

from bench.bandwidth import memory_bandwidth
from bench.make_checkpoint import PRESETS
from bench.options import device, numbers, output_file, positive, reporting
from model.checkpoint.families import families_of
from model.checkpoint.loader import DTYPES
from model.network.config import LoopedConfig
from model.network.int8 import quantize_linears
from model.network.looped import LoopedTransformer
from model.passes.cuda.backend import PAGE_SIZE, CudaBackend, CudaOptions
from model.passes.cuda.graphs import Eager
from model.passes.cuda.inputs import COLUMNS, Ints, bucket_of
from model.passes.cuda.operations import Operations, Shape, Tile
from model.passes.cuda.passes import Kind
from model.passes.cuda.plain import PlainOperations
from model.worker.build import resolve_device

TINY = {  # a shape for trying the command out
    **PRESETS["ouro-1.4b"],
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
}
SHAPES = {**PRESETS, "tiny": TINY}
TILES = {  # rows, columns, inputs of a product; positions and slots of attention
    "default": Tile(),
    "wide": Tile(64, 64, 64, 64, 8),
    "deep": Tile(64, 32, 128, 64, 8),
    "flat": Tile(16, 32, 128, 64, 8),
    "flat and wide": Tile(16, 64, 64, 64, 8),
    "more slots": Tile(64, 32, 64, 64, 16),
    "small blocks": Tile(64, 32, 64, 32, 16),
}


class Case(NamedTuple):
    """A pass: the tile it is made of, whether it is captured, its rows, and the tokens before each."""

    tile: str
    graph: bool
    rows: int
    context: int


class Result(NamedTuple):
    """What a case took, in microseconds and over one reading of the weights."""

    case: Case
    us: float
    over_reading: float

    def __str__(self) -> str:
        tile, graph, rows, context = self.case
        return f"{tile:>14}{graph!s:>7}{rows:6}{context:9}{self.us:10.1f}{self.over_reading:13.2f}x"


def random_model(config: LoopedConfig, dtype: torch.dtype, place: torch.device) -> LoopedTransformer:
    """A model with random weights, made where it runs."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with place:
            return LoopedTransformer(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def plain(shape: Shape, tile: Tile) -> Operations:
    """What computes where there is no GPU."""
    del tile
    return PlainOperations(shape)


def options_for(tile: str, place: torch.device) -> CudaOptions:
    """The backend of a case's tile; passes of either kind are timed with it."""
    options = CudaOptions(tile=TILES[tile])
    return options if place.type == "cuda" else dataclasses.replace(options, operations=plain)


class Bench:
    """A backend for each tile, one after the other: each holds its captured passes."""

    def __init__(self, model: LoopedTransformer, args: argparse.Namespace) -> None:
        self.model, self.args = model, args
        self.place = model.device
        self.pages_of_a_row = -(-(max(args.context) + 1) // PAGE_SIZE)

    def cases(self, tile: str) -> list[Case]:
        """All that is timed with a tile; graphs exist on a GPU alone."""
        ways = (True, False) if self.place.type == "cuda" else (False,)
        return [Case(tile, way, n, c) for c in self.args.context for n in self.args.rows for way in ways]

    def measure(self, tile: str) -> dict[Case, float]:
        """Seconds of each case with this tile."""
        num_tokens = max(self.args.rows) * self.pages_of_a_row * PAGE_SIZE
        most = max(self.args.context) + 1
        backend = options_for(tile, self.place).make(self.model, num_tokens, most)
        seconds: dict[Case, list[float]] = {case: [] for case in self.cases(tile)}
        for turn in tqdm(range(self.args.repeats + 1), desc=tile, unit="round", disable=None):
            for case, found in seconds.items():
                once = self._once(backend, case)
                if turn:  # the first round compiles and warms up
                    found.append(once)
        return {case: statistics.median(found) for case, found in seconds.items()}

    def _once(self, backend: CudaBackend, case: Case) -> float:
        """Seconds that a pass takes on the device."""
        bucket = bucket_of(case.rows)
        buffers = backend.buffers(bucket)
        buffers.fill(self._numbers(case, bucket, backend.cache.spare))
        kind = Kind(bucket, False, backend.model.config.num_coda_layers > 0, True)
        runner = backend.runner if case.graph else Eager(backend.step)
        with torch.inference_mode():
            if self.place.type != "cuda":
                started = time.perf_counter()
                runner.run(kind, buffers)
                return time.perf_counter() - started
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            runner.run(kind, buffers)
            end.record()
            torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def _numbers(self, case: Case, bucket: int, spare: int) -> Ints:
        """The columns of a pass of rows that each have pages of their own."""
        row = np.arange(case.rows)
        first = row * self.pages_of_a_row * PAGE_SIZE
        loop = self.model.config.num_loops - 1
        found = {name: np.zeros(bucket, np.int64) for name in COLUMNS}
        for name in ("cells", "entering_cells", "coda_cells"):
            found[name][:] = spare
        found["temperatures"].view(np.float64)[:] = -1.0
        values = {
            "positions": case.context,
            "cells": first + case.context,
            "loops": loop,
            "offsets": loop * (spare + 1),
            "ends": case.context + 1,
            "coda_cells": first + case.context,
            "coda_ends": case.context + 1,
            "tables": row * self.pages_of_a_row,
            "read_rows": row,
            "temperatures": 0,  # the bits of 0.0: the likeliest token
        }
        for name, value in values.items():
            found[name][: case.rows] = value
        pages = np.arange(case.rows * self.pages_of_a_row)
        return np.concatenate([*(found[name] for name in COLUMNS), pages])


def weight_bytes(model: LoopedTransformer) -> int:
    """Bytes of the matrices of a pass of looping rows that are read out; the prelude runs for others."""
    layers = [model.layers[index] for index in (*model.config.block, *model.config.coda)]
    parts = [*layers, model.head]
    return sum(t.nbytes for part in parts for t in part.state_dict().values() if t.ndim == 2)


def results(bench: Bench, bandwidth: float) -> Iterator[Result]:
    """What each case took, tile by tile."""
    size = weight_bytes(bench.model)
    for tile in bench.args.tiles:
        for case, seconds in bench.measure(tile).items():
            least = size / bandwidth
            yield Result(case, seconds * 1e6, seconds / least)


def facts(place: torch.device) -> dict[str, object]:
    """The machine, as far as times depend on it."""
    found: dict[str, object] = {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "device": str(place),
    }
    if place.type == "cuda":
        about = torch.cuda.get_device_properties(place)
        found |= {"name": about.name, "multiprocessors": about.multi_processor_count}
        found |= {"memory_bytes": about.total_memory, "cuda": torch.version.cuda}
    return found


def _tiles(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in TILES:
            raise argparse.ArgumentTypeError(f"{name!r} is not a tile; {', '.join(TILES)} are")
    return names


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(prog="python -m bench.gpu_pass", description=__doc__)
    made.add_argument("--shape", choices=sorted(SHAPES), default="ouro-1.4b", help="sizes of the model")
    made.add_argument("--device", type=device, default="auto", help="auto, cpu, cuda, cuda:i")
    made.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    made.add_argument("--int8", action="store_true", help="weights in int8, by channel")
    made.add_argument("--rows", type=numbers, default="1,2,4,8,16,32,64", help="comma-separated")
    made.add_argument("--context", type=numbers, default="128,1024", help="tokens, comma-separated")
    made.add_argument("--tiles", type=_tiles, default="default", help=f"of {', '.join(TILES)}")
    made.add_argument("--repeats", type=positive, default=20, help="rounds")
    made.add_argument("--buffer", type=positive, default=2**31, help="bytes read to measure the bandwidth")
    made.add_argument(
        "--output", type=output_file, default=Path("gpu_pass.json"), help="a file for the results"
    )
    return made


@reporting("python -m bench.gpu_pass")
def main() -> int:
    """The command line; results are written after every tile."""
    args = parser().parse_args()
    place = resolve_device(args.device)
    raw = SHAPES[args.shape]
    model = random_model(families_of(raw)[0].read_config(raw), DTYPES[args.dtype], place)
    if args.int8:
        quantize_linears(model)
    bandwidth = memory_bandwidth(place, args.buffer)
    report = {**facts(place), "shape": args.shape, "dtype": args.dtype, "int8": args.int8}
    report |= {"bytes_per_second": bandwidth, "weight_bytes": weight_bytes(model)}
    print(json.dumps(report))
    print(f"{'tile':>14}{'graph':>7}{'rows':>6}{'context':>9}{'us':>10}{'over reading':>14}")
    cases: list[dict[str, object]] = []
    for result in results(Bench(model, args), bandwidth):
        cases.append({**result.case._asdict(), "us": result.us, "over_reading": result.over_reading})
        print(result)
        args.output.write_text(json.dumps({**report, "cases": cases}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
