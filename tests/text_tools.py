"""A byte-level tokenizer of 257 tokens, made on the spot: id = byte, 256 = the special <eos>."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from server.tokenizer import TextCodec

EOS_ID = 256


def _byte_characters() -> list[str]:
    """The printable character that byte-level BPE writes for each byte (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]


def byte_tokenizer() -> Tokenizer:
    vocab = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer


def word_tokenizer(words: list[str]) -> Tokenizer:
    """The byte tokenizer with a token for each of `words` behind <eos>."""
    table = _byte_characters()
    vocab = {character: byte for byte, character in enumerate(table)}
    for index, word in enumerate(words):
        vocab["".join(table[byte] for byte in word.encode())] = EOS_ID + 1 + index
    tokenizer = byte_tokenizer()
    tokenizer.model = models.BPE(vocab={**vocab, "<eos>": EOS_ID}, merges=[])
    return tokenizer


def byte_codec() -> TextCodec:
    return TextCodec(byte_tokenizer())


def ids_of(text: str) -> list[int]:
    return list(text.encode())
