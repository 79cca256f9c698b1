"""The operations that a pass is made of: what they promise, and the Triton kernels that keep it.

`plain.py` has the same in plain torch, slow and obvious; tests hold one to the other. Numbers between
products are fp32, inputs of products have the model's dtype. Invariant: a row's bits depend on that row
alone, never on how many rows there are or what the others hold.
"""

from typing import NamedTuple, Protocol

import torch
import triton
from torch import Tensor

from model.network.config import LoopedConfig
from model.passes.cuda.kernels import attention, choice, joins, products
from model.passes.cuda.weights import Matrix

VOCAB_BLOCK = 1024  # tokens of a program that chooses
PROGRAMS = 256  # of a product that are wanted at least: about two for each multiprocessor
STEPS = 4  # tiles of inputs that a part of a product has at least


class Tile(NamedTuple):
    """The shapes of the work of one program; any powers of two from 16 on give right results.

    `rows`, `columns` and `inputs` are of a product. Attention walks contexts in blocks of `positions`, dealt
    out to `slots` programs. None of it has been tuned on a GPU.
    """

    rows: int = 64
    columns: int = 32
    inputs: int = 64
    positions: int = 64
    slots: int = 8

    def parts(self, matrix: Matrix) -> tuple[int, int]:
        """Into how many parts the inputs of a matrix are cut, and inputs of each: by its shape alone."""
        steps = -(-matrix.num_inputs // self.inputs)
        wanted = PROGRAMS // -(-matrix.num_outputs // self.columns)
        size = -(-steps // max(1, min(wanted, steps // STEPS)))
        return -(-steps // size), size * self.inputs


class Parts(NamedTuple):
    """A product whose parts are still to be added up: (parts, rows, outputs), fp32, and whose it is."""

    sums: Tensor
    matrix: Matrix


class Norms(NamedTuple):
    """Norms of a sub-layer's output, of the sum with the state, and before the next product, as they are."""

    output: Tensor | None = None
    sum: Tensor | None = None
    next: Tensor | None = None


class Places(NamedTuple):
    """Where rows stand, one entry each, int64: what attention needs to know of them.

    A row's K and V go to `entries` of a layer's (loops * cells). It sees the positions before `ends`, on the
    pages that stand in `pages` from `tables` on and lie behind the entry `offsets`; none if `ends` is 0.
    """

    positions: Tensor
    entries: Tensor
    offsets: Tensor
    tables: Tensor
    ends: Tensor
    pages: Tensor


class Cache(NamedTuple):
    """K and V of one layer, each (loops * cells, kv_heads, head_dim)."""

    keys: Tensor
    values: Tensor


class Asked(NamedTuple):
    """How a token is chosen by each row of logits: fp32 temperatures, below 0 for rows that ask nothing."""

    seeds: Tensor
    positions: Tensor
    temperatures: Tensor


class Operations(Protocol):
    """What a pass computes with."""

    def product(self, x: Tensor, matrix: Matrix) -> Parts:
        """x (rows, inputs) times a matrix, without its scales and biases."""

    def gated(self, x: Tensor, matrix: Matrix) -> Tensor:
        """silu(gate x) * up x, (rows, outputs / 2), in x's dtype."""

    def join(self, parts: Parts | None, state: Tensor | None, norms: Norms) -> tuple[Tensor, Tensor]:
        """The state (rows, size), fp32, behind a product that is added to `state`, and the next input."""

    def rotate(self, parts: Parts, more: Tensor | None, places: Places, cache: Cache) -> Tensor:
        """Stores K and V of rows; their rotated and scaled queries (rows, heads, head_dim), fp32.

        `more` are biases of queries and keys, beside those of the matrix.
        """

    def attend(self, queries: Tensor, places: Places, cache: Cache, window: int) -> Tensor:
        """What the rows make of the context that they see, (rows, heads * head_dim), in the model's dtype.

        `window` is how many positions they see at most, 0 for all.
        """

    def choose(self, logits: Parts, asked: Asked) -> Tensor:
        """Tokens and their logits, (rows, 2), fp64; zeros where nothing is asked. Logits have one part."""

    def noise(self, seeds: Tensor, positions: Tensor) -> Tensor:
        """Gumbel noise (rows, vocab), fp32."""


class Shape(NamedTuple):
    """What operations know of a model: sizes, its dtype, and the rotary embedding of its positions."""

    config: LoopedConfig
    dtype: torch.dtype
    cosines: Tensor
    sines: Tensor
    page_size: int

    @property
    def attention_scale(self) -> float:
        """The factor of scores."""
        scale = self.config.attention_scale
        return self.config.head_dim**-0.5 if scale is None else scale


class TritonOperations:
    """The operations by Triton kernels; on a CPU in Triton's interpreter, for tests.

    With `widen` bf16 is multiplied as fp32, which the interpreter needs and which changes no product.
    """

    def __init__(self, shape: Shape, tile: Tile, *, widen: bool | None = None) -> None:
        self.shape, self.tile = shape, tile
        self._widen = not shape.cosines.is_cuda if widen is None else widen

    def product(self, x: Tensor, matrix: Matrix) -> Parts:
        """One program for each tile of rows, tile of columns and part."""
        num_parts, part_size = self.tile.parts(matrix)
        sums = torch.empty(num_parts, len(x), matrix.num_outputs, device=x.device)
        tile = self.tile
        grid = (_tiles(len(x), tile.rows), _tiles(matrix.num_outputs, tile.columns), num_parts)
        products.product[grid](
            x,
            matrix.weight,
            sums,
            len(x),
            matrix.num_outputs,
            matrix.num_inputs,
            part_size,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            INPUTS=tile.inputs,
            WIDEN=self._widen,
        )
        return Parts(sums, matrix)

    def gated(self, x: Tensor, matrix: Matrix) -> Tensor:
        """One program for each tile of rows and of columns."""
        size, tile = matrix.num_outputs // 2, self.tile
        out = torch.empty(len(x), size, device=x.device, dtype=x.dtype)
        products.gated[(_tiles(len(x), tile.rows), _tiles(size, tile.columns))](
            x,
            matrix.weight,
            matrix.scales,
            matrix.biases,
            out,
            len(x),
            size,
            matrix.num_inputs,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            INPUTS=tile.inputs,
            WIDEN=self._widen,
        )
        return out

    def join(self, parts: Parts | None, state: Tensor | None, norms: Norms) -> tuple[Tensor, Tensor]:
        """One program a row."""
        given = state if parts is None else parts.sums[0]
        assert given is not None
        size = given.shape[-1]
        new_state = torch.empty(len(given), size, device=given.device)
        next_input = torch.empty(len(given), size, device=given.device, dtype=self.shape.dtype)
        joins.join[(len(given),)](
            None if parts is None else parts.sums,
            None if parts is None else parts.matrix.scales,
            None if parts is None else parts.matrix.biases,
            state,
            *norms,
            new_state,
            next_input,
            self.shape.config.norm_eps,
            len(given),
            SIZE=size,
            PAD=triton.next_power_of_2(size),
            PARTS=0 if parts is None else len(parts.sums),
        )
        return new_state, next_input

    def rotate(self, parts: Parts, more: Tensor | None, places: Places, cache: Cache) -> Tensor:
        """One program for each row and K/V head."""
        config, sums = self.shape.config, parts.sums
        group = config.num_heads // config.num_kv_heads
        queries = torch.empty(sums.shape[1], config.num_heads, config.head_dim, device=sums.device)
        attention.rotate[(sums.shape[1], config.num_kv_heads)](
            sums,
            parts.matrix.scales,
            parts.matrix.biases,
            more,
            places.positions,
            places.entries,
            self.shape.cosines,
            self.shape.sines,
            queries,
            cache.keys,
            cache.values,
            sums.shape[1],
            self.shape.attention_scale,
            KV_HEADS=config.num_kv_heads,
            GROUP=group,
            PAD=triton.next_power_of_2(group + 1),
            DIM=config.head_dim,
            DIM_PAD=triton.next_power_of_2(config.head_dim),
            TURNED=config.rotary_dim,
            INTERLEAVED=config.rope.interleaved,
            PARTS=len(sums),
        )
        return queries

    def attend(self, queries: Tensor, places: Places, cache: Cache, window: int) -> Tensor:
        """One program for each row, K/V head and slot; then one for each row and head."""
        config, slots = self.shape.config, self.tile.slots
        rows, heads, dim = queries.shape
        group, pad = config.num_heads // config.num_kv_heads, triton.next_power_of_2(dim)
        mixed = torch.empty(rows, heads, slots, dim, device=queries.device)
        weights = torch.empty(rows, heads, slots, 2, device=queries.device)
        attention.attend[(rows, config.num_kv_heads, slots)](
            queries,
            cache.keys,
            cache.values,
            places.offsets,
            places.tables,
            places.ends,
            places.pages,
            mixed,
            weights,
            window,
            KV_HEADS=config.num_kv_heads,
            GROUP=group,
            PAD=triton.next_power_of_2(group),
            DIM=dim,
            DIM_PAD=pad,
            PAGE=self.shape.page_size,
            BLOCK=self.tile.positions,
            SLOTS=slots,
        )
        out = torch.empty(rows, heads * dim, device=queries.device, dtype=self.shape.dtype)
        attention.combine[(rows, heads)](mixed, weights, out, DIM=dim, DIM_PAD=pad, SLOTS=slots)
        return out

    def choose(self, logits: Parts, asked: Asked) -> Tensor:
        """One program for each row and block of the vocabulary; then one a row."""
        numbers, scales = logits.sums[0], logits.matrix.scales
        rows, vocab_size = numbers.shape
        blocks = _tiles(vocab_size, VOCAB_BLOCK)
        scores = torch.empty(rows, blocks, device=numbers.device)
        tokens = torch.empty(rows, blocks, device=numbers.device, dtype=torch.int64)
        out = torch.zeros(rows, 2, device=numbers.device, dtype=torch.float64)
        choice.best_of_blocks[(rows, blocks)](
            numbers, scales, *asked, scores, tokens, vocab_size, BLOCK=VOCAB_BLOCK
        )
        choice.best_of_all[(rows,)](
            numbers,
            scales,
            asked.temperatures,
            scores,
            tokens,
            out,
            blocks,
            vocab_size,
            PAD=triton.next_power_of_2(blocks),
        )
        return out

    def noise(self, seeds: Tensor, positions: Tensor) -> Tensor:
        """One program for each row and block of the vocabulary."""
        vocab_size = self.shape.config.vocab_size
        out = torch.empty(len(seeds), vocab_size, device=seeds.device)
        grid = (len(seeds), _tiles(vocab_size, VOCAB_BLOCK))
        choice.noise[grid](seeds, positions, None, out, vocab_size, BLOCK=VOCAB_BLOCK)
        return out

    def words(self, seeds: Tensor, positions: Tensor, count: int) -> Tensor:
        """The first `count` Philox words of each row (rows, count), as int64: what the noise is made of."""
        out = torch.empty(len(seeds), count, device=seeds.device, dtype=torch.int64)
        grid = (len(seeds), _tiles(count, VOCAB_BLOCK))
        choice.noise[grid](seeds, positions, out, None, count, BLOCK=VOCAB_BLOCK)
        return out


def _tiles(size: int, tile: int) -> int:
    return -(-size // tile)
