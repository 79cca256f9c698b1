"""The bodies of `bench.attack`: each is one example of a kind that has stopped a server of this sort.

Made of bytes, not of `json.dumps`: some hold millions of values, which the attacker should not have to build.
"""

from collections.abc import Callable
from typing import NamedTuple

MIB = 2**20
COMPLETIONS, CHAT, TOKENIZE, DETOKENIZE = (
    "/v1/completions",
    "/v1/chat/completions",
    "/tokenize",
    "/detokenize",
)
USER = b'"messages":[{"role":"user","content":"hi"}]'


LARGE = (8 * MIB - 2048, MIB)  # within the limit that was the default once, and within today's
Maker = Callable[[int], bytes]  # of a body of so many bytes, more or less


class Attack(NamedTuple):
    """A body for a route, in each of `sizes`, sent `copies` times at once.

    The clients leave after `leave_after` seconds.
    """

    name: str
    path: str
    make: Maker
    sizes: tuple[int, ...] = LARGE
    copies: int = 1
    leave_after: float | None = None


def _repeated(start: bytes, entry: bytes, end: bytes) -> Maker:
    """A list of the same entry."""
    return lambda size: start + b",".join([entry] * (size // (len(entry) + 1))) + end


def _text(start: bytes, text: bytes, end: bytes) -> Maker:
    """A string that goes on and on."""
    return lambda size: start + text * (size // len(text)) + end


def _numbered(start: bytes, form: str, end: bytes) -> Maker:
    """Entries that differ."""
    return lambda size: start + ",".join(form % i for i in range(size // (len(form) + 4))).encode() + end


def _nested(start: bytes, before: bytes, after: bytes, end: bytes) -> Maker:
    def make(size: int) -> bytes:
        depth = size // (len(before) + len(after))
        return start + before * depth + b"{}" + after * depth + end

    return make


MODEL = b'{"model":"default",'
PROMPT = MODEL + b'"prompt":'
OPTION = MODEL + b'"prompt":"a","max_tokens":1,"structured_outputs":{"%s":'
CONVERSATION = MODEL + b'"max_tokens":1,"messages":['
DEVELOPER = '{"role":"developer","content":"x%d"}'
CONTENT = MODEL + b'"messages":[{"role":"user","content":['
VARIABLES = MODEL + USER + b',"chat_template_kwargs":{"a":['
METADATA = MODEL + USER + b',"metadata":{'
TEXT = PROMPT + b'"'
IDS = PROMPT + b"["
STOP_IDS = PROMPT + b'"a","n":128,"max_tokens":1,"stop_token_ids":['
STOP_TEXT = PROMPT + b'"a","n":128,"max_tokens":1,"stop":"'
CUT = b'","max_tokens":1,"truncate_prompt_tokens":5}'
ECHO = b'],"echo":true,"logprobs":20,"max_tokens":0}'
STRINGS = b'{"return_token_strs":true,"prompt":"'
LARK = OPTION % b"grammar" + rb'"start: \"a\"'
SCHEMA = OPTION % b"json"
CHOICE = OPTION % b"choice" + b"["
REGEX = OPTION % b"regex" + b'"'

ATTACKS = [
    Attack("nothing, to compare with", TOKENIZE, _text(b'{"prompt":"', b"a", b'"}'), (10,)),
    Attack("messages of {}", CHAT, _repeated(CONVERSATION, b"{}", b"]}")),
    Attack("messages without content", CHAT, _repeated(CONVERSATION, b'{"role":"user"}', b"]}")),
    Attack("content of {}", CHAT, _repeated(CONTENT, b"{}", b"]}]}")),
    Attack("tools", CHAT, _repeated(MODEL + USER + b',"tools":[', b"{}", b"]}")),
    Attack("template variables", CHAT, _repeated(VARIABLES, b"[]", b"]}}")),
    Attack("metadata", CHAT, _numbered(METADATA, '"%d":5', b"}}")),
    Attack("unknown fields", CHAT, _numbered(MODEL + USER + b",", '"a%d":0', b"}")),
    Attack("stop_token_ids of texts", COMPLETIONS, _repeated(STOP_IDS, b'""', b"]}")),
    Attack("stop_token_ids, n = 128", COMPLETIONS, _repeated(STOP_IDS, b"7", b"]}"), (MIB, 2**16)),
    Attack("stop of numbers", COMPLETIONS, _repeated(PROMPT + b'"a","stop":[', b"1", b"]}")),
    Attack("a long stop, n = 128", COMPLETIONS, _text(STOP_TEXT, b"ab", b'"}'), (MIB,)),
    Attack("logit_bias", COMPLETIONS, _numbered(PROMPT + b'"a","logit_bias":{', '"%d":1', b"}}")),
    Attack("prompts of []", COMPLETIONS, _repeated(IDS, b"[]", b"]}")),
    Attack("prompts that are empty", COMPLETIONS, _repeated(IDS, b'""', b"]}")),
    Attack("prompts of null", COMPLETIONS, _repeated(IDS, b"null", b"]}")),
    Attack("ids", COMPLETIONS, _repeated(IDS, b"12345", b"]}"), (*LARGE, 600_000)),
    Attack("ids that are floats", COMPLETIONS, _repeated(IDS, b"1.5e1", b"]}"), (*LARGE, 600_000)),
    Attack("digits", COMPLETIONS, _text(TEXT, b"1", b'"}'), (*LARGE, 4 * MIB - 2048, 120_000)),
    Attack("words", COMPLETIONS, _text(TEXT, b"hello world ", b'"}'), (*LARGE, 120_000)),
    Attack("one word", COMPLETIONS, _text(TEXT, b"a", b'"}'), (*LARGE, 120_000)),
    Attack("escapes", COMPLETIONS, _text(TEXT, rb"\n", b'"}'), (*LARGE, 4 * MIB - 2048)),
    Attack("emoji", COMPLETIONS, _text(TEXT, "🙂".encode(), b'"}'), (*LARGE, 4 * MIB - 2048)),
    Attack("digits to be cut", COMPLETIONS, _text(TEXT, b"1", CUT), (*LARGE, 32_000)),
    Attack("/tokenize of digits", TOKENIZE, _text(b'{"prompt":"', b"1", b'"}')),
    Attack("/tokenize of words, strings too", TOKENIZE, _text(STRINGS, b"a ", b'"}'), (MIB, 130_000)),
    Attack("/tokenize of digits, strings too", TOKENIZE, _text(STRINGS, b"1", b'"}'), (32_000,), copies=20),
    Attack("/detokenize of texts", DETOKENIZE, _repeated(b'{"tokens":[', b'""', b"]}")),
    Attack("/detokenize", DETOKENIZE, _repeated(b'{"tokens":[', b"12345", b"]}"), (600_000,), copies=5),
    Attack("developer messages, left", CHAT, _numbered(CONVERSATION, DEVELOPER, b"]}"), (MIB,), 40, 1.0),
    Attack("fewer of them, left", CHAT, _numbered(CONVERSATION, DEVELOPER, b"]}"), (150_000,), 40, 1.0),
    Attack(
        "echo, 20 log-probabilities",
        COMPLETIONS,
        _repeated(IDS, b'"%s"' % (b"hello " * 300), ECHO),
        (43_000,),
    ),
    Attack("choices", COMPLETIONS, _numbered(CHOICE, '"c%d"', b"]}}"), (MIB, 10_000)),
    Attack("long choices", COMPLETIONS, _repeated(CHOICE, b'"%s"' % (b"a" * 1000), b"]}}"), (MIB,)),
    Attack("regular expression", COMPLETIONS, _text(REGEX, b"[a-z]+1", b'"}}'), (MIB, 250_000, 60_000)),
    Attack("grammar", COMPLETIONS, _text(LARK, rb"|\"b\"", b'"}}'), (MIB, 250_000, 60_000)),
    Attack(
        "properties", COMPLETIONS, _numbered(SCHEMA + b'{"properties":{', '"p%d":{}', b"}}}}"), (MIB, 10**5)
    ),
    Attack("a deep schema", COMPLETIONS, _nested(SCHEMA, b'{"items":', b"}", b"}}"), (MIB, 50_000)),
    Attack("lists in lists", COMPLETIONS, lambda size: b"[" * size),
    Attack("not JSON", COMPLETIONS, _text(b"{", b"x", b""), (*LARGE, 4 * MIB - 2048)),
]
