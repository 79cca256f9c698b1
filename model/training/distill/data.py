"""Generated texts on disk, and as one stream to train on.

A run's data is shards of texts in the teacher's tokens; each shard is a function of the recipe and its
number. Invariant: a text is wholly training or wholly held out, decided by its number.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.training.distill.vocabulary import Encoded, Pieces, encode

HELD_OUT_EVERY = 50  # one text in so many

Ids = NDArray[np.uint16]


def save_shard(folder: Path, number: int, texts: list[list[int]]) -> None:
    """Writes one shard whole or not at all; an empty text is one that was filtered out."""
    folder.mkdir(parents=True, exist_ok=True)
    path, partial = shard_path(folder, number), folder / "partial.npz"
    tokens = np.asarray([token for text in texts for token in text], dtype=np.uint16)
    np.savez_compressed(partial, tokens=tokens, lengths=np.asarray([len(text) for text in texts]))
    os.replace(partial, path)


def shard_path(folder: Path, number: int) -> Path:
    """Where the shard with this number is."""
    return folder / f"shard-{number:05d}.npz"


def read_texts(folder: Path) -> Iterator[tuple[int, Ids]]:
    """Number and tokens of every text that passed the filter, in order of shards.

    Raises FileNotFoundError if there is no shard.
    """
    paths = sorted(folder.glob("shard-*.npz"))
    if not paths:
        raise FileNotFoundError(f"no shard-*.npz in {folder}: generate texts first")
    number = 0
    for path in paths:
        with np.load(path) as shard:
            tokens, lengths = shard["tokens"], shard["lengths"]
        ends = np.cumsum(lengths)
        for end, length in zip(ends, lengths, strict=True):
            if length:
                yield number, tokens[end - length : end]
            number += 1


class Stream(NamedTuple):
    """Texts one after the other, in the teacher's tokens and in the student's pieces of them."""

    teacher: Ids  # (teacher tokens,)
    student: Encoded
    starts: NDArray[np.int64]  # index into the student's ids of the first piece of each text

    @property
    def is_first(self) -> NDArray[np.bool_]:
        """Whether each of the student's tokens is the first piece of one of the teacher's."""
        owner = self.student.owner
        return np.concatenate(([True], owner[1:] != owner[:-1]))


class Streams(NamedTuple):
    """What to train on, and what never to train on."""

    train: Stream
    held_out: Stream


def read_streams(folder: Path, pieces: Pieces) -> Streams:
    """All shards of a folder, split by the texts' numbers."""
    sides: tuple[list[Ids], list[Ids]] = ([], [])
    for number, text in read_texts(folder):
        sides[number % HELD_OUT_EVERY == 0].append(text)
    if not all(sides):
        raise FileNotFoundError(f"{folder} holds too few texts for a held-out one: {HELD_OUT_EVERY} or more")
    return Streams(*(_stream(texts, pieces) for texts in sides))


def _stream(texts: list[Ids], pieces: Pieces) -> Stream:
    tokens = np.concatenate(texts)
    student = encode(tokens, pieces)
    firsts = np.cumsum([0, *(len(text) for text in texts[:-1])])
    return Stream(tokens, student, np.searchsorted(student.owner, firsts))
