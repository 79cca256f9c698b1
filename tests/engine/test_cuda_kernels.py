"""Each operation of the cuda backend equals plain torch, and no row's bits depend on other rows."""

import numpy as np
import pytest
import torch
from torch import Tensor

from model.passes.cuda.operations import Asked, Norms, Operations, Parts, Tile, TritonOperations
from model.passes.cuda.plain import PlainOperations
from model.passes.cuda.weights import Matrix
from model.passes.noise import gumbel_noise_numpy
from tests.cuda import (
    DEVICE,
    KERNELS,
    TILE,
    cache_of,
    fast_interpreter,
    matrix_of,
    numbers,
    places_of,
    rows_of,
    shape_of,
)
from tests.loose import Field

__all__ = ["fast_interpreter"]
pytestmark = KERNELS

KINDS = ("fp32", "bf16", "int8")
ROWS = 18  # more than a tile has
SOME = (slice(0, 1), slice(16, 18))  # rows that also run without the others


def both(tile: Tile = TILE, **changes: Field) -> tuple[TritonOperations, PlainOperations]:
    """The kernels and what they are held to."""
    shape = shape_of(**changes)
    return TritonOperations(shape, tile), PlainOperations(shape)


def inputs_for(kind: str, size: int) -> Tensor:
    """Rows of the dtype that a kind of matrix is multiplied with."""
    return numbers(ROWS, size, dtype=torch.float32 if kind == "fp32" else torch.bfloat16)


def finished(parts: Parts) -> Tensor:
    """A product's outputs."""
    return parts.sums.sum(0)


@pytest.mark.parametrize("kind", KINDS)
def test_products_equal_plain_ones_and_a_row_alone_has_the_same_bits(kind: str) -> None:
    """Neither rows, outputs nor inputs are multiples of the tile; the inputs are cut into parts."""
    triton, plain = both()
    matrix, x = matrix_of(44, 136, kind), inputs_for(kind, 136)
    got = triton.product(x, matrix)
    assert len(got.sums) > 1
    torch.testing.assert_close(finished(got), finished(plain.product(x, matrix)), atol=1e-3, rtol=1e-4)
    for rows in SOME:
        assert torch.equal(triton.product(x[rows], matrix).sums, got.sums[:, rows])


@pytest.mark.parametrize("kind", KINDS)
def test_gates_and_ups_equal_plain_ones_and_a_row_alone_has_the_same_bits(kind: str) -> None:
    """Biases and scales of both halves are applied before the activation."""
    triton, plain = both()
    matrix, x = matrix_of(2 * 20, 24, kind, biases=True), inputs_for(kind, 24)
    got = triton.gated(x, matrix)
    assert got.dtype == x.dtype
    torch.testing.assert_close(got, plain.gated(x, matrix), atol=2e-5, rtol=2**-7 if kind != "fp32" else 1e-5)
    for rows in SOME:
        assert torch.equal(triton.gated(x[rows], matrix), got[rows])


NORMS: dict[str, tuple[bool, bool, bool]] = {  # of the output, of the sum, before the next product
    "pre": (False, False, True),
    "sandwich": (True, False, True),
    "post_add": (False, True, True),
    "last": (False, True, False),
}


@pytest.mark.parametrize("placement", NORMS)
def test_joins_equal_plain_ones_and_a_row_alone_has_the_same_bits(placement: str) -> None:
    """The parts of a product with scales and biases, the state before it, and norms in three places."""
    triton, plain = both(hidden_size=40)
    weights = [numbers(40, seed=5 + place) for place in range(3)]
    norms = Norms(
        *(weight if is_there else None for weight, is_there in zip(weights, NORMS[placement], strict=True))
    )
    parts = Parts(numbers(3, 5, 40), matrix_of(40, 16, "int8", biases=True))
    state = numbers(5, 40, seed=9)
    got = triton.join(parts, state, norms)
    for mine, wanted in zip(got, plain.join(parts, state, norms), strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=1e-5)
    one = triton.join(Parts(parts.sums[:, 3:4].contiguous(), parts.matrix), state[3:4], norms)
    for mine, whole in zip(one, got, strict=True):
        assert torch.equal(mine, whole[3:4])


def test_a_state_without_a_product_is_only_normalised() -> None:
    triton, plain = both()
    state, norms = numbers(3, 32), Norms(sum=numbers(32, seed=5), next=numbers(32, seed=6))
    for mine, wanted in zip(triton.join(None, state, norms), plain.join(None, state, norms), strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=1e-5)


POSITIONS_OF_ROWS = [0, 40, 17, 5, 16, -1]
LOOPS = [0, 2, 1, 1, 0, 0]
HEADS: dict[str, dict[str, Field]] = {
    "groups": {},
    "one query a key": {"num_kv_heads": 4},
    "three queries a key": {"num_heads": 6},
}


@pytest.mark.parametrize(
    ("heads", "dtype"),
    [("groups", torch.float32), ("groups", torch.bfloat16), ("three queries a key", torch.float32)],
)
def test_rotated_queries_and_stored_keys_and_values_equal_plain_ones(heads: str, dtype: torch.dtype) -> None:
    """Of rows at mixed depths, with biases; nothing but their own entries changes."""
    triton, plain = both(dtype=dtype, **HEADS[heads])
    config = triton.shape.config
    places, width = places_of(POSITIONS_OF_ROWS, LOOPS), (config.num_heads + 2 * config.num_kv_heads) * 8
    parts = Parts(numbers(2, len(LOOPS), width), matrix_of(width, 32, "fp32", biases=True))
    more = numbers(config.num_heads + config.num_kv_heads, 8, seed=7)
    caches = [cache_of(config, dtype) for _ in range(2)]
    got = triton.rotate(parts, more, places, caches[0])
    torch.testing.assert_close(got, plain.rotate(parts, more, places, caches[1]), atol=1e-5, rtol=1e-5)
    for mine, wanted in zip(*caches, strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)
    one = Parts(parts.sums[:, 1:3].contiguous(), parts.matrix)
    assert torch.equal(triton.rotate(one, more, rows_of(places, slice(1, 3)), caches[1]), got[1:3])


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
def test_channels_behind_the_rotary_dimension_pass_unturned(interleaved: bool) -> None:
    from model.network.config import RopeConfig  # noqa: PLC0415

    triton, plain = both(rope=RopeConfig(rotary_dim=4, interleaved=interleaved))
    places, parts = places_of([9, 30], [0, 1]), Parts(numbers(1, 2, 64), matrix_of(64, 32, "fp32"))
    caches = [cache_of(triton.shape.config) for _ in range(2)]
    got = triton.rotate(parts, None, places, caches[0])
    torch.testing.assert_close(got, plain.rotate(parts, None, places, caches[1]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        got[:, :, 4:].flatten(1), parts.sums[0, :, :32].view(2, 4, 8)[:, :, 4:].flatten(1) / 8**0.5
    )
    torch.testing.assert_close(caches[0].keys, caches[1].keys)


@pytest.mark.parametrize(
    ("heads", "window"),
    [("groups", 0), ("groups", 1), ("three queries a key", 20), ("one query a key", 0)],
)
def test_attention_equals_plain_softmax_and_a_row_alone_has_the_same_bits(heads: str, window: int) -> None:
    """Rows of two sequences at mixed depths and lengths, over blocks; a row of nothing gives zeros."""
    triton, plain = both(**HEADS[heads])
    config, places = triton.shape.config, places_of(POSITIONS_OF_ROWS, LOOPS)
    queries, cache = numbers(len(LOOPS), config.num_heads, 8), cache_of(config)
    got = triton.attend(queries, places, cache, window)
    torch.testing.assert_close(got, plain.attend(queries, places, cache, window), atol=1e-5, rtol=1e-5)
    assert not got[-1].any()
    chosen = slice(1, 2)
    assert torch.equal(triton.attend(queries[chosen], rows_of(places, chosen), cache, window), got[chosen])


def test_what_lies_behind_a_row_is_never_read() -> None:
    """Another text may have left a NaN there, which no mask would hide."""
    triton, _ = both()
    places = places_of([17], [1])
    cache, queries = cache_of(triton.shape.config), numbers(1, 4, 8)
    wanted = triton.attend(queries, places, cache, 0)
    own = places.offsets[0] + torch.tensor(
        [0 * 16 + p for p in range(16)] + [3 * 16, 3 * 16 + 1], device=DEVICE
    )
    for kept in cache:
        before = kept[own]
        kept.fill_(torch.nan)
        kept[own] = before
    assert torch.equal(triton.attend(queries, places, cache, 0), wanted)


SEEDS = (0, 7, -1, 2**63 - 1, -(2**63))
PLACES = (0, 3, 41, 2**31, 5)


def test_philox_words_on_the_device_are_those_of_numpy() -> None:
    triton, _ = both()
    seeds, positions = torch.tensor(SEEDS, device=DEVICE), torch.tensor(PLACES, device=DEVICE)
    got = triton.words(seeds, positions, 21).cpu().numpy().view(np.uint64)
    for row, seed, position in zip(got, SEEDS, PLACES, strict=True):
        wanted = np.random.Philox(key=seed % 2**64, counter=position << 64).random_raw(21)
        assert (row == wanted).all()


def test_noise_on_the_device_is_that_of_the_cpu_to_the_last_place_but_one() -> None:
    """The logarithms are rounded once where torch rounds four times: a unit in the last place, no more."""
    triton, _ = both()
    got = triton.noise(torch.tensor(SEEDS, device=DEVICE), torch.tensor(PLACES, device=DEVICE)).cpu()
    wanted = torch.stack([gumbel_noise_numpy(s, p, 61) for s, p in zip(SEEDS, PLACES, strict=True)])
    torch.testing.assert_close(got, wanted, atol=2e-7, rtol=4e-7)


def chosen_by(run: Operations, logits: Tensor, matrix: Matrix, temperatures: list[float]) -> Tensor:
    count = len(logits)
    seeds, positions = torch.arange(count, device=DEVICE) * 11, torch.arange(count, device=DEVICE) + 5
    asked = Asked(seeds, positions, torch.tensor(temperatures, device=DEVICE))
    return run.choose(Parts(logits[None], matrix), asked)


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_chosen_tokens_are_those_of_plain_operators(kind: str) -> None:
    """Likeliest and drawn ones, over more than one block of the vocabulary; one row asks nothing."""
    triton, plain = both(vocab_size=1030)
    logits, temperatures = numbers(5, 1030), [0.0, 1.0, 0.5, -1.0, 4.0]
    matrix = matrix_of(1030, 16, kind)
    got = chosen_by(triton, logits, matrix, temperatures)
    torch.testing.assert_close(got, chosen_by(plain, logits, matrix, temperatures), atol=1e-6, rtol=1e-6)
    assert got[:, 0].unique().numel() >= 4
    assert not got[3].any()


def test_the_least_of_equal_tokens_wins_and_a_row_without_numbers_says_so() -> None:
    triton, _ = both(vocab_size=1030)
    logits = numbers(3, 1030)
    logits[0, [5, 700, 1029]] = 9.0
    logits[1, 1029] = torch.nan
    logits[2] = -torch.inf
    got = chosen_by(triton, logits, matrix_of(1030, 16, "fp32"), [0.0] * 3)
    assert got[0].tolist() == [5.0, 9.0]
    assert got[1, 0] == 1029
    assert got[1:, 1].isfinite().logical_not().all()
    assert got[2, 0] == 0
