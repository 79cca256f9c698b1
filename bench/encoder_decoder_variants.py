"""The models of `bench.encoder_decoder`: one recipe, with decoders of shared and of unshared layers.

Knows nothing about timing. Invariant: all models see the same texts in the same batches at the same learning
rates; they differ in the decoder's layers and loops alone.
"""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bench.docstrings import END, TOKENIZER, Corpus, Example
from model.checkpoint.loader import save_checkpoint
from model.network.looped import LoopedTransformer
from training.losses import LoopLosses, loop_losses
from training.recipe import Recipe, Stage
from training.trainer import Trainer, new_model


class Decoder(NamedTuple):
    """Stored layers of a decoder, and how often each token runs through them."""

    layers: int
    loops: int

    @property
    def name(self) -> str:
        """As the paper writes it: `12`, `2 x 6`."""
        return f"{self.layers}" if self.loops == 1 else f"{self.layers} x {self.loops}"

    @property
    def folder(self) -> str:
        """Of its run, in the folder of all runs."""
        return f"{self.layers}x{self.loops}"


# In the order of the table: shallow, as deep as the shared ones, shared.
DECODERS = (Decoder(2, 1), Decoder(4, 1), Decoder(12, 1), Decoder(2, 6), Decoder(4, 3))


def recipe_of(recipe: Recipe, decoder: Decoder) -> Recipe:
    """The recipe with this decoder; every stage runs all of its loops."""
    model = replace(recipe.model, num_block_layers=decoder.layers, num_loops=decoder.loops)
    stages = tuple(replace(stage, num_loops=decoder.loops) for stage in recipe.stages)
    return replace(recipe, model=model, stages=stages)


class Batch(NamedTuple):
    """Examples side by side, each padded to the longest."""

    sources: Tensor  # (batch, tokens)
    seen: Tensor  # (batch, tokens), bool: which are a source's own
    texts: Tensor  # (batch, length + 1), the start token before each
    kept: Tensor  # (batch, length), bool: which targets are a text's own


def batch_of(examples: list[Example]) -> Batch:
    """These examples as tensors."""
    sources, seen = _padded([example.source for example in examples])
    texts, own = _padded([[END, *example.text] for example in examples])
    return Batch(sources, seen, texts, own[:, 1:])


def _padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(row) for row in rows])
    own = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.full(own.shape, END)
    ids[own] = torch.tensor([token for row in rows for token in row])
    return ids, own


def batches(examples: list[Example], tokens: int, seed: int) -> list[list[Example]]:
    """All examples, those of like length together, in batches in an order that `seed` decides.

    Sources and texts of a batch have at most so many `tokens` with their padding, if it has two examples.
    """
    made: list[list[Example]] = [[]]
    longest = (0, 0)
    for example in sorted(examples, key=lambda example: (len(example.text) // 4, len(example.source))):
        wanted = max(longest[0], len(example.source)), max(longest[1], len(example.text))
        if made[-1] and sum(wanted) * (len(made[-1]) + 1) > tokens:
            made.append([])
            wanted = len(example.source), len(example.text)
        made[-1].append(example)
        longest = wanted
    order = torch.randperm(len(made), generator=torch.Generator().manual_seed(seed))
    return [made[index] for index in order]


class DocstringTask:
    """Cross-entropy of docstrings at every loop, behind the code that they speak of."""

    def __init__(self, examples: list[Example], recipe: Recipe) -> None:
        self.batches = batches(examples, recipe.tokens_per_step, recipe.seed)

    def losses(self, model: LoopedTransformer, stage: Stage, step: int) -> LoopLosses:
        """Losses of the step's examples; behind the last batch the first one comes again."""
        return losses_of(model, batch_of(self.batches[step % len(self.batches)]), stage)


def losses_of(model: LoopedTransformer, batch: Batch, stage: Stage) -> LoopLosses:
    """Losses of a batch as a stage weighs them."""
    source = model.encode(batch.sources, batch.seen)
    return loop_losses(model, batch.texts, stage, kept=batch.kept, source=source)


@torch.no_grad()
def held_out_loss(model: LoopedTransformer, examples: list[Example], recipe: Recipe) -> list[float]:
    """Cross-entropy after every loop, nats a token."""
    stage = recipe.stages[-1]
    total, count = torch.zeros(stage.num_loops), 0
    for each in batches(examples, recipe.tokens_per_step, recipe.seed):
        batch = batch_of(each)
        tokens = int(batch.kept.sum())
        total += tokens * losses_of(model, batch, stage).per_loop
        count += tokens
    found: list[float] = (total / count).tolist()
    return found


def train(recipe: Recipe, decoder: Decoder, corpus: Corpus, runs: Path, max_minutes: float) -> bool:
    """Trains one model, or goes on with it; True when its checkpoint is in `runs`/folder/model.

    A model whose recipe has got further stages since goes on with those.
    """
    folder = runs / decoder.folder
    folder.mkdir(parents=True, exist_ok=True)
    own = recipe_of(recipe, decoder)
    trainer = Trainer(own, DocstringTask(corpus.train, own), folder, new_model(own))
    if not trainer.run(max_minutes):
        return False
    save_checkpoint(trainer.model, folder / "model", torch.float32)
    (folder / "model" / TOKENIZER).write_bytes((runs / TOKENIZER).read_bytes())
    return True
