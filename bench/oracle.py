"""`python -m bench.oracle`: what speculation over loops gains where drafts agree as often as is said.

Random weights serve as well as trained ones. Every text is first written plainly; then an oracle that knows
it stands between engine and backend and says at the first draft depth the text's next token, or another one
at places drawn by a seed. Every pass does all its work, and what is committed is what the last loop says.
Policy `single`, row budget fixed: for one request at once, passes per token are
1 + (R - 1) x the share of wrong drafts. Rounds are in turn, a way's time is the least of its rounds. Times
count from when all requests of a group have a first token until one of them ends. Exit status 1 if any text
differs from plain decoding's.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from tqdm import tqdm

from bench.latency import DEFAULT_MODEL, peak_memory
from bench.options import count, numbers, output_file, plot_file, positive, reporting, share
from bench.prompts import prompts_for
from model.checkpoint.loader import DTYPES, load_config
from model.engine import PAGE_SIZE, Engine
from model.options import BACKENDS, DEFAULT_BACKEND, QuantizationName, WorkerOptions
from model.passes.backend import Backend, BackendFacts
from model.passes.rows import Rows
from model.protocol import GenerationRequest, SamplingParams
from model.schedule.batch import PassResult, Readout, Readouts
from model.worker.build import build_engine, choose
from training.pyplot import pyplot


class Way(NamedTuple):
    """How texts are written: with how many loops, and whether speculation is on."""

    num_loops: int
    speculation: bool

    def __str__(self) -> str:
        return f"R = {self.num_loops} {'with SPEED' if self.speculation else 'plain'}"


class Text(NamedTuple):
    """A text that is known, and the places in it where the oracle says another token."""

    tokens: list[int]
    wrong: frozenset[int]


class Cost(NamedTuple):
    """What was measured: `tokens` of all requests, and the passes, rows and seconds that they took."""

    tokens: int = 0
    passes: int = 0
    rows: int = 0
    seconds: float = 0.0

    def with_more(self, other: "Cost") -> "Cost":
        """Both together."""
        tokens, passes, rows, seconds = other
        return Cost(self.tokens + tokens, self.passes + passes, self.rows + rows, self.seconds + seconds)

    def until(self, end: "Cost") -> "Cost":
        """What came to it until `end`."""
        tokens, passes, rows, seconds = self
        return Cost(end.tokens - tokens, end.passes - passes, end.rows - rows, end.seconds - seconds)

    def figures(self, at_once: int) -> dict[str, float]:
        """What is reported, where `at_once` requests share each pass."""
        return {
            "passes_per_token": self.passes * at_once / self.tokens,
            "rows_per_pass": self.rows / self.passes,
            "ms_per_pass": 1e3 * self.seconds / self.passes,
            "ms_per_token": 1e3 * self.seconds * at_once / self.tokens,
        }


class Oracle:
    """A backend that drafts what `texts`, by request id, say; all else is what `backend` says."""

    def __init__(self, backend: Backend, vocab_size: int) -> None:
        self.texts: dict[str, Text] = {}
        self._backend = backend
        self._vocab_size = vocab_size

    @property
    def facts(self) -> BackendFacts:
        """Those of the backend."""
        return self._backend.facts

    def run(self, rows: Rows, readouts: Readouts) -> PassResult:
        """A pass of the backend, with other drafts."""
        result = self._backend.run(rows, readouts)
        said = zip(readouts.predicting, result.tokens, strict=True)
        tokens = [token if readout.is_final else self._draft(readout) for readout, token in said]
        return result._replace(tokens=tokens)

    def _draft(self, readout: Readout) -> int:
        text = self.texts[readout.sequence.request.request_id]
        index = readout.position - readout.sequence.wave.prompt_length
        return (text.tokens[index] + (index in text.wrong)) % self._vocab_size


class Measured(NamedTuple):
    """Of every way what it cost, and how many of its texts were not those of plain decoding."""

    costs: dict[Way, Cost]
    differing: dict[Way, int]


def wrong_places(num_texts: int, num_tokens: int, agreement: float, seed: int) -> list[frozenset[int]]:
    """For each text the places of wrong drafts: of all drafts as near to 1 - `agreement` as can be.

    The last token's draft is always right: nothing would follow it.
    """
    places = [(text, index) for text in range(num_texts) for index in range(num_tokens - 1)]
    wrong = random.Random(seed).sample(places, round((1 - agreement) * len(places)))
    return [frozenset(index for text, index in wrong if text == each) for each in range(num_texts)]


def ways_of(loops: Sequence[int]) -> list[Way]:
    """Plain and with speculation; a single loop has nothing to draft from."""
    return [Way(each, way) for each in sorted(set(loops)) for way in (False, True) if each > 1 or not way]


def build(args: argparse.Namespace) -> Engine:
    """An engine with room for what is asked, and no more. Raises ValueError for what can't be had."""
    own, wanted = load_config(args.model).num_loops, max(args.loops)
    longest = args.prompt_tokens + args.max_tokens
    options = WorkerOptions(
        model_path=str(args.model),
        max_loops=wanted if wanted > own else None,
        dtype=args.dtype,
        quantization=args.quantization,
        threads=args.threads,
        backend=args.backend,
        max_model_len=longest,
        kv_cache_tokens=args.requests * (longest + 3 * PAGE_SIZE),  # nobody waits for pages
        max_num_seqs=args.requests,
        row_budget=args.requests * (args.prompt_tokens + 2 * wanted),  # never short of rows
        prefix_caching=False,  # the same prompts run again and again
    )
    args.quantization = choose(options).quantization
    return build_engine(options)


def request(way: Way, index: int, prompt: list[int], max_tokens: int) -> GenerationRequest:
    """The text of a prompt, greedily."""
    return GenerationRequest(
        request_id=f"{way.num_loops} loops, text {index}",
        prompt_token_ids=prompt,
        max_tokens=max_tokens,
        num_loops=way.num_loops,
        sampling=SamplingParams(temperature=0.0),
        ignore_eos=True,
        speculation=way.speculation,
        draft_policy="single",
    )


def write(engine: Engine, asked: list[GenerationRequest]) -> tuple[Cost, dict[str, list[int]]]:
    """Writes the texts of a group together; raises ValueError for a request that can't be served."""
    texts: dict[str, list[int]] = {each.request_id: [] for each in asked}
    for each in asked:
        engine.add(each)
    start, end = Cost(), None
    while engine.has_requests:
        has_begun, has_ended = all(texts.values()), False
        for event in engine.step():
            if event.error:
                raise ValueError(event.error)
            texts[event.request_id] += event.token_ids
            has_ended |= event.finish_reason is not None
        if not has_begun:
            start = _now(engine, texts)
        elif has_ended and end is None:
            end = _now(engine, texts)
        if has_ended and end is None:
            raise ValueError("a text ended before all had begun: --max-tokens is too small")
    assert end is not None
    return start.until(end), texts


def _now(engine: Engine, texts: dict[str, list[int]]) -> Cost:
    """All since the engine was made, and the tokens of `texts`."""
    counts = engine.scheduler.counts
    return Cost(sum(map(len, texts.values())), counts.passes, counts.rows, time.perf_counter())


def measure(engine: Engine, ways: list[Way], prompts: list[list[int]], args: argparse.Namespace) -> Measured:
    """Every way in every round, in turn, after the texts that all are held to."""
    oracle = Oracle(engine.backend, engine.info.vocab_size)
    engine.backend = oracle
    wrong = wrong_places(len(prompts), args.max_tokens, args.agreement, args.seed)
    costs, differing = dict[Way, Cost](), dict.fromkeys(ways, 0)
    with tqdm(total=len(ways) * args.rounds + len(set(args.loops)), desc="ways", disable=None) as bar:
        for way in (way for way in ways if not way.speculation):
            bar.set_postfix_str(f"{way}, to know the texts")
            texts = _all_texts(engine, way, prompts, args)[1]
            oracle.texts |= {name: Text(texts[name], w) for name, w in zip(texts, wrong, strict=True)}
            bar.update()
        for number in range(args.rounds):
            for way in ways if number % 2 else reversed(ways):
                bar.set_postfix_str(str(way))
                cost, texts = _all_texts(engine, way, prompts, args)
                costs[way] = min(costs.get(way, cost), cost, key=lambda each: each.seconds)
                differing[way] += sum(texts[name] != oracle.texts[name].tokens for name in texts)
                bar.update()
    return Measured({way: costs[way] for way in ways}, differing)


def _all_texts(
    engine: Engine, way: Way, prompts: list[list[int]], args: argparse.Namespace
) -> tuple[Cost, dict[str, list[int]]]:
    """The texts of all prompts, a group of them at a time, and what they cost together."""
    total, texts = Cost(), dict[str, list[int]]()
    asked = [request(way, index, prompt, args.max_tokens) for index, prompt in enumerate(prompts)]
    for first in range(0, len(asked), args.requests):
        cost, written = write(engine, asked[first : first + args.requests])
        total, texts = total.with_more(cost), texts | written
    return total, texts


def summary(measured: Measured, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The figures of every way; `over_plain` maps loops to the time per token over their plain one's."""
    figures = {way: cost.figures(args.requests) for way, cost in measured.costs.items()}
    plain = {way.num_loops: each["ms_per_token"] for way, each in figures.items() if not way.speculation}
    return [
        {
            **way._asdict(),
            **each,
            "over_plain": {str(loops): each["ms_per_token"] / time for loops, time in plain.items()},
            "texts_that_differ": measured.differing[way],
        }
        for way, each in figures.items()
    ]


def table(summaries: list[dict[str, Any]]) -> Iterator[str]:
    """Lines to print."""
    columns = [f"over R={loops}" for loops in summaries[0]["over_plain"]]
    yield f"{'':18}{'passes/token':>13}{'rows/pass':>11}{'ms/pass':>10}{'ms/token':>10}" + "".join(
        f"{name:>10}" for name in columns
    )
    for each in summaries:
        numbers_of = (
            f"{each['passes_per_token']:13.3f}{each['rows_per_pass']:11.2f}{each['ms_per_pass']:10.2f}"
        )
        ratios = "".join(f"{ratio:9.2f}x" for ratio in each["over_plain"].values())
        way = str(Way(each["num_loops"], each["speculation"]))
        yield f"{way:18}{numbers_of}{each['ms_per_token']:10.2f}{ratios}"


def plot(summaries: list[dict[str, Any]], agreement: float, file: Path) -> None:
    """Passes per token and time per token, a group of bars for each number of loops."""
    plt = pyplot()

    plt.rcParams["svg.hashsalt"] = "oracle"  # the same figures give the same file
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    loops = sorted({each["num_loops"] for each in summaries})
    for axis, name in zip(axes, ("passes_per_token", "ms_per_token"), strict=True):
        for speculation in (False, True):
            label = f"SPEED, an oracle drafts at {agreement:.2f}" if speculation else "plain"
            chosen = [each for each in summaries if each["speculation"] == speculation]
            places = [loops.index(each["num_loops"]) + 0.4 * speculation - 0.2 for each in chosen]
            bars = axis.bar(places, [each[name] for each in chosen], 0.38, label=label)
            axis.bar_label(bars, fmt="%.3g", fontsize=8)
        axis.set_xticks(range(len(loops)), [f"R = {each}" for each in loops])
        axis.set_ylabel(name.replace("_per_", " per "))
    axes[0].legend(fontsize=8)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(prog="python -m bench.oracle", description=__doc__)
    made.add_argument("--model", default=str(DEFAULT_MODEL), help="a model's folder (default: embedded)")
    made.add_argument("--agreement", type=share, default=0.9, help="share of drafts that are right, 0 to 1")
    made.add_argument("--loops", type=numbers, default="2,4", help="of a request, each measured both ways")
    made.add_argument("--dtype", default="auto", choices=["auto", *DTYPES])
    made.add_argument("--quantization", default="auto", choices=get_args(QuantizationName))
    made.add_argument("--backend", default=DEFAULT_BACKEND, choices=BACKENDS)
    made.add_argument("--threads", type=count, default=0, help="CPU threads (default: all)")
    made.add_argument("--num-prompts", type=positive, default=4)
    made.add_argument("--prompt-tokens", type=positive, default=32)
    made.add_argument("--max-tokens", type=positive, default=41, help="of each text; the first isn't timed")
    made.add_argument("--requests", type=positive, default=1, help="at once")
    made.add_argument("--rounds", type=positive, default=3)
    made.add_argument("--seed", type=count, default=0, help="of the prompts and the wrong drafts")
    made.add_argument("--output", type=output_file, help="a file for the results as JSON")
    made.add_argument("--plot", type=plot_file, help="an .svg file to write")
    return made


@reporting("python -m bench.oracle")
def main() -> int:
    """The command line."""
    args = parser().parse_args()
    if args.num_prompts % args.requests:
        raise ValueError(f"--num-prompts {args.num_prompts} is no multiple of --requests {args.requests}")
    started = time.perf_counter()
    engine = build(args)
    facts = {
        "model": str(args.model),
        "family": engine.info.family,
        "backend": engine.info.backend,
        "dtype": engine.info.dtype,
        "quantization": args.quantization,
        "load_seconds": time.perf_counter() - started,
        "peak_memory_bytes": peak_memory(),
    }
    prompts = prompts_for(
        str(args.model), engine.info.vocab_size, args.num_prompts, args.prompt_tokens, args.seed
    )
    wrong = sum(map(len, wrong_places(len(prompts), args.max_tokens, args.agreement, args.seed)))
    drafts = args.num_prompts * (args.max_tokens - 1)
    measured = measure(engine, ways_of(args.loops), prompts, args)
    engine.check_integrity()
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(f"{args.requests} at once, {args.max_tokens} tokens after {args.prompt_tokens}", end="; ")
    print(f"AN ORACLE DRAFTS: {drafts - wrong} of {drafts} drafts are what the last loop says")
    summaries = summary(measured, args)
    print("\n".join(table(summaries)))
    differing = sum(measured.differing.values())
    print(f"texts that differ from plain decoding's: {differing}")
    if args.output:
        asked = {name: getattr(args, name) for name in ("agreement", "requests", "max_tokens", "rounds")}
        oracle = {"drafts": drafts, "wrong_drafts": wrong}
        args.output.write_text(json.dumps({**facts, **asked, **oracle, "ways": summaries}, indent=2) + "\n")
    if args.plot:
        plot(summaries, args.agreement, args.plot)
    return int(differing > 0)


if __name__ == "__main__":
    raise SystemExit(main())
