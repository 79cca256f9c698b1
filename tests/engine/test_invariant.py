"""Deterministic mode: a row's numbers are the same, to the last bit, whatever else is in the pass."""

import random
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from model import save_checkpoint
from model.engine import Engine
from model.network.config import RopeConfig
from model.network.int8 import quantize_linears
from model.network.layers import ACTIVATIONS, RMSNorm, Rotary
from model.network.looped import LoopedTransformer
from model.network.packed import PackedLinear
from model.options import EngineOptions, WorkerOptions
from model.passes.sampling import Sampler
from model.passes.torch.invariant import (
    BASE_ROWS,
    InvarianceError,
    InvariantActivation,
    InvariantLinear,
    InvariantNorm,
    InvariantRotary,
    invariant_sizes,
    make_invariant,
)
from model.protocol import GenerationRequest, SamplingParams
from model.worker.build import build_engine
from tests.cpu import HAS_INTEGER_PRODUCTS, needs_bf16_products, needs_integer_products
from tests.tiny_models import SHAPES, tiny_config, tiny_model

DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.bfloat16, marks=needs_bf16_products, id="bf16"),
]
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def invariant_model(dtype: torch.dtype, **changes) -> LoopedTransformer:
    model = tiny_model(**changes).to(dtype)
    make_invariant(model)
    return model


def requests(count: int, speculation: bool, seed: int = 0) -> list[GenerationRequest]:
    """Mixed lengths, greedy and sampled, some with penalties; the same for the same seed."""
    rng = random.Random(seed)
    kinds = [{"temperature": 0.0}, {"temperature": 0.9, "top_p": 0.9, "min_p": 0.01}]
    kinds.append({"temperature": 1.2, "top_k": 9, "presence_penalty": 0.5})
    return [
        GenerationRequest(
            request_id=str(index),
            prompt_token_ids=[rng.randrange(61) for _ in range(rng.randint(1, 60))],
            max_tokens=rng.randint(2, 20),
            sampling=SamplingParams(seed=index, **rng.choice(kinds)),
            ignore_eos=True,
            speculation=speculation,
        )
        for index in range(count)
    ]


class Recorded:
    """Texts, and the logits that decided each of their tokens."""

    def __init__(
        self, model: LoopedTransformer, kv_cache_tokens: int = 1024, row_budget: int = 32, **limits: int
    ) -> None:
        limits = {"prefill_chunk_size": 16, "prefill_rows": 64, **limits}
        config = EngineOptions(kv_cache_tokens=kv_cache_tokens, row_budget=row_budget, **limits)
        self.engine = Engine(model, config)
        self.logits: dict[tuple[str, int], torch.Tensor] = {}
        sampler = self.engine.backend.sampler
        choose = sampler.sample

        def recorded(logits, readouts, faults):
            for row, readout in zip(logits, readouts, strict=True):  # drafts come first, the last word last
                self.logits[readout.sequence.request.request_id, readout.position] = row.clone()
            return choose(logits, readouts, faults)

        vars(sampler)["sample"] = recorded

    def texts(self, requests: list[GenerationRequest]) -> dict[str, list[int]]:
        events = self.engine.run(requests)
        self.engine.check_integrity()
        return {r: [t for event in each for t in event.token_ids] for r, each in events.items()}


@dtypes
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_texts_are_the_same_bits_alone_and_in_any_batch(shape: str, dtype: torch.dtype) -> None:
    """Plain decoding, one request at a time, against speculation in batches with other chunk sizes.

    With ordinary kernels the bf16 logits differ for every shape (and the fp32 ones for most).
    """
    model = invariant_model(dtype, **SHAPES[shape])
    plain = Recorded(model, prefill_chunk_size=60, prefill_rows=60)
    expected: dict[str, list[int]] = {}
    for request in requests(10, speculation=False):
        expected |= plain.texts([request])
    ways = [
        Recorded(model, prefill_chunk_size=7, prefill_rows=40),
        Recorded(model, kv_cache_tokens=300, prefill_chunk_size=13, row_budget=9),  # little, scattered memory
    ]
    for way in ways:
        assert way.texts(requests(10, speculation=True)) == expected
        final = {
            (r.request_id, len(r.prompt_token_ids) + i)
            for r in requests(10, True)
            for i in range(r.max_tokens)
        }
        assert final <= plain.logits.keys()
        for place in final:
            assert torch.equal(way.logits[place], plain.logits[place]), place


@needs_integer_products
@dtypes
def test_integer_products_are_deterministic_as_they_are(dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype)
    quantize_linears(model)
    make_invariant(model)
    alone, together = Recorded(model), Recorded(model, prefill_chunk_size=5, prefill_rows=40)
    expected: dict[str, list[int]] = {}
    for request in requests(8, speculation=False):
        expected |= alone.texts([request])
    assert together.texts(requests(8, speculation=True)) == expected
    assert all(torch.equal(row, together.logits[place]) for place, row in alone.logits.items())


@dtypes
@given(in_features=st.integers(1, 200), out_features=st.integers(1, 200), data=st.data())
@settings(max_examples=25, deadline=None)
def test_a_linear_layer_gives_a_row_the_same_bits_among_any_others(dtype, in_features, out_features, data):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    linear = nn.Linear(in_features, out_features, dtype=dtype).requires_grad_(False)
    sizes = invariant_sizes(in_features, out_features, dtype)
    ours = InvariantLinear(PackedLinear(linear), sizes)
    rows = torch.randn(150, in_features, dtype=dtype)
    one_by_one = torch.cat([ours(row[None]) for row in rows])
    assert torch.allclose(one_by_one, linear(rows), atol=0.05 if dtype == torch.bfloat16 else 1e-4)
    chosen = torch.tensor(data.draw(st.lists(st.integers(0, 149), min_size=1, max_size=150)))
    assert torch.equal(ours(rows[chosen]), one_by_one[chosen])


def test_only_sizes_that_round_alike_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that sums in another order from 8 rows down, and another whose last row is special."""
    product = PackedLinear.product

    def other_order_for_few_rows(self, x):
        return product(self, x) if x.shape[0] > 8 else product(self, x) * (1 + 2**-20)

    monkeypatch.setattr(PackedLinear, "product", other_order_for_few_rows)
    sizes = invariant_sizes(96, 64, torch.float32)
    assert BASE_ROWS in sizes
    assert min(sizes) > 8

    def special_place(self, x):
        out = product(self, x)
        out[-1] *= 1 + 2**-20
        return out

    monkeypatch.setattr(PackedLinear, "product", special_place)
    with pytest.raises(
        InvarianceError, match=r"16 rows \(96 x 64, torch.float32\) depends on the rows' places"
    ):
        invariant_sizes(96, 64, torch.float32)


@dtypes
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("channels", [3, 48, 1024])
def test_activations_do_not_know_where_a_row_stands(name: str, channels: int, dtype: torch.dtype) -> None:
    """The scalar exp behind the last whole vector rounds otherwise than the vector's."""
    rows = 3 * torch.randn(200, 2 * channels, dtype=dtype)
    ours = InvariantActivation(ACTIVATIONS[name])
    got = ours(rows.chunk(2, -1)[0])
    assert torch.allclose(got, ACTIVATIONS[name](rows[:, :channels]), atol=0.02, rtol=0.02)
    for row in (0, 1, 84, 199):
        assert torch.equal(ours(rows[row : row + 1].chunk(2, -1)[0])[0], got[row])


@dtypes
@pytest.mark.parametrize("channels", [3, 40, 1000])
def test_norms_do_not_know_where_a_row_stands(channels: int, dtype: torch.dtype) -> None:
    rows = torch.randn(200, channels, dtype=dtype)
    norm = RMSNorm(channels, 1e-5).to(dtype).requires_grad_(False)
    got = InvariantNorm(norm)(rows)
    assert torch.allclose(got, norm(rows), atol=1e-2)
    assert torch.equal(torch.cat([InvariantNorm(norm)(row[None]) for row in rows]), got)


@dtypes
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_embedding_is_a_function_of_the_position(interleaved: bool, dtype: torch.dtype) -> None:
    rope = RopeConfig(interleaved=interleaved, rotary_dim=20)
    config = tiny_config(head_dim=24, max_positions=3000, rope=rope)
    rotary = Rotary(config)
    x, positions = torch.randn(50, 4, 24).to(dtype), torch.randint(0, 3000, (50,))
    ours = InvariantRotary(config)
    got = ours.rotate(x, *ours(positions, dtype))
    assert torch.allclose(
        got, rotary.rotate(x, *rotary(positions, dtype)), atol=5e-2 if dtype == torch.bfloat16 else 1e-5
    )
    for row, position in enumerate(positions):
        angles = InvariantRotary(config)(position[None], dtype)
        assert torch.equal(ours.rotate(x[row : row + 1], *angles)[0], got[row])


def test_rows_are_filtered_and_drawn_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several rows' logarithms go partly through a vector kernel and partly through a scalar one."""
    drawn: list[int] = []
    draw = Sampler._draw_scores

    def recorded(self, scores, readouts):
        drawn.append(len(scores))
        return draw(self, scores, readouts)

    monkeypatch.setattr(Sampler, "_draw_scores", recorded)
    engine = Recorded(invariant_model(torch.float32))
    assert engine.texts(requests(8, speculation=True)) == engine.texts(requests(8, speculation=True))
    assert set(drawn) == {1}


def test_what_cannot_be_made_invariant_is_refused() -> None:
    with pytest.raises(InvarianceError, match=r"needs float32, or bfloat16 .* dtype is torch\.float16"):
        make_invariant(tiny_model().half())
    with pytest.raises(InvarianceError, match="on a CPU only; the device is meta"):
        make_invariant(tiny_model().to("meta"))
    model = tiny_model()
    model.layers[0].mlp.down_proj = nn.Sequential(nn.Linear(48, 32))
    with pytest.raises(InvarianceError, match=r"no implementation of Sequential \(layers.0.mlp.down_proj\)"):
        make_invariant(model)


def test_the_option_builds_a_deterministic_engine_and_says_so(tmp_path: Path) -> None:
    save_checkpoint(tiny_model(), tmp_path, torch.float32)
    for deterministic in (True, False):
        options = WorkerOptions(
            model_path=str(tmp_path),
            kv_cache_tokens=1024,
            threads=1,
            device="cpu",
            deterministic=deterministic,
        )
        assert build_engine(options).info.deterministic is deterministic


@pytest.mark.parametrize(
    ("quantization", "dtype", "chosen"),
    [("int8", "float32", True), ("int8", "bfloat16", False), ("none", "float32", False)],
)
def test_unasked_an_engine_is_deterministic_where_that_is_cheap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: str, dtype: str, chosen: bool
) -> None:
    """Where it can't be had the engine does without, and only an explicit wish is refused."""
    save_checkpoint(tiny_model(), tmp_path, torch.float32)
    options = WorkerOptions(
        model_path=str(tmp_path),
        kv_cache_tokens=1024,
        row_budget=8,
        threads=1,
        device="cpu",
        dtype=dtype,
        quantization=quantization,
    )
    assert build_engine(options).info.deterministic is (chosen and HAS_INTEGER_PRODUCTS)

    def refuse(_: LoopedTransformer) -> None:
        raise InvarianceError("a product depends on its place")

    monkeypatch.setattr("model.worker.build.make_invariant", refuse)
    assert not build_engine(options).info.deterministic
    with pytest.raises(InvarianceError, match="depends on its place"):
        build_engine(msgspec.structs.replace(options, deterministic=True))


@pytest.mark.parametrize(
    ("has_products", "dtype"), [(False, "bfloat16"), (True, "bfloat16"), (False, "float32")]
)
def test_bf16_on_a_cpu_without_its_products_is_warned_of(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    has_products: bool,
    dtype: str,
) -> None:
    monkeypatch.setattr("model.worker.build.multiplies_bf16", lambda device: has_products)
    save_checkpoint(tiny_model(), tmp_path, torch.float32)
    build_engine(
        WorkerOptions(
            model_path=str(tmp_path), kv_cache_tokens=256, row_budget=8, threads=1, device="cpu", dtype=dtype
        )
    )
    warned = "no bfloat16 products" in caplog.text
    assert warned is (not has_products and dtype == "bfloat16")
