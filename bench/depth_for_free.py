"""Deeper at the same speed: held-out loss against time per token, for looped and unlooped models.

    python -m bench.depth_for_free train --runs FOLDER      (stops and resumes; hours on two cores)
    python -m bench.depth_for_free measure --runs FOLDER

One recipe and the same training tokens for: a block run once; the same block run R times; R times as many
layers with weights of their own. `measure` decodes the same held-out prompts with all of them in turn, in
one process, batch 1, round after round, so that a slow moment of the machine falls on all and on one round
of several. Source of the comparison: SPEED (Hooper et al. 2023, arXiv 2310.12072).
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from bench.depth_report import PLAIN, SERVER, SPEED, Row, write_report
from bench.depth_variants import Variant, held_out, train, variants
from bench.options import numbers, reporting, study_parser
from bench.prompts import held_out_prompts
from model.checkpoint.loader import load_model
from model.engine import Engine
from model.options import WorkerOptions
from model.protocol import GenerationRequest, SamplingParams
from model.worker.build import build_engine
from training.losses import evaluate
from training.main import TOKENIZER, UNFINISHED
from training.recipe import Recipe, load_recipe

RECIPE = Path(__file__).with_suffix(".toml")


class Decoded(NamedTuple):
    """One request: seconds a token after the first one, passes a token, and its text."""

    seconds_per_token: float
    passes_per_token: float
    tokens: list[int]


@reporting("python -m bench.depth_for_free")
def main() -> int:
    """The command; 0 when all is done, 3 when training is to be continued."""
    parser = _parser()
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    recipe: Recipe = load_recipe(args.recipe)
    chosen = variants(args.layers or [recipe.model.num_block_layers], args.depths)
    if problem := _problem(args, recipe, [variant.name for variant in chosen]):
        parser.error(problem)
    if args.only:
        chosen = [variant for variant in chosen if variant.name in args.only]
    if args.action == "train":
        done = [
            train(recipe, variant, args.runs, args.max_minutes, compiled=args.compile, device=args.device)
            for variant in chosen
        ]
        return 0 if all(done) else UNFINISHED
    write_report(measure(recipe, chosen, args), recipe, args.temperature, args.output)
    return 0


def _problem(args: argparse.Namespace, recipe: Recipe, names: list[str]) -> str | None:
    """What of the options can't be had, said before any work is done for them."""
    if unknown := set(args.only or ()) - set(names):
        return f"--only: {', '.join(sorted(unknown))} is not among {', '.join(names)} (--layers, --depths)"
    for name, least in {"num_prompts": 1, "prompt_tokens": 1, "max_tokens": 2}.items():
        if (value := getattr(args, name)) < least:
            return f"--{name.replace('_', '-')} is {value}; it must be at least {least}"
    length, most = args.prompt_tokens + args.max_tokens, recipe.model.max_positions
    if length > most:
        return f"--prompt-tokens and --max-tokens are {length} together; the models have {most} positions"
    return None


def measure(recipe: Recipe, chosen: list[Variant], args: argparse.Namespace) -> list[Row]:
    """Every variant in each of its ways to decode: one row each."""
    windows = held_out(recipe, args.runs)
    tokenizer = Tokenizer.from_file(str(args.runs / TOKENIZER))
    prompts = held_out_prompts(tokenizer, args.num_prompts, args.prompt_tokens)
    engines = {variant: _engine(args.runs / variant.name / "model", args) for variant in chosen}
    modes = [(variant, policy) for variant in chosen for policy in policies(variant)]
    rounds = [_decode_in_turn(engines, modes, prompts, args) for _ in range(args.rounds)]
    models = {v: load_model(args.runs / v.name / "model", dtype="float32").model for v in chosen}
    figures = {v: evaluate(model, windows) for v, model in tqdm(models.items(), "evaluating", unit="model")}
    return [
        Row(
            variant=variant,
            policy=policy,
            parameters=sum(p.numel() for p in models[variant].parameters()),
            loss=figures[variant].loss,
            agreement=figures[variant].agreement,
            milliseconds_per_token=milliseconds([decoded[variant, policy] for decoded in rounds]),
            passes_per_token=statistics.fmean(
                run.passes_per_token for decoded in rounds for run in decoded[variant, policy]
            ),
            equal_texts=statistics.fmean(
                run.tokens == plain.tokens
                for decoded in rounds
                for run, plain in zip(decoded[variant, policy], decoded[variant, PLAIN], strict=True)
            ),
        )
        for variant, policy in modes
    ]


def policies(variant: Variant) -> tuple[str, ...]:
    """How a variant decodes: plain, with drafts of early loops if it has any, and as the server does.

    The last one looks n-grams up as well, which needs no loops: so the block run once does it too.
    """
    return (PLAIN, SPEED, SERVER) if variant.loops > 1 else (PLAIN, SERVER)


def milliseconds(rounds: list[list[Decoded]]) -> float:
    """Per token of all prompts together (they make equally many), each prompt the median of its rounds."""
    each = zip(*rounds, strict=True)
    return 1e3 * statistics.fmean(statistics.median(run.seconds_per_token for run in same) for same in each)


def _engine(folder: Path, args: argparse.Namespace) -> Engine:
    loops = recipe_loops(folder)
    depths = args.draft_depths and tuple(depth for depth in args.draft_depths if depth < loops)
    options = WorkerOptions(model_path=str(folder), device="cpu", threads=args.threads, draft_depths=depths)
    return build_engine(options)


def recipe_loops(folder: Path) -> int:
    """num_loops of a checkpoint folder."""
    loops: int = json.loads((folder / "config.json").read_text())["num_loops"]
    return loops


def _decode_in_turn(
    engines: dict[Variant, Engine],
    modes: list[tuple[Variant, str]],
    prompts: list[list[int]],
    args: argparse.Namespace,
) -> dict[tuple[Variant, str], list[Decoded]]:
    """Each prompt by every mode before the next prompt; every other time in the opposite order."""
    decoded: dict[tuple[Variant, str], list[Decoded]] = {mode: [] for mode in modes}
    for variant, policy in modes:
        _decode(engines[variant], _request(prompts[0], policy, 0, args))  # warms up
    for index, prompt in enumerate(tqdm(prompts, desc="decoding", unit="prompt")):
        for variant, policy in modes if index % 2 else modes[::-1]:
            run = _decode(engines[variant], _request(prompt, policy, index, args))
            decoded[variant, policy].append(run)
    return decoded


def _request(prompt: list[int], policy: str, seed: int, args: argparse.Namespace) -> GenerationRequest:
    return GenerationRequest(
        request_id="depth",
        prompt_token_ids=prompt,
        max_tokens=args.max_tokens,
        sampling=SamplingParams(temperature=args.temperature, seed=seed),
        ignore_eos=True,
        draft_policy=policy,
    )


def _decode(engine: Engine, request: GenerationRequest) -> Decoded:
    """The clock runs from the first token on, passes are counted alike."""
    engine.add(request)
    tokens: list[int] = []
    passes, started = 0, 0.0
    while engine.has_requests:
        events = engine.step()
        passes += 1
        if not tokens and events:
            passes, started = 0, time.perf_counter()
        tokens += [token for event in events for token in event.token_ids]
    seconds, count = time.perf_counter() - started, len(tokens) - 1
    return Decoded(seconds / count, passes / count, tokens)


def _parser() -> argparse.ArgumentParser:
    parser = study_parser(RECIPE, __doc__, "all runs", "prompts")
    parser.add_argument(
        "--layers", type=numbers, default=None, help="of a block, comma-separated (default: the recipe's)"
    )
    parser.add_argument("--depths", type=numbers, default=[2, 3, 4, 6], help="R, comma-separated")
    parser.add_argument(
        "--only", type=lambda text: text.split(","), help="names such as 2x4, comma-separated"
    )
    parser.add_argument("--device", default="cpu", help="train: cpu or cuda; decoding is measured on the CPU")
    parser.add_argument(
        "--compile", action="store_true", help="train: compile the layers (needs a C++ compiler)"
    )
    parser.add_argument(
        "--draft-depths", type=numbers, default=None, help="measure: of SPEED (default: the server's)"
    )
    parser.add_argument("--num-prompts", type=int, default=16, help="measure")
    parser.add_argument("--prompt-tokens", type=int, default=96, help="measure")
    parser.add_argument("--max-tokens", type=int, default=128, help="measure")
    parser.add_argument("--temperature", type=float, default=0.0, help="measure (default: greedy)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
