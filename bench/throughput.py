"""`speed bench throughput`: tokens/s over the number of concurrent requests, with and without speculation.

A closed loop over the engine itself: whenever a request ends the next one starts, so that always as many
are in flight. Both ways take turns, block by block; the figure of a concurrency is the median over its
blocks, the ratio that of blocks run one after the other. The row budget is the server's: `auto` measures
pass times first. With --random-weights the model has the same shape and useless drafts.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from bench.latency import DEFAULT_MODEL
from bench.options import count, device, numbers, plot_file, positive, reporting, rows
from bench.prompts import prompts_for
from model.checkpoint.loader import DTYPES, load_model, save_checkpoint
from model.engine import Engine
from model.options import ENGINE_DEFAULTS, POLICIES, WorkerOptions
from model.protocol import GenerationRequest, SamplingParams
from model.worker.build import build_engine
from training.pyplot import pyplot


class Block(NamedTuple):
    """A stretch of serving at one concurrency."""

    tokens: int
    seconds: float
    passes: int

    @property
    def tokens_per_second(self) -> float:
        """Tokens/s of all requests together, prompt reading included."""
        return self.tokens / self.seconds


class Point(NamedTuple):
    """What one concurrency gives; tokens/s are medians, the ratio is the median of paired blocks."""

    concurrency: int
    tokens_per_second: float
    tokens_per_second_plain: float
    ratio: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `speed bench throughput` on a parser."""
    parser.add_argument("--model", default=str(DEFAULT_MODEL), help="model folder (default: embedded)")
    parser.add_argument("--device", type=device, default="auto", help="auto, cpu, cuda, cuda:i")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES])
    parser.add_argument("--threads", type=count, default=0, help="CPU threads (default: all)")
    parser.add_argument("--draft-policy", default=ENGINE_DEFAULTS.draft_policy, choices=POLICIES)
    parser.add_argument("--row-budget", type=rows, default="auto", help="auto, or rows of a pass")
    parser.add_argument("--concurrency", type=numbers, default="1,2,4,8,16,32", help="comma-separated")
    parser.add_argument("--blocks", type=positive, default=3, help="pairs of blocks at each concurrency")
    parser.add_argument("--requests", type=positive, default=2, help="requests of a block, for each place")
    parser.add_argument("--prompt-tokens", type=positive, default=64)
    parser.add_argument("--max-tokens", type=positive, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--random-weights", action="store_true", help="the same shape, useless drafts")
    parser.add_argument("--plot", type=plot_file, help="an .svg file to write")
    parser.add_argument("--seed", type=int, default=0)


@reporting("speed bench throughput")
def run(args: argparse.Namespace) -> int:
    """Runs `speed bench throughput`; the last line printed is one JSON object."""
    with tempfile.TemporaryDirectory() as folder:
        model = randomised(args.model, Path(folder)) if args.random_weights else args.model
        engine = build_engine(_options(args, model))
    info = engine.info
    print(f"{args.model}: {info.family}, {info.num_loops} loops, {info.dtype} on {info.device}, ", end="")
    print(f"{info.draft_policy}{', random weights' if args.random_weights else ''}")
    levels = args.concurrency
    count = args.blocks * args.requests * max(levels)
    prompts = prompts_for(args.model, info.vocab_size, count, args.prompt_tokens, args.seed)
    points = [measure(engine, prompts, level, args) for level in levels]
    print(f"{'at once':>8} {'tokens/s':>9} {'plain':>7} {'ratio':>7}")
    for point in points:
        print(f"{point[0]:8} {point[1]:9.0f} {point[2]:7.0f} {point[3]:6.2f}x")
    if args.plot:
        plot(points, args.plot)
    print(json.dumps([point._asdict() for point in points]))
    return 0


def measure(engine: Engine, prompts: list[list[int]], level: int, args: argparse.Namespace) -> Point:
    """Pairs of blocks with and without speculation over the same prompts, in turning order."""
    blocks: dict[bool, list[Block]] = {True: [], False: []}
    size = args.requests * level
    serve(engine, _requests(prompts[:level], args, speculation=True), level)  # warms up
    for index in tqdm(range(args.blocks), desc=f"{level} at once", unit="pair", disable=None):
        part = prompts[index * size : (index + 1) * size]
        for speculation in (True, False) if index % 2 else (False, True):
            blocks[speculation].append(serve(engine, _requests(part, args, speculation), level))
    rates = {way: [block.tokens_per_second for block in those] for way, those in blocks.items()}
    ratios = [fast / plain for fast, plain in zip(rates[True], rates[False], strict=True)]
    return Point(
        level, statistics.median(rates[True]), statistics.median(rates[False]), statistics.median(ratios)
    )


def serve(engine: Engine, requests: list[GenerationRequest], level: int) -> Block:
    """Runs all requests, `level` at a time."""
    waiting, running, tokens = iter(requests), 0, 0
    passes, started = engine.stats.passes, time.perf_counter()
    while True:
        for request in _next(waiting, level - running):
            engine.add(request)
            running += 1
        if not running:
            return Block(tokens, time.perf_counter() - started, engine.stats.passes - passes)
        for event in engine.step():
            tokens += len(event.token_ids)
            running -= event.finish_reason is not None


def _next(waiting: Iterator[GenerationRequest], count: int) -> Iterator[GenerationRequest]:
    for _ in range(count):
        request = next(waiting, None)
        if request is not None:
            yield request


def _requests(
    prompts: list[list[int]], args: argparse.Namespace, speculation: bool
) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            request_id=str(index),
            prompt_token_ids=prompt,
            max_tokens=args.max_tokens,
            sampling=SamplingParams(temperature=args.temperature, seed=index),
            ignore_eos=True,
            speculation=speculation,
        )
        for index, prompt in enumerate(prompts)
    ]


def _options(args: argparse.Namespace, model: str) -> WorkerOptions:
    return WorkerOptions(
        model_path=model,
        device=args.device,
        dtype=args.dtype,
        threads=args.threads,
        draft_policy=args.draft_policy,
        row_budget=args.row_budget,
        max_num_seqs=max(args.concurrency),
        prefix_caching=False,  # both ways run the same prompts
    )


def randomised(model: str, folder: Path) -> str:
    """A checkpoint of the same shape with random weights so large that its depths don't agree."""
    loaded = load_model(model, dtype="float32")
    generator = torch.Generator().manual_seed(0)
    for parameter in loaded.model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=2.0 / parameter.shape[1] ** 0.5, generator=generator)
    save_checkpoint(loaded.model, folder, torch.float32)
    return str(folder)


def plot(points: list[Point], file: Path) -> None:
    """Tokens/s over concurrency."""
    plt = pyplot()

    figure, axis = plt.subplots(figsize=(7, 4))
    levels = [point.concurrency for point in points]
    axis.plot(levels, [point.tokens_per_second for point in points], "o-", label="SPEED")
    axis.plot(levels, [point.tokens_per_second_plain for point in points], "s--", label="plain")
    axis.set_xscale("log", base=2)
    axis.set_xticks(levels, [str(level) for level in levels])
    axis.set_xlabel("requests at once")
    axis.set_ylabel("tokens/s")
    axis.set_ylim(bottom=0)
    axis.legend()
    figure.tight_layout()
    figure.savefig(file)
