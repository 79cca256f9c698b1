"""Rotary embedding: frequencies equal transformers' for any parameters; rotation keeps what it must."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from model.checkpoint.families.family import Fields
from model.checkpoint.families.rope import read_rope
from model.network.config import ConfigError, LoopedConfig, RopeConfig
from model.network.layers import Rotary, rotary_frequencies
from tests.loose import Field, Json

torch.set_num_threads(1)

thetas = st.floats(2.0, 1e8)
half_dims = st.integers(1, 64)
factors = st.floats(1.0, 64.0)
lengths = st.integers(8, 1 << 20)


def assert_equal_to_transformers(
    half_dim: int, longest: int, rope: RopeConfig, fields: dict[str, Json]
) -> None:
    config = LlamaConfig(
        head_dim=2 * half_dim,
        max_position_embeddings=longest,
        rope_parameters={"rope_type": rope.kind, "rope_theta": rope.theta, **fields},
    )
    wanted, wanted_scaling = ROPE_INIT_FUNCTIONS[rope.kind](config, device="cpu")
    found, scaling = rotary_frequencies(rope, 2 * half_dim, longest)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    assert scaling == pytest.approx(wanted_scaling, rel=1e-6)


@given(half_dims, thetas, factors)
def test_linear(half_dim: int, theta: float, factor: float) -> None:
    rope = RopeConfig(theta=theta, kind="linear", factor=factor)
    assert_equal_to_transformers(half_dim, 64, rope, {"factor": factor})


@given(half_dims, thetas, lengths, st.floats(1.0, 64.0), st.floats(0.5, 4.0))
def test_llama3(half_dim: int, theta: float, original: int, factor: float, low: float) -> None:
    fields: dict[str, Field] = {"factor": factor, "low_freq_factor": low, "high_freq_factor": 3 * low}
    rope = RopeConfig(theta=theta, kind="llama3", original_max_positions=original, **fields)
    assert_equal_to_transformers(half_dim, original, rope, with_length(fields, original))


ramps = st.fixed_dictionaries(
    {
        "factor": factors,
        "beta_fast": st.floats(1.0, 64.0),
        "beta_slow": st.floats(0.1, 1.0),
        "truncate": st.booleans(),
    }
)


@settings(max_examples=300)
@given(half_dims, thetas, lengths, ramps)
def test_yarn(half_dim: int, theta: float, original: int, ramp: dict[str, Json]) -> None:
    """Small original contexts too, where the ramp's upper end falls below its lower one."""
    rope = RopeConfig(theta=theta, kind="yarn", original_max_positions=original, **ramp)
    assert_equal_to_transformers(half_dim, original, rope, with_length(ramp, original))


def with_length(fields: dict[str, Json], original: int) -> dict[str, Json]:
    return {**fields, "original_max_position_embeddings": original}


@given(factors, st.floats(0.1, 3.0), st.floats(0.1, 3.0), st.none() | st.floats(0.1, 3.0))
def test_yarn_attention_factor(
    factor: float, mscale: float, mscale_all_dim: float, given_factor: float | None
) -> None:
    rope = RopeConfig(
        kind="yarn",
        factor=factor,
        original_max_positions=4096,
        attention_factor=given_factor,
        mscale=mscale,
        mscale_all_dim=mscale_all_dim,
    )
    fields = {"factor": factor, "original_max_position_embeddings": 4096, "attention_factor": given_factor}
    fields |= {"mscale": mscale, "mscale_all_dim": mscale_all_dim}
    assert_equal_to_transformers(8, 4096, rope, fields)


def test_unknown_kind_is_an_error() -> None:
    with pytest.raises(ConfigError, match="proportional"):
        rotary_frequencies(RopeConfig(kind="proportional"), 8, 64)


@given(st.lists(factors, min_size=1, max_size=32), thetas, lengths, factors, st.none() | st.floats(0.5, 2.0))
@settings(deadline=None)
def test_longrope(
    divisors: list[float], theta: float, original: int, factor: float, attention_factor: float | None
) -> None:
    """Read from a config.json: the factor of cos and sin is worked out there."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": theta,
        "short_factor": divisors,
        "long_factor": [2.0] * len(divisors),
        "original_max_position_embeddings": original,
        "factor": factor,
        "attention_factor": attention_factor,
    }
    longest, read = read_rope(Fields({"max_position_embeddings": 2 * original, "rope_parameters": rope}))
    assert longest == original
    assert_equal_to_transformers(len(divisors), longest, read, rope)


def rotary(**rope: Field) -> Rotary:
    return Rotary(
        LoopedConfig(
            family="test",
            vocab_size=4,
            hidden_size=16,
            intermediate_size=4,
            num_heads=2,
            num_kv_heads=2,
            head_dim=8,
            num_block_layers=1,
            num_loops=1,
            max_positions=4096,
            rope=RopeConfig(**rope),
        )
    )


shapes = pytest.mark.parametrize(
    "options", [{}, {"interleaved": True}, {"rotary_dim": 4}, {"rotary_dim": 6, "interleaved": True}]
)


@shapes
def test_scores_depend_on_the_distance_alone(options: dict[str, Field]) -> None:
    """What makes it a relative embedding, and what a wrong pairing of channels breaks."""
    torch.manual_seed(0)
    turn, (q, k) = rotary(**options), torch.randn(2, 1, 1, 8)
    first, shifted = torch.tensor([9, 2]), torch.tensor([309, 302])

    def score(positions: Tensor) -> Tensor:
        cos, sin = turn(positions, torch.float32)
        return (turn.rotate(q, cos[:1], sin[:1]) * turn.rotate(k, cos[1:], sin[1:])).sum()

    assert score(first).item() == pytest.approx(score(shifted).item(), abs=1e-4)
    assert abs(score(first) - score(torch.tensor([9, 4]))) > 1e-3


@shapes
def test_rotation_keeps_lengths_and_the_channels_past_rotary_dim(options: dict[str, Field]) -> None:
    turn, x = rotary(**options), torch.randn(5, 2, 8)
    turned = turn.rotate(x, *turn(torch.arange(5) + 100, torch.float32))
    untouched = options.get("rotary_dim", 8)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[..., untouched:], x[..., untouched:])
    assert not torch.allclose(turned[..., :untouched], x[..., :untouched])


def test_interleaved_is_the_complex_product_of_channel_pairs() -> None:
    torch.manual_seed(0)
    turn, x = rotary(interleaved=True), torch.randn(3, 1, 8)
    angles = torch.arange(3)[:, None, None] * 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    wanted = torch.view_as_complex(x.view(3, 1, 4, 2)) * torch.polar(torch.ones(3, 1, 4), angles)
    turned = turn.rotate(x, *turn(torch.arange(3), torch.float32))
    torch.testing.assert_close(turned, torch.view_as_real(wanted).flatten(-2))


def test_frequencies_survive_casting_and_the_meta_device() -> None:
    """Frequencies rounded to bf16 with the rest of a module are off by radians at position 4000."""
    with torch.device("meta"):
        turn = rotary(theta=1e4)
    turn = turn.to(torch.bfloat16).to_empty(device="cpu")
    cos, _ = turn(torch.tensor([4000]), torch.float32)
    assert cos[0, 0, 1].item() == pytest.approx(math.cos(4000 * 1e4**-0.25), abs=1e-3)
