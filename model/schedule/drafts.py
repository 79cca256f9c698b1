"""Draft policies: at which depths a sequence guesses its next token, and how far each guess is believed.

Pure Python; knows nothing about rows, pages or other sequences. Every policy is exact, since a wave
commits nothing but what the last depth says: a policy decides what is tried, never what comes out.

    single    one draft depth (WaveFront Decoding, arXiv 2609.23033)
    gated     a second proposal at a later depth, taken where it contradicts the first (LoopSpec, 2609.17184)
    recheck   every depth from the first one on is compared (SPEED, 2310.12072)
    lookup    recheck, and behind a guess the tokens that followed the same n-gram earlier in the text
              (prompt lookup; several tokens enter in one pass, so passes per token can fall below 1)
    adaptive  lookup, but a depth is read out only while its guesses are worth it, else probed now and then
    none      no speculation
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from model.options import POLICIES, unknown_policy

SHORTEST_NGRAM, LONGEST_NGRAM = 2, 4  # tokens
MOST_PROPOSED = 15  # tokens that a match may bring in one pass
LEAST_AGREEMENT = 0.3  # of the last token proposed: behind it most rows would be wasted
USELESS = 0.08  # agreement below which `adaptive` stops reading a depth out
FEW_LOOPS = 12  # up to so many, each depth may be read out
PROBE_EVERY = 64  # tokens between two looks at a useless depth
UNKNOWN_AGREEMENT = 0.6  # what is expected of a depth before anything was seen
PRIOR_WEIGHT = 6.0  # observations that the engine's experience counts for in a new sequence
SEQUENCE_MEMORY, ENGINE_MEMORY = 40.0, 1000.0  # observations after which old ones have faded

LOOKUP_POLICIES = frozenset({"adaptive", "lookup"})  # that draft from the text as well, without any depth

_NOTHING_SEEN = (0.0, 0.0)


class Agreement:
    """How often guesses of each kind were what the last depth said, the recent ones counting most.

    A kind is a depth or an n-gram length. `prior` is a longer-lived record that fills in where this one
    has seen little; what is observed here is passed on to it. `num_observed` and `num_agreed` count, by
    kind, all that a record without a `prior` was ever told.
    """

    def __init__(self, memory: float, prior: "Agreement | None" = None) -> None:
        self._keep = 1.0 - 1.0 / memory
        self._prior = prior
        self._seen: dict[int, tuple[float, float]] = {}  # kind -> faded (agreed, observed)
        self.num_observed: Counter[int] = Counter()
        self.num_agreed: Counter[int] = Counter()

    def observe(self, kind: int, agreed: bool) -> None:
        """One guess was compared with the last depth."""
        hits, total = self._seen.get(kind, _NOTHING_SEEN)
        self._seen[kind] = hits * self._keep + agreed, total * self._keep + 1.0
        if self._prior is not None:
            self._prior.observe(kind, agreed)
        else:
            self.num_observed[kind] += 1
            self.num_agreed[kind] += agreed

    def of(self, kind: int) -> float:
        """Expected share of guesses that hold, 0..1."""
        hits, total = self._seen.get(kind, _NOTHING_SEEN)
        before = UNKNOWN_AGREEMENT if self._prior is None else self._prior.of(kind)
        return (hits + PRIOR_WEIGHT * before) / (total + PRIOR_WEIGHT)


class Experience(NamedTuple):
    """What an engine has learnt about its model's guesses; new sequences start from it."""

    depths: Agreement
    ngrams: Agreement

    @classmethod
    def none(cls) -> "Experience":
        """The experience of an engine that has just been started."""
        return cls(Agreement(ENGINE_MEMORY), Agreement(ENGINE_MEMORY))


class DraftPolicy:
    """`single`, `gated`, `recheck` and `none`, by their depths; the base of the others.

    Belongs to one sequence. `depths` are the draft depths, below the sequence's own last depth;
    `is_thrifty` is whether `reads` ever declines one of them, so that it has to be probed now and then.
    """

    is_thrifty = False

    def __init__(self, depths: frozenset[int], experience: Experience) -> None:
        self.depths = depths
        self.agreement = Agreement(SEQUENCE_MEMORY, experience.depths)

    def reads(self, depth: int, least_agreement: float) -> bool:
        """Whether a row is read out at `depth`, one of `depths`.

        A guess whose agreement is below `least_agreement` is not worth its readout at present.
        """
        del depth, least_agreement
        return True

    def overrules(self, depth: int, agreement: float) -> bool:
        """Whether a readout at `depth` beats a token from the text whose agreement is `agreement`."""
        del depth, agreement
        return True

    def prefer(self, tokens: Sequence[int], token: int, depth: int) -> tuple[int, float]:
        """The better guess of what follows `tokens`, and its agreement; a readout at `depth` says `token`."""
        del tokens
        return token, self.agreement.of(depth)

    def propose(self, tokens: Sequence[int]) -> list[int]:
        """Tokens that may follow `tokens`, to enter together with the last of them."""
        del tokens
        return []

    def proposal_agreement(self) -> float:
        """The agreement of each token of the latest proposal, given that the one before it holds."""
        return 0.0

    def observe(self, guesses: Mapping[int, int], token: int) -> None:
        """`token` was committed; `guesses` maps depths to what they said of its position."""
        for depth, guess in guesses.items():
            self.agreement.observe(depth, guess == token)

    def committed(self, tokens: Sequence[int], upto: int) -> None:
        """tokens[:upto] are final now (and maybe were before)."""


class LookupPolicy(DraftPolicy):
    """`lookup`: what followed the last few tokens the last time they stood in the text."""

    def __init__(self, depths: frozenset[int], experience: Experience) -> None:
        super().__init__(depths, experience)
        self.ngrams = Agreement(SEQUENCE_MEMORY, experience.ngrams)
        self._index = NGramIndex()
        self._proposal_agreement = 0.0

    def propose(self, tokens: Sequence[int]) -> list[int]:
        """What followed the last n-gram earlier: as many tokens as are likely enough to hold."""
        match = self._index.find(tokens)
        if match is None:
            return []
        self._proposal_agreement = self.ngrams.of(match.length)
        proposed: list[int] = []
        for index in range(match.follows, match.follows + _worth_trying(self._proposal_agreement)):
            # A text that goes in circles is followed round: the source runs into what is proposed here.
            proposed.append(tokens[index] if index < len(tokens) else proposed[index - len(tokens)])
        return proposed

    def prefer(self, tokens: Sequence[int], token: int, depth: int) -> tuple[int, float]:
        """The guess of the text where its n-gram has the higher agreement, else that of the readout."""
        match, agreement = self._index.find(tokens), self.agreement.of(depth)
        if match is None or (of_match := self.ngrams.of(match.length)) <= agreement:
            return token, agreement
        return tokens[match.follows], of_match

    def proposal_agreement(self) -> float:
        """The agreement of n-grams as long as the one that the latest proposal followed."""
        return self._proposal_agreement

    def overrules(self, depth: int, agreement: float) -> bool:
        """Whether the readout is the better of the two by experience."""
        return self.agreement.of(depth) >= agreement

    def committed(self, tokens: Sequence[int], upto: int) -> None:
        """Learns the text, and from it how good matches are: no row is spent on finding that out."""
        for position in range(self._index.num_known, upto):
            match = self._index.add(tokens, position)
            if match is not None:
                self.ngrams.observe(match.length, tokens[match.follows] == tokens[position])


class AdaptivePolicy(LookupPolicy):
    """`adaptive`: as `lookup`, without the readouts that experience says are useless."""

    is_thrifty = True

    def reads(self, depth: int, least_agreement: float) -> bool:
        """Whether the depth's agreement is worth a readout at present."""
        return self.agreement.of(depth) >= max(USELESS, least_agreement)


class Match(NamedTuple):
    """An earlier place of the last `length` tokens; `follows` is the position behind it."""

    length: int
    follows: int


class NGramIndex:
    """Where each n-gram of a text was last followed by something."""

    def __init__(self) -> None:
        self.num_known = 0  # positions taken in
        self._follows: dict[tuple[int, ...], int] = {}

    def add(self, tokens: Sequence[int], position: int) -> Match | None:
        """Takes in the token at `position`, the next one; returns what `find` said before it came."""
        self.num_known = position + 1
        last, match = _last(tokens, position), None
        for start in range(len(last) - SHORTEST_NGRAM + 1):
            ngram = last[start:]
            if match is None and (follows := self._follows.get(ngram)) is not None:
                match = Match(len(ngram), follows)
            self._follows[ngram] = position
        return match

    def find(self, tokens: Sequence[int]) -> Match | None:
        """The longest n-gram at the end of `tokens` that is known; the latest place of it."""
        last = _last(tokens, len(tokens))
        for start in range(len(last) - SHORTEST_NGRAM + 1):
            ngram = last[start:]
            if (follows := self._follows.get(ngram)) is not None:
                return Match(len(ngram), follows)
        return None


def _last(tokens: Sequence[int], end: int) -> tuple[int, ...]:
    """The longest n-gram that ends before position `end`."""
    return tuple(tokens[max(0, end - LONGEST_NGRAM) : end])


def _worth_trying(agreement: float) -> int:
    """How many guesses in a row are worth trying, each of this agreement given the one before it."""
    if agreement <= LEAST_AGREEMENT:
        return 0
    if agreement >= 1:
        return MOST_PROPOSED
    return min(MOST_PROPOSED, int(math.log(LEAST_AGREEMENT) / math.log(agreement)))


def default_depths(num_loops: int, most_loops: int) -> tuple[int, ...]:
    """Depths worth a prediction where nobody says otherwise: two early ones, none for one loop.

    Up to `FEW_LOOPS` loops they are the first two (measured: 4 loops, 1.25 passes per token against 1.39 with
    the first alone); a model of many small loops knows less after one: R / 16 and R / 4, 2 and 8 of 32.
    Those are counted that a request for `most_loops` could draft at.
    """
    depths = (1, 2) if num_loops <= FEW_LOOPS else (max(1, num_loops // 16), num_loops // 4)
    return tuple(depth for depth in depths if depth < most_loops)


def policy_depths(
    name: str, num_loops: int, default: Sequence[int], given: Sequence[int] | None = None
) -> frozenset[int]:
    """The draft depths of a policy, all below `num_loops`: those `given`, else by the model's `default`.

    `single` takes the first and `gated` the first two. The others take all that were given; else every
    depth from the first default one on, or just the defaults where a model has very many loops and a
    readout at each would cost more than it tells.
    """
    depths = [depth for depth in (default if given is None else given) if depth < num_loops]
    if name == "none" or not depths:
        return frozenset()
    if name in {"single", "gated"}:
        return frozenset(depths[: 1 if name == "single" else 2])
    if given is None and num_loops <= FEW_LOOPS:
        return frozenset(range(depths[0], num_loops))
    return frozenset(depths)


def make_policy(name: str, depths: frozenset[int], experience: Experience | None = None) -> DraftPolicy:
    """A policy for one sequence, with what `policy_depths` says; raises ValueError for an unknown name."""
    if name not in POLICIES:
        raise ValueError(unknown_policy(name))
    kind = {"lookup": LookupPolicy, "adaptive": AdaptivePolicy}.get(name, DraftPolicy)
    return kind(depths, experience or Experience.none())
