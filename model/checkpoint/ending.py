"""Which tokens end a text of a checkpoint: what its four files that speak of it say, together.

config.json often knows the end of a document only, while a chat model ends its turns with another token.
Knows nothing about weights and imports no torch. Invariant: a token is added only on the checkpoint's own
word; files that are missing say nothing, nor does an odd value; files that cannot be read are an error.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from model.checkpoint.families import TurnEnd
from model.checkpoint.hub import LfsPointerError
from model.checkpoint.tokenizer import TokenizerError, tokenizer_file
from model.network.config import LoopedConfig

log = logging.getLogger(__name__)

GENERATION_CONFIG_FILE = "generation_config.json"
# How turns end in the templates of chat models; one counts if the checkpoint's own template writes it.
TURN_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eot|>",
    "<end_of_turn>",
    "<|end|>",
    "<|return|>",
    "<|END_OF_TURN_TOKEN|>",
)

ReadJson = Callable[[Path], dict[str, Any]]


def ending_tokens(
    folder: Path,
    config: LoopedConfig,
    read_json: ReadJson,
    turn_end: TurnEnd | None = None,
    *,
    generation_config: bool = True,
) -> tuple[int, ...]:
    """Ids of the tokens that end a text, those of config.json first.

    `turn_end` is the family's, and counts where all files name the end of a document alone.

    `generation_config`: whether generation_config.json is listened to; a value there that is no token id is
    left out with a warning. Raises what `read_json` raises for a file that is there but is not JSON.
    """

    def read(name: str) -> dict[str, Any]:
        return read_json(folder / name) if (folder / name).is_file() else {}

    ids = list(config.eos_token_ids)
    if generation_config:
        ids += _generation_config_ids(read(GENERATION_CONFIG_FILE))
    tokenizer_config = read("tokenizer_config.json")
    id_of = _special_ids(_tokenizer(folder, read_json), tokenizer_config)
    ids += [id_of[text] for text in _ending_texts(folder, tokenizer_config) if text in id_of]
    if turn_end is not None and set(ids) == {turn_end.document_end}:
        ids += [turn_end.token_id] if id_of.get(turn_end.text, turn_end.token_id) == turn_end.token_id else []
    return tuple(i for i in dict.fromkeys(ids) if i < config.vocab_size)


def _tokenizer(folder: Path, read_json: ReadJson) -> dict[str, Any]:
    """The content of tokenizer.json; nothing for a model without one, or with one that text can't use."""
    try:
        file = tokenizer_file(folder)
    except (TokenizerError, LfsPointerError):  # the server says so, where text is wanted
        return {}
    return read_json(file) if file is not None else {}


def _generation_config_ids(raw: Mapping[str, Any]) -> list[int]:
    value = raw.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    known = [i for i in ids if type(i) is int and i >= 0]
    if len(known) < len(ids):
        log.warning("%s: eos_token_id is %r; what is no token id is left out", GENERATION_CONFIG_FILE, value)
    return known


def _special_ids(tokenizer: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, int]:
    """Text -> id of the tokens that were added to the vocabulary, as the special ones are."""
    ids: dict[str, int] = {}
    decoder = config.get("added_tokens_decoder")
    for key, token in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(token, dict) and isinstance(token.get("content"), str) and key.isdecimal():
            ids[token["content"]] = int(key)
    added = tokenizer.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and type(token.get("id")) is int and isinstance(token.get("content"), str):
            ids[token["content"]] = token["id"]
    return ids


def _ending_texts(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """The tokenizer's end of a text, and the ends of turns that the chat template writes."""
    eos = config.get("eos_token")
    text = eos.get("content") if isinstance(eos, dict) else eos
    template = str(config.get("chat_template", ""))
    if (file := folder / "chat_template.jinja").is_file():
        template = file.read_text(encoding="utf-8", errors="replace")
    return [*([text] if isinstance(text, str) else []), *(end for end in TURN_ENDS if end in template)]
