"""Requests that a fuzzer sends, each a function of a seed and a number alone.

Bodies are drawn from the schemas of the server's own /openapi.json, not by hypothesis: a hundred thousand
are wanted, and one of them again by its number. Then most are damaged, as JSON or as bytes.
"""

import base64
import gzip
import json
import random
from collections.abc import Callable
from copy import deepcopy
from typing import Any, NamedTuple

POSTS = (
    *("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"),
    *("/v1/messages/count_tokens", "/tokenize", "/detokenize"),
)
WEIGHTS = (25, 25, 20, 15, 5, 5, 5)
LIMITS = {"/v1/responses": "max_output_tokens", "/v1/messages": "max_tokens"}  # of those without chat's names
GETS = ("/v1/models", "/v1/models/x", "/health", "/ready", "/metrics", "/version", "/", "/openapi.json")
METHODS = ("GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE")
MAX_TOKENS = 6  # of nearly every answer: the fuzzer is after bad requests, not long ones
MAX_CHOICES = 3
GRAMMAR_FIELDS = (
    *("response_format", "structured_outputs"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar"),
)
MAX_DEPTH = 5
SOUND_TEXTS = (
    *("", "a", "hello world", "The capital of France is", " ", "\n", "\x00", "\x7f", "\u2028", "\ufeff", "é"),
    *(
        "😀",
        "你好",
        "<|im_start|>system",
        "</s>",
        "<eos>",
        "{{ 7 * 7 }}",
        "{% raw %}",
        "%s%n",
        "../../etc/passwd",
    ),
    *("null", "NaN", "1e999", "-1", "a" * 300, "😀" * 80, "$ref", "__class__"),
)
TEXTS = (*SOUND_TEXTS, "\ud83d", "\udc00")
NUMBERS = (0, 1, -1, 2, 0.5, -0.0, 1e-300, 1e308, 2**31, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), 10**40)
SCALARS: tuple[Any, ...] = (None, True, False, *TEXTS, *NUMBERS, [], {}, [[]], [None], {"": None})
BYTES = (
    *(
        b"",
        b"\x00",
        b"\xff\xfe",
        b"\xc0\x80",
        b"\xed\xa0\x80",
        b"\xef\xbb\xbf",
        b"NaN",
        b"Infinity",
        b"1e99999",
    ),
    *(
        b"-",
        b"[" * 2000,
        b'{"a":' * 500,
        b"9" * 5000,
        b'"',
        b"\\ud800",
        b"\\u0000",
        b",",
        b"}",
        b"]",
        b"//",
        b"'",
    ),
    *(b'"stream":true,', b'"n":128,', b'"max_tokens":0,', b'"model":1,', b"null", b"true"),
)
TYPES = (
    "application/json; charset=utf-16",
    "text/plain",
    "multipart/form-data",
    "",
    "application/x-ndjson",
    "é",
)
HEADERS = (
    ("Authorization", "Bearer \xff"),
    ("X-Request-Id", "x" * 5000),
    ("X-Request-Id", "a\tb"),
    ("Content-Encoding", "gzip"),
    ("Content-Encoding", "br"),
    ("Origin", "null"),
    ("Expect", "100-continue"),
    ("Accept-Encoding", "zstd"),
    ("Range", "bytes=0-"),
    ("Traceparent", "00-zz"),
)
REGEXES = (
    *(
        r"(?s:.)*[a-m](?s:.){30}z",
        r".*a.{5000}",
        "(a+)+",
        r"(a{1000}){1000}",
        r"\p{L}{1,500}",
        "(",
        "[",
        r"(a)\1",
    ),
    *(r"\d{3}-\d{4}", "(yes|no)", "", "a*", "(?=a)b", "[^\\x00-\\xff]", r"(\w|\s){3,40}", "^$", r"(?i:k){9}"),
)
GRAMMARS = (
    *(
        'start: "a" start | "b"',
        "start: start",
        "start: <|eos|>",
        "start: (",
        "start: X\nX: /(.*a.{20}b)/ & /c.*/",
    ),
    *(
        "start: e\ne: e e e | /[a-z]/",
        'start: "é" | "\\ud800"',
        "%import common.INT\nstart: INT",
        "start: /.{1,}/",
    ),
)
SCHEMAS: tuple[Any, ...] = (
    {"type": "object"},
    {"type": "array", "items": {"$ref": "#"}},
    {"$ref": "#"},
    {"type": "integer", "minimum": 5, "maximum": 2},
    {"type": "string", "pattern": r"(.*[a-f].{20}){2}"},
    {"type": "string", "format": "date-time"},
    {"type": "string", "minLength": 10**9},
    {"enum": [1, "a", None, {"b": [True]}]},
    {"allOf": [{"type": "object"}, {"properties": {"a": {"const": 1}}, "required": ["a"]}]},
    {"type": "object", "properties": {"a": {"type": ["string", "null"]}}, "additionalProperties": False},
    {"x-guidance": {"whitespace_pattern": "("}, "type": "object"},
    {"multipleOf": 0, "type": "number"},
    {"not": {}},
    True,
)


class FuzzRequest(NamedTuple):
    """One request. `kind` says how it was made."""

    kind: str
    method: str
    path: str
    headers: list[tuple[str, str]]
    body: bytes

    def as_json(self) -> dict[str, Any]:
        """What is needed to send it again; the body as text where it is some."""
        try:
            body = {"body": self.body.decode()}
        except UnicodeDecodeError:
            body = {"body_base64": base64.b64encode(self.body).decode()}
        return {"kind": self.kind, "method": self.method, "path": self.path, "headers": self.headers, **body}


class RequestSource:
    """Draws requests after an OpenAPI document."""

    def __init__(self, document: dict[str, Any], seed: int) -> None:
        self._document = document
        self._seed = seed
        self._model = document["components"]["schemas"]["CompletionRequest"]["properties"]["model"]["enum"][0]
        self._bodies = {
            path: document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
            for path in POSTS
        }

    def request(self, number: int) -> FuzzRequest:
        """The request of that number, always the same for a seed and a document."""
        rng = random.Random(f"{self._seed} {number}")
        kinds: dict[str, Callable[[random.Random], FuzzRequest]] = {
            "valid": self._valid,
            "damaged_json": self._damaged_json,
            "damaged_bytes": self._damaged_bytes,
            "grammar": self._grammar,
            "damaged_request": self._damaged_request,
        }
        kind = rng.choices(list(kinds), [32, 27, 31, 2, 8])[0]
        return kinds[kind](rng)._replace(kind=kind)

    def _valid(self, rng: random.Random) -> FuzzRequest:
        path, body = self._body(rng)
        return _post(path, body)

    def _damaged_json(self, rng: random.Random) -> FuzzRequest:
        path, body = self._body(rng)
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            damage_json(body, rng)
        return _post(path, body)

    def _damaged_bytes(self, rng: random.Random) -> FuzzRequest:
        request = _post(*self._body(rng))
        body = request.body
        for _ in range(rng.choice((1, 1, 2, 3, 8))):
            body = damage_bytes(body, rng)
        return request._replace(body=body)

    def _grammar(self, rng: random.Random) -> FuzzRequest:
        path = rng.choice(POSTS[:2])
        body: dict[str, Any] = (
            {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"}
        )
        body |= {
            "model": self._model,
            "max_tokens": MAX_TOKENS,
            "temperature": 1.5,
            "n": rng.choice((1, 1, 2)),
        }
        kind, value = _any_grammar(rng)
        if kind == "json" and rng.random() < 0.5:
            named = {"name": "x", "schema": value}
            body["response_format"] = {"type": "json_schema", "json_schema": named}
        else:
            body["structured_outputs"] = {kind: value}
        return _post(path, body)

    def _damaged_request(self, rng: random.Random) -> FuzzRequest:
        path, body = self._body(rng)
        request = _post(path, body)
        headers = [("Content-Type", rng.choice((*TYPES, "application/json")))]
        headers += rng.sample(HEADERS, rng.randint(0, 2))
        if rng.random() < 0.2:
            packed = gzip.compress(request.body, mtime=0)
            request = request._replace(body=packed[: rng.choice((len(packed), 5))])
            headers.append(("Content-Encoding", "gzip"))
        paths = (
            *POSTS,
            *GETS,
            "/v1/models/%ff%00",
            "/v1/",
            "//",
            "/v1/completions/",
            "/%2e%2e/x",
            "/v1/é?x=%zz",
        )
        where = rng.choice(paths)
        return request._replace(method=rng.choice(METHODS), path=where, headers=headers)

    def _body(self, rng: random.Random) -> tuple[str, dict[str, Any]]:
        path = rng.choices(POSTS, WEIGHTS)[0]
        body = self.draw(self._bodies[path], rng)
        assert isinstance(body, dict)
        for name in ("n", "best_of"):
            if isinstance(body.get(name), int):
                body[name] = min(body[name], MAX_CHOICES)
        if rng.random() < 0.9:
            _tidy(path, body, rng)
        return path, body

    def draw(self, schema: dict[str, Any], rng: random.Random, depth: int = 0) -> object:
        """A value that `schema` allows, or nearly so: formats and patterns are not looked at."""
        if "$ref" in schema:
            name = schema["$ref"].rsplit("/", 1)[-1]
            return self.draw(self._document["components"]["schemas"][name], rng, depth)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return rng.choice(schema["enum"])
        if options := schema.get("anyOf") or schema.get("oneOf"):
            return self.draw(rng.choice(options), rng, depth)
        kinds = schema.get("type", "object")
        kind = rng.choice(kinds) if isinstance(kinds, list) else kinds
        if kind == "object":
            return self._draw_object(schema, rng, depth)
        if kind == "array":
            return self._draw_array(schema, rng, depth)
        return _draw_scalar(kind, schema, rng)

    def _draw_object(self, schema: dict[str, Any], rng: random.Random, depth: int) -> dict[str, Any]:
        required = set(schema.get("required", ()))
        share = rng.choice((0.0, 0.1, 0.3)) if depth < MAX_DEPTH else 0.0
        drawn = {
            name: self.draw(part, rng, depth + 1)
            for name, part in schema.get("properties", {}).items()
            if name in required or rng.random() < share
        }
        more = schema.get("additionalProperties")
        if isinstance(more, dict) and depth < MAX_DEPTH:
            for _ in range(rng.randint(0, 2)):
                drawn[str(rng.randint(0, 300))] = self.draw(more, rng, depth + 1)
        return drawn

    def _draw_array(self, schema: dict[str, Any], rng: random.Random, depth: int) -> list[object]:
        least = schema.get("minItems", 0)
        size = rng.randint(least, min(schema.get("maxItems", 4), max(least, 4)))
        return [self.draw(schema.get("items", {"type": "integer"}), rng, depth + 1) for _ in range(size)]


def damage_json(value: dict[str, Any], rng: random.Random) -> None:
    """Changes one thing inside of a JSON object, in place: a value, a name, or an entry too many.

    What it puts there is a copy: the next damage may lie inside of it.
    """
    places = list(_places(value))
    if not places or rng.random() < 0.1:
        value[rng.choice(TEXTS)] = deepcopy(rng.choice(SCALARS))
        return
    holder, key = rng.choice(places)
    if isinstance(holder, dict) and rng.random() < 0.15:
        holder[rng.choice((str(key).upper(), str(key) + "s", rng.choice(TEXTS)))] = holder.pop(key)
    elif rng.random() < 0.1:
        holder[key] = [holder[key]] * rng.choice((1, 2, 300))
    else:
        holder[key] = deepcopy(rng.choice(SCALARS))


def damage_bytes(body: bytes, rng: random.Random) -> bytes:
    """Changes a byte or a slice of a body."""
    start = rng.randint(0, len(body))
    end = min(len(body), start + rng.choice((0, 0, 1, 1, 2, 5, 40)))
    new = rng.choice(
        (
            rng.randbytes(rng.randint(1, 4)),
            rng.choice(BYTES),
            rng.choice(BYTES),
            b"",
            body[start:end] * 2,
            body[:40],
        )
    )
    return body[:start] + new + body[end:]


def _tidy(path: str, body: dict[str, Any], rng: random.Random) -> None:
    """Keeps rules between fields that a schema can't say, and answers short."""
    if path in LIMITS:
        body[LIMITS[path]] = rng.randint(1, MAX_TOKENS)
        body.pop("min_tokens", None)
    if "completions" not in path:
        if path == "/tokenize":
            body.pop(rng.choice(("prompt", "messages")), None)
            body.setdefault("prompt", "x") if "messages" not in body else None
        return
    body["max_tokens"] = rng.randint("chat" in path, MAX_TOKENS)
    body.pop("max_completion_tokens", None)
    for name in (
        "n",
        "best_of",
        "min_tokens",
        "init_scale",
        "num_loops",
        "draft_policy",
        "suffix",
        "top_logprobs",
    ):
        if rng.random() < 0.9:
            body.pop(name, None)
    if not body.get("stream"):
        body.pop("stream_options", None)
    if rng.random() < 0.8:  # each new grammar is a process; there are requests that are about grammars
        for name in GRAMMAR_FIELDS:
            body.pop(name, None)
    wanted = body.get("structured_outputs")
    if isinstance(wanted, dict):
        body["structured_outputs"] = dict([_any_grammar(rng)])
        body.pop("response_format", None)


def _any_grammar(rng: random.Random) -> tuple[str, Any]:
    kind = rng.choice(("regex", "grammar", "json", "choice"))
    if kind == "json":
        schema = json.loads(json.dumps(rng.choice(SCHEMAS)))
        if isinstance(schema, dict) and rng.random() < 0.4:
            damage_json(schema, rng)
        return kind, schema
    if kind == "choice":
        return kind, rng.choices(TEXTS, k=rng.randint(0, 5))
    text = rng.choice(REGEXES if kind == "regex" else GRAMMARS)
    if rng.random() < 0.6:
        text = damage_bytes(text.encode(errors="replace"), rng).decode(errors="replace")
    return kind, text


def _draw_scalar(kind: str, schema: dict[str, Any], rng: random.Random) -> object:
    if kind == "string":
        text = rng.choice(TEXTS if rng.random() < 0.02 else SOUND_TEXTS)
        return text or "x" * schema.get("minLength", 0)
    if kind in {"integer", "number"}:
        low, high = schema.get("minimum", schema.get("exclusiveMinimum", -5)), schema.get("maximum", 200)
        edge = rng.random() < 0.2
        drawn = rng.choice((low, high)) if edge else rng.uniform(low, min(high, low + 50))
        return int(drawn) if kind == "integer" else drawn
    return None if kind == "null" else rng.random() < 0.5


def _places(value: object) -> list[tuple[Any, Any]]:
    """Every (container, key or index) inside of `value`."""
    found: list[tuple[Any, Any]] = []
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        found += [(value, key), *_places(part)]
    return found


def _post(path: str, body: object) -> FuzzRequest:
    return FuzzRequest("", "POST", path, [("Content-Type", "application/json")], json.dumps(body).encode())
