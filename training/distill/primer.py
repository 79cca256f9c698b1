"""Short conversations of our own beside the teacher's: greetings, sums, capitals, opposites.

A small teacher gets some of what every user tries first wrong (two plus three "is a classic math problem"),
and then the student learns it wrong. Knows nothing about models. Invariant: a function of primer.toml alone.
"""

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PRIMER = Path(__file__).with_name("primer.toml")
NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"),
    *("twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)


class Exchange(NamedTuple):
    """What a user says, and what is answered."""

    question: str
    answer: str


def primer(path: Path = PRIMER) -> list[Exchange]:
    """Every conversation, each once; raises KeyError for a missing part."""
    raw = tomllib.loads(path.read_text(encoding="utf-8"))
    exchanges = [
        Exchange(said, answer)
        for each in raw["exchanges"]
        for said in each["say"]
        for answer in each["answer"]
    ]
    return [*dict.fromkeys([*exchanges, *_facts(raw["facts"]), *_sums()])]


def _facts(groups: list[dict[str, list[str] | str]]) -> Iterator[Exchange]:
    for group in groups:
        for row in group["table"]:
            for ask in group["ask"]:
                answer = str(group["answer"]).format(*row)
                yield Exchange(ask.format(*row), answer[0].upper() + answer[1:])


def _sums() -> Iterator[Exchange]:
    """Sums and differences of numbers up to ten, in words and in digits; one sum is kept for trying."""
    for a in range(11):
        for b in range(11):
            if (a, b) == (2, 3):
                continue
            first, second, total = NUMBERS[a], NUMBERS[b], NUMBERS[a + b]
            yield Exchange(
                f"What is {first} plus {second}?", f"{first.capitalize()} plus {second} is {total}."
            )
            yield Exchange(f"What is {a} + {b}?", f"{a} + {b} = {a + b}")
            yield Exchange(f"How much is {a} plus {b}?", f"{a} plus {b} is {a + b}.")
            if a >= b:
                rest = NUMBERS[a - b]
                yield Exchange(
                    f"What is {first} minus {second}?", f"{first.capitalize()} minus {second} is {rest}."
                )
                yield Exchange(f"What is {a} - {b}?", f"{a} - {b} = {a - b}")
