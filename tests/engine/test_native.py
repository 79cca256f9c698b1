"""The native backend: the torch modules' numbers, and rows whose bits depend on nothing else in the pass."""

from dataclasses import replace

import msgspec
import pytest
import torch
from torch import nn

from model.engine import Engine
from model.network.config import RopeConfig
from model.network.int8 import Int8Linear, quantize_linears
from model.network.looped import LoopedTransformer
from model.options import EngineOptions, WorkerOptions
from model.passes.native import library, weights
from model.passes.native.backend import NativeOptions
from model.passes.native.library import NativeUnavailableError
from model.passes.torch.backend import TorchMaker
from model.protocol import GenerationRequest, SamplingParams, TokenEvent
from model.worker.build import choose_backend
from tests.loose import Field
from tests.tiny_models import SHAPES, tiny_config, tiny_model

FP32 = NativeOptions(threads=1, kv_dtype="float32")
WEIGHTS = ("float32", "bfloat16", "int8", "int4")
pytestmark = pytest.mark.native


def native(model: LoopedTransformer, options: NativeOptions = FP32, chunk: int = 16) -> Engine:
    limits = EngineOptions(kv_cache_tokens=1024, prefill_chunk_size=chunk, prefix_caching=False)
    return Engine(model, limits, maker=options)


def requests(count: int, *, speculation: bool, logprobs: int | None = None) -> list[GenerationRequest]:
    """Half of them greedy, half of them sampled."""
    return [
        GenerationRequest(
            request_id=str(index),
            prompt_token_ids=[(7 * index + 3 * place) % 61 for place in range(5 + 6 * index)],
            max_tokens=12,
            speculation=speculation,
            logprobs=logprobs,
            prompt_logprobs=logprobs,
            sampling=SamplingParams(temperature=0.9 * (index % 2), seed=index),
        )
        for index in range(count)
    ]


def texts(events: dict[str, list[TokenEvent]]) -> dict[str, list[int]]:
    return {name: [token for event in each for token in event.token_ids] for name, each in events.items()}


def scores(events: list[TokenEvent]) -> list[float]:
    prompts = [score for event in events for score in event.prompt_logprobs or () if score is not None]
    return [score.logprob for score in [*prompts, *(score for event in events for score in event.logprobs)]]


def held_as(kind: str, **changes: Field) -> tuple[LoopedTransformer, NativeOptions]:
    """A model with layers before and behind the loop, its weights in a type."""
    model = tiny_model(**{**SHAPES["prelude_and_coda"], **changes})
    if kind == "bfloat16":
        model = model.to(torch.bfloat16)
    elif kind == "int8":
        quantize_linears(model)
    return model, NativeOptions(threads=1, int4=kind == "int4")


@pytest.mark.parametrize("shape", SHAPES)
def test_scores_of_every_position_are_those_of_torch(shape: str) -> None:
    """Log-probabilities of prompt and text, in fp32; greedy, so that no rounding decides a draw."""
    greedy = SamplingParams(temperature=0.0)
    asked = [
        msgspec.structs.replace(request, sampling=greedy)
        for request in requests(4, speculation=True, logprobs=2)
    ]
    model = tiny_model(**SHAPES[shape])
    if model.config.prefix_lm:  # each token of the prompt sees the next: its scores mean nothing
        asked = [msgspec.structs.replace(request, prompt_logprobs=None) for request in asked]
    ours = native(model).run(asked)
    theirs = Engine(model, EngineOptions(kv_cache_tokens=1024, prefix_caching=False)).run(asked)
    assert texts(ours) == texts(theirs)
    for name in ours:
        assert scores(ours[name]) == pytest.approx(scores(theirs[name]), abs=5e-4)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_text_depends_on_nothing_else_in_the_pass(kind: str) -> None:
    """Speculation on and off, alone and five at once, chunks of 1, 7 and 16, one thread and two."""
    model, options = held_as(kind)
    engine = native(model, options)
    expected = texts(engine.run(requests(5, speculation=False)))
    assert texts(engine.run(requests(5, speculation=True))) == expected
    engine.check_integrity()
    for chunk, threads in ((1, 1), (7, 2), (16, 2)):
        other = native(model, replace(options, threads=threads), chunk)
        alone = [texts(other.run([request])) for request in requests(5, speculation=True)]
        assert {name: text for each in alone for name, text in each.items()} == expected


def test_the_bits_of_a_score_depend_on_nothing_else_in_the_pass() -> None:
    model, options = held_as("int8")
    engine = native(model, options)
    together = engine.run(requests(5, speculation=True, logprobs=3))
    for request in requests(5, speculation=False, logprobs=3):
        alone = engine.run([request])[request.request_id]
        assert scores(alone) == scores(together[request.request_id])


def test_what_is_not_covered_is_an_error_of_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    options = WorkerOptions(model_path="x", backend="native")
    with monkeypatch.context() as patch:
        patch.setattr(weights, "MOST_INPUTS", 40)
        with pytest.raises(ValueError, match="a matrix has 64 inputs; 40 are the most"):
            choose_backend(options, tiny_config(), torch.device("cpu"))
    monkeypatch.setenv(library.VARIABLE, "0")
    with pytest.raises(ValueError, match="backend native: SPEED_NATIVE is 0"):
        choose_backend(options, tiny_config(), torch.device("cpu"))
    monkeypatch.setenv(library.VARIABLE, "sse9")
    with pytest.raises(NativeUnavailableError, match="'sse9' is not known"):
        library.choose()


def test_a_model_that_the_library_does_not_cover_is_run_by_torch_with_the_reason() -> None:
    """Asked for by name it is an error."""
    config, cpu = tiny_config(head_dim=9, rope=RopeConfig(rotary_dim=8)), torch.device("cpu")
    maker, why_torch = choose_backend(WorkerOptions(model_path="x"), config, cpu)
    assert isinstance(maker, TorchMaker)
    assert why_torch == "head_dim is 9; an even one is needed"
    with pytest.raises(ValueError, match="backend native: head_dim is 9; an even one is needed"):
        choose_backend(WorkerOptions(model_path="x", backend="native"), config, cpu)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("tie", [False, True])
def test_each_matrix_is_freed_as_soon_as_it_is_packed(
    monkeypatch: pytest.MonkeyPatch, kind: str, tie: bool
) -> None:
    """A model whose memory was twice its weights while it loaded needed 15 GB for 4 billion in bf16."""
    model, options = held_as(kind, tie_embeddings=tie)
    wanted = texts(native(model, options).run(requests(3, speculation=True)))
    linears = [module for module in model.modules() if isinstance(module, nn.Linear | Int8Linear)]
    left: list[int] = []
    pack = weights.PackedModel._pack

    def noted(*args: Field) -> None:
        left.append(sum(linear.weight.nbytes for linear in linears if linear.weight is not tied))
        pack(*args)

    tied = model.embedding.weight
    monkeypatch.setattr(weights.PackedModel, "_pack", noted)
    engine = native(model, replace(options, frees=True))
    assert left == sorted(left, reverse=True)
    assert len(set(left)) >= len(left) - tie
    assert {linear.weight.numel() for linear in linears} == (
        {0, tied.numel()} if tie and kind != "int8" else {0}
    )
    assert texts(engine.run(requests(3, speculation=True))) == wanted
