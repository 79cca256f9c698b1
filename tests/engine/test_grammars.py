"""Grammars through the engine: every text matches, and speculation, batches and failures change none."""

import json
import re
from unittest import mock

import jsonschema_rs
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLParserLimits

from model.engine import Engine
from model.grammar import check as check_module
from model.grammar.state import Matchers, Vocabulary
from model.options import POLICIES, DraftPolicyName, EngineOptions
from model.protocol import GenerationRequest, Grammar, GrammarKind, SamplingParams, TokenEvent
from tests.engine.native_tools import MAKER
from tests.loose import Field, Json
from tests.text_tools import EOS_ID, word_tokenizer
from tests.tiny_models import SHAPES, tiny_model

VOCAB = 300  # the tokenizer has fewer: the last rows of the head stand for nothing
WORDS = ['{"', '": ', '", "', "true", "false", "null", "]}", "12", '"}', "ab", "é", "[[", "  "]
TOKENIZER = word_tokenizer(WORDS)
VOCABULARY = Vocabulary(TOKENIZER.to_str(), VOCAB, [EOS_ID])
NEW_TOKENS = 60
GREEDY = SamplingParams(temperature=0)
# Sampling from flat random models would spend all its tokens inside one string.
SAMPLED: dict[str, Field] = {"temperature": 1.5, "top_p": 0.95, "top_k": 40, "frequency_penalty": 0.3}


def engine(
    policy: DraftPolicyName = "adaptive",
    shape: str = "pre_norm",
    eos: bool = True,
    tokens: int = 4096,
    row_budget: int = 32,
) -> Engine:
    options = {"vocab_size": VOCAB, "max_positions": 64, "eos_token_ids": (EOS_ID,) if eos else ()}
    model = tiny_model(**{**SHAPES[shape], **options})
    config = EngineOptions(
        draft_policy=policy,
        kv_cache_tokens=tokens,
        row_budget=row_budget,
        prefill_chunk_size=16,
        prefill_rows=32,
    )
    return Engine(model, config, VOCABULARY, MAKER)


def request(
    name: str, grammar: Grammar, sampling: SamplingParams = GREEDY, **options: Field
) -> GenerationRequest:
    prompt = [sum(name.encode()) % 256, 7, 9]
    return GenerationRequest(
        request_id=name,
        prompt_token_ids=prompt,
        sampling=sampling,
        grammar=grammar,
        **{"max_tokens": NEW_TOKENS, **options},
    )


def run(shared: Engine, requests: list[GenerationRequest]) -> dict[str, list[TokenEvent]]:
    answers = shared.run(requests)
    shared.check_integrity()
    return answers


def text_of(events: list[TokenEvent]) -> str:
    ids = [token for event in events for token in event.token_ids]
    return TOKENIZER.decode(ids, skip_special_tokens=True)


def schema(value: dict[str, Json]) -> Grammar:
    return Grammar(kind="json_schema", text=json.dumps(value))


def _integers(low: int, size: int) -> dict[str, Json]:
    return {"type": "integer", "minimum": low, "maximum": low + size}


CONSTANTS = st.sampled_from(["a", "ab", "é", 1, None, "x y"])
SCALARS = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(_integers, st.integers(-50, 50), st.integers(0, 200)),
    st.builds(lambda size: {"type": "string", "maxLength": size}, st.integers(0, 6)),
    st.builds(lambda values: {"enum": values}, st.lists(CONSTANTS, min_size=1, max_size=3, unique=True)),
)


def _objects(values: st.SearchStrategy) -> st.SearchStrategy:
    return st.dictionaries(st.sampled_from(["a", "ab", "key"]), values, max_size=3).map(
        lambda parts: {
            "type": "object",
            "properties": parts,
            "required": sorted(parts),
            "additionalProperties": False,
        }
    )


def _arrays(values: st.SearchStrategy) -> st.SearchStrategy:
    return st.builds(
        lambda items, most: {"type": "array", "items": items, "maxItems": most}, values, st.integers(0, 3)
    )


SCHEMAS = st.recursive(SCALARS, lambda inner: _objects(inner) | _arrays(inner), max_leaves=5)


@given(
    schemas=st.lists(SCHEMAS, min_size=2, max_size=4),
    policy=st.sampled_from(POLICIES),
    tokens=st.sampled_from([64, 96, 4096]),
    shape=st.sampled_from(["pre_norm", "prelude_and_coda"]),
    budget=st.integers(2, 12),
    seed=st.integers(0, 2**63 - 1),
)
@settings(max_examples=15, deadline=None)
def test_with_random_schemas_speculation_and_batches_change_no_text_and_every_text_validates(
    schemas: list[Json], policy: DraftPolicyName, tokens: int, shape: str, budget: int, seed: int
) -> None:
    requests = [
        request(f"{i}{sampling}", schema(value), sampling)
        for i, value in enumerate(schemas)
        for sampling in (GREEDY, SamplingParams(**SAMPLED, seed=seed))
    ]
    """With every draft policy, and where memory is so short that sequences are pre-empted."""
    plain = engine("none", shape)
    alone = {r.request_id: text_of(run(plain, [r])[r.request_id]) for r in requests}
    answers = run(engine(policy, shape, tokens=tokens, row_budget=budget), requests)
    assert {name: text_of(events) for name, events in answers.items()} == alone
    for index, value in enumerate(schemas):
        for sampling in range(2):
            name = requests[2 * index + sampling].request_id
            if answers[name][-1].finish_reason == "stop":
                assert jsonschema_rs.is_valid(value, json.loads(alone[name]))
            else:  # cut off
                assert sum(len(event.token_ids) for event in answers[name]) == NEW_TOKENS


def test_drafts_obey_the_grammar_so_what_it_forces_costs_one_pass_a_token() -> None:
    """Random weights draft at random; where one token is allowed every draft is right."""
    forced = request("a", Grammar(kind="regex", text="(xyz){10}"))
    events = run(engine("single"), [forced])["a"]
    stats = events[-1].stats
    assert stats is not None
    assert text_of(events) == "xyz" * 10
    assert stats.rejected_drafts == 0
    assert stats.passes < 30 + 3


def test_text_that_is_copied_is_drafted_by_lookup_and_obeys_the_grammar() -> None:
    """The prompt repeats what the grammar forces at first and forbids then: proposals of both kinds."""
    grammar = Grammar(kind="regex", text="(abcdefgh){4}(abcdXfgh)[ab]{4}")
    prompt = list(b"abcdefghabcdefghabcdefgh")
    answers = {}
    for policy in ("none", "lookup", "adaptive"):
        asked = msgspec.structs.replace(request("a", grammar, max_tokens=40), prompt_token_ids=prompt)
        events = run(engine(policy), [asked])["a"]
        stats = events[-1].stats
        assert stats is not None
        answers[policy] = text_of(events)
        assert policy == "none" or stats.passes < 0.7 * 40
    assert len(set(answers.values())) == 1


# Some explode: their lexers meet a limit soon, each where its own text leads it.
REGEXES = st.sampled_from(
    [
        r"(?s:.)*[a-m](?s:.){30}z",
        r"(.*[a-f].{8}){2,}",
        r"\d{3}-[a-c]{2}(.*x.{9}y)*",
        r"(true|false|null|ab)*",
        r"(ab|[^a]{2})*.{6}(12|[0-9])+",
    ]
)
LIMITS = st.builds(
    lambda states, fuel: LLParserLimits(max_lexer_states=states, step_lexer_fuel=fuel, verbose_errors=False),
    st.sampled_from([60, 200, 1000, 25_000]),
    st.sampled_from([1000, 5000, 100_000]),
)


@given(
    regexes=st.lists(REGEXES, min_size=1, max_size=2),
    limits=LIMITS,
    policy=st.sampled_from(POLICIES),
    tokens=st.sampled_from([96, 4096]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=5, deadline=None)
def test_an_answer_is_the_same_alone_and_six_at_once_and_where_its_lexer_meets_a_limit(
    regexes: list[str], limits: LLParserLimits, policy: DraftPolicyName, tokens: int, seed: int
) -> None:
    """In fresh engines and one that has used the grammar, with and without drafts: text, end and words."""

    def seen(events: list[TokenEvent]) -> tuple[list[int], str | None, str | None]:
        return [i for event in events for i in event.token_ids], events[-1].finish_reason, events[-1].error

    requests = [
        request(
            f"{i}{j}", Grammar(kind="regex", text=regex), SamplingParams(**SAMPLED, seed=j), max_tokens=25
        )
        for i, regex in enumerate(regexes)
        for j in range(seed, seed + 6 // len(regexes))
    ]
    with mock.patch.object(check_module, "_limits", return_value=limits):
        plain, used = engine("none"), engine(policy, tokens=tokens)
        alone = {r.request_id: seen(run(plain, [r])[r.request_id]) for r in requests}
        for _ in range(2):
            together = run(used, requests)
            assert {name: seen(events) for name, events in together.items()} == alone
        first = requests[0]
        assert seen(run(engine(policy), [first])[first.request_id]) == alone[first.request_id]
    assert {end for _, end, _ in alone.values()} <= {"stop", "length", "error"}
    assert all(not error or "too complex" in error for _, _, error in alone.values())


def test_drafts_that_meet_a_limit_are_not_followed_and_the_text_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A draft that was called stuck and open later left a wave without rows."""
    asked = request("a", Grammar(kind="regex", text=r"(?s:.)*[a-m](?s:.){12}z"), SamplingParams(seed=5))
    plain = run(engine("none"), [asked])["a"]
    whole = Vocabulary.matchers

    def without_drafts(self: Vocabulary, grammar: Grammar, *, with_drafts: bool) -> Matchers:
        del with_drafts
        return whole(self, grammar, with_drafts=False)

    monkeypatch.setattr(Vocabulary, "matchers", without_drafts)
    events = run(engine("single"), [asked])["a"]
    assert text_of(events) == text_of(plain)
    assert events[-1].finish_reason == "length"
    stats, plain_stats = events[-1].stats, plain[-1].stats
    assert stats is not None
    assert plain_stats is not None
    assert stats.passes == plain_stats.passes  # every draft waited for its confirmation
    assert stats.accepted_drafts > 0


@pytest.mark.parametrize("eos", [True, False])
@pytest.mark.parametrize("ignore_eos", [True, False])
def test_a_sequence_ends_by_itself_where_nothing_can_follow(eos: bool, ignore_eos: bool) -> None:
    events = run(
        engine(eos=eos),
        [request("a", Grammar(kind="choice", text='["true", "null"]'), ignore_eos=ignore_eos)],
    )["a"]
    assert text_of(events) in {"true", "null"}
    assert (events[-1].finish_reason, events[-1].stop_token_id) == ("stop", None)


@pytest.mark.parametrize(
    ("kind", "text", "pattern"),
    [
        ("regex", r"\d{3}-[a-c]{2}", r"\d{3}-[a-c]{2}"),
        ("regex", "(é|ab){4}", "(é|ab){4}"),
        ("choice", '["null", "nu", "é\\n"]', "null|nu|é\n"),
        ("lark", 'start: "<" word+ ">"\nword: /[ab]/ | word "," word', r"<[ab,]+>"),
        ("json_object", "", r"\{(.|\n)*\}"),
    ],
)
@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(**SAMPLED, seed=3)], ids=["greedy", "sampled"])
def test_each_kind_of_grammar_holds(
    kind: GrammarKind, text: str, pattern: str, sampling: SamplingParams
) -> None:
    events = run(engine(), [request("a", Grammar(kind=kind, text=text), sampling)])["a"]
    if events[-1].finish_reason == "stop":
        assert re.fullmatch(pattern, text_of(events))
    else:
        assert kind in {"json_object", "lark"}  # these may go on for ever


def test_an_ending_token_comes_only_where_the_text_is_whole() -> None:
    """The end is by far the likeliest token everywhere; the grammar lets it through as soon as it may."""
    bias = SamplingParams(temperature=0, logit_bias={EOS_ID: 100.0})
    grammar = Grammar(kind="regex", text="x{4,9}")
    events = run(engine(), [request("a", grammar, bias), request("b", grammar, bias, min_tokens=7)])
    assert text_of(events["a"]) == "xxxx"
    assert events["a"][-1].stop_token_id == EOS_ID
    assert text_of(events["b"]) == "x" * 7


def test_a_grammar_beats_min_tokens_and_biases() -> None:
    bias = SamplingParams(temperature=0, logit_bias={ord("y"): 100.0, ord("x"): -100.0})
    grammar = Grammar(kind="regex", text="xx")
    options = {"min_tokens": 5, "stop_token_ids": [ord("x")]}
    events = run(
        engine(), [request("a", grammar, bias, min_tokens=5), request("b", grammar, bias, **options)]
    )
    assert text_of(events["a"]) == "xx"
    assert (text_of(events["b"]), events["b"][-1].stop_token_id) == ("x", ord("x"))


def test_logprobs_under_a_grammar_are_those_of_the_raw_logits() -> None:
    free = msgspec.structs.replace(request("free", Grammar(kind="json_object")), grammar=None, max_tokens=20)
    alone = run(engine(), [free])["free"]
    both = run(engine(), [free, request("other", Grammar(kind="regex", text="[ab]{30}"), logprobs=2)])
    assert text_of(both["free"]) == text_of(alone)
    scores = [score for event in both["other"] for score in event.logprobs]
    assert len(text_of(both["other"])) == 30
    assert any(score.rank > 1 for score in scores)  # the likeliest were forbidden


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar(kind="regex", text="("), "unclosed group"),
        (Grammar(kind="json_schema", text="{"), "not valid JSON"),
        (Grammar(kind="lark", text="start: start"), "no text"),
    ],
)
def test_a_grammar_that_does_not_compile_is_an_error_event_and_harms_nobody(
    grammar: Grammar, message: str
) -> None:
    good = request("good", Grammar(kind="choice", text='["ab"]'))
    answers = run(engine(), [request("bad", grammar), good])
    assert [event.finish_reason for event in answers["bad"]] == ["error"]
    assert message in (answers["bad"][0].error or "")
    assert text_of(answers["good"]) == "ab"


def test_without_a_tokenizer_a_grammar_is_an_error_event() -> None:
    bare = Engine(tiny_model(vocab_size=VOCAB), EngineOptions(kv_cache_tokens=1024))
    (event,) = bare.run([request("a", Grammar(kind="json_object"), max_tokens=9)])["a"]
    assert event.finish_reason == "error"
    assert "tokenizer" in (event.error or "")


@pytest.mark.parametrize("steps", [0, 1, 6])
def test_an_abort_frees_the_matcher_and_the_pages(steps: int) -> None:
    shared = engine()
    shared.add(request("a", Grammar(kind="regex", text="x+")))
    for _ in range(steps):
        shared.step()
    shared.abort("a")
    ends = [event.finish_reason for event in shared.step()]
    assert ends == ["abort"]
    assert not shared.has_work
    shared.check_integrity()
