"""`python -m bench.determinism_cost`: tokens/s with deterministic mode over tokens/s without.

Two engines with the same weights in one process take turns, prompt by prompt, so that a slow moment of
the machine falls on both: quote the ratio. The last line printed is one JSON object.
"""

import argparse
import json
import statistics
import time

from tqdm import tqdm

from bench.latency import DEFAULT_MODEL
from bench.options import count, positive, reporting
from bench.prompts import prompts_for
from model.engine import Engine
from model.options import WorkerOptions
from model.protocol import GenerationRequest, SamplingParams
from model.worker.build import build_engine

AT_ONCE = 8
CASES = {
    "plain, batch 1": (False, 1),
    "speculative, batch 1": (True, 1),
    "speculative, 8 at once": (True, AT_ONCE),
}


def tokens_per_second(engine: Engine, prompts: list[list[int]], speculation: bool, max_tokens: int) -> float:
    """Greedy continuations of these prompts together, prompt reading included."""
    requests = [
        GenerationRequest(
            request_id=str(index),
            prompt_token_ids=prompt,
            max_tokens=max_tokens,
            sampling=SamplingParams(temperature=0.0),
            ignore_eos=True,
            speculation=speculation,
        )
        for index, prompt in enumerate(prompts)
    ]
    started = time.perf_counter()
    engine.run(requests)
    return len(prompts) * max_tokens / (time.perf_counter() - started)


def compare(
    engines: dict[bool, Engine], groups: list[list[list[int]]], speculation: bool, max_tokens: int, name: str
) -> dict[str, float]:
    """Median speed of each engine, and the median of the groups' ratios, deterministic over ordinary."""
    speeds: dict[bool, list[float]] = {True: [], False: []}
    for number, group in enumerate(tqdm([groups[0], *groups], desc=name, unit="group", disable=None)):
        for mode in (True, False) if number % 2 else (False, True):
            speed = tokens_per_second(engines[mode], group, speculation, max_tokens)
            if number:  # the first group comes twice, to warm up
                speeds[mode].append(speed)
    ratios = [on / off for on, off in zip(speeds[True], speeds[False], strict=True)]
    return {
        "deterministic": statistics.median(speeds[True]),
        "ordinary": statistics.median(speeds[False]),
        "ratio": statistics.median(ratios),
    }


@reporting("python -m bench.determinism_cost")
def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.determinism_cost", description=__doc__)
    parser.add_argument("--model", default=str(DEFAULT_MODEL))
    parser.add_argument("--dtype", default="float32", choices=("bfloat16", "float32"))
    parser.add_argument("--threads", type=count, default=0, help="CPU threads (default: all)")
    parser.add_argument("--num-prompts", type=positive, default=16)
    parser.add_argument("--prompt-tokens", type=positive, default=64)
    parser.add_argument("--max-tokens", type=positive, default=64)
    args = parser.parse_args()
    options = {
        mode: WorkerOptions(
            model_path=args.model, device="cpu", dtype=args.dtype, threads=args.threads, deterministic=mode
        )
        for mode in (True, False)
    }
    engines = {mode: build_engine(each) for mode, each in options.items()}
    vocab_size = engines[True].model.config.vocab_size
    prompts = prompts_for(args.model, vocab_size, args.num_prompts, args.prompt_tokens)
    report: dict[str, object] = {"dtype": args.dtype}
    print(f"{args.dtype}, greedy, tokens/s: deterministic, ordinary, ratio")
    for name, (speculation, at_once) in CASES.items():
        groups = [prompts[first : first + at_once] for first in range(0, len(prompts), at_once)]
        row = compare(engines, groups, speculation, args.max_tokens, name)
        report[name] = row
        print(f"  {name}: {row['deterministic']:.0f}, {row['ordinary']:.0f}, {row['ratio']:.3f}")
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
