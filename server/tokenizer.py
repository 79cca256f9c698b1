"""Text to token ids and back, by the model's tokenizer.json, or the null object where there is none.

Not `transformers.AutoTokenizer`: that takes seconds to import, and the API process stays small. An older form
is converted by it once, in a process of its own (`model.checkpoint.tokenizer`).
"""

import json
import logging
import re
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from model.checkpoint.hub import LfsPointerError, read_file
from model.checkpoint.tokenizer import TOKENIZER_FILE, TokenizerError, tokenizer_file
from server.disguise import Disguise
from server.errors import NoTokenizerError
from server.settings import SettingsError

log = logging.getLogger(__name__)

TOKENS_REMEMBERED = 2**16  # whose bytes are kept: those beside a chosen token are often the same ones
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")

# Special tokens for filling in the middle: before the prefix, before the suffix, before the middle.
FILL_IN_THE_MIDDLE = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen, CodeGemma, StableCode
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek
)


class FillTokens(NamedTuple):
    """Ids of the tokens that stand before a prefix, a suffix and the middle to be generated."""

    prefix: int
    suffix: int
    middle: int


class TextCodec:
    """A tokenizer as the server needs it. Never changed after construction: threads may share it.

    `longest_piece` is the most characters (of a byte-level vocabulary: bytes) that one token stands for.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        tokenizer.no_truncation()  # a prompt that is too long is an error, never cut in silence
        tokenizer.no_padding()
        self._byte_of_character = _byte_of_character() if _is_byte_level(tokenizer) else {}
        self._anchor = self._find_anchor()
        self.longest_piece = max(map(len, tokenizer.get_vocab()), default=0)
        self.token_bytes = lru_cache(TOKENS_REMEMBERED)(self._token_bytes)
        self.fill_tokens = self._find_fill_tokens()
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = {token.content: i for i, token in added.items() if token.special}
        self.hidden_ids = frozenset(self.special_ids.values())
        self.added_tokens = frozenset(token.content for token in added.values())

    @classmethod
    def from_folder(cls, folder: Path) -> "TextCodec":
        """The tokenizer.json of the model in `folder`; raises OSError or ValueError if it is unreadable."""
        return cls.from_file(folder / TOKENIZER_FILE)

    @classmethod
    def from_file(cls, file: Path) -> "TextCodec":
        """The tokenizer of a tokenizer.json; raises OSError or ValueError if it is unreadable."""
        return cls(Tokenizer.from_buffer(read_file(file)))

    def check_text(self, field: str) -> None:
        """Raises NoTokenizerError if `field`, which means text, cannot be served. Here it always can."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`, with the special tokens that tokenizer.json's post-processor adds if wanted."""
        # As a batch of one: the library's `encode` holds the interpreter's lock from beginning to end.
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def prepare_for_chats(self) -> None:
        """Makes what the first conversation would wait for: up to a second for the largest vocabularies."""
        _ = self.disguise

    @cached_property
    def disguise(self) -> Disguise:
        """What keeps users' texts from holding control tokens; a second tokenizer, made when first needed."""
        return Disguise(self._tokenizer)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of ids, bytes that are no UTF-8 as U+FFFD."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def decode_showing(self, token_ids: Sequence[int], shown: frozenset[int]) -> str:
        """Text of ids, of special tokens those in `shown` alone; bytes that are no UTF-8 as U+FFFD."""
        kept = [i for i in token_ids if i in shown or i not in self.hidden_ids]
        return self.decode(kept, skip_special_tokens=False)

    def decode_long(self, token_ids: Sequence[int]) -> str:
        """The text of many ids, special tokens included; other threads run meanwhile, at some cost."""
        (text,) = self._tokenizer.decode_batch([list(token_ids)], skip_special_tokens=False)
        return str(text)

    def piece(self, token_id: int) -> str:
        """The token as the vocabulary writes it; empty for ids that only pad the model's vocabulary."""
        piece: str | None = self._tokenizer.id_to_token(token_id)
        return piece or ""

    def special_stops(self, stops: Iterable[str]) -> dict[int, str]:
        """By id, those of the stop strings that are a special token each: no text would show them."""
        return {self.special_ids[text]: text for text in stops if text in self.special_ids}

    def fill_in_the_middle(self, prefix: Sequence[int], suffix: str) -> list[int]:
        """Ids that ask for the text between `prefix` (without special tokens) and `suffix`.

        Call only if `fill_tokens` is not None.
        """
        assert self.fill_tokens is not None
        before, between, after = self.fill_tokens
        behind = self.encode(suffix, add_special_tokens=False)
        return [*self._leading_special_tokens(), before, *prefix, between, *behind, after]

    def _token_bytes(self, token_id: int) -> bytes:
        """What the token alone adds to a text, incomplete characters and special tokens included."""
        piece = self.piece(token_id)
        if match := _BYTE_PIECE.fullmatch(piece):
            return bytes.fromhex(match[1])
        if piece and all(character in self._byte_of_character for character in piece):
            return bytes(self._byte_of_character[character] for character in piece)
        # Behind another token: a SentencePiece decoder drops the leading space of whatever comes first.
        before = self.decode(self._anchor, skip_special_tokens=False)
        text = self.decode([*self._anchor, token_id], skip_special_tokens=False)
        return text.removeprefix(before).encode()

    def _find_anchor(self) -> list[int]:
        """A token with a visible text."""
        for token_id in range(self._tokenizer.get_vocab_size()):
            text = self.decode([token_id], skip_special_tokens=True)
            if text.isascii() and text.isalnum():
                return [token_id]
        return []

    def _leading_special_tokens(self) -> list[int]:
        encoding = self._tokenizer.encode("a")
        text_begins = encoding.special_tokens_mask.index(0)
        ids: list[int] = encoding.ids[:text_begins]
        return ids

    def _find_fill_tokens(self) -> FillTokens | None:
        for pieces in FILL_IN_THE_MIDDLE:
            ids = [i for i in map(self._tokenizer.token_to_id, pieces) if i is not None]
            if len(ids) == len(pieces):
                return FillTokens(*ids)
        return None


class TokenIdCodec(TextCodec):
    """In the place of the tokenizer that a model came without: ids in, ids out, and all text is empty."""

    def __init__(self) -> None:
        self.fill_tokens = None
        self.special_ids = {}
        self.hidden_ids = frozenset()
        self.added_tokens = frozenset()
        self.longest_piece = 0
        self.token_bytes = lru_cache(TOKENS_REMEMBERED)(self._token_bytes)

    def check_text(self, field: str) -> None:
        """Raises NoTokenizerError."""
        raise NoTokenizerError(field)

    def prepare_for_chats(self) -> None:
        """There will be none."""

    @cached_property
    def disguise(self) -> Disguise:
        """Raises NoTokenizerError."""
        raise NoTokenizerError("messages")

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:  # noqa: ARG002
        """Raises NoTokenizerError."""
        raise NoTokenizerError("prompt")

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:  # noqa: ARG002
        """Nothing."""
        return ""

    def piece(self, token_id: int) -> str:  # noqa: ARG002
        """Nothing."""
        return ""

    def _token_bytes(self, token_id: int) -> bytes:
        """A name for the token, as vLLM writes it; log-probabilities need one for each."""
        return f"token_id:{token_id}".encode()


def load_codec(folder: Path) -> TextCodec:
    """The tokenizer of the model in `folder`, or what stands for one that it lacks.

    Raises SettingsError for a tokenizer.json that cannot be read. An older form that cannot be converted is
    warned of, and the model is served by token ids.
    """
    try:
        file = tokenizer_file(folder)
        if file is None:
            return TokenIdCodec()
        return TextCodec.from_file(file)
    except TokenizerError as error:
        log.warning("text is not served, token ids alone: %s", error)
        return TokenIdCodec()
    except LfsPointerError as error:
        raise SettingsError(str(error)) from None
    except Exception as error:  # the library raises no narrower class
        raise SettingsError(f"{file} is not a readable tokenizer: {error}") from None


def printable(token: bytes) -> str:
    """A token's bytes as text; one that holds half a character as `bytes:\\xe4\\xb8`, OpenAI's way."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    if tokenizer.decoder is None:
        return False
    decoder = json.loads(tokenizer.decoder.__getstate__())
    return any(part["type"] == "ByteLevel" for part in decoder.get("decoders", [decoder]))


def _byte_of_character() -> dict[str, int]:
    """The byte behind each character of a byte-level vocabulary (the table of GPT-2's encoder.py)."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + i): byte for i, byte in enumerate(others)}
