"""Texts by the teacher itself: conversations in which it writes both sides, and plain continuations.

Given its chat template up to the user's turn, an instruct model writes a question (Magpie, Xu et al. 2024,
arXiv 2406.08464), and then answers it. Knows nothing about students. Invariant: a shard is a function of
the settings, the teacher and its number (on one machine: rounding differs between machines).
"""

from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import Tokenizer

from model.protocol import GenerationRequest, SamplingParams, TokenEvent
from model.training.corpus import END_OF_TEXT

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
REPEATED = 4  # tokens; a text is judged by how many of its runs of so many are distinct

Run = Callable[[list[GenerationRequest]], dict[str, list[TokenEvent]]]  # an engine's


@dataclass(frozen=True)
class Generation:
    """What is generated, and what of it is kept. Lengths are the teacher's tokens."""

    texts_per_shard: int
    share_of_continuations: float  # of the texts; the others are conversations
    share_of_two_turns: float  # of the conversations
    temperature: float
    answer_temperature: float
    max_question: int
    max_answer: int
    max_continuation: int
    min_question: int = 3
    min_answer: int = 2
    min_distinct: float = 0.6  # share of distinct runs of tokens
    seed: int = 0

    @property
    def longest(self) -> int:
        """Tokens of the longest text that can come about, the system prompt included."""
        conversation = 64 + 2 * (self.max_question + self.max_answer + 16)
        return max(conversation, self.max_continuation + 1)


@dataclass
class _Text:
    """A text on its way: what the teacher reads, and what the student will."""

    number: int
    turns: int
    prompt: list[int]
    kept: list[int]
    alive: bool = True


class Writer:
    """Writes shards with an engine's `run`."""

    def __init__(self, run: Run, tokenizer: Tokenizer, settings: Generation) -> None:
        self.run, self.tokenizer, self.settings = run, tokenizer, settings
        self._end = _id_of(tokenizer, TURN_END)
        self._end_of_text = _id_of(tokenizer, END_OF_TEXT)
        self._control = {_id_of(tokenizer, TURN_START), self._end, self._end_of_text}
        self._newline = tokenizer.encode("\n").ids
        self._system = self._turn("system", SYSTEM)

    def shard(self, number: int) -> list[list[int]]:
        """All texts of a shard, in order; those that the filter refused are empty."""
        size = self.settings.texts_per_shard
        texts = [self._begin(number * size + index) for index in range(size)]
        self._continue(texts)
        for turn in range(max(text.turns for text in texts)):
            talking = [text for text in texts if text.alive and text.turns > turn]
            self._say(talking, "user", self.settings.temperature, self.settings.max_question, turn)
            answering = [text for text in talking if text.alive and text.turns > turn]
            self._say(
                answering, "assistant", self.settings.answer_temperature, self.settings.max_answer, turn
            )
        return [text.kept if text.alive else [] for text in texts]

    def _begin(self, number: int) -> _Text:
        """What a text will be follows from its number: continuation, or conversation of one or two turns."""
        place = (number * 0.6180339887498949) % 1  # evenly spread whatever the shard's size
        if place < self.settings.share_of_continuations:
            return _Text(number, 0, [self._end_of_text], [self._end_of_text])
        rest = (place - self.settings.share_of_continuations) / (1 - self.settings.share_of_continuations)
        return _Text(number, 2 if rest < self.settings.share_of_two_turns else 1, list(self._system), [])

    def _continue(self, texts: list[_Text]) -> None:
        plain = [text for text in texts if not text.turns]
        written = self._write(plain, self.settings.temperature, self.settings.max_continuation, 0)
        for text, (tokens, _) in zip(plain, written, strict=True):
            text.kept += tokens
            text.alive = len(tokens) >= REPEATED and self._is_good(tokens)

    def _say(self, texts: list[_Text], role: str, temperature: float, max_tokens: int, turn: int) -> None:
        """One side's turn; a text whose turn is bad dies, or ends before it if it has whole turns."""
        opening = self._opening(role)
        for text in texts:
            text.prompt += opening
        fewest = self.settings.min_question if role == "user" else self.settings.min_answer
        written = self._write(texts, temperature, max_tokens, 2 * turn + (role == "assistant"))
        for text, (tokens, ended) in zip(texts, written, strict=True):
            if ended and len(tokens) >= fewest and self._is_good(tokens):
                said = [*tokens, self._end, *self._newline]
                text.prompt += said
                text.kept += [*opening, *said]
            elif turn and role == "user":
                text.turns = turn  # the turns before it stand
            else:
                text.alive = False

    def _write(
        self, texts: list[_Text], temperature: float, max_tokens: int, stage: int
    ) -> list[tuple[list[int], bool]]:
        """What the teacher writes behind each prompt, and whether it came to an end by itself."""
        requests = [
            GenerationRequest(
                request_id=str(text.number),
                prompt_token_ids=text.prompt,
                max_tokens=max_tokens,
                sampling=SamplingParams(
                    temperature=temperature, seed=(self.settings.seed * 1_000_003 + text.number) * 8 + stage
                ),
                stop_token_ids=[self._end, self._end_of_text],
            )
            for text in texts
        ]
        events = self.run(requests) if requests else {}
        written = []
        for text in texts:
            tokens = [token for event in events[str(text.number)] for token in event.token_ids]
            ended = bool(tokens) and tokens[-1] in (self._end, self._end_of_text)
            written.append((tokens[:-1] if ended else tokens, ended))
        return written

    def _is_good(self, tokens: list[int]) -> bool:
        """No control tokens inside, and few repetitions."""
        runs = [tuple(tokens[i : i + REPEATED]) for i in range(len(tokens) - REPEATED + 1)]
        distinct = len(set(runs)) >= self.settings.min_distinct * len(runs)
        return distinct and not self._control.intersection(tokens)

    def _opening(self, role: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(f"{TURN_START}{role}\n").ids
        return ids

    def _turn(self, role: str, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(f"{TURN_START}{role}\n{text}{TURN_END}\n").ids
        return ids


def _id_of(tokenizer: Tokenizer, token: str) -> int:
    found: int | None = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"the teacher's tokenizer has no {token}")
    return found
