"""`speed bench latency`: the same prompts with and without speculation, and at one loop, one at a time.

All ways run in one process, prompt by prompt in turn, so that a slow moment of the machine falls on
all. Passes, rows and texts are deterministic; tokens/s are not: quote the ratio.
"""

import argparse
import json
import resource
import statistics
import time
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from tqdm import tqdm

from bench.bandwidth import WeightReading, memory_bandwidth, weight_bytes_of_a_pass
from bench.breakdown import break_down
from bench.options import count, device, numbers, positive, reporting
from bench.prompts import prompts_for, question_prompts
from model.checkpoint.hub import model_folder
from model.checkpoint.loader import DTYPES, load_model, load_skeleton
from model.engine import Engine
from model.network.looped import LoopedTransformer
from model.options import (
    BACKENDS,
    DEFAULT_BACKEND,
    ENGINE_DEFAULTS,
    POLICIES,
    KVCacheDtypeName,
    WorkerOptions,
)
from model.protocol import GenerationRequest, SamplingParams, SequenceStats
from model.worker.build import build_engine, choose, resolve_device

DEFAULT_MODEL = Path(__file__).resolve().parent.parent / "model" / "weights" / "default"


class Run(NamedTuple):
    """One request: its text, seconds from submission to its last token, and what it cost."""

    tokens: list[int]
    seconds: float
    stats: SequenceStats


class Mode(NamedTuple):
    """All prompts in one mode, three ways, in the same order; `one_loop` is plain decoding of one loop."""

    speculative: list[Run]
    plain: list[Run]
    one_loop: list[Run]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `speed bench latency` on a parser."""
    parser.add_argument(
        "--model", default=str(DEFAULT_MODEL), help="folder or Hugging Face id (default: embedded)"
    )
    parser.add_argument("--device", type=device, default="auto", help="auto, cpu, cuda, cuda:i")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES])
    parser.add_argument("--quantization", default="auto", choices=["auto", "none", "int8"])
    parser.add_argument("--threads", type=count, default=0, help="CPU threads (default: all)")
    parser.add_argument(
        "--draft-depths", type=numbers, default=None, help="comma-separated (default: the model's)"
    )
    parser.add_argument("--kv-cache-dtype", default="auto", choices=get_args(KVCacheDtypeName))
    parser.add_argument("--backend", default=DEFAULT_BACKEND, choices=BACKENDS)
    parser.add_argument("--draft-policy", default=ENGINE_DEFAULTS.draft_policy, choices=POLICIES)
    parser.add_argument(
        "--row-budget", type=positive, default=32, help="rows of a pass; a fixed one: passes repeat exactly"
    )
    parser.add_argument("--num-prompts", type=positive, default=16)
    parser.add_argument(
        "--questions", action="store_true", help="of a chat model: the questions of bench.questions"
    )
    parser.add_argument("--prompt-tokens", type=positive, default=64)
    parser.add_argument("--max-tokens", type=positive, default=128)
    parser.add_argument("--temperature", type=float, default=0.8, help="of the sampled half")
    parser.add_argument("--top-p", type=float, default=0.95, help="of the sampled half")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write --max-tokens tokens whatever the text says (default); off: texts end where they end",
    )


@reporting("speed bench latency")
def run(args: argparse.Namespace) -> int:
    """Runs `speed bench latency`; the last line printed is one JSON object."""
    folder = model_folder(args.model)
    options = _options(args, folder)
    args.quantization = choose(options).quantization
    started = time.perf_counter()
    engine = build_engine(options)
    load_seconds, peak = time.perf_counter() - started, peak_memory()
    print(f"loaded in {load_seconds:.1f} s; peak memory {peak / 1e9:.2f} GB")
    vocab_size = engine.model.config.vocab_size
    if args.questions:
        prompts = question_prompts(str(folder))[: args.num_prompts]
    else:
        prompts = prompts_for(str(folder), vocab_size, args.num_prompts, args.prompt_tokens, args.seed)
    info = engine.info
    held = "int8 weights" if args.quantization == "int8" else info.dtype
    print(f"{args.model}: {info.family}, {info.num_loops} loops, {held}, {info.backend} on {info.device}")
    report: dict[str, object] = {
        "draft_policy": info.draft_policy,
        "draft_depths": info.draft_depths,
        "dtype": info.dtype,
        "device": info.device,
        "quantization": args.quantization,
        "kv_cache_dtype": info.kv_cache_dtype,
        "backend": info.backend,
        "load_seconds": load_seconds,
        "peak_memory_bytes": peak,
    }
    sampled = SamplingParams(temperature=args.temperature, top_p=args.top_p)
    modes: dict[str, Mode] = {}
    for name, sampling in (("greedy", SamplingParams(temperature=0.0)), ("sampled", sampled)):
        modes[name] = measure(engine, prompts, sampling, args.max_tokens, name, ignore_eos=args.ignore_eos)
        report[name] = summary(modes[name])
        _print_summary(name, summary(modes[name]))
    greedy = [_request(p, SamplingParams(temperature=0.0), args.max_tokens, True) for p in prompts[:4]]
    breakdowns = [break_down(engine, [request]) for request in greedy]
    middle = sorted(breakdowns)[len(breakdowns) // 2]
    print(middle)
    report["pass"] = {**middle._asdict(), "own_python_share": middle.own_python_share}
    reading = _weight_reading(args, folder, engine, middle.pass_us)
    print(reading)
    report["weights"] = {**reading._asdict(), "share_of_pass": reading.share}
    report["agreement_per_depth"] = agreement(_reference(args, folder), prompts, modes["greedy"].speculative)
    print(f"agreement with the last loop on the greedy texts, loop by loop: {report['agreement_per_depth']}")
    print(json.dumps(report))
    return 0


def _options(args: argparse.Namespace, folder: Path) -> WorkerOptions:
    return WorkerOptions(
        model_path=str(folder),
        device=args.device,
        dtype=args.dtype,
        quantization=args.quantization,
        kv_cache_dtype=args.kv_cache_dtype,
        threads=args.threads,
        draft_depths=None if args.draft_depths is None else tuple(args.draft_depths),
        draft_policy=args.draft_policy,
        backend=args.backend,
        row_budget=args.row_budget,
        prefix_caching=False,  # the same prompts run again and again
    )


def _reference(args: argparse.Namespace, folder: Path) -> LoopedTransformer:
    """The model as torch computes it: an engine may have given its own weights away."""
    int8 = args.quantization == "int8"
    return load_model(folder, resolve_device(args.device), args.dtype, int8=int8).model


def _weight_reading(args: argparse.Namespace, folder: Path, engine: Engine, pass_us: float) -> WeightReading:
    weights = weight_bytes_of_a_pass(load_skeleton(folder), engine.model.dtype, args.quantization)
    return WeightReading(weights, memory_bandwidth(engine.model.device), pass_us / 1e6)


def peak_memory() -> int:
    """Bytes of memory that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(
    engine: Engine,
    prompts: list[list[int]],
    sampling: SamplingParams,
    max_tokens: int,
    name: str,
    *,
    ignore_eos: bool = True,
) -> Mode:
    """Each prompt each way, taking turns at being first; the first prompt twice, to warm up."""
    mode = Mode([], [], [])
    ways = [(mode.speculative, True, None), (mode.plain, False, None), (mode.one_loop, False, 1)]

    def generate(prompt: list[int], speculation: bool, num_loops: int | None) -> Run:
        request = _request(
            prompt, sampling, max_tokens, speculation, num_loops=num_loops, ignore_eos=ignore_eos
        )
        return _generate(engine, request)

    for _, speculation, num_loops in ways:
        generate(prompts[0], speculation, num_loops)
    for index, prompt in enumerate(tqdm(prompts, desc=name, unit="prompt", disable=None)):
        first = index % len(ways)
        for runs, speculation, num_loops in ways[first:] + ways[:first]:
            runs.append(generate(prompt, speculation, num_loops))
    return mode


def summary(mode: Mode) -> dict[str, float]:
    """The figures of one mode; tokens/s count whole requests, prompt reading included."""
    fast, plain = mode.speculative, mode.plain
    ratios = [p.seconds / f.seconds for f, p in zip(fast, plain, strict=True)]
    decoded = sum(len(r.tokens) - 1 for r in fast)
    shallow = [
        f.seconds / len(f.tokens) * len(s.tokens) / s.seconds
        for f, s in zip(fast, mode.one_loop, strict=True)
    ]
    return {
        "tokens_per_second": _tokens_per_second(fast),
        "tokens_per_second_plain": _tokens_per_second(plain),
        "speedup_median": statistics.median(ratios),
        "speedup_min": min(ratios),
        "time_of_one_loop_median": statistics.median(shallow),
        "passes_per_token": sum(r.stats.passes for r in fast) / decoded,
        "passes_per_token_plain": sum(r.stats.passes for r in plain) / decoded,
        "rows_per_token": sum(r.stats.rows for r in fast) / decoded,
        "equal_texts": sum(f.tokens == p.tokens for f, p in zip(fast, plain, strict=True)) / len(fast),
    }


@torch.inference_mode()
def agreement(model: LoopedTransformer, prompts: list[list[int]], runs: list[Run]) -> list[float]:
    """Share of generated positions where a loop's greedy token is the last loop's, per loop."""
    shares = torch.zeros(model.config.num_loops)
    for prompt, run in zip(prompts, runs, strict=True):
        ids = torch.tensor([prompt + run.tokens], device=model.device)
        logits = [model.whole_readout(state)[0, len(prompt) - 1 : -1] for state in model.depths(ids)]
        tokens = [each.argmax(-1) for each in logits]
        shares += torch.tensor([float((t == tokens[-1]).float().mean()) for t in tokens])
    return [round(float(share) / len(runs), 4) for share in shares]


def _generate(engine: Engine, request: GenerationRequest) -> Run:
    started = time.perf_counter()
    events = engine.run([request])[request.request_id]
    seconds = time.perf_counter() - started
    stats = events[-1].stats
    assert stats is not None
    return Run([token for event in events for token in event.token_ids], seconds, stats)


def _request(
    prompt: list[int],
    sampling: SamplingParams,
    max_tokens: int,
    speculation: bool,
    *,
    num_loops: int | None = None,
    ignore_eos: bool = True,
) -> GenerationRequest:
    return GenerationRequest(
        request_id="bench",
        prompt_token_ids=prompt,
        max_tokens=max_tokens,
        sampling=sampling,
        ignore_eos=ignore_eos,
        speculation=speculation,
        num_loops=num_loops,
    )


def _tokens_per_second(runs: list[Run]) -> float:
    return sum(len(r.tokens) for r in runs) / sum(r.seconds for r in runs)


def _print_summary(name: str, figures: dict[str, float]) -> None:
    fast, plain = figures["tokens_per_second"], figures["tokens_per_second_plain"]
    median, lowest = figures["speedup_median"], figures["speedup_min"]
    passes, passes_plain = figures["passes_per_token"], figures["passes_per_token_plain"]
    print(f"{name}: {fast:.0f} tokens/s with speculation, {plain:.0f} without; ", end="")
    print(f"median speed-up {median:.2f}x (lowest {lowest:.2f}x)")
    shallow = figures["time_of_one_loop_median"]
    print(f"  {shallow:.2f}x the time per token of the same weights at one loop")
    print(f"  passes per token {passes:.3f} (plain {passes_plain:.3f}), ", end="")
    print(f"rows per token {figures['rows_per_token']:.3f}, equal texts {figures['equal_texts']:.1%}")
