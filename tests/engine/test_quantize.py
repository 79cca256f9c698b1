"""int8 weights: what they stand for, exactness of what is computed with them, and speculation on == off."""

import copy

import pytest
import torch
from torch import Tensor, nn

from model.engine import Engine
from model.network.int8 import Int8Linear, quantize_linears, quantized
from model.options import EngineOptions
from model.protocol import GenerationRequest, SamplingParams
from tests.engine.native_tools import MAKER
from tests.tiny_models import SHAPES, tiny_model


def linear(
    inputs: int = 96, outputs: int = 64, bias: bool = False, dtype: torch.dtype = torch.float32
) -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(inputs, outputs, bias=bias, dtype=dtype).requires_grad_(False)


def rows(count: int, inputs: int = 96, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of very different sizes, one of them nothing but zeros, each with one large number in it."""
    x = torch.randn(count, inputs, generator=torch.Generator().manual_seed(count))
    x = x * torch.logspace(-3, 3, count)[:, None]
    x[:, 5] *= 50
    x[count // 2] = 0
    return x.to(dtype)


def test_a_weight_is_off_by_half_a_step_of_its_channel_at_most() -> None:
    weight = torch.randn(40, 70) * torch.logspace(-4, 2, 40)[:, None]
    weight[7] = 0
    stored, scales = quantized(weight)
    assert stored.abs().amax(1).tolist() == [0 if row == 7 else 127 for row in range(40)]
    assert ((stored * scales[:, None] - weight).abs() <= scales[:, None] * 0.5001).all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("count", [1, 5, 100])
def test_the_product_is_that_of_the_dequantised_weight(
    bias: bool, dtype: torch.dtype, rounding: float, count: int
) -> None:
    layer = linear(bias=bias, dtype=dtype)
    stored, scales = quantized(layer.weight)
    weight = (stored * scales[:, None]).double()
    x = rows(count, dtype=dtype)
    wanted = x.double() @ weight.T + (layer.bias.double() if bias else 0)
    got = Int8Linear(layer)(x)
    assert got.dtype == dtype
    assert ((got - wanted).abs() <= rounding * (x.double().abs() @ weight.abs().T + 1)).all()


def test_every_layer_but_the_gate_is_replaced_and_is_a_quarter_of_its_size() -> None:
    model = tiny_model(exit_gate=True, tie_embeddings=True)
    embedding = model.embedding.weight.clone()
    assert quantize_linears(model) == 4 * 2 + 1
    assert isinstance(model.gate, nn.Linear)
    assert [m for m in model.modules() if isinstance(m, nn.Linear)] == [model.gate]
    assert torch.equal(model.embedding.weight, embedding)
    assert quantize_linears(model) == 0  # a second time
    assert Int8Linear(linear()).weight.dtype == torch.int8


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_product_is_that_of_the_same_int8_weights(dtype: torch.dtype) -> None:
    layer, x = linear(bias=True, dtype=dtype), rows(17, dtype=dtype)
    wanted = Int8Linear(layer)(x).float()
    model = nn.Sequential(layer.cuda())
    assert quantize_linears(model) == 1
    assert isinstance(model[0], Int8Linear)
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    assert (model(x.cuda()).float().cpu() - wanted).abs().max() < limit * wanted.abs().max()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_quantised_model_computes_with_the_weights_it_stands_for(shape: str) -> None:
    model = tiny_model(**SHAPES[shape])
    ids = torch.arange(1, 41)[None]
    rounded = copy.deepcopy(model)
    for name, layer in rounded.named_modules():
        if isinstance(layer, nn.Linear) and name != "adapter":
            stored, scales = quantized(layer.weight)
            layer.weight = nn.Parameter(stored * scales[:, None], requires_grad=False)
    rounded.embedding.weight = model.embedding.weight
    quantize_linears(model)
    wanted = rounded.whole_readout(rounded.depths(ids)[-1])
    got = model.whole_readout(model.depths(ids)[-1])
    assert (got - wanted).abs().mean() < 2e-2 * wanted.std()


def test_a_thousandth_of_the_state_is_not_rounded_away() -> None:
    """An adapter of (0.001, 1) in int8 was (0, 1): loops that had been trained did nothing."""
    model = tiny_model(num_loops=2, num_prelude_layers=1, input_injection=True, initial_state_std=0.1)
    size = model.config.hidden_size
    model.adapter.weight.copy_(torch.cat((1e-3 * torch.eye(size), torch.eye(size)), 1))
    quantize_linears(model)
    first, second = model.depths(torch.arange(1, 9)[None])
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.native)])
def test_speculation_changes_no_token_of_a_quantised_model(dtype: torch.dtype) -> None:
    """Alone, in a batch with other lengths, greedy and sampled.

    In bf16 by the native library alone: torch's products round with the number of rows.
    """
    model = tiny_model(num_loops=4, num_kv_heads=4).to(dtype)
    quantize_linears(model)

    def requests(speculation: bool) -> list[GenerationRequest]:
        samplings = [SamplingParams(temperature=0), SamplingParams(temperature=0.8, top_p=0.9, seed=4)]
        return [
            GenerationRequest(
                request_id=f"{length}.{kind}",
                prompt_token_ids=list(range(1, length)),
                sampling=sampling,
                max_tokens=24,
                ignore_eos=True,
                speculation=speculation,
            )
            for length in (3, 9, 30)
            for kind, sampling in enumerate(samplings)
        ]

    def texts(batches: list[list[GenerationRequest]]) -> list[list[int]]:
        engine = Engine(model, EngineOptions(draft_depths=(1, 2), kv_cache_tokens=1024), maker=MAKER)
        events = [event for batch in batches for events in engine.run(batch).values() for event in events]
        return [
            [t for e in events if e.request_id == r.request_id for t in e.token_ids] for r in requests(False)
        ]

    plain = texts([[request] for request in requests(False)])
    assert len({tuple(text) for text in plain}) > 3
    assert texts([[request] for request in requests(True)]) == plain
    assert texts([requests(True)]) == plain
