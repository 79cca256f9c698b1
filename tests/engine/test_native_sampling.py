"""Tokens and scores by the native library: those of the torch sampler, from the same noise."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from model.engine import Engine
from model.options import EngineOptions
from model.passes.native import structs
from model.passes.native.backend import NativePasses
from model.passes.native.choosing import Choices
from model.passes.sampling import Sampler
from model.passes.scores import token_logprobs
from model.protocol import GenerationRequest, Grammar, SamplingParams
from model.schedule.batch import Readout
from model.schedule.drafts import make_policy
from model.schedule.pages import PrefixKeys
from model.schedule.sequence import Sequence
from model.schedule.wave import Unconstrained, Wave
from tests.engine.native_tools import MAKER, passes_for
from tests.loose import Field
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.native
CPU = torch.device("cpu")
VOCAB = 1000  # no multiple of a vector


class Forbidding(Unconstrained):
    """Every third token must not come."""

    def __init__(self, vocab_size: int) -> None:
        self.mask: NDArray[np.bool_] = np.arange(vocab_size) % 3 == 0

    def forbidden(self, wave: Wave, position: int, *, before_min_tokens: bool) -> NDArray[np.bool_]:
        return self.mask


@cache
def passes(vocab_size: int = VOCAB, threads: int = 1) -> NativePasses:
    return passes_for(tiny_model(vocab_size=vocab_size, hidden_size=16), threads=threads)


def readout(params: SamplingParams, position: int = 6, vocab_size: int = VOCAB, **fields: Field) -> Readout:
    """Of a sequence with three tokens of a prompt, two that are committed and drafts behind them."""
    is_constrained = fields.pop("is_constrained", False)
    fields["grammar"] = Grammar(kind="json_object") if is_constrained else None
    request = GenerationRequest(
        request_id="r", prompt_token_ids=[1, 2, 2], max_tokens=50, sampling=params, **fields
    )
    policy, ending = make_policy("none", frozenset()), frozenset(request.stop_token_ids)
    constraint = Forbidding(vocab_size) if is_constrained else None
    wave = Wave([1, 2, 2], 4, policy, 100, ending, constraint=constraint)
    wave.tokens += [3, 2, 7]
    wave.num_committed = 5
    return Readout(0, Sequence(request, wave, PrefixKeys("", 16)), position)


def chosen(logits: torch.Tensor, readouts: list[Readout], threads: int = 1) -> list[int]:
    choices = Choices()
    for one in readouts:
        choices.add(one)
    rows = np.arange(len(readouts), dtype=np.int32)
    tokens: list[int] = passes(logits.shape[1], threads).choose(logits.numpy(), rows, choices.array)
    return tokens


def by_torch(logits: torch.Tensor, readouts: list[Readout]) -> list[int]:
    sampler = Sampler(logits.shape[1], CPU)
    rows = zip(torch.split(logits, 1), readouts, strict=True)
    return [int(sampler.sample(row, [one], {})) for row, one in rows]


def logits_of(count: int, spread: float, vocab_size: int = VOCAB, seed: int = 0) -> torch.Tensor:
    return spread * torch.randn(count, vocab_size, generator=torch.Generator().manual_seed(seed))


@given(
    temperature=st.sampled_from([0.0, 0.2, 0.8, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 2, 40, 999, 5000]),
    top_p=st.sampled_from([1.0, 0.05, 0.5, 0.9, 0.95, 0.999]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    penalties=st.sampled_from(
        [{}, {"repetition_penalty": 1.7, "frequency_penalty": 0.3, "presence_penalty": -1.0}]
    ),
    bias=st.sampled_from([{}, {5: 4.0, 999: 9.0, 2: -100.0}]),
    fields=st.sampled_from([{}, {"min_tokens": 20, "stop_token_ids": [0, 5]}, {"is_constrained": True}]),
    spread=st.sampled_from([0.01, 1.0, 4.0, 30.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
@settings(max_examples=150, deadline=None)
def test_tokens_are_those_of_the_torch_sampler(
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalties: dict[str, Field],
    bias: dict[int, float],
    fields: dict[str, Field],
    spread: float,
    seed: int,
) -> None:
    """Ten positions each. The logarithms of the noise differ from torch's in their last bits, and so would a
    token whose two best scores do; of 15,000 here none does."""
    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        logit_bias=bias,
        seed=seed,
        **penalties,
    )
    readouts = [readout(params, 5 + number % 2, **fields) for number in range(10)]
    logits = logits_of(10, spread, seed=seed % 1000)
    assert chosen(logits, readouts) == by_torch(logits, readouts)


SMALLEST, LARGEST = 5e-324, 2**63 - 1


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(top_k=LARGEST),
        SamplingParams(top_k=-1),
        SamplingParams(temperature=SMALLEST),
        SamplingParams(top_p=SMALLEST),
        SamplingParams(min_p=SMALLEST),
        SamplingParams(repetition_penalty=SMALLEST),
        SamplingParams(repetition_penalty=10),
        SamplingParams(seed=-(2**63)),
        SamplingParams(logit_bias=dict.fromkeys(range(VOCAB), 100.0)),
    ],
    ids=str,
)
def test_the_bounds_of_what_a_request_may_ask_give_a_token(params: SamplingParams) -> None:
    """A top_k beyond 32 bits was an error of the pass, and a 500 for whoever asked."""
    assert 0 <= chosen(logits_of(1, 3.0), [readout(params)])[0] < VOCAB


@pytest.mark.parametrize("vocab_size", [1, 3, 16, 17, 4096])
def test_any_size_of_vocabulary(vocab_size: int) -> None:
    params = [SamplingParams(temperature=0.7, top_p=p, top_k=k, seed=k) for k in (0, 2) for p in (1.0, 0.6)]
    readouts = [readout(each, vocab_size=vocab_size) for each in params]
    logits = logits_of(4, 2.0, vocab_size)
    assert chosen(logits, readouts) == by_torch(logits, readouts)


def test_noise_is_that_of_numpys_generator() -> None:
    """Of equal scores the one with the smallest word wins, so a token tells of 1,000 words."""
    keys = [(seed, position) for seed in (-1, 0, 12345, 2**62) for position in (6, 7, 2**31, 2**40)]
    readouts = [readout(SamplingParams(seed=seed))._replace(position=position) for seed, position in keys]
    wanted = [
        int(np.random.Philox(key=seed % 2**64, counter=position << 64).random_raw(VOCAB).argmin())
        for seed, position in keys
    ]
    assert chosen(torch.zeros(len(keys), VOCAB), readouts) == wanted


def test_tokens_follow_the_filtered_softmax() -> None:
    """Chi-square over 20,000 seeds; false alarm 1e-6 for a fixed set of seeds: it never flickers."""
    logits = torch.linspace(-1, 2, 64)[torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    params = [SamplingParams(temperature=0.7, top_k=50, min_p=0.1, seed=seed) for seed in range(20_000)]
    readouts = [readout(each, vocab_size=64) for each in params]
    tokens = chosen(logits.expand(len(params), -1).contiguous(), readouts, threads=2)
    scores = (logits / 0.7).double()
    scores[scores < scores.sort(descending=True).values[49]] = -torch.inf
    scores[scores < scores.max() + np.log(0.1)] = -torch.inf
    expected = scores.softmax(-1) * len(params)
    observed = torch.tensor(tokens).bincount(minlength=64).double()
    live = expected > 0
    assert observed[~live].sum() == 0
    statistic = float(((observed - expected)[live] ** 2 / expected[live]).sum())
    freedom = int(live.sum()) - 1
    deviation = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
    assert deviation < 4.75  # Wilson-Hilferty, one in a million


def test_a_row_is_chosen_alike_alone_and_in_any_batch() -> None:
    params = [
        SamplingParams(temperature=0.8 + index / 9, top_p=0.3 + index / 20, top_k=index % 3 * 9, seed=index)
        for index in range(12)
    ]
    readouts, logits = [readout(each) for each in params], logits_of(12, 2.0)
    together = chosen(logits, readouts, threads=3)
    assert together == [chosen(logits[i : i + 1], [readouts[i]])[0] for i in range(12)]
    assert together[::-1] == chosen(logits.flip(0).contiguous(), readouts[::-1], threads=2)


@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0, 40.0])
@pytest.mark.parametrize("num_top", [0, 1, 5, VOCAB])
def test_scores_are_those_of_a_log_softmax(spread: float, num_top: int) -> None:
    logits = logits_of(6, spread)
    tokens = torch.tensor([0, 17, VOCAB - 1, *logits[3:].argmax(-1).tolist()])
    wanted = token_logprobs(logits.double(), tokens, num_top)
    rows = np.arange(6, dtype=np.int32)
    got = passes().score(logits.numpy(), rows, tokens.int().numpy(), num_top)
    assert got.ranks.tolist() == wanted[:, 2].tolist()
    assert got.logprobs == pytest.approx(wanted[:, 1].numpy(), abs=2e-6 + 1e-6 * spread)
    assert got.top_logprobs == pytest.approx(wanted[:, 3 + num_top :].numpy(), abs=2e-6 + 1e-6 * spread)
    for row, top in zip(
        logits.tolist(), got.top_tokens.tolist(), strict=True
    ):  # of equal ones the first ones
        assert top == sorted(range(VOCAB), key=lambda token: (-row[token], token))[:num_top]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", np.nan, "temperature is nan"),
        ("temperature", -1, "temperature is -1"),
        ("top_p", 1.5, "top_p is 1.5"),
        ("min_p", -0.5, "min_p is -0.5"),
        ("num_banned", 1, "banned are missing"),
        ("num_counted", 2, "counts are missing"),
        ("num_biased", 2, "biases are missing"),
    ],
)
def test_choices_out_of_range_are_refused(field: str, value: float, message: str) -> None:
    choices = Choices()
    choices.add(readout(SamplingParams()))
    array, row = choices.array, np.zeros(1, np.int32)
    array[field] = value
    with pytest.raises(ValueError, match=message):
        passes().choose(np.zeros((1, VOCAB), np.float32), row, array)


def test_rows_and_tokens_out_of_range_are_refused() -> None:
    logits, zero, one = np.zeros((1, VOCAB), np.float32), np.zeros(1, np.int32), np.ones(1, np.int32)
    choices = Choices()
    choices.add(readout(SamplingParams(logit_bias={VOCAB: 1.0})))
    with pytest.raises(ValueError, match="biased: token 1000 is outside 0 to 999"):
        passes().choose(logits, zero, choices.array)
    with pytest.raises(ValueError, match="logits row is 1; 0 to 0 are possible"):
        passes().score(logits, one, zero, 0)
    with pytest.raises(ValueError, match="scored: token 1000 is outside"):
        passes().score(logits, zero, np.array([VOCAB], np.int32), 0)


def test_structures_of_another_size_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from model.passes.native import library  # noqa: PLC0415, its cache is emptied

    library.load.cache_clear()
    monkeypatch.setattr(structs, "SAMPLING_SIZES", [size + 8 for size in structs.SAMPLING_SIZES])
    with pytest.raises(library.NativeUnavailableError, match="compile it again"):
        library.load(library.choose())
    library.load.cache_clear()


@pytest.mark.parametrize(
    "fields", [{"logprobs": 3}, {"prompt_logprobs": 2}, {"logprobs": 0, "prompt_logprobs": 0}]
)
def test_what_an_engine_says_is_what_torch_says(fields: dict[str, Field]) -> None:
    """Tokens drawn with filters and penalties, and their scores, through whole engines."""
    asked = [
        GenerationRequest(
            request_id=str(index),
            prompt_token_ids=[(7 * index + 3 * place) % 61 for place in range(5 + 6 * index)],
            max_tokens=12,
            sampling=SamplingParams(
                temperature=0.4 * index, top_p=0.8, frequency_penalty=0.3, seed=index, logit_bias={5: 1.0}
            ),
            **fields,
        )
        for index in range(4)
    ]
    limits = EngineOptions(kv_cache_tokens=1024, prefill_chunk_size=8)
    ours, theirs = (Engine(tiny_model(), limits, maker=maker).run(asked) for maker in (MAKER, None))
    for name, events in ours.items():
        other = theirs[name]
        assert [event.token_ids for event in events] == [event.token_ids for event in other]
        for mine, his in zip(events, other, strict=True):
            assert [s.token_id for s in mine.logprobs] == [s.token_id for s in his.logprobs]
            pairs = [
                *zip(mine.logprobs, his.logprobs, strict=True),
                *zip((mine.prompt_logprobs or [])[1:], (his.prompt_logprobs or [])[1:], strict=True),
            ]
            for one, two in pairs:
                assert one is not None
                assert two is not None
                assert one.logprob == pytest.approx(two.logprob, abs=1e-4)
                assert one.rank == two.rank
                assert [token for token, _ in one.top] == [token for token, _ in two.top]
