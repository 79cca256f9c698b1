"""The engine with an encoder: sources of any length, alone and beside others; what becomes of their K/V."""

import random
from typing import cast

import pytest
import torch

from model.engine import Engine
from model.network.config import EncoderConfig, NormPlacement, RelativeBias
from model.network.int8 import quantize_linears
from model.network.looped import LoopedTransformer
from model.options import POLICIES, DraftPolicyName, EngineOptions
from model.passes.backend import BackendMaker
from model.passes.native.backend import NativeOptions
from model.passes.native.library import NativeUnavailableError
from model.passes.native.weights import check_covered
from model.passes.rows import Rows
from model.passes.torch.backend import TorchBackend, TorchMaker
from model.protocol import GenerationRequest, SamplingParams, TokenEvent
from model.schedule.batch import PassResult, Readouts
from tests.engine.native_tools import BACKENDS
from tests.loose import Field
from tests.tiny_models import source_model, tiny_model

START, VOCABULARY, NEW_TOKENS = 3, 61, 12
GREEDY = SamplingParams(temperature=0)


MODEL = source_model(max_positions=4096)
TORCH = TorchMaker()


def engine_of(model: LoopedTransformer = MODEL, maker: BackendMaker = TORCH, **options: Field) -> Engine:
    options = {"prefill_chunk_size": 16, "prefill_rows": 48, "row_budget": 32, **options}
    limits = EngineOptions(**{"max_model_len": 2100, "kv_cache_tokens": 6000, **options})
    return Engine(model, limits, maker=maker)


def request(name: object, source: list[int], **options: Field) -> GenerationRequest:
    options = {"max_tokens": NEW_TOKENS, "sampling": GREEDY, "ignore_eos": True, **options}
    return GenerationRequest(request_id=str(name), prompt_token_ids=source, **options)


def sources(*lengths: int) -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(VOCABULARY) for _ in range(length)] for length in lengths]


def texts(engine: Engine, requests: list[GenerationRequest]) -> list[list[int]]:
    events = engine.run(requests)
    engine.check_integrity()
    return [[t for event in events[each.request_id] for t in event.token_ids] for each in requests]


@torch.inference_mode()
def plain_greedy(
    source: list[int], model: LoopedTransformer = MODEL, begin: tuple[int, ...] = (), loops: int | None = None
) -> list[int]:
    """A whole forward pass for every token: no cache, no rows."""
    encoded, ids = model.encode(torch.tensor([source])), [START, *begin]
    for _ in range(NEW_TOKENS):
        state = model.depths(torch.tensor([ids]), loops, source=encoded)[-1]
        ids.append(int(model.whole_readout(state)[0, -1].argmax()))
    return ids[1 + len(begin) :]


@pytest.mark.parametrize("maker", BACKENDS)
@pytest.mark.parametrize("policy", POLICIES)
def test_text_is_plain_decoding_for_every_policy_alone_and_in_a_batch(
    policy: str, maker: BackendMaker
) -> None:
    given = sources(1, 2, 15, 16, 17, 40, 100)
    wanted = [plain_greedy(source) for source in given]
    assert len({tuple(text) for text in wanted}) > 4  # the source decides
    engine = engine_of(maker=maker, draft_policy=cast(DraftPolicyName, policy))
    requests = [request(i, source) for i, source in enumerate(given)]
    assert texts(engine, requests) == wanted
    assert [texts(engine, [each])[0] for each in requests] == wanted


@pytest.mark.parametrize("maker", BACKENDS)
def test_every_loop_says_what_a_whole_forward_pass_of_the_decoder_says(maker: BackendMaker) -> None:
    (source,) = sources(30)
    events = engine_of(maker=maker).run([request("a", source, loop_logprobs=1), request("b", source)])["a"]
    text = [token for event in events for token in event.token_ids]
    told = [loops for event in events for loops in event.loop_logprobs]
    with torch.inference_mode():
        states = MODEL.depths(
            torch.tensor([[START, *text[:-1]]]), source=MODEL.encode(torch.tensor([source]))
        )
        wanted = torch.stack(
            [MODEL.logits(hidden)[0].log_softmax(-1) for hidden in MODEL.whole_loops(states)]
        )
    for index, token in enumerate(text):
        found = [said.scores.logprob for said in told[index]]
        assert found == pytest.approx(wanted[:, index, token].tolist(), abs=1e-4)
    assert text == plain_greedy(source)


@pytest.mark.parametrize("maker", BACKENDS)
@pytest.mark.parametrize(
    "changes",
    [
        {"num_loops": 1},
        {"gated_mlp": False, "activation": "relu", "intermediate_size": 41, "mlp_bias": True},
        {"tie_embeddings": True, "head_scale": 32**-0.5, "head_dim": 6, "num_heads": 3, "num_kv_heads": 3},
        {"head_dim": 16, "num_heads": 2, "num_kv_heads": 2, "encoder": EncoderConfig(3, START)},
        {"num_block_layers": 1, "num_loops": 5, "relative_bias": RelativeBias(32, 128)},
        {"relative_bias": RelativeBias(4, 3), "norm_placement": NormPlacement.OUTPUT},
    ],
)
def test_every_option_of_the_family(changes: dict[str, Field], maker: BackendMaker) -> None:
    model, given = source_model(max_positions=4096, **changes), sources(3, 30, 7)
    wanted = [plain_greedy(source, model) for source in given]
    assert texts(engine_of(model, maker), [request(i, source) for i, source in enumerate(given)]) == wanted


def test_a_size_that_torch_alone_runs() -> None:
    """Heads of an odd number of channels."""
    model, given = source_model(max_positions=4096, head_dim=5), sources(3, 30, 7)
    with pytest.raises(NativeUnavailableError, match="head_dim is 5"):
        check_covered(model.config, torch.device("cpu"))
    wanted = [plain_greedy(source, model) for source in given]
    assert texts(engine_of(model), [request(i, source) for i, source in enumerate(given)]) == wanted


@pytest.mark.native
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
def test_the_bits_of_a_text_behind_a_source_are_its_own(kind: str) -> None:
    """Scores of sampled texts, bit for bit: speculation on and off, sources encoded alone and beside others,
    one thread and three, chunks of 3 and 16, K/V in fp16."""
    model = source_model(max_positions=4096)
    if kind == "bfloat16":
        model = model.to(torch.bfloat16)
    elif kind == "int8":
        quantize_linears(model)
    given = sources(1, 3, 16, 17, 40, 7)
    found = []
    for threads, chunk, rows, speculation in ((1, 16, 48, True), (3, 3, 500, True), (2, 16, 48, False)):
        maker = NativeOptions(threads=threads, int4=kind == "int4")
        requests = [
            request(
                i,
                source,
                sampling=SamplingParams(seed=i),
                logprobs=2,
                speculation=speculation,
                decoder_prompt=list(range(5 * i)),
            )
            for i, source in enumerate(given)
        ]
        engine = engine_of(model, maker, prefill_chunk_size=chunk, prefill_rows=rows, prefix_caching=False)
        found.append(scores(engine, requests))
        found.append([scores(engine, [each])[0] for each in requests])
    assert all(each == found[0] for each in found)
    assert len({tuple(each) for each in found[0]}) == len(given)


def scores(engine: Engine, requests: list[GenerationRequest]) -> list[list[tuple[int, float]]]:
    """Each token of a text with its log-probability."""
    events = engine.run(requests)
    engine.check_integrity()
    said = [events[each.request_id] for each in requests]
    return [
        [
            pair
            for event in each
            for pair in zip(event.token_ids, (s.logprob for s in event.logprobs), strict=True)
        ]
        for each in said
    ]


@pytest.mark.parametrize("maker", BACKENDS)
def test_sources_of_1_to_2000_tokens_64_at_once_with_aborts(maker: BackendMaker) -> None:
    """More than the cache holds: some wait, some make way; whoever is aborted leaves nothing behind."""
    rng = random.Random(1)
    lengths = [1, 2000, *(rng.choice([5, 16, 33, 200, 700]) for _ in range(62))]
    requests = [request(i, source, max_tokens=6) for i, source in enumerate(sources(*lengths))]
    roomy = engine_of(maker=maker, max_num_seqs=1)
    alone = [texts(roomy, [each])[0] for each in requests]
    busy = engine_of(maker=maker, max_num_seqs=64)
    said: dict[str, list[int]] = {each.request_id: [] for each in requests}
    ended: dict[str, list[str]] = {each.request_id: [] for each in requests}
    for each in requests:
        busy.add(each)
    aborted = [str(i) for i in range(0, 64, 5)]
    while busy.has_requests:
        for event in busy.step():
            said[event.request_id] += event.token_ids
            ended[event.request_id] += [event.finish_reason] if event.finish_reason else []
        busy.pool.check_integrity()
        if aborted and rng.random() < 0.3:
            busy.abort(aborted.pop())
    busy.check_integrity()
    assert all(len(reasons) == 1 for reasons in ended.values())
    finished = [i for i in range(64) if ended[str(i)] == ["length"]]
    assert len(finished) >= 51
    assert [said[str(i)] for i in finished] == [alone[i] for i in finished]


class Watched(TorchBackend):
    """Notes the sources of every pass."""

    sources: list[list[int]]

    def run(self, rows: Rows, readouts: Readouts) -> PassResult:
        self.sources.append([len(source.tokens) for source in rows.new_sources])
        return super().run(rows, readouts)


def watched(engine: Engine) -> list[list[int]]:
    engine.backend.__class__ = Watched
    cast(Watched, engine.backend).sources = []
    return cast(Watched, engine.backend).sources


def test_a_pass_encodes_as_many_sources_as_it_may_have_prompt_rows_or_one() -> None:
    engine = engine_of(max_num_seqs=64)
    seen = watched(engine)
    lengths = [10, 20, 300, 5, 5, 5, 48, 30, 500]
    texts(engine, [request(i, source) for i, source in enumerate(sources(*lengths))])
    passes = [lengths for lengths in seen if lengths]
    assert sorted(length for each in passes for length in each) == sorted(lengths)
    assert all(sum(each) <= 48 or len(each) == 1 for each in passes)
    assert any(len(each) > 1 for each in passes)


def test_equal_sources_are_encoded_once_at_a_time_and_after() -> None:
    """Eight texts of one source, then it is found in the cache; another salt or another source is not."""
    engine = engine_of()
    seen = watched(engine)
    (source,) = sources(50)
    sampled = [request(i, source, sampling=SamplingParams(seed=i)) for i in range(8)]
    first = texts(engine, sampled)
    assert [lengths for lengths in seen if lengths] == [[50]]
    assert len({tuple(text) for text in first}) > 1
    assert texts(engine, sampled) == first
    assert sum(map(len, seen)) == 1
    stats = [engine.run([one])[one.request_id][-1].stats for one in sampled[:1]]
    assert stats[0] is not None
    assert stats[0].cached_prompt_tokens == 50
    texts(engine, [request("salted", source, cache_salt="other"), request("longer", [*source, 1])])
    assert sum(map(len, seen)) == 3
    apart = engine_of(prefix_caching=False)
    seen = watched(apart)
    assert texts(apart, sampled) == first
    assert sum(map(len, seen)) == 8


def test_a_forced_beginning_is_gone_on_from() -> None:
    source, other = sources(20, 21)
    begin = [7, 9, 11, *range(20)]
    wanted = plain_greedy(source, begin=tuple(begin))
    engine = engine_of()
    requests = [request(0, source, decoder_prompt=begin), request(1, other, decoder_prompt=begin)]
    assert texts(engine, requests) == [wanted, plain_greedy(other, begin=tuple(begin))]
    again = engine.run(requests[:1])["0"]
    assert [token for event in again for token in event.token_ids] == wanted
    assert again[-1].stats is not None
    assert again[-1].stats.cached_prompt_tokens == 20 + 16  # the source, and a page of the text's beginning


def test_fewer_loops_for_one_request() -> None:
    (source,) = sources(9)
    requests = [request(depth, source, num_loops=depth) for depth in (1, 2, 3)]
    wanted = [plain_greedy(source, loops=depth) for depth in (1, 2, 3)]
    assert texts(engine_of(), requests) == wanted


@pytest.mark.parametrize("maker", BACKENDS)
def test_pre_emption_changes_no_text(maker: BackendMaker) -> None:
    given = sources(30, 31, 32, 33)
    requests = [request(i, s, max_tokens=90, sampling=SamplingParams(seed=i)) for i, s in enumerate(given)]
    roomy = engine_of(maker=maker)
    alone = [texts(roomy, [each])[0] for each in requests]
    for caching in (True, False):
        tight = engine_of(maker=maker, max_model_len=160, kv_cache_tokens=300, prefix_caching=caching)
        assert texts(tight, requests) == alone
        assert tight.stats.preemptions > 0


def test_source_and_text_fill_the_context_and_no_more() -> None:
    """Each begins a page: 33 + 31 tokens take five pages of 16, where 64 tokens take four."""
    engine = engine_of(max_model_len=64, kv_cache_tokens=64)
    (source,) = sources(33)
    assert len(texts(engine, [request(0, source, max_tokens=30)])[0]) == 30
    events = engine.run([request(1, source, max_tokens=31)])["1"]
    assert events[-1].is_refusal
    assert events[-1].error == "34 prompt tokens and max_tokens 31 exceed the context of 64 tokens"


class Fragile(TorchBackend):
    """Fails where a source holds the token 13."""

    def run(self, rows: Rows, readouts: Readouts) -> PassResult:
        if any(13 in source.tokens for source in rows.new_sources):
            raise RuntimeError("an unlucky source")
        return super().run(rows, readouts)


def test_a_source_that_fails_ends_its_own_request_alone() -> None:
    engine = engine_of()
    engine.backend.__class__ = Fragile
    lucky = [[t for t in source if t != 13] for source in sources(20, 30, 40)]
    requests = [request(i, source) for i, source in enumerate(lucky)]
    events = engine.run([*requests, request("unlucky", [12, 13, 14])])
    engine.check_integrity()
    assert events["unlucky"][-1].finish_reason == "error"
    wanted = [plain_greedy(source) for source in lucky]
    assert [[t for event in events[str(i)] for t in event.token_ids] for i in range(3)] == wanted


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_logprobs": 0}, "read by its encoder, which predicts no token"),
        ({"decoder_prompt": [61]}, "decoder_prompt: 61 is no token id"),
        ({"init_scale": 1.0}, "does not start from noise"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(fields: dict[str, Field], message: str) -> None:
    engine = engine_of()
    last: TokenEvent = engine.run([request(0, [1, 2], **fields)])["0"][-1]
    assert last.is_refusal
    assert message in (last.error or "")


def test_a_model_without_an_encoder_has_no_decoder_prompt() -> None:
    engine = Engine(tiny_model(), EngineOptions(kv_cache_tokens=256))
    last = engine.run([request(0, [1, 2], decoder_prompt=[4])])["0"][-1]
    assert last.is_refusal
    assert "decoder_prompt: this model has no decoder apart" in (last.error or "")
