"""How much a request may bring: what follows from the model's context, and what holds for every model.

Knows no HTTP. Invariant: what can fit the context is never refused, as long as a character of a prompt
is written in at most `JSON_BYTES` bytes and no token stands for more characters than the longest one in
the vocabulary (tokenizers that give one unknown token to a whole word have the floors).
"""

from typing import NamedTuple

from model.protocol import EngineInfo

# Bodies. Fields other than prompts (schemas, metadata, sampling) have the floor to themselves.
BODY_FLOOR = 2**20
JSON_BYTES = 3  # a byte of UTF-8 in JSON's \uXXXX, for any script; ASCII takes fewer
ID_BYTES = 16  # a token id in JSON, with comma, spaces and indentation
MAX_PARTS = 2**16  # strings, objects and lists of a body: each costs a hundred bytes once parsed
VALUES_FLOOR = 2**17  # values of any kind: parsing them takes some 30 ms, in which nothing else runs

# Texts. Shorter ones are always tokenised to the end, so that their exact length can be said.
TEXT_FLOOR = 2**15
USUAL_CHARACTERS = 8  # a token rarely stands for more, on average over a text

# Lists and texts of single fields.
MAX_MESSAGES = 4096
MAX_CONTENT_PARTS = 1024
MAX_STOP_STRINGS = 16
MAX_INCLUDES = 64
MAX_EDITS = 16
MAX_ANNOTATIONS = 2**16  # of a text that comes back: one for each token, at most
MAX_STOP_TOKEN_IDS = 4096  # of --max-stop-token-ids, which is usually less
MAX_LOGIT_BIAS = 1024
MAX_CHOICES = 1024
MAX_PROMPTS = 4096  # a server's --max-queued-requests is usually less
MAX_IDS = 2**20  # of one prompt; the context is usually less
MAX_TOOLS = 128  # as OpenAI has it
MAX_TOOL_NAME = 128  # characters
MAX_NAME = 1024  # characters of a stop string, a user, a salt, a name
MAX_GRAMMAR = 2**16  # characters of an expression, grammar or schema; escaped they fit BODY_FLOOR


class BodyLimits(NamedTuple):
    """What a body may hold: bytes, values of any kind, and among those strings, objects and lists."""

    num_bytes: int
    num_values: int = VALUES_FLOOR
    num_parts: int = MAX_PARTS


def body_limits(info: EngineInfo | None, longest_piece: int, max_prompts: int, largest: int) -> BodyLimits:
    """What `max_prompts` prompts that fill the context take; at most `largest` bytes.

    `info` is None while the model is not known: then only `largest` counts.
    """
    if info is None:
        return BodyLimits(largest)
    each = info.max_model_len * max(JSON_BYTES * longest_piece, ID_BYTES)
    num_values = max(VALUES_FLOOR, info.max_model_len + MAX_PARTS)
    return BodyLimits(min(largest, BODY_FLOOR + max_prompts * each), num_values)


def longest_text(info: EngineInfo, longest_piece: int) -> int:
    """Characters beyond which no text fits the context."""
    return max(TEXT_FLOOR, info.max_model_len * longest_piece)


def usual_text(info: EngineInfo) -> int:
    """Characters beyond which hardly any text fits the context."""
    return max(TEXT_FLOOR, info.max_model_len * USUAL_CHARACTERS)
