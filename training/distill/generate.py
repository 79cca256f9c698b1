"""Texts by the teacher itself: conversations about questions of a bank or of its own, and continuations.

Given its chat template up to the user's turn and the first words of a question, an instruct model writes
the rest (Magpie, Xu et al. 2024, arXiv 2406.08464), and then answers it. Knows nothing about students.
Invariant: a shard is a function of the settings, the bank, the teacher and its number (on one machine:
rounding differs between machines).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from training.corpus import END_OF_TEXT
from training.distill.batch import Written
from training.distill.questions import QuestionBank

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
REPEATED = 4  # tokens; a text is judged by how many of its runs of so many are distinct
SENTENCE_ENDS = (".", "!", "?")

# Prompts, most tokens, a temperature for each, seed -> what is written behind each (`BatchWriter.write`).
Write = Callable[[list[list[int]], int, list[float], int], list[Written]]


@dataclass(frozen=True)
class Generation:
    """What is generated, and what of it is kept. Lengths are the teacher's tokens.

    `system` is what the teacher is told before a conversation, and the student is not: it learns to answer
    so by itself. Each text takes one of `answer_temperatures`, in turn.
    """

    system: str
    texts_per_shard: int
    share_of_continuations: float  # of the texts; the others are conversations
    share_of_bank: float  # of the conversations
    share_of_two_turns: float  # of the conversations
    temperature: float  # of questions and continuations
    answer_temperatures: tuple[float, ...]
    max_question: int
    max_answer: int
    max_continuation: int
    min_question: int = 3
    min_answer: int = 2
    min_distinct: float = 0.8  # share of distinct runs of tokens
    seed: int = 0


@dataclass
class _Text:
    """A text on its way: what the teacher reads, and what the student will."""

    temperature: float  # of its answers
    turns: int
    prompt: list[int]
    kept: list[int]
    question: str = ""  # from the bank; empty: the teacher's own
    whole: int = 0  # of `kept`, what may stay: turns that are asked and answered


class Writer:
    """Writes shards."""

    def __init__(self, write: Write, tokenizer: Tokenizer, settings: Generation, bank: QuestionBank) -> None:
        self.write, self.tokenizer, self.settings, self.bank = write, tokenizer, settings, bank
        self._end = id_of(tokenizer, TURN_END)
        self._end_of_text = id_of(tokenizer, END_OF_TEXT)
        self._control = {id_of(tokenizer, TURN_START), self._end, self._end_of_text}
        self._system = turn(tokenizer, "system", settings.system)

    def shard(self, number: int) -> list[list[int]]:
        """All texts of a shard, in order; those that the filter refused are empty."""
        rng = np.random.default_rng([self.settings.seed, number])
        texts = [self._begin(index, rng) for index in range(self.settings.texts_per_shard)]
        self._continue(texts, number)
        for exchange in range(max(text.turns for text in texts)):
            self._ask([text for text in texts if text.turns > exchange], exchange, number, rng)
            self._answer([text for text in texts if text.turns > exchange], exchange, number)
        return [text.kept[: text.whole] for text in texts]

    def _begin(self, index: int, rng: np.random.Generator) -> _Text:
        """A continuation, or a conversation of one or two turns whose first question may be the bank's."""
        settings = self.settings
        temperature = settings.answer_temperatures[index % len(settings.answer_temperatures)]
        kind, bank, turns, which = rng.random(4)
        if kind < settings.share_of_continuations:
            return _Text(temperature, 0, [self._end_of_text], [self._end_of_text])
        question = self.bank.whole[int(which * len(self.bank.whole))] if bank < settings.share_of_bank else ""
        return _Text(
            temperature, 2 if turns < settings.share_of_two_turns else 1, list(self._system), [], question
        )

    def _continue(self, texts: list[_Text], number: int) -> None:
        """What the teacher writes behind nothing, up to its last whole sentence."""
        plain = [text for text in texts if not text.turns]
        temperatures, most = [self.settings.temperature] * len(plain), self.settings.max_continuation
        for text, written in zip(plain, self._written(plain, most, temperatures, number, 0), strict=True):
            said = self._sentences(written)
            text.kept += [*said, self._end_of_text]
            text.whole = len(text.kept) if len(said) >= REPEATED and self._is_good(said) else 0

    def _ask(self, texts: list[_Text], exchange: int, number: int, rng: np.random.Generator) -> None:
        """The user's turn: the bank's question, or an opening that the teacher completes."""
        head = self._opening("user")
        own = [text for text in texts if exchange or not text.question]
        begun = [self.bank.openings[int(rng.integers(len(self.bank.openings)))] for _ in own]
        starts = [self.tokenizer.encode(words).ids for words in begun]
        for text, start in zip(own, starts, strict=True):
            text.prompt += [*head, *start]
        temperatures, most = [self.settings.temperature] * len(own), self.settings.max_question
        ends = self._written(own, most, temperatures, number, 2 * exchange + 1)
        for text, start, written in zip(own, starts, ends, strict=True):
            said = [*start, *written.tokens]
            long_enough = written.ended and len(said) >= self.settings.min_question
            good = long_enough and self._is_good(said) and self.bank.may_ask(self.tokenizer.decode(said))
            text.prompt += [*written.tokens, *self._turn_end()]
            text.kept += [*head, *said, *self._turn_end()]
            if not good:
                text.turns = exchange  # the turns before it stand
        for text in texts:
            if not exchange and text.question:
                said = [*head, *self.tokenizer.encode(text.question).ids, *self._turn_end()]
                text.prompt += said
                text.kept += said

    def _answer(self, texts: list[_Text], exchange: int, number: int) -> None:
        """The assistant's turn, up to its last whole sentence where it doesn't end by itself."""
        head = self._opening("assistant")
        for text in texts:
            text.prompt += head
        temperatures = [text.temperature for text in texts]
        answers = self._written(texts, self.settings.max_answer, temperatures, number, 2 * exchange + 2)
        for text, written in zip(texts, answers, strict=True):
            said = self._sentences(written)
            good = len(said) >= self.settings.min_answer and self._is_good(said)
            text.prompt += [*written.tokens, *self._turn_end()]
            text.kept += [*head, *said, *self._turn_end()]
            text.whole = len(text.kept) if good else text.whole
            if not good or not written.ended:
                text.turns = exchange + 1  # what was cut or is no good is nothing to go on about

    def _written(
        self, texts: list[_Text], most: int, temperatures: list[float], number: int, stage: int
    ) -> list[Written]:
        """What the teacher writes behind each prompt."""
        seed = (self.settings.seed * 1_000_003 + number) * 8 + stage
        return self.write([text.prompt for text in texts], most, temperatures, seed) if texts else []

    def _sentences(self, written: Written) -> list[int]:
        """All of a text that ended, whole sentences of one that did not."""
        if written.ended:
            return written.tokens
        for count in range(len(written.tokens), 0, -1):
            if self.tokenizer.decode([written.tokens[count - 1]]).rstrip().endswith(SENTENCE_ENDS):
                return written.tokens[:count]
        return []

    def _is_good(self, tokens: list[int]) -> bool:
        """No control tokens inside, and few repetitions."""
        runs = [tuple(tokens[i : i + REPEATED]) for i in range(len(tokens) - REPEATED + 1)]
        distinct = len(set(runs)) >= self.settings.min_distinct * len(runs)
        return distinct and not self._control.intersection(tokens)

    def _opening(self, role: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(f"{TURN_START}{role}\n").ids
        return ids

    def _turn_end(self) -> list[int]:
        return [self._end, *self.tokenizer.encode("\n").ids]


def turn(tokenizer: Tokenizer, role: str, text: str) -> list[int]:
    """One turn of a conversation in the teacher's tokens."""
    ids: list[int] = tokenizer.encode(f"{TURN_START}{role}\n{text}{TURN_END}\n").ids
    return ids


def id_of(tokenizer: Tokenizer, token: str) -> int:
    """The id of a special token; raises ValueError where there is none."""
    found: int | None = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"the teacher's tokenizer has no {token}")
    return found
