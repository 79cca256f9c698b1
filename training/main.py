"""`speed train`: corpus -> tokenizer -> training in slices -> evaluation -> exported checkpoint.

Knows nothing about serving. Every step leaves its result in the run's folder and is skipped when it
is already there, so that the command may be stopped and given again.
"""

import argparse
import json
import platform
from pathlib import Path

import numpy as np
import torch

from training.corpus import encode, read_corpus, standard_library
from training.export import export
from training.recipe import Recipe, load_recipe
from training.reporting import reporting
from training.text_task import TextTask, spread_windows
from training.tokenizer import train_tokenizer
from training.trainer import Trainer, new_model

TOKENIZER, SIZES = "tokenizer.json", "sizes.json"
UNFINISHED = 3  # exit status
HELD_OUT_WINDOWS, HELD_OUT_LENGTH = 48, 512  # of the figures on the model card
DEFAULT_RECIPE = Path(__file__).with_name("stdlib.toml")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `speed train` on a parser."""
    parser.add_argument("--recipe", type=Path, default=DEFAULT_RECIPE, help="TOML file (default: stdlib)")
    parser.add_argument("--corpus", type=Path, default=None, help="folder of .py files (default: stdlib)")
    parser.add_argument("--output", type=Path, required=True, help="folder of the run; resumed if it exists")
    parser.add_argument("--max-minutes", type=float, default=24 * 60.0, help="stop this slice after so long")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's choice)")


def run(args: argparse.Namespace) -> int:
    """Runs `speed train`; 2 for what the user can mend, else as `_run`."""
    return reporting("speed train", _run)(args)


def _run(args: argparse.Namespace) -> int:
    """Trains, evaluates and exports; 0 when the recipe is finished, 3 when time ran out before."""
    if args.threads:
        torch.set_num_threads(args.threads)
    recipe = load_recipe(args.recipe)
    args.output.mkdir(parents=True, exist_ok=True)
    prepare(recipe, args.corpus or standard_library(), args.output)
    task = TextTask(np.load(args.output / "train.npy"), recipe)
    trainer = Trainer(recipe, task, args.output, new_model(recipe))
    if not trainer.run(args.max_minutes):
        print(f"step {trainer.step} of {recipe.total_steps}: give the command again to go on")
        return UNFINISHED
    sizes = json.loads((args.output / SIZES).read_text())
    windows = spread_windows(np.load(args.output / "held_out.npy"), HELD_OUT_WINDOWS, HELD_OUT_LENGTH)
    figures = export(trainer, args.output / TOKENIZER, sizes, windows, args.output / "model")
    for depth, (loss, share) in enumerate(zip(*figures, strict=True), start=1):
        print(f"loop {depth}: held-out loss {loss:.4f} nats/token, agreement with the last {share:.3f}")
    return 0


def prepare(recipe: Recipe, corpus: Path, folder: Path) -> None:
    """Tokenizer, token arrays and their sizes of a run, made once and kept in its folder."""
    if (folder / SIZES).exists():
        return
    split = read_corpus(corpus)
    tokenizer = train_tokenizer((d.text for d in split.train), recipe.model.vocab_size)
    tokenizer.save(str(folder / TOKENIZER))
    sizes: dict[str, object] = {"corpus": _name_of(corpus)}
    for name, documents in split._asdict().items():
        tokens = encode(documents, tokenizer, recipe.seed)
        np.save(folder / f"{name}.npy", tokens)
        num_bytes = sum(len(d.text.encode()) for d in documents)
        sizes[name] = {
            "files": len(documents),
            "tokens": len(tokens),
            "bytes_per_token": num_bytes / len(tokens),
        }
    (folder / SIZES).write_text(json.dumps(sizes))  # last: it says that the others are there


def _name_of(corpus: Path) -> str:
    if corpus == standard_library():
        return f"The standard library of Python {platform.python_version()} (PSF licence)"
    return f"The .py files of a folder named {corpus.resolve().name}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="speed train")
    add_arguments(parser)
    raise SystemExit(run(parser.parse_args()))
