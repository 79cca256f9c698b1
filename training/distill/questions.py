"""Questions for the teacher: whole ones from templates and topics, and openings that it ends itself.

Knows nothing about models. Invariant: a question that is kept for trying the finished model
(`QuestionBank.never`) never becomes training data.
"""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

QUESTIONS = Path(__file__).with_name("questions.toml")


@dataclass(frozen=True)
class QuestionBank:
    """`whole` questions, `openings` of others, and what is `never` asked (compared by letters alone)."""

    whole: tuple[str, ...]
    openings: tuple[str, ...]
    never: frozenset[str]

    def may_ask(self, question: str) -> bool:
        """Whether a question may become training data."""
        return _letters(question) not in self.never


def load_questions(path: Path = QUESTIONS) -> QuestionBank:
    """Reads a bank; raises KeyError for a missing part."""
    raw = tomllib.loads(path.read_text(encoding="utf-8"))
    never = frozenset(map(_letters, raw["never"]))
    filled = [
        template.format(topic)
        for group in raw["groups"]
        for template in group["templates"]
        for topic in group["topics"]
    ]
    allowed = dict.fromkeys(question for question in filled if _letters(question) not in never)
    return QuestionBank(tuple(allowed), tuple(raw["openings"]), never)


def _letters(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))
