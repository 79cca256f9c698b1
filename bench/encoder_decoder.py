"""The SPEED paper's comparison, small: decoders that share their layers against decoders that don't.

    python -m bench.encoder_decoder train --runs FOLDER    (stops and resumes; half an hour on a busy core)
    python -m bench.encoder_decoder measure --runs FOLDER

The paper (Hooper et al. 2023, arXiv 2310.12072) runs the layers of a T5-like decoder several times, 2 x 6 and
4 x 3, beside decoders of 2, 4 and 12 layers of their own. Here each is trained by one recipe on functions and
their docstrings (`bench.docstrings`). `measure` has all of them write the docstrings of functions from other
files, greedily and one at a time, plain and with SPEED in turn, in one process.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from bench.docstrings import END, LONGEST_TEXT, TOKENIZER, Example, corpus_in
from bench.encoder_decoder_report import BUCKETS, PLAIN, SPEED, Figures, Row, write_report
from bench.encoder_decoder_variants import DECODERS, Decoder, held_out_loss, recipe_of, train
from bench.options import positive, reporting, study_parser
from model.checkpoint.loader import load_model
from model.engine import Engine
from model.options import WorkerOptions
from model.protocol import GenerationRequest, SamplingParams
from model.schedule.drafts import Experience
from model.worker.build import build_engine
from training.main import UNFINISHED
from training.recipe import Recipe, load_recipe

RECIPE = Path(__file__).with_suffix(".toml")
# Rows are free here, up to the widest wave: it isn't left to a measurement what may run.
MOST_ROWS = 32

Mode = tuple[Decoder, str]  # and a draft policy


class Written(NamedTuple):
    """One docstring, the end token left out: what it took, and how the guesses after the first loop fared."""

    tokens: list[int]
    num_decoded: int  # tokens, the end token too
    seconds: float  # everything, the encoder too
    passes: int
    guesses: int
    corrected: int


@reporting("python -m bench.encoder_decoder")
def main() -> int:
    """The command; 0 when all is done, 3 when training is to be continued."""
    args = _parser().parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    recipe = load_recipe(args.recipe)
    if args.action == "train":
        args.runs.mkdir(parents=True, exist_ok=True)
        corpus = corpus_in(args.runs, recipe.model.vocab_size, recipe.seed)
        done = [train(recipe, decoder, corpus, args.runs, args.max_minutes) for decoder in DECODERS]
        return 0 if all(done) else UNFINISHED
    write_report(measure(recipe, args), recipe, args.output)
    return 0


def measure(recipe: Recipe, args: argparse.Namespace) -> list[Row]:
    """Every model in each of its ways to decode: one row each."""
    engines = {decoder: _engine(args.runs / decoder.folder / "model", args) for decoder in DECODERS}
    tokenizer = Tokenizer.from_file(str(args.runs / TOKENIZER))
    held_out = corpus_in(args.runs, recipe.model.vocab_size, recipe.seed).held_out
    chosen = in_buckets(held_out, args.num_texts)
    modes = [(decoder, policy) for decoder in DECODERS for policy in policies(decoder)]
    for mode in modes:
        _write(engines[mode[0]], mode[1], held_out[0])  # warms up
    written = {
        bucket: [_in_turn(engines, modes, examples) for _ in range(args.rounds)]
        for bucket, examples in chosen.items()
    }
    rows = []
    for decoder in tqdm(DECODERS, "evaluating", unit="model"):
        model = load_model(args.runs / decoder.folder / "model", dtype="float32").model
        loss = held_out_loss(model, held_out, recipe_of(recipe, decoder))
        parameters = sum(p.numel() for p in model.parameters())
        for policy in policies(decoder):
            figures = {
                bucket: figures_of(rounds, (decoder, policy), chosen[bucket], tokenizer)
                for bucket, rounds in written.items()
            }
            rows.append(Row(decoder, policy, parameters, loss, figures))
    return rows


def policies(decoder: Decoder) -> tuple[str, ...]:
    """How a model decodes: plain, and with drafts of early loops if it has any."""
    return (PLAIN, SPEED) if decoder.loops > 1 else (PLAIN,)


def in_buckets(examples: list[Example], each: int) -> dict[str, list[Example]]:
    """The first `each` examples of every bucket of text lengths, the end token left out.

    Raises ValueError for a bucket without any.
    """
    found = {
        bucket: [example for example in examples if len(example.text) - 1 in lengths][:each]
        for bucket, lengths in BUCKETS.items()
    }
    if empty := [bucket for bucket, chosen in found.items() if not chosen]:
        raise ValueError(f"no held-out docstring has {' or '.join(empty)} tokens: install more packages")
    return found


def _engine(folder: Path, args: argparse.Namespace) -> Engine:
    options = WorkerOptions(
        model_path=str(folder),
        device="cpu",
        threads=args.threads,
        row_budget=MOST_ROWS,
        max_num_seqs=1,
        max_model_len=512,
        prefix_caching=False,
    )
    return build_engine(options)


def _in_turn(
    engines: dict[Decoder, Engine], modes: Sequence[Mode], examples: list[Example]
) -> dict[Mode, list[Written]]:
    """Each docstring by every mode before the next one; every other time in the opposite order."""
    written: dict[Mode, list[Written]] = {mode: [] for mode in modes}
    for index, example in enumerate(tqdm(examples, "writing", unit="text")):
        for decoder, policy in modes if index % 2 else modes[::-1]:
            written[decoder, policy].append(_write(engines[decoder], policy, example))
    return written


def _write(engine: Engine, policy: str, example: Example) -> Written:
    engine.experience = Experience.none()
    request = GenerationRequest(
        request_id="docstring",
        prompt_token_ids=example.source,
        max_tokens=LONGEST_TEXT,
        sampling=SamplingParams(temperature=0.0),
        draft_policy=policy,
    )
    passes, tokens, started = 0, list[int](), time.perf_counter()
    engine.add(request)
    while engine.has_requests:
        tokens += [token for event in engine.step() for token in event.token_ids]
        passes += 1
    seconds, depths = time.perf_counter() - started, engine.experience.depths
    guesses, agreed = depths.num_observed[1], depths.num_agreed[1]
    own = tokens[:-1] if tokens[-1] == END else tokens
    return Written(own, len(tokens), seconds, passes, guesses, guesses - agreed)


def figures_of(
    rounds: list[dict[Mode, list[Written]]], mode: Mode, examples: list[Example], tokenizer: Tokenizer
) -> Figures:
    """Of one mode and bucket: a text's time is the median of its rounds; all else is the same in each."""
    first, plain = rounds[0][mode], rounds[0][mode[0], PLAIN]
    wanted = [tokenizer.decode(example.text[:-1]) for example in examples]
    same_texts = zip(*(written[mode] for written in rounds), strict=True)
    return Figures(
        texts=len(examples),
        tokens=sum(each.num_decoded for each in first),
        seconds=sum(statistics.median(each.seconds for each in same) for same in same_texts),
        passes=sum(each.passes for each in first),
        guesses=sum(each.guesses for each in first),
        corrected=sum(each.corrected for each in first),
        rouge_l=sum(rouge_l(tokenizer.decode(w.tokens), text) for w, text in zip(first, wanted, strict=True)),
        equal_to_plain=sum(a.tokens == b.tokens for a, b in zip(first, plain, strict=True)),
    )


def rouge_l(found: str, wanted: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004), 0..1."""
    ours, theirs = found.split(), wanted.split()
    longest = [0] * (len(theirs) + 1)  # with the words of `ours` so far, and so many of `theirs`
    for word in ours:
        row = [0]
        for place, other in enumerate(theirs):
            row.append(longest[place] + 1 if word == other else max(longest[place + 1], row[-1]))
        longest = row
    return 2 * longest[-1] / max(1, len(ours) + len(theirs))


def _parser() -> argparse.ArgumentParser:
    parser = study_parser(RECIPE, __doc__, "corpus, tokenizer and all runs", "texts")
    parser.add_argument("--num-texts", type=positive, default=12, help="measure: of each bucket")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
