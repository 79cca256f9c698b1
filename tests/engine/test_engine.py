"""The engine on tiny real models: speculation on == off, alone == in a batch, the cache after flushes."""

import random
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.engine import Engine, EngineConfigError
from model.network.looped import LoopedTransformer
from model.options import POLICIES, DraftPolicyName, EngineOptions
from model.passes.backend import BackendMaker
from model.passes.torch.backend import TorchBackend, TorchMaker
from model.protocol import GenerationRequest, SamplingParams
from tests.engine.native_tools import maker_for
from tests.loose import Field, Json
from tests.tiny_models import SHAPES, tiny_model

GREEDY = SamplingParams(temperature=0)
NEW_TOKENS = 16


def request(index: int, prompt: list[int], sampling: SamplingParams, **options: Field) -> GenerationRequest:
    options = {"max_tokens": NEW_TOKENS, **options}
    return GenerationRequest(
        request_id=str(index), prompt_token_ids=prompt, sampling=sampling, ignore_eos=True, **options
    )


def prompts(count: int, vocab: int = 61) -> list[list[int]]:
    rng = random.Random(count)
    return [[rng.randrange(vocab) for _ in range(rng.randint(1, 40))] for _ in range(count)]


def engine(
    model: LoopedTransformer,
    draft_depths: tuple[int, ...] | None = None,
    policy: DraftPolicyName = "adaptive",
    row_budget: int = 32,
    tokens: int = 1024,
    maker: BackendMaker | None = None,
    **limits: Field,
) -> Engine:
    limits = {"prefill_chunk_size": 16, "prefill_rows": 32, **limits}
    config = EngineOptions(
        draft_depths=draft_depths,
        draft_policy=policy,
        kv_cache_tokens=tokens,
        row_budget=row_budget,
        **limits,
    )
    return Engine(model, config, maker=maker or maker_for(model))


def texts(engine: Engine, requests: list[GenerationRequest]) -> list[list[int]]:
    events = engine.run(requests)
    engine.check_integrity()
    return [[t for event in events[r.request_id] for t in event.token_ids] for r in requests]


@torch.inference_mode()
def plain_greedy(model: LoopedTransformer, prompt: list[int], loops: int | None = None) -> list[int]:
    """A whole forward pass for every token: no cache, no rows."""
    ids = list(prompt)
    for _ in range(NEW_TOKENS):
        prefix = len(prompt) if model.config.prefix_lm else 0
        state = model.depths(torch.tensor([ids]), loops, prefix=prefix)[-1]
        ids.append(int(model.whole_readout(state)[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_text_is_plain_decoding_for_every_shape_and_draft_policy(shape: str) -> None:
    model = tiny_model(**SHAPES[shape])
    expected = [plain_greedy(model, prompt) for prompt in prompts(6)]
    requests = [request(i, prompt, GREEDY) for i, prompt in enumerate(prompts(6))]
    deepest = (model.config.num_loops - 1,) if model.config.num_loops > 1 else None
    for policy in POLICIES:
        for draft_depths in (None, deepest):
            assert texts(engine(model, draft_depths, policy, row_budget=7), requests) == expected


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.8, "top_p": 0.95},
        {"temperature": 1.2, "top_k": 10, "presence_penalty": 1.0, "repetition_penalty": 1.2},
        {"temperature": 0.0, "frequency_penalty": 0.7, "logit_bias": {5: 2.0, 6: -100.0}},
    ],
)
def test_sampled_text_is_the_same_with_speculation_on_and_off_alone_and_in_a_batch(
    sampling: dict[str, Json],
) -> None:
    model = tiny_model(num_loops=4)

    def requests(speculation: bool) -> list[GenerationRequest]:
        return [
            request(i, prompt, SamplingParams(**sampling, seed=i), speculation=speculation, max_tokens=40)
            for i, prompt in enumerate(prompts(8))
        ]

    plain = engine(model)
    alone = [texts(plain, [r])[0] for r in requests(speculation=False)]
    assert len({tuple(text) for text in alone}) > 1
    for policy in POLICIES:
        assert texts(engine(model, policy=policy), requests(True)) == alone
    assert texts(engine(model, (1, 2, 3), max_num_seqs=3, row_budget=5), requests(True)) == alone
    short = engine(model, max_num_seqs=8, tokens=160)  # the eight would need some 500
    assert texts(short, requests(True)) == alone
    assert short.stats.preemptions > 0
    ample = engine(model)
    assert [texts(ample, requests(True)) for _ in range(2)] == [alone, alone]
    assert ample.stats.prefix_cache_hits > 0


def test_a_seed_decides_the_text() -> None:
    model = tiny_model()
    prompt = prompts(1)[0]
    requests = [request(i, prompt, SamplingParams(seed=seed)) for i, seed in enumerate((1, 1, 2))]
    first, again, other = texts(engine(model), requests)
    assert first == again != other


@given(
    chunk=st.integers(1, 50),
    budget=st.integers(1, 12),
    drafts=st.sets(st.integers(1, 2)),
    policy=st.sampled_from(POLICIES),
)
@settings(max_examples=40, deadline=None)
def test_the_cache_after_flushes_is_the_cache_of_the_committed_tokens(
    chunk: int, budget: int, drafts: set[int], policy: DraftPolicyName
) -> None:
    """Invariant 3: K/V of every slot, compared with a run that only reads the final text as a prompt."""
    model = tiny_model()
    prompt = prompts(3)[2]
    wavy = engine(
        model,
        tuple(sorted(drafts)) or None,
        policy,
        prefill_chunk_size=chunk,
        prefill_rows=chunk,
        row_budget=budget,
        maker=TorchMaker(),
    )
    text = texts(wavy, [request(0, prompt, GREEDY)])[0]
    reader = engine(model, policy="none", maker=TorchMaker())
    texts(reader, [request(0, prompt + text[:-1], GREEDY, max_tokens=1)])
    used = len(prompt) + len(text) - 1  # both engines give the first pages, in order
    assert isinstance(wavy.backend, TorchBackend)
    assert isinstance(reader.backend, TorchBackend)
    for ours, theirs in zip(wavy.backend.store.keys, reader.backend.store.keys, strict=True):
        assert torch.allclose(ours[:, :used], theirs[:, :used], atol=1e-4)


def test_num_loops_of_a_request_runs_it_at_that_depth() -> None:
    model = tiny_model(num_loops=4)
    prompt = prompts(2)[1]
    requests = [request(loops, prompt, GREEDY, num_loops=loops) for loops in (1, 2, 4)]
    assert texts(engine(model), requests) == [plain_greedy(model, prompt, loops) for loops in (1, 2, 4)]


def test_eos_and_stop_tokens_end_a_request_and_are_reported() -> None:
    model = tiny_model()
    prompt = prompts(1)[0]
    text = texts(engine(model), [request(0, prompt, GREEDY)])[0]
    stopper = text[5]
    stop = request(1, prompt, GREEDY, stop_token_ids=[stopper])
    events = engine(model).run([stop])["1"]
    assert events[-1].finish_reason == "stop"
    assert events[-1].stop_token_id == stopper
    assert [t for e in events for t in e.token_ids] == text[: text.index(stopper) + 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_token_ids": []}, "prompt_token_ids is empty"),
        ({"prompt_token_ids": [61]}, "prompt_token_ids: 61 is no token id; ids are 0 to 60"),
        ({"prompt_token_ids": [-1]}, "prompt_token_ids: -1 is no token id"),
        ({"max_tokens": 128}, "exceed the context of 128"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"num_loops": 4}, "num_loops is 4, but the model has 3 loops"),
        ({"draft_policy": "best"}, "draft_policy 'best' is not known"),
        ({"sampling": SamplingParams(logit_bias={99: 1.0})}, "logit_bias: 99 is no token id"),
    ],
)
def test_a_request_that_cannot_be_served_ends_with_an_error_and_harms_nobody(
    options: dict[str, Field], message: str
) -> None:
    fields = {"request_id": "bad", "prompt_token_ids": [1], "max_tokens": 4, "sampling": GREEDY}
    bad = GenerationRequest(**{**fields, **options})
    shared = engine(tiny_model())
    events = shared.run([bad, request(0, [1, 2], GREEDY)])
    assert [e.finish_reason for e in events["bad"]] == ["error"]
    assert message in (events["bad"][0].error or "")
    assert events["0"][-1].finish_reason == "length"
    shared.check_integrity()


def test_zero_tokens_are_an_answer_too() -> None:
    events = engine(tiny_model()).run([request(0, [1], GREEDY, max_tokens=0)])["0"]
    assert [(e.finish_reason, e.token_ids) for e in events] == [("length", [])]


def test_a_full_context_fits() -> None:
    model = tiny_model()
    prompt = [1] * 100
    events = engine(model).run([request(0, prompt, GREEDY, max_tokens=28)])["0"]
    assert sum(len(e.token_ids) for e in events) == 28


def test_an_abort_frees_the_pages_within_one_pass() -> None:
    shared = engine(tiny_model())
    shared.add(request(0, [1, 2, 3], GREEDY))
    shared.step()
    shared.abort("0")
    assert [e.finish_reason for e in shared.step()] == ["abort"]
    shared.check_integrity()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (EngineOptions(draft_depths=(3,)), r"draft depth 3 is outside 1\.\.2"),
        (EngineOptions(max_model_len=129), r"max_model_len 129 is outside 1\.\.128"),
        (EngineOptions(kv_cache_tokens=16), r"max_model_len 128 needs \d+ bytes .* are there \(16 tokens\)"),
        (EngineOptions(kv_cache_memory=10_000), r"are there \(\d+ tokens\): lower max_model_len"),
        (
            EngineOptions(draft_policy=cast(DraftPolicyName, "best")),
            "draft_policy 'best' is not known; adaptive, single",
        ),
    ],
)
def test_options_that_cannot_work_are_refused_with_their_limit(config: EngineOptions, message: str) -> None:
    with pytest.raises(EngineConfigError, match=message):
        Engine(tiny_model(), config)


def test_a_context_that_nobody_asked_for_is_cut_to_what_memory_holds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ouro's own context of 65,536 tokens would take 48 GiB of cache."""
    model = tiny_model()
    monkeypatch.setattr(
        "model.engine.cache_memory", lambda *_: 70 * TorchMaker().cache_bytes(model).per_token
    )
    cut = Engine(model)
    assert cut.info.max_model_len == 64
    assert "cut to 64 tokens" in caplog.text
    assert len(texts(cut, [request(0, [1] * 40, GREEDY, max_tokens=24)])[0]) == 24
    with pytest.raises(EngineConfigError, match="max_model_len 100 needs"):
        Engine(model, EngineOptions(max_model_len=100))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_on_a_gpu_speculation_changes_no_token_in_fp32(shape: str) -> None:
    model = tiny_model(**SHAPES[shape])
    expected = [plain_greedy(model, prompt) for prompt in prompts(4)]
    on_gpu = engine(model.to("cuda"), maker=TorchMaker())
    for sampling in (GREEDY, SamplingParams(temperature=0.8, top_p=0.95, seed=3)):
        fast = texts(on_gpu, [request(i, p, sampling) for i, p in enumerate(prompts(4))])
        plain = texts(on_gpu, [request(i, p, sampling, speculation=False) for i, p in enumerate(prompts(4))])
        assert fast == plain
        assert sampling is not GREEDY or fast == expected


@pytest.mark.gpu
def test_on_a_gpu_a_pass_waits_for_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = engine(tiny_model().to("cuda"), maker=TorchMaker())
    on_gpu.run([request(0, [1, 2, 3], GREEDY)])
    waits = 0
    original = torch.Tensor.tolist
    torch.cuda.set_sync_debug_mode("error")
    try:

        def counted(tensor: torch.Tensor) -> list[object]:
            nonlocal waits
            waits += 1
            torch.cuda.set_sync_debug_mode("default")
            values: list[object] = original(tensor)
            torch.cuda.set_sync_debug_mode("error")
            return values

        monkeypatch.setattr(torch.Tensor, "tolist", counted)
        on_gpu.add(request(1, [1, 2, 3], GREEDY))
        while on_gpu.has_work:
            before = waits
            on_gpu.step()
            assert waits <= before + 1
    finally:
        monkeypatch.undo()
        torch.cuda.set_sync_debug_mode("default")
    assert waits


def test_a_request_may_choose_its_draft_policy() -> None:
    """Passes tell them apart: `none` runs every loop alone."""
    shared = engine(tiny_model())
    events = shared.run([request(0, [1, 2], GREEDY, draft_policy="none"), request(1, [1, 2], GREEDY)])
    stats = [events[name][-1].stats for name in "01"]
    assert stats[0] is not None
    assert stats[1] is not None
    assert stats[0].passes == 3 * (NEW_TOKENS - 1) == stats[0].rows
    assert stats[1].rows > stats[1].passes


def test_requests_of_different_salts_share_no_prefix() -> None:
    shared = engine(tiny_model())
    prompt = list(range(40))
    cached = []
    for salt in ("a", "a", "b"):
        events = shared.run([request(0, prompt, GREEDY, cache_salt=salt)])["0"]
        stats = events[-1].stats
        assert stats is not None
        cached.append(stats.cached_prompt_tokens)
    assert cached == [0, 32, 0]


@pytest.mark.parametrize("shape", SHAPES)
def test_pre_emption_and_shared_prefixes_change_no_text_of_any_shape(shape: str) -> None:
    """Nine requests in two groups that begin alike, memory for about three, others aborted among them."""
    model = tiny_model(**SHAPES[shape])
    begin = [[i % 61 for i in range(33)], [(7 * i) % 61 for i in range(20)]]
    wanted = [request(i, [*begin[i % 2], i], SamplingParams(seed=i), max_tokens=60) for i in range(6)]
    alone = [texts(engine(model, policy="none"), [each])[0] for each in wanted]
    short = engine(model, tokens=128, max_num_seqs=9)
    for i in range(6, 9):
        short.add(request(i, [*begin[0], i], GREEDY, max_tokens=40))
    for _ in range(5):
        short.step()
    for i in range(6, 9):
        short.abort(str(i))
    assert texts_among(short, wanted) == alone
    assert (short.stats.prefix_cache_hits > 0) is not model.config.prefix_lm  # each prompt is another one
    assert short.stats.preemptions > 0


def texts_among(engine: Engine, requests: list[GenerationRequest]) -> list[list[int]]:
    """As `texts`, in an engine that still has others to answer."""
    said: dict[str, list[int]] = {each.request_id: [] for each in requests}
    for each in requests:
        engine.add(each)
    while engine.has_work:
        for event in engine.step():
            said.setdefault(event.request_id, []).extend(event.token_ids)
    engine.check_integrity()
    return [said[each.request_id] for each in requests]
