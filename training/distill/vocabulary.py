"""A byte-level BPE cut to its first tokens, and the teacher's tokens in pieces of the cut one.

The head of a small model must stay small beside its block. Merges have their order, so encoding with the
first merges only is the full encoding stopped early: the cut encoding of a text is that of its full
tokens, one after the other (`encode` relies on it, a test holds it). Knows nothing about models.
"""

import json
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer


class VocabularyError(ValueError):
    """A tokenizer that can't be cut; the message names what is in the way."""


def cut_tokenizer(full: Tokenizer, size: int) -> Tokenizer:
    """The tokenizer with the first `size` ids alone: special tokens, bytes, and the merges among them."""
    raw: dict[str, Any] = json.loads(full.to_str())
    vocab: dict[str, int] = raw["model"]["vocab"]
    kept = {token: index for token, index in vocab.items() if index < size}
    outside = [each["content"] for each in raw["added_tokens"] if each["id"] >= size]
    # Not all 256: a tokenizer may lack bytes that its texts never held.
    lost = [token for token, index in vocab.items() if len(token) == 1 and index >= size]
    if outside or lost or len(kept) != size:
        raise VocabularyError(f"{size} tokens don't hold the bytes {lost} and the special tokens {outside}")
    raw["model"]["vocab"] = kept
    raw["model"]["merges"] = [pair for pair in raw["model"]["merges"] if "".join(pair) in kept]
    return Tokenizer.from_str(json.dumps(raw))


class Pieces(NamedTuple):
    """For every token of the full vocabulary, the tokens of the cut one that it falls into."""

    ids: NDArray[np.uint16]  # all pieces, one token's after the other's
    starts: NDArray[np.int64]  # (full vocab + 1,), into ids

    @property
    def first(self) -> NDArray[np.int64]:
        """The first piece of every token (full vocab,)."""
        return self.ids[self.starts[:-1]].astype(np.int64)


def pieces_of(full: Tokenizer, cut: Tokenizer) -> Pieces:
    """The pieces of every token of `full`; a token that `cut` has is its own only piece."""
    size, cut_size = full.get_vocab_size(), cut.get_vocab_size()
    ids: list[int] = []
    starts = [0]
    for token in range(size):
        text = full.id_to_token(token)
        ids += [token] if token < cut_size else [piece.id for piece in cut.model.tokenize(text)]
        starts.append(len(ids))
    return Pieces(np.asarray(ids, dtype=np.uint16), np.asarray(starts, dtype=np.int64))


class Encoded(NamedTuple):
    """Full tokens in pieces."""

    ids: NDArray[np.uint16]  # (pieces,)
    owner: NDArray[np.int64]  # index of the full token that each is a piece of


def encode(tokens: NDArray[np.uint16], pieces: Pieces) -> Encoded:
    """The pieces of a text given in tokens of the full vocabulary."""
    counts = np.diff(pieces.starts)[tokens]
    owner = np.repeat(np.arange(len(tokens)), counts)
    before = np.cumsum(counts) - counts  # pieces ahead of each token
    offsets = np.arange(len(owner)) - before[owner]
    return Encoded(pieces.ids[pieces.starts[tokens][owner] + offsets], owner)
