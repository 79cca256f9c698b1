"""Finding tags in a text that comes in parts."""


def begun(text: str, tag: str) -> int:
    """How many characters at the end of `text` are a beginning of `tag`, but not all of it."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:length]):
            return length
    return 0


def certain(text: str, tag: str) -> int:
    """How many characters of `text`, which has no `tag`, stand apart from a `tag` that may begin at its end.

    Blanks before the tag belong to it.
    """
    return len(text[: len(text) - begun(text, tag)].rstrip())
