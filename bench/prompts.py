"""Prompts that the default model never saw: pieces of held-out files of the standard library."""

import random
from pathlib import Path

from tokenizers import Tokenizer

from model.training.corpus import read_corpus, standard_library


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


def random_prompts(vocab_size: int, count: int, length: int, seed: int = 0) -> list[list[int]]:
    """Random token ids, for checkpoints without a tokenizer."""
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(length)] for _ in range(count)]


def prompts_for(model_path: str, vocab_size: int, count: int, length: int, seed: int = 0) -> list[list[int]]:
    """Held-out prompts in the model's own tokens, or random ids if it has no tokenizer.json."""
    file = Path(model_path) / "tokenizer.json"
    if not file.exists():
        return random_prompts(vocab_size, count, length, seed)
    return held_out_prompts(Tokenizer.from_file(str(file)), count, length, seed)


def copy_prompts(prompts: list[list[int]]) -> list[list[int]]:
    """Prompts whose likely continuation stands in them: each text, and its first eighth once more.

    What editing, quoting and renaming look like to a model: long stretches of the output are in the prompt.
    """
    return [[*prompt, *prompt[: len(prompt) // 8]] for prompt in prompts]
