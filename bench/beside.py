"""`python -m bench.beside`: our passes beside a neighbour that never sleeps, and beside torch's.

Two things of one request, on the native library and on torch, in turn: tokens/s of a decoded answer, and
the seconds until a long prompt is read. Each is measured alone and beside one process that turns for ever,
which is stopped in between.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from tqdm import tqdm

from bench.latency import DEFAULT_MODEL
from bench.options import numbers, positive, reporting
from bench.prompts import prompts_for
from model.engine import Engine
from model.machine import usable_cores
from model.options import WorkerOptions
from model.protocol import GenerationRequest, SamplingParams
from model.worker.build import build_engine

BACKENDS = ("native", "torch")


class Job(NamedTuple):
    """A prompt to be read (one token is written), or with `decodes` an answer to be written."""

    backend: str
    prompt_tokens: int
    decodes: bool

    @property
    def label(self) -> str:
        """For the table."""
        what = "ms a decoded token" if self.decodes else f"s to read {self.prompt_tokens} tokens"
        return f"{self.backend}: {what}"


class Neighbour:
    """A process that is always ready to run, stopped until `busy` is entered."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        self._process.send_signal(signal.SIGSTOP)

    @contextmanager
    def busy(self, runs: bool) -> Iterator[None]:
        """It runs inside, if it is to."""
        if runs:
            self._process.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGSTOP)

    def end(self) -> None:
        """No trace is left."""
        self._process.kill()
        self._process.wait()


def seconds(engine: Engine, job: Job, prompt: list[int], max_tokens: int) -> float:
    """From the request to its only token; or a token's share of the time from the first to the last."""
    engine.add(
        GenerationRequest(
            request_id="0",
            prompt_token_ids=prompt,
            max_tokens=max_tokens if job.decodes else 1,
            sampling=SamplingParams(temperature=0.0),
            ignore_eos=True,
        )
    )
    added, first, tokens = time.perf_counter(), 0.0, 0
    while engine.has_requests:
        for event in engine.step():
            tokens += len(event.token_ids) if first else 0
            first = first or time.perf_counter()
    last = time.perf_counter()
    return (last - first) / max(1, tokens) if job.decodes else last - added


def measure(args: argparse.Namespace) -> dict[tuple[Job, bool], list[float]]:
    """Every job alone and beside the neighbour, round by round."""
    options = {"model_path": args.model, "threads": args.threads, "prefix_caching": False, "row_budget": 32}
    engines = {name: build_engine(WorkerOptions(backend=name, **options)) for name in args.backends}
    jobs = [Job(name, args.prompt_tokens[0], True) for name in engines]
    jobs += [Job(name, length, False) for length in args.prompt_tokens for name in engines]
    found: dict[tuple[Job, bool], list[float]] = defaultdict(list)
    neighbour = Neighbour()
    try:
        for number in tqdm(range(args.rounds), desc="rounds", unit="round", disable=None):
            for job in jobs if number % 2 else reversed(jobs):
                engine = engines[job.backend]
                length = 40 if job.decodes else job.prompt_tokens
                prompt = prompts_for(args.model, engine.info.vocab_size, 1, length, number)[0]
                torch.set_num_threads(1 if job.backend == "native" else args.threads)
                for runs in (False, True):
                    with neighbour.busy(runs):
                        found[job, runs].append(seconds(engine, job, prompt, args.max_tokens))
    finally:
        neighbour.end()
    return found


def report(found: dict[tuple[Job, bool], list[float]]) -> Iterator[str]:
    """Lines of a table: medians, and the median of each round's ratio."""
    yield f"{'':<34}{'alone':>10}{'beside':>10}{'ratio':>8}"
    for job in dict.fromkeys(job for job, _ in found):
        alone, beside = found[job, False], found[job, True]
        ratio = statistics.median(b / a for a, b in zip(alone, beside, strict=True))
        scale = 1e3 if job.decodes else 1.0
        times = [statistics.median(each) * scale for each in (alone, beside)]
        yield f"{job.label:<34}{times[0]:>10.2f}{times[1]:>10.2f}{ratio:>7.2f}x"


@reporting("python -m bench.beside")
def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.beside", description=__doc__)
    parser.add_argument("--model", default=str(DEFAULT_MODEL), help="folder or Hugging Face id")
    parser.add_argument("--threads", type=positive, default=usable_cores())
    parser.add_argument(
        "--prompt-tokens", type=numbers, default="500,2000", help="of the prompts that are read"
    )
    parser.add_argument("--max-tokens", type=positive, default=40, help="of the answer that is decoded")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--backends", type=lambda text: text.split(","), default=list(BACKENDS))
    args = parser.parse_args()
    if unknown := set(args.backends) - set(BACKENDS):
        raise ValueError(f"--backends {', '.join(sorted(unknown))}: native and torch are known")
    print(f"{args.model}, {args.threads} threads, {os.cpu_count()} cores, at most 32 rows a pass")
    print("\n".join(report(measure(args))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
