"""No input gives a 5xx: bodies that are nearly right, over tokenizers and templates of every kind.

The suite makes a few hundred; SPEED_FUZZ_REQUESTS=20000 makes more, and -s shows how they were answered.
"""

import json
import os
import random

import msgspec
import pytest

from model.protocol import GenerationRequest
from server.chat_template import ChatTemplate
from server.schemas.chat import ChatRequest
from server.schemas.completions import CompletionRequest
from server.schemas.messages import CountTokensRequest, MessagesRequest
from server.schemas.responses import ResponsesRequest
from server.schemas.tokenize import DetokenizeRequest, TokenizeRequest
from server.tokenizer import TokenIdCodec
from tests.contract.conftest import Served, serving
from tests.contract.test_clients import LOOPS, padded_codec
from tests.fake_engine import EOS, INFO, FakeEngine
from tests.loose import Json
from tests.text_tools import byte_codec
from tests.unit.test_text import sentencepiece_codec

NUM_REQUESTS = int(os.environ.get("SPEED_FUZZ_REQUESTS", "600"))
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}{{ eos_token }}\n{% endfor %}"
    "{{ extra }}{% if flag %}{{ flag.text }}{% endif %}"
)
CODECS: dict[str, Json] = {
    "bytes": byte_codec,
    "padded": padded_codec,
    "sentencepiece": sentencepiece_codec,
    "none": TokenIdCodec,
}
TEMPLATES: dict[str, Json] = {
    "plain": lambda: ChatTemplate(PLAIN, {"eos_token": "<eos>"}),
    "loops": lambda: ChatTemplate(LOOPS, describes_tools=True),
    "tools": lambda: ChatTemplate("{{ tools }}<tool_call><function=></think>" + PLAIN),
    "none": lambda: None,
}
NASTY: list[Json] = [
    *[None, True, False, 0, -1, 1, 2, 0.0, -0.0, 0.5, 1.5, 16.0, 257, 10**6, -(2**63), 2**63, 10**400],
    *[1e308, float("inf"), float("-inf"), float("nan")],
    *[
        "",
        "a",
        "<eos>",
        "<pad>",
        "<s>",
        "<eo",
        "s>",
        " \n",
        "\x00",
        "\ud800",
        "\U0010fffd",
        "é世🙂",
        "\u2028",
    ],
    *["user", "text", "null", "1", "9" * 5000, "{" * 200, "(" * 200, "a{1,999999}", "[a-", "\\", "x" * 300],
    *["{% raise %}", "{{ messages }}", "start: x", 'start: "a" start', "date-time", "#/$defs/A"],
    *[[], {}, [[]], [{}], [None], ["a"], [1], [1, "a"], [[1], ["a"]], {"a": 1}, {"": ""}, {"type": "text"}],
    *[{"type": "json_object"}, {"type": "json_schema"}, {"type": "text"}, {"json": {}}, {"regex": "a*"}],
    {"type": "json_schema", "json_schema": {"name": "n", "schema": {"$ref": "#/$defs/A"}}},
    {"type": "json_schema", "json_schema": {"name": "n", "schema": {"propertyNames": {"$ref": "#"}}}},
    {"type": "json_object", "schema": {"format": 3, "enum": [], "uniqueItems": False}},
    {"choice": ["a", "\x00"]},
    {"grammar": "start: <eos>"},
    {"role": "user", "content": "hi"},
    {"role": "assistant"},
    {"role": "system", "content": [{"type": "text", "text": "<eos>"}]},
    {"include_usage": True, "continuous_usage_stats": True},
    {"1": 1, "300": 2},
    [{"type": "text", "text": "a"}, {"type": "text", "text": ""}],
    *["required", "auto", {"type": "function", "function": {"name": "f"}}, {"mode": "auto", "tools": []}],
    *[{"name": "f", "arguments": '{"a": "\\ud800"}'}, {"name": "f", "parameters": {"properties": {"a": 1}}}],
    *[{"properties": {"<eos>": {"enum": ["</parameter>"]}}, "required": ["b"]}, {"$ref": "#"}],
]
MODELS = (
    *(CompletionRequest, ChatRequest, ResponsesRequest, MessagesRequest, CountTokensRequest),
    *(TokenizeRequest, DetokenizeRequest),
)
FIELDS = sorted({"tools", "store", "unknown", *(name for model in MODELS for name in model.model_fields)})
PROMPT: dict[str, Json] = {
    "system": [{"type": "text", "text": "be"}],
    "messages": [
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "tool_use", "id": "c", "name": "f", "input": {}},
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "ok"}]},
    ],
    "tools": [{"name": "f", "input_schema": {"type": "object"}}, {"type": "bash_20250124", "name": "bash"}],
    "tool_choice": {"type": "auto"},
}
TOOLS: dict[str, Json] = {
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "f",
                "description": "<eos>",
                "parameters": {"type": "object", "properties": {"a": {"type": "string"}, "b": {"$ref": "#"}}},
                "strict": False,
            },
        }
    ],
    "tool_choice": "required",
    "messages": [
        {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "content": "<eos>", "tool_call_id": "a"},
    ],
}
BASES: dict[str, dict[str, Json]] = {
    "/v1/completions": {"model": "default", "prompt": "hi", "max_tokens": 5},
    "/v1/chat/completions": {"model": "default", "messages": [{"role": "user", "content": "hi"}]},
    "/v1/responses": {
        "model": "default",
        "max_output_tokens": 5,
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "ok"},
        ],
        "tools": [
            {"type": "function", "name": "f", "parameters": {"type": "object"}},
            {"type": "web_search"},
        ],
        "tool_choice": {
            "type": "allowed_tools",
            "mode": "auto",
            "tools": [{"type": "function", "name": "f"}],
        },
        "text": {"format": {"type": "text"}},
    },
    "/v1/messages": {"model": "default", "max_tokens": 5, **PROMPT},
    "/v1/messages/count_tokens": {"model": "default", **PROMPT},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [104, 105]},
}
PATHS = tuple(BASES)


def made_up(rng: random.Random, depth: int = 2) -> Json:
    """A nasty value, or a list or an object of such."""
    kind = rng.random()
    if depth and kind < 0.15:
        return [made_up(rng, depth - 1) for _ in range(rng.randint(0, 3))]
    if depth and kind < 0.25:
        return {str(made_up(rng, 0)): made_up(rng, depth - 1) for _ in range(rng.randint(0, 2))}
    return rng.choice(NASTY)


def mutated(rng: random.Random, value: Json) -> Json:
    """A valid value with a part exchanged."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        name = rng.choice(sorted(value))
        return value | {name: mutated(rng, value[name])}
    if isinstance(value, list) and value and rng.random() < 0.6:
        index = rng.randrange(len(value))
        return [*value[:index], mutated(rng, value[index]), *value[index + rng.randint(0, 1) :]]
    return made_up(rng)


def body_for(rng: random.Random, path: str) -> bytes:
    """JSON that is nearly right; every tenth has wrong bytes."""
    body = dict(BASES[path])
    if path == "/v1/completions" and rng.random() < 0.3:
        body["prompt"] = [104, 105]
    if path == "/tokenize" and rng.random() < 0.5:
        body = {"messages": BASES["/v1/chat/completions"]["messages"]}
    if "messages" in body and rng.random() < 0.4:
        body |= {name: TOOLS[name] for name in TOOLS if path != "/tokenize" or name != "tool_choice"}
    for _ in range(rng.randint(0, 3)):
        body[rng.choice(FIELDS)] = made_up(rng)
    if rng.random() < 0.5:
        body = mutated(rng, body)
    content = bytearray(json.dumps(body).encode())
    for _ in range(rng.randint(1, 3) if rng.random() < 0.1 else 0):
        content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content)


def tokens(request: GenerationRequest) -> list[int]:
    """Any, among them half characters and an end in the middle."""
    rng = random.Random(request.sampling.seed)
    return [rng.choice([97, 0xE4, 0xFF, 10, EOS]) for _ in range(4)]


async def send(served: Served, path: str, content: bytes) -> int:
    response = await served.client.post(path, content=content, headers={"content-type": "application/json"})
    return response.status_code


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("template", TEMPLATES)
async def test_no_body_gives_a_5xx(codec: str, template: str) -> None:
    info = msgspec.structs.replace(INFO, max_model_len=1500)
    engine = FakeEngine(tokens, tokens_per_event=3, info=info)
    rng = random.Random(f"{codec} {template}")
    statuses: dict[int, int] = {}
    options = {"chat_template": TEMPLATES[template](), "codec": CODECS[codec](), "allow_priority": True}
    async with serving(engine, **options) as served:
        for _ in range(NUM_REQUESTS // (len(CODECS) * len(TEMPLATES))):
            path = rng.choice(PATHS)
            content = body_for(rng, path)
            status = await send(served, path, content)
            statuses[status] = statuses.get(status, 0) + 1
            assert status < 500, (path, content)
        for request in engine.requests:  # what was taken can be run
            ids = [*request.prompt_token_ids, *request.stop_token_ids, *request.sampling.logit_bias]
            assert request.prompt_token_ids
            assert all(0 <= token_id < INFO.vocab_size for token_id in ids)
            assert len(request.prompt_token_ids) + request.max_tokens <= info.max_model_len
    assert statuses.get(400, 0) > 5, "nothing was refused: the bodies show little"
    print(statuses)
