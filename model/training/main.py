"""`speed train`: corpus -> tokenizer -> training in slices -> evaluation -> exported checkpoint.

Knows nothing about serving. Every step leaves its result in the run's folder and is skipped when it
is already there, so that the command may be stopped and given again.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from model.training.corpus import Split, Tokens, encode, read_corpus, standard_library
from model.training.recipe import Recipe, load_recipe
from model.training.tokenizer import train_tokenizer
from model.training.trainer import Trainer

DEFAULT_RECIPE = Path(__file__).with_name("stdlib.toml")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `speed train` on a parser."""
    parser.add_argument("--recipe", type=Path, default=DEFAULT_RECIPE, help="TOML file (default: stdlib)")
    parser.add_argument("--corpus", type=Path, default=None, help="folder of .py files (default: stdlib)")
    parser.add_argument("--output", type=Path, required=True, help="folder of the run; resumed if it exists")
    parser.add_argument("--max-minutes", type=float, default=24 * 60.0, help="stop this slice after so long")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's choice)")


def run(args: argparse.Namespace) -> int:
    """Runs `speed train`; 0 when the recipe is finished and exported, 3 when time ran out before."""
    if args.threads:
        torch.set_num_threads(args.threads)
    recipe = load_recipe(args.recipe)
    args.output.mkdir(parents=True, exist_ok=True)
    train, held_out = prepare(recipe, args.corpus or standard_library(), args.output)
    trainer = Trainer(recipe, train, held_out, args.output)
    if not trainer.run(args.max_minutes):
        print(f"step {trainer.step} of {recipe.total_steps}: give the command again to go on")
        return 3
    result = trainer.evaluate()
    for depth, (loss, share) in enumerate(zip(*result, strict=True), start=1):
        print(f"loop {depth}: held-out loss {loss:.4f} nats/token, agreement with the last {share:.3f}")
    return 0


def prepare(recipe: Recipe, corpus: Path, folder: Path) -> tuple[Tokens, Tokens]:
    """Tokenizer and token arrays (train, held out) of a run, made once and kept in its folder."""
    paths = [folder / name for name in ("tokenizer.json", "train.npy", "held_out.npy")]
    if not all(path.exists() for path in paths):
        split = read_corpus(corpus)
        tokenizer = train_tokenizer((d.text for d in split.train), recipe.model.vocab_size)
        _write_tokens(split, tokenizer, recipe.seed, paths[1:])
        tokenizer.save(str(paths[0]))
    return np.load(paths[1]), np.load(paths[2])


def _write_tokens(split: Split, tokenizer: Tokenizer, seed: int, paths: list[Path]) -> None:
    for documents, path in zip(split, paths, strict=True):
        tokens = encode(documents, tokenizer, seed)
        size = sum(len(d.text.encode()) for d in documents)
        print(f"{path.stem}: {len(documents)} files, {len(tokens)} tokens, {size / len(tokens):.2f} bytes/token")
        np.save(path, tokens)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="speed train")
    add_arguments(parser)
    raise SystemExit(run(parser.parse_args()))
