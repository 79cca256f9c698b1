"""Prompts of a given length in a model's own tokens, from texts that every Python brings along.

A model with a chat template is asked in a conversation about English prose, another one continues Python
code: pieces of files that `speed train` holds out.
"""

import random
import re
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer

from bench.questions import QUESTIONS
from server.chat_template import ChatTemplate, load_chat_template
from training.corpus import read_corpus, standard_library


def held_out_prompts(
    tokenizer: Tokenizer, count: int, length: int, seed: int = 0, corpus: Path | None = None
) -> list[list[int]]:
    """`count` prompts of `length` tokens, each from the start of a line of a held-out file.

    Files are drawn in proportion to nothing: every held-out file is as likely as any other.
    """
    rng = random.Random(seed)
    documents = read_corpus(corpus or standard_library()).held_out
    prompts: list[list[int]] = []
    while len(prompts) < count:
        lines = rng.choice(documents).text.splitlines(keepends=True)
        first = rng.randrange(len(lines))
        ids: list[int] = tokenizer.encode("".join(lines[first : first + length])).ids
        if len(ids) >= length:
            prompts.append(ids[:length])
    return prompts


def conversation_prompts(
    tokenizer: Tokenizer, template: ChatTemplate, count: int, length: int, seed: int = 0
) -> list[list[int]]:
    """`count` prompts of `length` tokens: one user's message each, a piece of Python's manual.

    Raises ValueError if the template alone takes `length` tokens.
    """
    rng = random.Random(seed)
    before, after = _around(tokenizer, template)
    room = length - len(before) - len(after)
    if room < 1:
        raise ValueError(f"the chat template alone takes {len(before) + len(after)} tokens of {length}")
    manual = "\n\n".join(topics.values())
    starts = [sentence.start() for sentence in re.finditer(r"(?<=[.:]\s)\w|(?<=\n\n)\w", manual)]
    prompts: list[list[int]] = []
    while len(prompts) < count:
        first = rng.choice(starts)
        text = manual[first : first + 16 * length]
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        if len(ids) >= room:
            prompts.append([*before, *ids[:room], *after])
    return prompts


def question_prompts(model_path: str) -> list[list[int]]:
    """The twenty questions of `bench.questions`, one conversation each.

    Raises ValueError for a model without a tokenizer or a chat template.
    """
    file, template = Path(model_path) / "tokenizer.json", load_chat_template(Path(model_path))
    if template is None or not file.exists():
        raise ValueError(f"{model_path} is no chat model: it has no chat template or no tokenizer.json")
    tokenizer = Tokenizer.from_file(str(file))
    before, after = _around(tokenizer, template)
    return [
        [*before, *tokenizer.encode(question, add_special_tokens=False).ids, *after] for question in QUESTIONS
    ]


def _around(tokenizer: Tokenizer, template: ChatTemplate) -> tuple[list[int], list[int]]:
    """What the template puts before a user's message and behind it."""
    mark = "\N{OBJECT REPLACEMENT CHARACTER}"
    text = template.render([{"role": "user", "content": mark}], add_generation_prompt=True)
    before, _, after = text.partition(mark)
    ids = [tokenizer.encode(part, add_special_tokens=False).ids for part in (before, after)]
    return ids[0], ids[1]


def random_prompts(vocab_size: int, count: int, length: int, seed: int = 0) -> list[list[int]]:
    """Random token ids, for checkpoints without a tokenizer."""
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(length)] for _ in range(count)]


def prompts_for(model_path: str, vocab_size: int, count: int, length: int, seed: int = 0) -> list[list[int]]:
    """Conversations for a chat model, else held-out code; random ids if there is no tokenizer.json."""
    file = Path(model_path) / "tokenizer.json"
    if not file.exists():
        return random_prompts(vocab_size, count, length, seed)
    tokenizer, template = Tokenizer.from_file(str(file)), load_chat_template(Path(model_path))
    if template is None:
        return held_out_prompts(tokenizer, count, length, seed)
    return conversation_prompts(tokenizer, template, count, length, seed)


def copy_prompts(prompts: list[list[int]]) -> list[list[int]]:
    """Prompts whose likely continuation stands in them: each text, and its first eighth once more.

    What editing, quoting and renaming look like to a model: long stretches of the output are in the prompt.
    """
    return [[*prompt, *prompt[: len(prompt) // 8]] for prompt in prompts]
