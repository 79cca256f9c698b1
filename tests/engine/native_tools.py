"""Passes of the native library over whole texts, for tests: rows of drawn shapes in, logits out."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from numpy.typing import NDArray

from model.network.looped import LoopedTransformer
from model.passes.backend import BackendMaker
from model.passes.native.backend import NativeOptions, NativePasses, RowArrays
from model.passes.native.library import NativeUnavailableError, usable_levels
from model.passes.native.weights import check_covered
from model.passes.torch.backend import TorchMaker
from tests.loose import Field
from tests.native import HAS_LIBRARY

LEVELS = usable_levels() if HAS_LIBRARY else []
POSITIONS = 128
Array = NDArray[np.float32]
# What runs the passes of an engine whose backend a test doesn't care for: what users have, in full precision.
MAKER: BackendMaker = NativeOptions(threads=1, kv_dtype="float32") if HAS_LIBRARY else TorchMaker()

BACKENDS: list[Field] = [  # for tests that hold for both
    pytest.param(TorchMaker(), id="torch"),
    pytest.param(NativeOptions(threads=1, kv_dtype="float32"), id="native", marks=pytest.mark.native),
]


def maker_for(model: LoopedTransformer) -> BackendMaker:
    """`MAKER`, or torch for a model that the library doesn't cover."""
    try:
        check_covered(model.config, model.device)
    except NativeUnavailableError:
        return TorchMaker()
    return MAKER


def passes_for(model: LoopedTransformer, **options: Field) -> NativePasses:
    """Passes of a model with K/V in fp32 unless said otherwise."""
    return NativePasses(
        model, 64 * 16, POSITIONS, NativeOptions(**{"kv_dtype": "float32", "threads": 2, **options})
    )


@dataclass
class Text:
    """Tokens, the pages that they lie on, and how they are read: chunks, each through all loops.

    The first `prefix` tokens see one another both ways; behind an encoder there is a source.
    """

    tokens: list[int]
    pages: list[int]
    chunks: list[int]  # sizes, with the sum of all tokens
    loops: int
    state: Array | None = None  # (tokens, hidden) that the first loop starts from
    prefix: int = 0
    source: list[int] = field(default_factory=list)
    source_pages: list[int] = field(default_factory=list)
    logits: list[Array] = field(default_factory=list)
    done: int = 0  # chunks times loops

    @property
    def is_read(self) -> bool:
        """Whether nothing is left to run."""
        return self.done == len(self.chunks) * self.loops

    def rows(self) -> tuple[range, int]:
        """Positions and loop of what runs next."""
        chunk, loop = divmod(self.done, self.loops)
        start = sum(self.chunks[:chunk])
        return range(start, start + self.chunks[chunk]), loop


def encode(passes: NativePasses, texts: Sequence[Text]) -> None:
    """Encodes the sources of texts, all in one pass."""
    sizes = [len(text.source) for text in texts]
    tables = [sum(len(text.source_pages) for text in texts[:index]) for index in range(len(texts))]
    rows = RowArrays(
        tokens=[token for text in texts for token in text.source],
        positions=[place for size in sizes for place in range(size)],
        loops=[0] * sum(sizes),
        tables=[table for table, size in zip(tables, sizes, strict=True) for _ in range(size)],
        pages=[page for text in texts for page in text.source_pages],
        ends=bytearray(sum(sizes)),
        lasts=[size - 1 for size in sizes for _ in range(size)],
        encoded=True,
    )
    passes.run(rows, (), ())


def step(passes: NativePasses, texts: Sequence[Text]) -> None:
    """One pass over the next rows of all `texts`; logits are kept of rows that end their last loop."""
    if new := [text for text in texts if text.source and not text.done]:
        encode(passes, new)
    columns: dict[str, list[int]] = {name: [] for name in ("tokens", "positions", "loops", "tables", "ends")}
    pages, noises, noise, readouts = list[int](), list[int](), list[Array](), list[int]()
    lasts, source_tables, source_lasts = list[int](), list[int](), list[int]()
    for text in texts:
        positions, loop = text.rows()
        is_last = loop == text.loops - 1
        first = len(columns["tokens"])
        columns["tokens"] += [text.tokens[p] for p in positions]
        columns["positions"] += positions
        columns["loops"] += [loop] * len(positions)
        columns["tables"] += [len(pages)] * len(positions)
        columns["ends"] += [is_last] * len(positions)
        readouts += range(first, first + len(positions)) if is_last else []
        start = text.state if loop == 0 else None
        noises += [-1] * len(positions) if start is None else range(len(noise), len(noise) + len(positions))
        noise += [] if start is None else [start[p] for p in positions]
        lasts += [max(position, text.prefix - 1) for position in positions]
        pages += text.pages
        source_tables += [len(pages)] * len(positions)
        source_lasts += [len(text.source) - 1] * len(positions)
        pages += text.source_pages
    arrays: dict[str, Field] = {name: np.array(column, np.int32) for name, column in columns.items()}
    arrays["ends"] = arrays["ends"].astype(np.uint8)
    rows = RowArrays(
        **arrays,
        pages=np.array(pages, np.int32),
        noises=np.array(noises, np.int32) if noise else None,
        noise=np.stack(noise).astype(np.float32) if noise else None,
        lasts=lasts if passes.config.prefix_lm else None,
        source_tables=source_tables if passes.config.encoder else None,
        source_lasts=source_lasts if passes.config.encoder else None,
    )
    result = passes.run(rows, np.array(readouts, np.int32), np.arange(len(readouts), dtype=np.int32))
    assert result.tokens == result.logits.argmax(-1).tolist()
    found = result.logits
    for text in texts:
        positions, loop = text.rows()
        if loop == text.loops - 1:
            text.logits.append(found[: len(positions)])
            found = found[len(positions) :]
        text.done += 1


def whole_logits(
    passes: NativePasses,
    tokens: Sequence[int],
    loops: int,
    state: Array | None = None,
    chunk: int = POSITIONS,
    prefix: int | None = None,
    source: Sequence[int] = (),
) -> Array:
    """Logits (tokens, vocab) of one text after `loops` loops, read in chunks of one size.

    A model that reads both ways so reads the first `prefix` tokens, by default all.
    """
    count, num_pages = len(tokens), -(-len(tokens) // 16)
    sizes = [min(chunk, count - start) for start in range(0, count, chunk)]
    text = Text(list(tokens), list(range(num_pages)), sizes, loops, state, source=list(source))
    text.prefix = count if prefix is None else prefix
    text.source_pages = list(range(num_pages, num_pages + -(-len(source) // 16)))
    while not text.is_read:
        step(passes, [text])
    return np.concatenate(text.logits)
