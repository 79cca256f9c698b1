"""`python -m bench.growth`: how the time per token grows with context, loops and requests at once.

The embedded model, with speculation and plain, every point in turn in every round; a point is the least of
its rounds. Reading of prompts is left out. For loops the same weights are told to be run up to `--loops`
times. Slopes are of a straight line through the points of a curve, by least squares.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from bench.latency import DEFAULT_MODEL
from bench.options import count, numbers, plot_file, positive, reporting
from bench.prompts import prompts_for
from model.engine import Engine
from model.options import WorkerOptions
from model.protocol import GenerationRequest, SamplingParams
from model.worker.build import build_engine
from training.pyplot import pyplot

CONTEXT, LOOPS, REQUESTS = "context", "loops", "requests"
UNITS = {CONTEXT: "tokens of context", LOOPS: "loops", REQUESTS: "requests at once"}
SHORT_PROMPT = 32  # tokens, where the context isn't what grows
LOOPED_LEN = 512  # tokens of the model with many loops, each of which takes K/V of its own


class Point(NamedTuple):
    """One point of a curve: `size` in its curve's unit."""

    curve: str
    size: int
    speculation: bool


class Line(NamedTuple):
    """Milliseconds a token: at size 0, and for each further unit."""

    base: float
    slope: float


class Engines(NamedTuple):
    """The model with its own loops, and with many."""

    own: Engine
    looped: Engine


def unrolled_folder(model: Path, loops: int, folder: Path) -> Path:
    """A checkpoint with the files of `model` and more loops. Raises ValueError for another family."""
    raw = json.loads((model / "config.json").read_text(encoding="utf-8"))
    if "mean_recurrence" not in raw:
        raise ValueError(f"{model} is no Raven model, whose loops can be set by mean_recurrence")
    for file in model.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file.resolve())
    changed = {**raw, "mean_recurrence": loops}
    (folder / "config.json").write_text(json.dumps(changed), encoding="utf-8")
    return folder


def build(args: argparse.Namespace, folder: Path) -> Engines:
    """Both engines."""
    looped = unrolled_folder(Path(args.model), max(args.loops), folder)
    common = {"threads": args.threads, "prefix_caching": False, "row_budget": args.row_budget}
    own = WorkerOptions(model_path=args.model, max_num_seqs=max(args.requests), **common)
    many = WorkerOptions(model_path=str(looped), max_num_seqs=1, max_model_len=LOOPED_LEN, **common)
    return Engines(build_engine(own), build_engine(many))


def points(args: argparse.Namespace, longest: int) -> list[Point]:
    """All points; contexts end where the model's do."""
    last = longest - args.max_tokens - SHORT_PROMPT
    sizes = {
        CONTEXT: sorted({min(size, last) for size in args.context}),
        LOOPS: args.loops,
        REQUESTS: args.requests,
    }
    return [Point(curve, size, way) for curve in sizes for size in sizes[curve] for way in (True, False)]


def requests(point: Point, prompts: list[list[int]], longest: int) -> list[GenerationRequest]:
    """Requests as long as they may be: the first still writes when the last prompt is read."""
    return [
        GenerationRequest(
            request_id=str(index),
            prompt_token_ids=prompt,
            max_tokens=longest - len(prompt),
            num_loops=point.size if point.curve == LOOPS else None,
            sampling=SamplingParams(temperature=0.0),
            ignore_eos=True,
            speculation=point.speculation,
        )
        for index, prompt in enumerate(prompts)
    ]


def milliseconds(engine: Engine, asked: list[GenerationRequest], max_tokens: int) -> float:
    """A token of each request, over `max_tokens` of each from when all prompts are read."""
    for request in asked:
        engine.add(request)
    waiting, started, tokens = {request.request_id for request in asked}, 0.0, 0
    while tokens < max_tokens * len(asked):
        for event in engine.step():
            if event.error or event.finish_reason:
                raise ValueError(event.error or "a request ended too soon: --max-tokens is too small")
            tokens += len(event.token_ids) if started else 0
            waiting -= {event.request_id} if event.token_ids else set()
        if not waiting and not started:
            started = time.perf_counter()
    took = time.perf_counter() - started
    for request in asked:
        engine.abort(request.request_id)
    engine.step()  # brings the ends of those that were aborted
    return took * 1e3 * len(asked) / tokens


def measure(engines: Engines, wanted: list[Point], args: argparse.Namespace) -> dict[Point, float]:
    """The least time of every point over all rounds."""
    best = dict.fromkeys(wanted, float("inf"))
    with tqdm(total=(args.rounds) * len(wanted), desc="points", disable=None) as bar:
        for number in range(args.rounds):
            for point in wanted if number % 2 else reversed(wanted):
                bar.set_postfix_str(f"{point.curve} {point.size}")
                length = point.size if point.curve == CONTEXT else SHORT_PROMPT
                many = point.size if point.curve == REQUESTS else 1
                engine = engines.looped if point.curve == LOOPS else engines.own
                prompts = prompts_for(args.model, engine.info.vocab_size, many, length, number)
                asked = requests(point, prompts, engine.info.max_model_len)
                best[point] = min(best[point], milliseconds(engine, asked, args.max_tokens))
                bar.update()
    return best


def curves(best: dict[Point, float]) -> Iterator[tuple[str, bool, list[int], list[float], Line]]:
    """Each curve's sizes, times and line."""
    for curve in UNITS:
        for speculation in (True, False):
            chosen = [p for p in best if p.curve == curve and p.speculation == speculation]
            sizes, times = [p.size for p in chosen], [best[p] for p in chosen]
            slope, base = np.polyfit(sizes, times, 1) if len(sizes) > 1 else (0.0, times[0])
            yield curve, speculation, sizes, times, Line(float(base), float(slope))


def name_of(speculation: bool) -> str:
    """In tables and plots."""
    return "SPEED" if speculation else "plain"


def report(best: dict[Point, float]) -> Iterator[str]:
    """Lines of a table."""
    for curve, speculation, sizes, times, line in curves(best):
        shown = ", ".join(f"{size}: {each:.2f}" for size, each in zip(sizes, times, strict=True))
        yield f"{name_of(speculation)}, ms a token over {UNITS[curve]}: {shown}"
        yield f"    {line.base:.2f} ms + {line.slope:.4f} ms for each further one"


def plot(best: dict[Point, float], file: Path) -> None:
    """One panel a curve, with its line."""
    plt = pyplot()

    plt.rcParams["svg.hashsalt"] = "growth"  # the same figures give the same file
    figure, axes = plt.subplots(1, len(UNITS), figsize=(12, 3.6), layout="constrained")
    panels = dict(zip(UNITS, axes, strict=True))
    for curve, speculation, sizes, times, line in curves(best):
        axis = panels[curve]
        label = f"{name_of(speculation)}: {line.base:.1f} + {line.slope:.3g} n ms"
        (drawn,) = axis.plot(sizes, times, "o" if speculation else "s", label=label)
        ends = np.array([0, max(sizes)])
        axis.plot(ends, line.base + line.slope * ends, "-", color=drawn.get_color(), linewidth=1)
    for curve, axis in panels.items():
        axis.set_xlabel(UNITS[curve])
        axis.set_ylabel("ms a token")
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=8)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(prog="python -m bench.growth", description=__doc__)
    made.add_argument(
        "--model", default=str(DEFAULT_MODEL), help="a Raven model's folder (default: embedded)"
    )
    made.add_argument("--threads", type=count, default=0, help="CPU threads (default: all)")
    made.add_argument("--context", type=numbers, default="128,256,512,1024,1536,2048", help="tokens")
    made.add_argument("--loops", type=numbers, default="1,2,4,8,16,32")
    made.add_argument("--requests", type=numbers, default="1,2,4,8,16,32,64")
    made.add_argument("--max-tokens", type=positive, default=32, help="of each request")
    made.add_argument("--row-budget", type=positive, default=96, help="rows of a pass; a fixed one")
    made.add_argument("--rounds", type=positive, default=3)
    made.add_argument("--plot", type=plot_file, help="an .svg file to write")
    return made


@reporting("python -m bench.growth")
def main() -> int:
    """The command line."""
    args = parser().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        engines = build(args, Path(folder))
        best = measure(engines, points(args, engines.own.info.max_model_len), args)
    print(f"{args.model}, {engines.own.info.dtype} on {args.threads or 'all'} threads, ", end="")
    print(f"{args.max_tokens} tokens a request, least of {args.rounds} rounds")
    print("\n".join(report(best)))
    if args.plot:
        plot(best, args.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
