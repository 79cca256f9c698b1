"""`python -m bench.policies`: the draft policies on the same prompts, one request at a time.

Every policy starts without experience and sees the prompts in the same order, with the row budget fixed:
passes and rows per token are then a function of the model and the seed. Times are taken prompt by prompt,
the policies in turn, so that a slow moment of the machine falls on all of them. Writes a table, and with
--plot a picture. Exit status 1 if any text differs from plain decoding's.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from bench.latency import DEFAULT_MODEL
from bench.options import count, device, plot_file, positive, reporting
from bench.prompts import copy_prompts, prompts_for
from model.checkpoint.loader import DTYPES
from model.engine import Engine
from model.options import POLICIES, WorkerOptions
from model.protocol import GenerationRequest, SamplingParams, SequenceStats
from model.schedule.drafts import Experience
from model.worker.build import build_engine
from training.pyplot import pyplot

ROW_BUDGET = 64  # above the rows of any one sequence: batch 1 is never short of them
PLAIN = "none"


class Cost(NamedTuple):
    """One request under one policy."""

    tokens: list[int]
    seconds: float
    stats: SequenceStats


def workloads(model: str, vocab_size: int, count: int) -> dict[str, list[list[int]]]:
    """Prompts to continue freely, and prompts to copy from."""
    return {
        "continue": prompts_for(model, vocab_size, count, 64, seed=2),
        "copy": copy_prompts(prompts_for(model, vocab_size, count, 160, seed=3)),
    }


def compare(
    engine: Engine, prompts: Iterable[list[int]], sampling: SamplingParams, max_tokens: int
) -> dict[str, list[Cost]]:
    """Every prompt under every policy; the order of the policies turns from prompt to prompt."""
    experience = {policy: Experience.none() for policy in POLICIES}
    costs: dict[str, list[Cost]] = {policy: [] for policy in POLICIES}
    for index, prompt in enumerate(prompts):
        turn = index % len(POLICIES)
        for policy in POLICIES[turn:] + POLICIES[:turn]:
            engine.experience = experience[policy]
            costs[policy].append(_generate(engine, prompt, sampling, max_tokens, policy))
    return costs


def _generate(
    engine: Engine, prompt: list[int], sampling: SamplingParams, max_tokens: int, policy: str
) -> Cost:
    request = GenerationRequest(
        request_id="bench",
        prompt_token_ids=prompt,
        max_tokens=max_tokens,
        sampling=sampling,
        ignore_eos=True,
        draft_policy=policy,
    )
    started = time.perf_counter()
    events = engine.run([request])["bench"]
    seconds = time.perf_counter() - started
    stats = events[-1].stats
    assert stats is not None
    return Cost([token for event in events for token in event.token_ids], seconds, stats)


def summary(costs: dict[str, list[Cost]]) -> dict[str, dict[str, float]]:
    """Figures by policy; the speed-up is the median over prompts of plain seconds / seconds."""
    table = {}
    for policy, runs in costs.items():
        decoded = sum(len(run.tokens) - 1 for run in runs)
        ratios = [plain.seconds / run.seconds for plain, run in zip(costs[PLAIN], runs, strict=True)]
        table[policy] = {
            "passes_per_token": sum(run.stats.passes for run in runs) / decoded,
            "rows_per_token": sum(run.stats.rows for run in runs) / decoded,
            "tokens_per_second": sum(len(r.tokens) for r in runs) / sum(r.seconds for r in runs),
            "speedup_median": statistics.median(ratios),
            "texts_that_differ": sum(r.tokens != p.tokens for r, p in zip(runs, costs[PLAIN], strict=True)),
        }
    return table


def plot(report: dict[str, dict[str, dict[str, float]]], file: Path) -> None:
    """Passes per token and tokens/s of each policy, a group of bars for each workload."""
    plt = pyplot()

    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for axis, name in zip(axes, ("passes_per_token", "tokens_per_second"), strict=True):
        for place, policy in enumerate(POLICIES):
            heights = [table[policy][name] for table in report.values()]
            axis.bar([i + (place - 2.5) * 0.13 for i in range(len(heights))], heights, 0.12, label=policy)
        axis.set_xticks(range(len(report)), list(report))
        axis.set_title(name.replace("_", " "))
    axes[0].axhline(1.0, color="grey", linewidth=0.8)
    axes[0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(file)


def _print_table(name: str, table: dict[str, dict[str, float]]) -> None:
    print(f"\n{name}\n{'policy':10} {'passes/token':>13} {'rows/token':>11} {'tokens/s':>9} {'speed-up':>9}")
    for policy, row in table.items():
        figures = f"{row['passes_per_token']:13.3f} {row['rows_per_token']:11.2f} "
        print(f"{policy:10} {figures}{row['tokens_per_second']:9.0f} {row['speedup_median']:8.2f}x")


@reporting("python -m bench.policies")
def main() -> int:
    """Runs the comparison; the last line printed is one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m bench.policies", description=__doc__)
    parser.add_argument("--model", default=str(DEFAULT_MODEL))
    parser.add_argument("--device", type=device, default="auto")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES])
    parser.add_argument("--threads", type=count, default=0, help="CPU threads (default: all)")
    parser.add_argument("--num-prompts", type=positive, default=12)
    parser.add_argument("--max-tokens", type=positive, default=128)
    parser.add_argument("--plot", type=plot_file, help="an .svg file to write")
    args = parser.parse_args()
    options = WorkerOptions(
        model_path=args.model,
        device=args.device,
        dtype=args.dtype,
        threads=args.threads,
        row_budget=ROW_BUDGET,
        prefix_caching=False,  # each prompt runs once for every policy
    )
    engine = build_engine(options)
    samplings = {
        "greedy": SamplingParams(temperature=0),
        "sampled": SamplingParams(temperature=0.8, top_p=0.95),
    }
    report = {}
    for workload, prompts in workloads(args.model, engine.model.config.vocab_size, args.num_prompts).items():
        for sampling, params in samplings.items():
            name = f"{workload}, {sampling}"
            bar = tqdm(prompts, desc=name, unit="prompt", disable=None)
            report[name] = summary(compare(engine, bar, params, args.max_tokens))
            _print_table(name, report[name])
    if args.plot:
        plot(report, args.plot)
    print(json.dumps(report))
    return int(any(row["texts_that_differ"] for table in report.values() for row in table.values()))


if __name__ == "__main__":
    raise SystemExit(main())
