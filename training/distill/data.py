"""Texts to distil from: generated shards on disk, what the teacher says of them, the examples they make.

A run's data is shards of texts in the teacher's tokens; each shard is a function of the recipe and its
number, and its labels (`labels`) one of the shard and the teacher. Invariant: a text is wholly training or
wholly held out, decided by its place in its shard.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from training.distill.primer import Exchange
from training.distill.vocabulary import Pieces, encode

HELD_OUT_EVERY = 50  # one text in so many

Ids = NDArray[np.uint16]


class Labels(NamedTuple):
    """The teacher's likeliest tokens behind each of a text's pieces, in the student's vocabulary."""

    ids: NDArray[np.uint16]  # (pieces - 1, likeliest)
    probabilities: NDArray[
        np.float16
    ]  # the same shape; a row of zeros: nothing is known, the text alone teaches


class Example(NamedTuple):
    """One text as the student reads it."""

    ids: Ids  # (pieces,)
    answers: NDArray[np.bool_]  # (pieces,), whether a piece is the assistant's
    labels: Labels | None  # None: the text alone teaches


class Examples(NamedTuple):
    """What to train on, and what never to train on."""

    train: list[Example]
    held_out: list[Example]


def save_shard(folder: Path, number: int, texts: list[list[int]]) -> None:
    """Writes one shard whole or not at all; an empty text is one that was filtered out."""
    tokens = np.asarray([token for text in texts for token in text], dtype=np.uint16)
    _save(shard_path(folder, number), tokens=tokens, lengths=np.asarray([len(text) for text in texts]))


def save_labels(folder: Path, number: int, labels: list[Labels]) -> None:
    """Writes what the teacher says of the texts of a shard that were kept, in their order."""
    ids, probabilities = (np.concatenate(parts) for parts in zip(*labels, strict=True))
    # The older name, which stands in the files that there are.
    _save(labels_path(folder, number), ids=ids, chances=probabilities)


def _save(path: Path, **arrays: Any) -> None:  # noqa: ANN401  (numpy's own signature)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name("partial.npz")
    np.savez_compressed(partial, **arrays)
    os.replace(partial, path)


def shard_path(folder: Path, number: int) -> Path:
    """Where the shard with this number is."""
    return folder / f"shard-{number:05d}.npz"


def labels_path(folder: Path, number: int) -> Path:
    """Where the labels of the shard with this number are."""
    return folder / f"labels-{number:05d}.npz"


def shard_numbers(folder: Path) -> list[int]:
    """The numbers of the shards there; raises FileNotFoundError if there is none."""
    numbers = sorted(int(path.stem.removeprefix("shard-")) for path in folder.glob("shard-*.npz"))
    if not numbers:
        raise FileNotFoundError(f"no shard-*.npz in {folder}: generate texts first")
    return numbers


def read_shard(folder: Path, number: int) -> list[tuple[int, Ids]]:
    """Place in the shard and tokens of every text that passed the filter."""
    with np.load(shard_path(folder, number)) as shard:
        tokens, lengths = shard["tokens"], shard["lengths"]
    ends = np.cumsum(lengths)
    pairs = enumerate(zip(ends, lengths, strict=True))
    return [(place, tokens[end - length : end]) for place, (end, length) in pairs if length]


def read_examples(folder: Path, pieces: Pieces, heads: "Heads") -> Examples:
    """Every shard of a folder, split by the texts' places; FileNotFoundError for what is missing."""
    sides: tuple[list[Example], list[Example]] = ([], [])
    for number in shard_numbers(folder):
        texts = read_shard(folder, number)
        if not labels_path(folder, number).exists():
            raise FileNotFoundError(
                f"no {labels_path(folder, number).name} in {folder}: label the texts first"
            )
        with np.load(labels_path(folder, number)) as stored:
            ids, probabilities = stored["ids"], stored["chances"]
        start = 0
        for place, tokens in texts:
            student = encode(tokens, pieces).ids
            rows = slice(start, start := start + len(student) - 1)
            labels = Labels(ids[rows], probabilities[rows])
            sides[place % HELD_OUT_EVERY == 0].append(Example(student, heads.answers(student), labels))
    return Examples(*sides)


class Heads:
    """How turns begin and end in the student's tokens."""

    def __init__(self, cut: Tokenizer, turn_start: str, turn_end: str) -> None:
        self.cut, self.start, self.end = cut, turn_start, turn_end
        self._assistant: list[int] = cut.encode(f"{turn_start}assistant\n").ids
        self._end = cut.token_to_id(turn_end)

    def answers(self, ids: Ids) -> NDArray[np.bool_]:
        """Which pieces the assistant says, the end of its turn included; of a plain text, all."""
        if ids[0] != self._assistant[0]:
            return np.ones(len(ids), dtype=bool)
        found, size = np.zeros(len(ids), dtype=bool), len(self._assistant)
        for place in range(len(ids) - size):
            if ids[place : place + size].tolist() == self._assistant:
                end = place + size + int(np.argmax(ids[place + size :] == self._end))
                found[place + size : end + 1] = True
        return found

    def example(self, exchange: Exchange) -> Example:
        """A conversation of our own, which the text alone teaches."""
        turns = (("user", exchange.question), ("assistant", exchange.answer))
        text = "".join(f"{self.start}{role}\n{said}{self.end}\n" for role, said in turns)
        ids = np.asarray(self.cut.encode(text).ids, dtype=np.uint16)
        return Example(ids, self.answers(ids), None)


def padded(examples: Iterable[Example]) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]:
    """Ids (count, longest), and which of them are the texts' own and the assistant's, the same shape."""
    texts = list(examples)
    shape = len(texts), max(len(each.ids) for each in texts)
    ids = np.zeros(shape, dtype=np.int64)
    own, said = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    for row, each in enumerate(texts):
        ids[row, : len(each.ids)] = each.ids
        own[row, : len(each.ids)] = True
        said[row, : len(each.ids)] = each.answers
    return ids, own, said


def batches(lengths: NDArray[np.int64], most: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Indices of texts in batches of at most `most` tokens, padding included, in random order.

    Texts of like length share a batch; each is in exactly one. One that is longer than `most` has its own.
    """
    order = np.argsort(lengths + rng.uniform(0, 8, len(lengths)))
    cuts, start = [], 0
    for index in range(len(order)):
        if (index - start + 1) * lengths[order[start : index + 1]].max() > most and index > start:
            cuts.append(index)
            start = index
    parts = np.split(order, cuts)
    for chosen in rng.permutation(len(parts)):
        yield parts[chosen]
