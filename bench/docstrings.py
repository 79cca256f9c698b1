"""Functions and what their docstrings say of them: texts with a source, for `bench.encoder_decoder`.

From the Python files of the standard library and of whatever packages are installed: the source is a
function's code without its docstring, the text is the docstring in one line. Invariant: a file is wholly
training or wholly held out, by a hash of its path, and no two texts are the same, so that none is in both.
"""

import ast
import hashlib
import inspect
import random
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from training.corpus import is_held_out

SPECIAL_TOKENS = ("<pad>", "</s>")  # a text begins with the first and ends with the second, as in T5
START, END = range(2)
MAX_FILE_BYTES = 100_000
MOST_FILES = 60  # of a package: a large one would be half of the corpus
# Copies of one another, file by file: what is held out would be in training under another name.
SKIPPED = {"transformers", "test", "tests", "idlelib", "__pycache__"}
PREFIXES = ("stdlib", "purelib")
MOST_SOURCE, MOST_TEXT = 80, 120  # tokens; a source is cut there, a longer text is left out
LEAST_CHARACTERS = 12  # of a docstring
SEED = 7


class Example(NamedTuple):
    """A function and its docstring, in token ids that end as T5's do."""

    source: list[int]
    text: list[int]


class Corpus(NamedTuple):
    """Examples to train on, and others."""

    train: list[Example]
    held_out: list[Example]


def read_functions() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(code, docstring) of every documented function: those to train on, and those held out."""
    seen: set[str] = set()
    train: list[tuple[str, str]] = []
    held_out: list[tuple[str, str]] = []
    for folder in sorted({Path(sysconfig.get_paths()[name]) for name in PREFIXES}):
        packages = Counter[str]()
        for path in sorted(folder.rglob("*.py"), key=_hashed):
            relative = path.relative_to(folder)
            if SKIPPED & set(relative.parts) or "site-packages" in relative.parts:
                continue
            packages[relative.parts[0]] += 1
            if packages[relative.parts[0]] > MOST_FILES:
                continue
            for code, text in _functions_of(path):
                if text not in seen:
                    seen.add(text)
                    (held_out if is_held_out(relative.as_posix()) else train).append((code, text))
    if not train or not held_out:
        raise ValueError("too few functions with docstrings to split into two parts")
    return train, held_out


def _hashed(path: Path) -> bytes:
    """An order of files that no package decides."""
    return hashlib.sha256(path.name.encode() + path.parent.name.encode()).digest()


def _functions_of(path: Path) -> Iterator[tuple[str, str]]:
    if path.stat().st_size > MAX_FILE_BYTES:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in other people's strings
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node, clean=False)
        if text is None or len(text) < LEAST_CHARACTERS or not text.isascii():
            continue
        node.body, node.decorator_list = node.body[1:] or [ast.Pass()], []
        yield ast.unparse(node), " ".join(inspect.cleandoc(text).split())


def train_tokenizer(pairs: Iterable[tuple[str, str]], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of codes and texts; every encoding ends with the end token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((part[:1000] for pair in pairs for part in pair), trainer)
    end = SPECIAL_TOKENS[END]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, END)])
    return tokenizer


def encode(pairs: list[tuple[str, str]], tokenizer: Tokenizer) -> list[Example]:
    """The pairs in ids, shuffled by a fixed seed, without those whose text is too long."""
    sources = tokenizer.encode_batch([code[:1500] for code, _ in pairs], add_special_tokens=False)
    texts = tokenizer.encode_batch([text[:1500] for _, text in pairs])
    examples = [
        Example([*source.ids[: MOST_SOURCE - 1], END], text.ids)
        for source, text in zip(sources, texts, strict=True)
        if len(text.ids) <= MOST_TEXT
    ]
    random.Random(SEED).shuffle(examples)
    return examples
