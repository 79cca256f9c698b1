"""Where a sequence stands in its grammar: which tokens may come next, and whether anything can.

Knows nothing about logits. A matcher has limits, and how near they are depends on all that its lexer was
ever asked, by copies of the matcher as well. So each sequence compiles its grammar for itself, and twice:
one matcher follows what is certain, the other one the drafts. Invariants: a text and the place where it
meets a limit do not depend on drafts or on other requests; nothing that a matcher meets raises here.
"""

from collections import abc
from itertools import takewhile
from typing import NamedTuple

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray
from tokenizers import Tokenizer

from model.grammar.check import GrammarError, in_words, new_matcher
from model.protocol import Grammar
from model.schedule.wave import Outcome, Wave

_END = "<|end of the grammar|>"


class Matchers(NamedTuple):
    """Two matchers of one grammar that have nothing in common: for the certain text, and for drafts."""

    certain: LLMatcher
    drafts: LLMatcher | None


class Vocabulary:
    """The tokens of a model as bytes, as matchers need them; compiles grammars over them.

    `tokenizer_json` is the model's; `vocab_size` the model's, ids that the tokenizer lacks are never
    allowed. `eos_token_ids` have no text, whatever the tokenizer says. Raises GrammarError for a
    tokenizer that llguidance cannot read. `mask` is for one thread.
    """

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: abc.Sequence[int] = ()) -> None:
        self.vocab_size = vocab_size
        self.eos_token_ids = [token for token in eos_token_ids if token < vocab_size]
        try:
            self._tokenizer, self._end = _with_end(tokenizer_json)
        except Exception as error:  # ValueError, or the tokenizers package's bare Exception
            raise GrammarError(f"grammars are not possible with this model's tokenizer: {error}") from error
        self._words = np.empty((self._tokenizer.vocab_size + 31) // 32, np.int32)

    def matchers(self, grammar: Grammar, *, with_drafts: bool) -> Matchers:
        """Matchers at the start of `grammar`, compiled now and shared with nobody, in 1 ms each.

        Raises GrammarError if it does not compile. Thread-safe.
        """
        certain = new_matcher(self._tokenizer, grammar)
        return Matchers(certain, new_matcher(self._tokenizer, grammar) if with_drafts else None)

    def can_be_text(self, token: int) -> bool:
        """Whether a matcher may be shown the token."""
        return token != self._end and token < self._tokenizer.vocab_size

    def mask(self, matcher: LLMatcher) -> tuple[NDArray[np.bool_], bool]:
        """Which tokens may come next as text, (vocab_size,), and whether the text may end here."""
        matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        bits = np.unpackbits(self._words.view(np.uint8), bitorder="little").view(np.bool_)
        may_end = bool(bits[self._end])
        bits[self._end] = False
        allowed = np.zeros(self.vocab_size, np.bool_)
        count = min(self.vocab_size, self._tokenizer.vocab_size)
        allowed[:count] = bits[:count]
        allowed[self.eos_token_ids] = False
        return allowed, may_end


class _Mask(NamedTuple):
    """At one place of a text: tokens forbidden there (vocab,), whether any text or an end is allowed."""

    forbidden: NDArray[np.bool_]
    has_text: bool
    may_end: bool


class GrammarState:
    """Follows one sequence; a `Constraint` of its wave. `ending_tokens` are those of the wave."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        matchers: Matchers,
        prompt_length: int,
        ending_tokens: frozenset[int],
    ) -> None:
        """Takes `matchers` over. Raises GrammarError if the grammar allows no first token."""
        places = _Places(vocabulary, sorted(ending_tokens))
        self._prompt_length = prompt_length
        self._endings = places.endings
        self._certain = _CertainText(places, matchers.certain)
        self._drafts = _DraftText(places, matchers.drafts)
        if self._certain.outcome != "open":
            raise GrammarError(self.problem or "the grammar matches no text")

    @property
    def problem(self) -> str:
        """Why nothing may follow the last certain token."""
        return self._certain.problem

    def forbidden(self, wave: Wave, position: int, *, before_min_tokens: bool) -> NDArray[np.bool_] | None:
        """Tokens that must not stand at `position`, (vocab,), read only; None if it has no mask.

        Before `min_tokens` the ending tokens are forbidden too, as long as that leaves any.
        """
        self._settle(wave.tokens[: wave.num_committed])
        mask = self._mask_behind(wave.tokens[self._edge : position])
        if mask is None or not before_min_tokens:
            return mask and mask.forbidden
        forbidden = mask.forbidden.copy()
        forbidden[self._endings] = True
        return mask.forbidden if forbidden.all() else forbidden

    def outcome(self, tokens: list[int], position: int, token: int, *, is_certain: bool) -> Outcome:
        """Whether other tokens may follow `token` at `position`, or the text is whole, or stuck."""
        text = [*tokens[:position], token]
        if is_certain:
            self._settle(text)
            return self._certain.outcome
        draft = self._drafts.follow(text[self._edge :])
        return draft.outcome if draft else "stuck"

    def admits(self, tokens: list[int], proposed: list[int]) -> int:
        """How many of the tokens `proposed` may follow `tokens`."""
        text = tokens[self._edge :]
        for count, token in enumerate(proposed):
            text = [*text, token]
            draft = self._drafts.follow(text)
            if draft is None or draft.outcome != "open":
                return count
        return len(proposed)

    @property
    def _edge(self) -> int:
        """The first position that is not certain."""
        return self._prompt_length + self._certain.num_tokens

    def _settle(self, tokens: list[int]) -> None:
        """Moves the edge behind `tokens`, a text from its start, if the grammar lets it go that far."""
        for token in tokens[self._edge :]:
            if self._certain.outcome != "open":
                return
            self._certain.advance(token)
            self._drafts.advance(token)

    def _mask_behind(self, text: list[int]) -> _Mask | None:
        """The mask behind what is certain and the drafts `text`."""
        if not text:
            return self._certain.mask
        draft = self._drafts.follow(text)
        return draft and draft.mask


class _Places(NamedTuple):
    """Says what may stand at a place."""

    vocabulary: Vocabulary
    endings: list[int]

    def mask(self, matcher: LLMatcher) -> _Mask | None:
        """What may stand where `matcher` is; None if finding out takes it beyond its limits."""
        allowed, may_end = self.vocabulary.mask(matcher)
        if matcher.is_error():
            return None
        has_text = bool(allowed.any())
        allowed[self.endings] |= may_end
        return _Mask(~allowed, has_text, may_end)


class _CertainText:
    """The committed text: what plain decoding asks of its matcher, in the same order, and nothing else."""

    def __init__(self, places: _Places, matcher: LLMatcher) -> None:
        self.num_tokens = 0
        self.mask: _Mask | None = None  # of what may follow
        self.outcome: Outcome = "stuck"
        self.problem = ""  # why nothing can follow, if the outcome is "stuck"
        self._places = places
        self._matcher = matcher
        self._look()

    def advance(self, token: int) -> None:
        """Puts `token` behind the text."""
        self.num_tokens += 1
        allowed = self._places.vocabulary.can_be_text(token) and self._allows(token)
        if allowed and self._matcher.consume_token(token):
            self._look()
            return
        self.mask, self.outcome = None, "stuck"
        self.problem = self._complaint() or f"the grammar does not allow the token {token} here"

    def _look(self) -> None:
        self.mask = self._places.mask(self._matcher)
        self.outcome = _outcome(self.mask)
        if self.outcome == "stuck":
            self.problem = self._complaint() or "the grammar allows none of the model's tokens here"

    def _allows(self, token: int) -> bool:
        return self.mask is not None and not self.mask.forbidden[token]

    def _complaint(self) -> str:
        return in_words(self._matcher.get_error()) if self._matcher.is_error() else ""


class _Draft(NamedTuple):
    """A draft token that was followed: a matcher behind it, and what may come there.

    `matcher` is copied, never moved: llguidance 1.9 may give a stale mask after a rollback.
    """

    token: int
    matcher: LLMatcher | None
    mask: _Mask | None
    outcome: Outcome


class _DraftText:
    """The drafts behind the certain text, followed with a matcher and a lexer of their own.

    Where those meet their limits, or `matcher` is None, every draft is "stuck".
    """

    def __init__(self, places: _Places, matcher: LLMatcher | None) -> None:
        self._places = places
        self._matcher = matcher  # behind the certain text
        self._path: list[_Draft] = []

    def advance(self, token: int) -> None:
        """The certain text grows by `token`; drafts that were built on another one are dropped."""
        if self._path and self._path[0].token == token:
            self._matcher = self._path.pop(0).matcher
            return
        self._path.clear()
        if self._matcher and not self._matcher.consume_token(token):
            self._matcher = None

    def follow(self, text: list[int]) -> _Draft | None:
        """The last of the drafts `text`, of at least one; None if one before it leads nowhere.

        Drafts that were followed beyond `text` are kept, those of another text are dropped.
        """
        pairs = zip(self._path, text, strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0].token == pair[1], pairs))
        if same < len(text):
            del self._path[same:]
        for token in text[same:]:
            if self._path and self._path[-1].outcome != "open":
                return None
            self._path.append(self._draft(token))
        return self._path[len(text) - 1]

    def _draft(self, token: int) -> _Draft:
        """`token` behind the last draft."""
        before = self._path[-1].matcher if self._path else self._matcher
        if before is None or not self._places.vocabulary.can_be_text(token):
            return _Draft(token, None, None, "stuck")
        matcher = before.deep_copy()
        if not matcher.consume_token(token):
            return _Draft(token, None, None, "stuck")
        mask = self._places.mask(matcher)
        return _Draft(token, matcher, mask, _outcome(mask))


def _outcome(mask: _Mask | None) -> Outcome:
    if mask is None:
        return "stuck"
    if mask.has_text:
        return "open"
    return "complete" if mask.may_end else "stuck"


def _with_end(tokenizer_json: str) -> tuple[LLTokenizer, int]:
    """A tokenizer and the id of a token without text, whose bit in a mask says that the text may end."""
    tokenizer = LLTokenizer(tokenizer_json)
    if tokenizer.is_special_token(tokenizer.eos_token):
        return tokenizer, tokenizer.eos_token
    extended = Tokenizer.from_str(tokenizer_json)  # it has no end: llguidance would take the first token
    extended.add_special_tokens([_END])
    end = extended.token_to_id(_END)
    assert end is not None
    return LLTokenizer(extended.to_str(), eos_token=end), end
