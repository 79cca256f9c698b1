"""Text to token ids and back, by the model's tokenizer.json.

Not `transformers.AutoTokenizer`: that imports torch, and the API process never does.
"""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer


class TextCodec:
    """A tokenizer as the server needs it. Stateless after construction: threads may share it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        tokenizer.no_truncation()  # a prompt that is too long is an error, never cut in silence
        tokenizer.no_padding()

    @classmethod
    def from_folder(cls, folder: Path) -> "TextCodec":
        """The tokenizer of the model in `folder`; raises OSError or ValueError if it is unreadable."""
        return cls(Tokenizer.from_buffer((folder / "tokenizer.json").read_bytes()))

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, with the special tokens that tokenizer.json's post-processor adds."""
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of ids, bytes that are no UTF-8 as U+FFFD."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text
