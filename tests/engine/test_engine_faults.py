"""Faults on tiny real models: one request's error is its own, text and pages of the others stay right."""

import random

import pytest
import torch

from model.engine import Engine
from model.options import EngineOptions
from model.passes.backend import BackendMaker
from model.passes.sampling import Sampler
from model.passes.torch.backend import TorchBackend, TorchMaker
from model.protocol import GenerationRequest, SamplingParams, TokenEvent
from model.schedule.batch import PassResult, Readouts
from model.worker.build import ModelOutputError, _warm_up
from tests.engine.native_tools import MAKER
from tests.tiny_models import SHAPES, tiny_model

GREEDY = SamplingParams(temperature=0)
DRAWN = SamplingParams(temperature=1.0, top_p=0.9, frequency_penalty=0.5, seed=7)
BAD = 60  # a token that only the prompt of the culprit holds


def request(
    name: str, prompt: list[int], sampling: SamplingParams = GREEDY, **options: object
) -> GenerationRequest:
    return GenerationRequest(
        **{  # type: ignore[arg-type]
            "request_id": name,
            "prompt_token_ids": prompt,
            "max_tokens": 14,
            "sampling": sampling,
            "ignore_eos": True,
            **options,
        }
    )


def requests(count: int = 6) -> list[GenerationRequest]:
    rng = random.Random(count)
    prompts = [[rng.randrange(50) for _ in range(rng.randint(1, 30))] for _ in range(count)]
    return [request(str(i), prompt, DRAWN if i % 2 else GREEDY) for i, prompt in enumerate(prompts)]


def engine(model: torch.nn.Module, num_tokens: int = 1024, maker: BackendMaker | None = None) -> Engine:
    options = EngineOptions(kv_cache_tokens=num_tokens, prefill_chunk_size=16, prefill_rows=32)
    return Engine(model, options, maker=maker or TorchMaker())  # type: ignore[arg-type]


def text(events: list[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


def check_others(engine: Engine, events: dict[str, list[TokenEvent]], fresh: Engine, culprit: str) -> None:
    """All but the culprit have the text of an engine where nothing went wrong; no page is lost."""
    engine.check_integrity()
    expected = fresh.run(requests())
    for name, answers in events.items():
        assert [event.finish_reason for event in answers if event.finish_reason] == [
            "error" if name == culprit else "length"
        ]
        if name != culprit:
            assert text(answers) == text(expected[name])


@pytest.mark.parametrize("error", [ValueError("bad"), RuntimeError("CUDA error"), MemoryError()])
def test_an_error_in_the_sampling_of_one_request_is_its_own(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    adjust = Sampler._adjust

    def broken(self: Sampler, scores: torch.Tensor, readout: object) -> None:
        if readout.sequence.request.request_id == "3" and readout.sequence.num_generated > 4:  # type: ignore[attr-defined]
            raise error
        adjust(self, scores, readout)  # type: ignore[arg-type]

    monkeypatch.setattr(Sampler, "_adjust", broken)
    faulty = engine(model)
    events = faulty.run(requests())
    monkeypatch.undo()
    check_others(faulty, events, engine(model), culprit="3")
    assert len(text(events["3"])) == 5


@pytest.mark.parametrize("shape", ["pre_norm", "prelude_and_coda", "first_loop_gate"])
def test_who_breaks_a_pass_is_found_and_the_others_go_on(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exception names nobody, and comes when K/V and states of all have been overwritten."""
    model = tiny_model(**SHAPES[shape])
    faulty = engine(model)
    assert isinstance(faulty.backend, TorchBackend)
    reader = faulty.backend.reader
    read = reader.read

    def broken(hidden: torch.Tensor, readouts: Readouts) -> PassResult:
        predicting = readouts.predicting
        if any(r.sequence.request.request_id == "2" and r.sequence.num_generated > 2 for r in predicting):
            raise RuntimeError("out of memory")
        return read(hidden, readouts)

    monkeypatch.setattr(reader, "read", broken)
    check_others(faulty, faulty.run(requests()), engine(model), culprit="2")


def test_an_engine_that_is_broken_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a pass without any request's rows fails as well, no request is ended for it."""
    faulty = engine(tiny_model())
    for each in requests():
        faulty.add(each)
    for _ in range(5):
        faulty.step()

    def broken(*_: object) -> None:
        raise RuntimeError("device lost")

    monkeypatch.setattr(faulty.backend, "run", broken)
    with pytest.raises(RuntimeError, match="device lost"):
        faulty.step()


def test_a_request_that_cannot_be_taken_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    faulty = engine(tiny_model())

    def broken(*_: object) -> None:
        raise KeyError("no")

    monkeypatch.setattr(faulty, "_sequence", broken)
    events = faulty.run([request("a", [1])])
    assert [event.finish_reason for event in events["a"]] == ["error"]


MAKERS: dict[str, BackendMaker] = {maker.name: maker for maker in (MAKER, TorchMaker())}


@pytest.mark.parametrize("maker", [MAKERS[name] for name in sorted(MAKERS)])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
@pytest.mark.parametrize("logprobs", [None, 2])
def test_logits_that_are_no_numbers_end_the_request_that_has_them(
    number: float, sampling: SamplingParams, logprobs: int | None, maker: BackendMaker
) -> None:
    """Its pages are used again by the others and by the next ones: nothing of it is left in them."""
    model = tiny_model(tie_embeddings=False)
    model.embedding.weight[BAD] = number
    small = engine(model, num_tokens=192, maker=maker)
    bad = request("bad", [BAD, *range(20)], sampling, logprobs=logprobs)
    events = small.run([bad, *requests()])
    check_others(small, events, engine(model, maker=maker), culprit="bad")
    assert text(events["bad"]) == []
    assert "not a number" in (events["bad"][-1].error or "")
    check_others(small, small.run(requests()), engine(model), culprit="")
    assert small.pool.num_cached_pages == len(small.pool._page_of)


def test_prompt_scores_that_are_no_numbers_end_the_request() -> None:
    model = tiny_model(tie_embeddings=False)
    model.embedding.weight[BAD] = torch.nan
    events = engine(model).run([request("bad", [1, BAD, 2], max_tokens=0, prompt_logprobs=1)])["bad"]
    assert [event.finish_reason for event in events] == ["error"]


@pytest.mark.parametrize("name", ["norm", "head"])
def test_a_model_with_damaged_weights_is_refused_at_the_warm_up(name: str) -> None:
    model = tiny_model(tie_embeddings=False)
    weight = next(value for key, value in model.named_parameters() if name in key)
    weight.view(-1)[-1] = torch.nan
    with pytest.raises(ModelOutputError, match=r"not a number.*damaged"):
        _warm_up(engine(model))
