"""`python -m bench.native_pass`: what a pass of the native library takes, by rows, threads, context and part.

Passes of all sizes and readings of as much memory take turns, so that a slow moment of the machine falls on
all; said are the least and the median of each. A pass can't be faster than its weights and keys are read:
"over reading" is its time over that of reading so many bytes with as many threads in the same run.
`--shape` takes random weights in the sizes of a known model: one layer's, packed once for every layer.
"""

import argparse
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple, get_args

import numpy as np
import torch
from tqdm import tqdm

from bench.latency import DEFAULT_MODEL
from bench.make_checkpoint import PRESETS
from bench.options import numbers, positive, reporting
from model.checkpoint.families import families_of
from model.checkpoint.loader import load_model
from model.machine import process_memory, usable_cores
from model.network.config import LoopedConfig
from model.network.int8 import quantize_linears
from model.network.looped import LoopedTransformer
from model.options import KVCacheDtypeName
from model.passes.kv import KV_DTYPES, head_bytes
from model.passes.native import structs
from model.passes.native.backend import NativeOptions, NativePasses, RowArrays
from model.passes.native.library import load
from model.passes.native.weights import allocate, release

WEIGHTS = ("float32", "bfloat16", "int8", "int4")
WIDTH = 13  # of a column
MOST_READOUTS = 8  # as many as decode at once; the other rows of a pass read a prompt


class Case(NamedTuple):
    """A size of pass: rows of one text that stand side by side, one in R of them in its first loop."""

    threads: int
    rows: int
    context: int


class Sample(NamedTuple):
    """Seconds of a pass and of its parts."""

    seconds: float
    parts: dict[str, float]


def rows_of(case: Case, num_loops: int, num_tokens: int) -> RowArrays:
    """The rows of a wave: later positions at earlier loops, the last ones over `context` positions."""
    order = np.arange(case.rows, dtype=np.int32)
    positions = (case.context - 1 + order // num_loops).astype(np.int32)
    return RowArrays(
        tokens=order % 7 + 5,
        positions=positions,
        loops=order % num_loops,
        tables=np.zeros(case.rows, np.int32),
        pages=np.arange(num_tokens // structs.PAGE, dtype=np.int32),
        ends=np.ones(case.rows, np.uint8),
    )


def pass_bytes(passes: NativePasses, case: Case, kv_dtype: torch.dtype) -> int:
    """What a pass reads: all weights, for a row enters and is read out; K/V of loops with a row."""
    config = passes.config
    loops = min(case.rows, config.num_loops)
    layers = config.num_block_layers * loops + config.num_prelude_layers + config.num_coda_layers
    each = 2 * config.num_kv_heads * head_bytes(config.head_dim, kv_dtype)
    return passes.packed.weight_bytes + layers * case.context * each


class Bench:
    """Passes of one packed model by one thread and by more, and a reading of as much memory."""

    def __init__(self, model: LoopedTransformer, args: argparse.Namespace) -> None:
        most = max(args.rows) + max(args.context)
        self.num_tokens = -(-most // structs.PAGE) * structs.PAGE
        self.repeats: int = args.repeats
        self.kv_dtype = KV_DTYPES[NativeOptions(kv_dtype=args.kv_cache_dtype).held_in]
        before = process_memory()
        self.passes = {
            threads: NativePasses(
                model,
                self.num_tokens,
                self.num_tokens,
                NativeOptions(threads=threads, int4=args.weights == "int4", kv_dtype=args.kv_cache_dtype),
            )
            for threads in args.threads
        }
        self.cases = [Case(t, n, c) for t in args.threads for c in args.context for n in args.rows]
        one = self.passes[args.threads[0]]
        self.packed_bytes, self.memory = one.packed.weight_bytes, process_memory() - before
        self._buffer = allocate(max(self.packed_bytes, 2**26), huge=True)
        self._buffer[:] = 1
        self._library = load(one.level)

    def read_seconds(self, threads: int) -> float:
        """Seconds that so many threads take to read the buffer, each a part of its own."""
        size = self._buffer.nbytes // threads
        starts = [self._buffer.ctypes.data + index * size for index in range(threads)]
        others = [threading.Thread(target=self._library.speed_stream, args=(s, size)) for s in starts[1:]]
        started = time.perf_counter()
        for other in others:
            other.start()
        self._library.speed_stream(starts[0], size)
        for other in others:
            other.join()
        return time.perf_counter() - started

    def run_case(self, case: Case) -> Sample:
        """One pass."""
        passes = self.passes[case.threads]
        rows = rows_of(case, passes.config.num_loops, self.num_tokens)
        readouts = np.arange(min(case.rows, MOST_READOUTS), dtype=np.int32)
        nothing = np.full(len(readouts), -1, np.int32)
        passes.times()
        started = time.perf_counter()
        passes.run(rows, readouts, nothing)
        return Sample(time.perf_counter() - started, passes.times())

    def measure(self) -> tuple[dict[int, float], dict[Case, list[Sample]]]:
        """Bytes a second by number of threads, and the samples of every case."""
        samples: dict[Case, list[Sample]] = defaultdict(list)
        reading: dict[int, float] = defaultdict(float)
        for turn in tqdm(range(self.repeats + 1), desc="rounds", unit="round", disable=None):
            for threads in self.passes:
                rate = self._buffer.nbytes / self.read_seconds(threads)
                reading[threads] = max(reading[threads], rate)
            for case in self.cases if turn % 2 else reversed(self.cases):
                sample = self.run_case(case)
                if turn:  # the first round warms up
                    samples[case].append(sample)
        return dict(reading), samples


def report(bench: Bench, reading: dict[int, float], samples: dict[Case, list[Sample]]) -> Iterator[str]:
    """Lines of a table."""
    for threads, rate in reading.items():
        yield f"memory is read at {rate / 1e9:.1f} GB/s by {threads} thread{'s' * (threads > 1)} at best"
    shown = [part for part in structs.PARTS if part not in ("enter", "join")]
    head = ("threads", "rows", "context", "MB", "least ms", "median", "over reading")
    yield "".join(f"{name:>{WIDTH}}" for name in (*head, *shown))
    for case in bench.cases:
        found = samples[case]
        seconds = [sample.seconds for sample in found]
        size = pass_bytes(bench.passes[case.threads], case, bench.kv_dtype)
        over = min(seconds) / (size / reading[case.threads])
        medians = [statistics.median(sample.parts[part] for sample in found) for part in shown]
        times = [min(seconds), statistics.median(seconds)]
        figures = [
            *(str(number) for number in case),
            f"{size / 1e6:.1f}",
            *(f"{each * 1e3:.2f}" for each in times),
            f"{over:.2f}x",
            *(f"{each * 1e3:.2f}" for each in medians),
        ]
        yield "".join(f"{figure:>{WIDTH}}" for figure in figures)


def random_model(config: LoopedConfig, dtype: torch.dtype) -> LoopedTransformer:
    """Random weights whose layers are one and the same in memory: only the packed ones are held in full."""
    with torch.device("meta"):
        model = LoopedTransformer(config)
    generator = torch.Generator().manual_seed(0)
    made: dict[str, torch.nn.Parameter] = {}
    for name, parameter in list(model.named_parameters()):
        owner, _, field = name.rpartition(".")
        kind = ".".join(part for part in name.split(".") if not part.isdigit())
        if kind not in made:
            tensor = torch.ones(parameter.shape, dtype=dtype)
            if parameter.ndim > 1:
                tensor.normal_(std=0.02, generator=generator)
            made[kind] = torch.nn.Parameter(tensor, requires_grad=False)
        setattr(model.get_submodule(owner), field, made[kind])
    return model


def load_for(args: argparse.Namespace) -> LoopedTransformer:
    """The model of the command line, its weights held as asked."""
    dtype = torch.bfloat16 if args.weights in ("bfloat16", "int4") else torch.float32
    if args.shape is None:
        return load_model(args.model, "cpu", dtype, int8=args.weights == "int8").model
    raw = PRESETS[args.shape]
    model = random_model(families_of(raw)[0].read_config(raw), dtype)
    if args.weights == "int8":
        quantize_linears(model)
    return model


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(prog="python -m bench.native_pass", description=__doc__)
    made.add_argument(
        "--model", default=str(DEFAULT_MODEL), help="folder or Hugging Face id (default: embedded)"
    )
    made.add_argument("--shape", choices=sorted(PRESETS), help="random weights in these sizes instead")
    made.add_argument("--weights", choices=WEIGHTS, default="int8")
    made.add_argument("--kv-cache-dtype", choices=get_args(KVCacheDtypeName), default="auto")
    made.add_argument("--rows", type=numbers, default="1,2,3,4,5,6,7,8", help="comma-separated")
    made.add_argument("--threads", type=numbers, help="comma-separated (default: 1 and all cores)")
    made.add_argument("--context", type=numbers, default="100", help="positions, comma-separated")
    made.add_argument("--repeats", type=positive, default=40, help="passes of each kind")
    return made


@reporting("python -m bench.native_pass")
def main() -> int:
    """The command line."""
    args = parser().parse_args()
    args.threads = args.threads or sorted({1, usable_cores()})
    torch.set_num_threads(1)
    started = time.perf_counter()
    model = load_for(args)
    bench = Bench(model, args)
    release(model)
    name = args.shape or args.model
    held_in = NativeOptions(kv_dtype=args.kv_cache_dtype).held_in
    print(
        f"{name}: {args.weights}, K/V in {held_in}, level {next(iter(bench.passes.values())).level.name}, ",
        end="",
    )
    print(f"{bench.packed_bytes / 1e6:.1f} MB packed, ready after {time.perf_counter() - started:.1f} s")
    reading, samples = bench.measure()
    for line in report(bench, reading, samples):
        print(line)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
