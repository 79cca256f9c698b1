"""A grammar's state follows drafts and flushes: always the mask of the tokens that stand there now."""

from types import SimpleNamespace
from typing import cast
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLParserLimits

from model.grammar import check as check_module
from model.grammar.check import GrammarError
from model.grammar.state import GrammarState, Vocabulary
from model.protocol import Grammar
from model.schedule.wave import Wave
from tests.text_tools import EOS_ID, byte_tokenizer, word_tokenizer

VOCAB = 270
VOCABULARY = Vocabulary(word_tokenizer(["ab", "ba", "aa"]).to_str(), VOCAB, [EOS_ID])
PROMPT = [1, 2, 3]


def state(
    regex: str, endings: frozenset[int] = frozenset({EOS_ID}), vocabulary: Vocabulary = VOCABULARY
) -> GrammarState:
    return state_of(Grammar(kind="regex", text=regex), endings, vocabulary)


def state_of(
    grammar: Grammar,
    endings: frozenset[int] = frozenset({EOS_ID}),
    vocabulary: Vocabulary = VOCABULARY,
    drafts: bool = True,
) -> GrammarState:
    matchers = vocabulary.matchers(grammar, with_drafts=drafts)
    return GrammarState(vocabulary, matchers, len(PROMPT), endings)


def wave(tokens: list[int], num_committed: int = 0) -> Wave:
    return cast(Wave, SimpleNamespace(tokens=PROMPT + tokens, num_committed=len(PROMPT) + num_committed))


def allowed(
    state: GrammarState,
    tokens: list[int],
    num_committed: int = 0,
    count: int | None = None,
    **options: bool,
) -> set[int] | None:
    """Ids allowed behind the first `count` of `tokens`; None without a mask."""
    position = len(PROMPT) + (len(tokens) if count is None else count)
    options = {"before_min_tokens": False, **options}
    forbidden = state.forbidden(wave(tokens, num_committed), position, **options)
    return None if forbidden is None else set(np.flatnonzero(~forbidden).tolist())


A, B, AB, BA, AA = ord("a"), ord("b"), EOS_ID + 1, EOS_ID + 2, EOS_ID + 3


def test_a_mask_holds_the_tokens_that_continue_the_text_and_the_end_where_it_is_whole() -> None:
    grammar = state("a(ba)?")
    assert allowed(grammar, []) == {A, AB}
    assert allowed(grammar, [A]) == {B, BA, EOS_ID}
    assert allowed(grammar, [AB]) == {A}
    assert allowed(grammar, [A], before_min_tokens=True) == {B, BA}
    assert allowed(grammar, [A, BA], before_min_tokens=True) == {EOS_ID}  # the grammar goes first


def test_ids_beyond_the_tokenizer_and_ends_that_are_ignored_are_never_allowed() -> None:
    anything = allowed(state(r"(.|\n)*", endings=frozenset()), [])
    assert anything is not None
    assert max(anything) == AA
    assert EOS_ID not in anything


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_masks_are_a_function_of_the_tokens_before_whatever_was_drafted_and_flushed(
    data: st.DataObject,
) -> None:
    """Against a fresh state for every mask. Drafts may be of any kind, and some the grammar forbids."""
    grammar = "(a|ba){0,3}b(aa|b)*"
    followed = state(grammar)
    tokens, committed = list[int](), 0
    for _ in range(data.draw(st.integers(1, 12))):
        keep = data.draw(st.integers(committed, len(tokens)))
        tokens = tokens[:keep] + data.draw(st.lists(st.sampled_from([A, B, AB, BA, AA, EOS_ID]), max_size=3))
        fresh = state(grammar)
        count = data.draw(st.integers(committed, len(tokens)))
        assert allowed(followed, tokens, committed, count) == allowed(fresh, tokens, 0, count)
        token = data.draw(st.sampled_from([A, B, AB]))
        position = len(PROMPT) + count
        text = wave(tokens).tokens
        assert followed.outcome(text, position, token, is_certain=False) == fresh.outcome(
            text, position, token, is_certain=False
        )
        valid = next((n for n in range(count, -1, -1) if allowed(fresh, tokens, 0, n) is not None), 0)
        committed = data.draw(st.integers(committed, max(valid, committed)))


def test_a_position_behind_a_forbidden_draft_has_no_mask_and_the_one_before_keeps_its_own() -> None:
    grammar = state("(ab)*")
    assert allowed(grammar, [AB, B, A]) is None
    assert allowed(grammar, [AB, EOS_ID]) is None
    assert allowed(grammar, [AB, 2**31]) is None
    assert allowed(grammar, [AB, B, A], count=1) == {A, AB, EOS_ID}


@pytest.mark.parametrize("is_certain", [False, True])
def test_outcomes(is_certain: bool) -> None:
    def outcome(tokens: list[int], token: int) -> str:
        grammar = state("a(ba)?")
        position = len(PROMPT) + len(tokens)
        return grammar.outcome([*PROMPT, *tokens], position, token, is_certain=is_certain)

    assert outcome([], A) == "open"
    assert outcome([], AB) == "open"
    assert outcome([A], BA) == "complete"
    assert outcome([A], A) == "stuck"
    assert outcome([A], 2**31) == "stuck"


def test_a_certain_token_that_the_grammar_forbids_is_named() -> None:
    grammar = state("a(ba)?")
    assert grammar.outcome([*PROMPT, A], 4, A, is_certain=False) == "stuck"
    assert grammar.problem == ""  # a draft is nobody's problem
    assert grammar.outcome([*PROMPT, A], 4, A, is_certain=True) == "stuck"
    assert "does not allow the token 97" in grammar.problem
    assert grammar.outcome([*PROMPT, A], 4, A, is_certain=True) == "stuck"  # asked again


def test_proposals_are_admitted_up_to_the_first_that_the_grammar_forbids_or_that_completes_it() -> None:
    grammar = state("(ab)*x")
    assert grammar.admits(PROMPT, [AB, A, B, AB]) == 4
    assert grammar.admits([*PROMPT, A], [B, B, A]) == 1
    assert grammar.admits([*PROMPT, AB], [A, B, ord("x"), A]) == 2
    assert grammar.admits([*PROMPT, B], [A]) == 0
    assert allowed(grammar, [AB]) == {A, AB, ord("x")}


def test_where_no_token_can_spell_the_grammar_it_is_stuck_not_complete() -> None:
    small = Vocabulary(byte_tokenizer().to_str(), 100)  # no "x" among the first 100 bytes
    with pytest.raises(GrammarError, match="none of the model's tokens"):
        state("x", frozenset(), small)
    grammar = state("[A-Z]x", frozenset(), small)
    assert grammar.outcome(PROMPT, 3, ord("A"), is_certain=True) == "stuck"
    assert "none of the model's tokens" in grammar.problem


def test_a_mask_behind_a_dropped_draft_is_that_of_the_new_one() -> None:
    """A matcher that is rolled back may keep the mask of what it has left: it only compares lexer states."""
    words = Vocabulary(word_tokenizer(["1c", "1d"]).to_str(), VOCAB, [EOS_ID])
    text = 'start: "a" D "c" | "b" D "d"\nD: /[0-9]+/'
    grammar = state_of(Grammar(kind="lark", text=text), vocabulary=words)
    digits = set(b"0123456789")
    assert allowed(grammar, [A]) == digits | {EOS_ID + 1}
    assert allowed(grammar, [B]) == digits | {EOS_ID + 2}


REGEXES = [
    r"(?s:.)*[a-m](?s:.){30}z",
    r"a{9}|b(.*a.{60}){3}",
    "(a|ba){0,3}b(aa|b)*",
    r"((ab|ba)*a.{12})*",
    r".*(a.{5}b|b.{7}a).*",
    r"(a+b+)+.{3}",
]
LIMITS = st.builds(
    lambda states, fuel: LLParserLimits(max_lexer_states=states, step_lexer_fuel=fuel, verbose_errors=False),
    st.sampled_from([30, 100, 400, 25_000]),
    st.sampled_from([200, 1000, 5000, 100_000]),
)


def _is_seen(grammar: GrammarState, tokens: list[int]) -> tuple[set[int] | None, str, str]:
    """All that decoding asks where `tokens` are certain."""
    if not tokens:
        return allowed(grammar, []), "open", ""
    outcome = grammar.outcome(PROMPT + tokens, len(PROMPT) + len(tokens) - 1, tokens[-1], is_certain=True)
    return allowed(grammar, tokens, len(tokens)), outcome, grammar.problem


@given(data=st.data(), regex=st.sampled_from(REGEXES), limits=LIMITS)
@settings(max_examples=60, deadline=None)
def test_drafts_change_neither_a_mask_nor_where_a_limit_is_met(
    data: st.DataObject, regex: str, limits: LLParserLimits
) -> None:
    """Of copies of one compiled matcher, each met the limits that all of them had used up."""
    with mock.patch.object(check_module, "_limits", return_value=limits):
        followed = state(regex)
        plain = state_of(Grammar(kind="regex", text=regex), drafts=False)
    tokens: list[int] = []
    while len(tokens) < 25:
        seen = _is_seen(plain, tokens)
        assert _is_seen(followed, tokens) == seen
        mask, outcome, _ = seen
        if outcome != "open":
            return
        assert mask is not None
        if mask <= {EOS_ID}:
            return
        for _ in range(data.draw(st.integers(0, 3))):
            drafts = data.draw(st.lists(st.sampled_from([A, B, AB, BA, AA, ord("z")]), max_size=5))
            allowed(followed, tokens + drafts, len(tokens))
            followed.admits(PROMPT + tokens, drafts)
        tokens = [*tokens, data.draw(st.sampled_from(sorted(mask - {EOS_ID})))]


def test_a_draft_beyond_the_limits_is_not_followed_and_the_certain_text_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits = LLParserLimits(step_lexer_fuel=300, verbose_errors=False)
    monkeypatch.setattr(check_module, "_limits", lambda: limits)
    vocabulary = Vocabulary(byte_tokenizer().to_str(), 257, [EOS_ID])
    grammar = state("a{9}|b(.*c.{60}){3}", vocabulary=vocabulary)
    assert allowed(grammar, [A]) == {A}
    assert allowed(grammar, [B, *b"xxcxcxxxcx"]) is None
    assert allowed(grammar, [A, A], 1) is None  # its drafts have no matcher any more
    assert allowed(grammar, [A, A], 2) == {A}
    assert grammar.outcome([*PROMPT, A, A], 5, A, is_certain=False) == "stuck"
    assert grammar.outcome([*PROMPT, A, A], 5, A, is_certain=True) == "open"


@pytest.mark.parametrize("text", ["", "{}", "no json"])
def test_a_tokenizer_that_cannot_be_read_is_a_grammar_error(text: str) -> None:
    with pytest.raises(GrammarError, match="not possible with this model's tokenizer"):
        Vocabulary(text, 10)
