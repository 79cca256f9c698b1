"""Functions and what their docstrings say of them: texts with a source, for `bench.encoder_decoder`.

They come from the Python files of the standard library and of whatever packages are installed. A source is a
function's code without its docstring, its text the docstring in one line. Invariants: a file is wholly
training or wholly held out, by a hash of its path; no two texts are the same.
"""

import ast
import hashlib
import inspect
import json
import random
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from training.corpus import is_held_out
from training.tokenizer import train_tokenizer

CORPUS, TOKENIZER = "corpus.json", "tokenizer.json"
END = 0  # the tokenizer's <|endoftext|>: a text begins and ends with it, a source ends with it
MOST_FILE_BYTES = 100_000
MOST_FILES = 80  # of one package, or the largest would be most of the corpus
# Tests say little about themselves. transformers copies its models from one another, file by file: what is
# held out would be in training under another name.
SKIPPED = {"transformers", "test", "tests", "idlelib", "site-packages", "__pycache__"}
LONGEST_SOURCE, LONGEST_TEXT = 96, 128  # tokens; a longer source is cut, a longer text left out
SHORTEST_TEXT = 12  # characters
TOKENIZER_TEXTS = 20_000  # enough to find the pairs to merge


class Function(NamedTuple):
    """A function's code and its docstring."""

    code: str
    text: str


class Example(NamedTuple):
    """A function and its docstring in token ids, both with the end token behind them."""

    source: list[int]
    text: list[int]


class Corpus(NamedTuple):
    """Examples to train on, and examples of other files."""

    train: list[Example]
    held_out: list[Example]


def corpus_in(folder: Path, vocab_size: int, seed: int) -> Corpus:
    """The corpus of a folder of runs: made once, with its tokenizer, and kept there."""
    if not (folder / CORPUS).exists():
        train, held_out = read_functions(installed())
        tokenizer = train_tokenizer((part for pair in train[:TOKENIZER_TEXTS] for part in pair), vocab_size)
        tokenizer.save(str(folder / TOKENIZER))
        made = Corpus(encode(train, tokenizer, seed), encode(held_out, tokenizer, seed))
        (folder / CORPUS).write_text(json.dumps(made))  # last: it says that the tokenizer is there
    parts = json.loads((folder / CORPUS).read_text())
    return Corpus(*([Example(*example) for example in part] for part in parts))


def installed() -> list[Path]:
    """The folders of the standard library and of installed packages."""
    paths = sysconfig.get_paths()
    return [Path(paths["stdlib"]), Path(paths["purelib"])]


def read_functions(folders: list[Path]) -> tuple[list[Function], list[Function]]:
    """The documented functions below `folders`: those to train on, and those held out.

    Raises ValueError if one of the two is empty.
    """
    seen: set[str] = set()
    train: list[Function] = []
    held_out: list[Function] = []
    for folder in folders:
        for path in _files(folder):
            side = held_out if is_held_out(path.relative_to(folder).as_posix()) else train
            for function in _functions(path):
                if function.text not in seen:
                    seen.add(function.text)
                    side.append(function)
    if not train or not held_out:
        raise ValueError("too few functions with docstrings are installed to split them into two parts")
    return train, held_out


def _files(folder: Path) -> Iterator[Path]:
    """At most MOST_FILES files of each package, in an order that mixes packages and is always the same."""
    taken = Counter[str]()
    found = [path.relative_to(folder) for path in folder.rglob("*.py")]
    for path in sorted(found, key=lambda path: hashlib.sha256(path.as_posix().encode()).digest()):
        if not SKIPPED & set(path.parts) and taken[path.parts[0]] < MOST_FILES:
            taken[path.parts[0]] += 1
            yield folder / path


def _functions(path: Path) -> Iterator[Function]:
    """The functions of a file that have an ASCII docstring; none if it is no Python of today."""
    if path.stat().st_size > MOST_FILE_BYTES:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in other people's strings
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            text = " ".join(inspect.cleandoc(ast.get_docstring(node) or "").split())
            if len(text) >= SHORTEST_TEXT and text.isascii():
                node.body, node.decorator_list = node.body[1:] or [ast.Pass()], []
                yield Function(ast.unparse(node), text)


def encode(functions: list[Function], tokenizer: Tokenizer, seed: int) -> list[Example]:
    """The functions in ids, shuffled by `seed`, without those whose text is too long."""
    sources = tokenizer.encode_batch([function.code for function in functions])
    texts = tokenizer.encode_batch([function.text for function in functions])
    examples = [
        Example([*source.ids[: LONGEST_SOURCE - 1], END], [*text.ids, END])
        for source, text in zip(sources, texts, strict=True)
        if len(text.ids) < LONGEST_TEXT
    ]
    random.Random(seed).shuffle(examples)
    return examples
