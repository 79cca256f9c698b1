"""The corpus of the default model: Python files of a folder, the standard library unless told otherwise.

Knows nothing about models. Invariants: a file is wholly training or wholly held out, decided by a
hash of its path, so that the split is the same on every machine; no two documents are identical.
"""

import hashlib
import sysconfig
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
MIN_BYTES, MAX_BYTES = 200, 400_000
MAX_NON_ASCII = 0.05  # tables of encodings and the like teach a small model nothing
HELD_OUT_PER_THOUSAND = 20
SKIPPED_FOLDERS = {"site-packages", "__pycache__", "encodings", "pydoc_data"}

Tokens = NDArray[np.uint16]


class Document(NamedTuple):
    """One source file: its path relative to the corpus folder and its text."""

    path: str
    text: str


class Split(NamedTuple):
    """Documents to train on and documents never trained on."""

    train: list[Document]
    held_out: list[Document]


def standard_library() -> Path:
    """The folder of this interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def read_corpus(folder: Path) -> Split:
    """Reads every usable *.py below `folder`, in path order, without duplicates.

    Raises FileNotFoundError when the folder holds none.
    """
    seen: set[str] = set()
    split = Split([], [])
    for path in sorted(folder.rglob("*.py")):
        relative = path.relative_to(folder)
        text = None if SKIPPED_FOLDERS & set(relative.parts) else _usable_text(path)
        if text is None or (digest := hashlib.sha256(text.encode()).hexdigest()) in seen:
            continue
        seen.add(digest)
        side = split.held_out if is_held_out(relative.as_posix()) else split.train
        side.append(Document(relative.as_posix(), text))
    if not split.train or not split.held_out:
        raise FileNotFoundError(f"too few usable .py files below {folder} to split into two parts")
    return split


def is_held_out(relative_path: str) -> bool:
    """Whether the file with this path, relative to the corpus folder, is kept out of training."""
    digest = hashlib.sha256(relative_path.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 1000 < HELD_OUT_PER_THOUSAND


def encode(documents: list[Document], tokenizer: Tokenizer, seed: int) -> Tokens:
    """All documents in an order shuffled by `seed`, each after an end-of-text token, as one array."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    order = np.random.default_rng(seed).permutation(len(documents))
    assert end is not None, f"the tokenizer has no {END_OF_TEXT}"
    parts: list[int] = []
    for encoding in tokenizer.encode_batch([documents[i].text for i in order]):
        parts.append(end)
        parts.extend(encoding.ids)
    return np.asarray(parts, dtype=np.uint16)


def _usable_text(path: Path) -> str | None:
    data = path.read_bytes()
    if not MIN_BYTES <= len(data) <= MAX_BYTES:
        return None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return None
    non_ascii = sum(ord(char) > 127 for char in text)
    return text if non_ascii <= MAX_NON_ASCII * len(text) else None
