"""Where a sequence stands in its grammar: which tokens may come next, and whether anything can.

Knows nothing about logits. A `GrammarState` follows the tokens of one wave, drafts included, by consuming
and rolling back; a draft and its confirmation see the same mask, since it is a function of the tokens
before them. Invariant: nothing that the matcher meets, an error of its own included, raises here. A
position behind a token that the grammar forbids has no mask; a matcher that has failed is replaced.
"""

from collections.abc import Sequence as SequenceOf
from functools import lru_cache
from itertools import takewhile
from typing import NamedTuple

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray
from tokenizers import Tokenizer

from model.grammar import GrammarError, in_words, new_matcher
from model.protocol import Grammar
from model.wave import Outcome, Wave

MATCHERS_KEPT = 32  # a grammar used again is copied in 10 us, not compiled in 1 ms
_END = "<|end of the grammar|>"


class Vocabulary:
    """The tokens of a model as bytes, as matchers need them; compiles grammars over them.

    `tokenizer_json` is the model's; `vocab_size` the model's, ids that the tokenizer lacks are never
    allowed. `eos_token_ids` have no text, whatever the tokenizer says. Raises GrammarError for a
    tokenizer that llguidance cannot read. `mask` is for one thread.
    """

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: SequenceOf[int] = ()) -> None:
        self.vocab_size = vocab_size
        self.eos_token_ids = [token for token in eos_token_ids if token < vocab_size]
        try:
            self._tokenizer, self._end = _with_end(tokenizer_json)
        except Exception as error:  # ValueError, or the tokenizers package's bare Exception
            raise GrammarError(f"grammars are not possible with this model's tokenizer: {error}") from error
        self._words = np.empty((self._tokenizer.vocab_size + 31) // 32, np.int32)
        self._compiled = lru_cache(MATCHERS_KEPT)(lambda grammar: new_matcher(self._tokenizer, grammar))

    def matcher(self, grammar: Grammar) -> LLMatcher:
        """A matcher at the start of `grammar`; raises GrammarError if it does not compile. Thread-safe."""
        return self._compiled(grammar).deep_copy()

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
        self, vocabulary: Vocabulary, start: LLMatcher, prompt_length: int, ending_tokens: frozenset[int]
    ) -> None:
        """`start` is a matcher of `vocabulary`. Raises GrammarError if it allows no first token."""
        self._vocabulary = vocabulary
        self._pristine = start
        self._matcher = self._pristine.deep_copy()
        self._prompt_length = prompt_length
        self._endings = sorted(ending_tokens)
        self._consumed: list[int] = []  # by the matcher, from the first generated token on
        self._num_certain = 0  # of them, committed
        self._masks: dict[int, _Mask] = {}  # by the number of tokens consumed before
        self.problem = ""  # why the last outcome was "stuck"
        if self._here() != "open":
            raise GrammarError(self.problem or "the grammar matches no text")

    def forbidden(self, wave: Wave, position: int, *, before_min_tokens: bool) -> NDArray[np.bool_] | None:
        """Tokens that must not stand at `position`, (vocab,), read only; None if it has no mask.

        Before `min_tokens` the ending tokens are forbidden too, as long as that leaves any.
        """
        self._commit(wave)
        first = self._prompt_length + self._num_certain
        mask = self._mask_behind(wave.tokens[first:position])
        if mask is None or not before_min_tokens:
            return mask and mask.forbidden
        forbidden = mask.forbidden.copy()
        forbidden[self._endings] = True
        return mask.forbidden if forbidden.all() else forbidden

    def outcome(self, tokens: list[int], position: int, token: int) -> Outcome:
        """See wave.Constraint."""
        text = [*tokens[self._prompt_length + self._num_certain : position], token]
        ahead = self._consumed[self._num_certain :]
        if len(ahead) > len(text) and ahead[: len(text)] == text:
            return "open"  # it has been continued already
        return self._here() if self._move(text) else "stuck"

    def admits(self, tokens: list[int], proposed: list[int]) -> int:
        """See wave.Constraint."""
        if not self._move(tokens[self._prompt_length + self._num_certain :]):
            return 0
        return sum(
            1 for _ in takewhile(lambda token: self._consume(token) and self._here() == "open", proposed)
        )

    def _commit(self, wave: Wave) -> None:
        """Moves the border behind which nothing is rolled back; masks before it are of no use any more."""
        count = wave.num_committed - self._prompt_length
        if count <= self._num_certain:
            return
        text = wave.tokens[self._prompt_length + self._num_certain : wave.num_committed]
        if self._consumed[self._num_certain : count] != text and not self._move(text):
            return
        self._num_certain = count
        self._masks = {place: mask for place, mask in self._masks.items() if place >= count}

    def _mask_behind(self, text: list[int]) -> _Mask | None:
        """The mask behind what is certain and `text`."""
        ahead = self._consumed[self._num_certain :]
        place = self._num_certain + len(text)
        if place in self._masks and ahead[: len(text)] == text:
            return self._masks[place]
        return self._mask_here() if self._move(text) else None

    def _move(self, text: list[int]) -> bool:
        """Brings the matcher behind what is certain and `text`; False if the grammar forbids that."""
        ahead = self._consumed[self._num_certain :]
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ahead, text, strict=False)))
        self._roll_back(len(ahead) - same)
        return all(self._consume(token) for token in text[same:])

    def _roll_back(self, count: int) -> None:
        if not count:
            return
        self._matcher.rollback(count)
        del self._consumed[-count:]
        self._masks = {place: m for place, m in self._masks.items() if place <= len(self._consumed)}

    def _consume(self, token: int) -> bool:
        taken = self._vocabulary.can_be_text(token) and self._matcher.try_consume_tokens([token]) == 1
        if self._failed():
            return False
        if taken:
            self._consumed.append(token)
        else:
            self.problem = f"the grammar does not allow the token {token} here"
        return taken

    def _mask_here(self) -> _Mask | None:
        """The mask behind all that is consumed; None if it takes the matcher beyond its limits."""
        place = len(self._consumed)
        if place not in self._masks:
            allowed, may_end = self._vocabulary.mask(self._matcher)
            if self._failed():
                return None
            has_text = bool(allowed.any())
            allowed[self._endings] |= may_end
            self._masks[place] = _Mask(~allowed, has_text, may_end)
        return self._masks[place]

    def _here(self) -> Outcome:
        mask = self._mask_here()
        if mask is None:
            return "stuck"
        if mask.has_text:
            return "open"
        self.problem = "" if mask.may_end else "the grammar allows none of the model's tokens here"
        return "complete" if mask.may_end else "stuck"

    def _failed(self) -> bool:
        """Whether the matcher met its limits; then another one takes its place, at what is certain."""
        if not self._matcher.is_error():
            return False
        self.problem = in_words(self._matcher.get_error())
        certain = self._consumed[: self._num_certain]
        self._matcher = self._pristine.deep_copy()
        self._matcher.consume_tokens(certain)
        self._consumed = certain
        self._masks.clear()
        return True


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
