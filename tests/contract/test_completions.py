"""POST /v1/completions: texts, choices, usage, and the stream that says the same as the whole answer."""

import json
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.protocol import GenerationRequest
from tests.contract.conftest import TEXT, Served, serving
from tests.fake_engine import EOS, INFO, FakeEngine
from tests.loose import Json
from tests.text_tools import byte_codec, ids_of
from tests.unit.test_tokenizer import fim_codec

USAGE = {
    "prompt_tokens": 2,
    "completion_tokens": len(ids_of(TEXT)),
    "total_tokens": 2 + len(ids_of(TEXT)),
    "prompt_tokens_details": {"cached_tokens": 1},
    "completion_tokens_details": {
        "accepted_prediction_tokens": 2,
        "rejected_prediction_tokens": 1,
        "decode_passes": 3,
    },
}


def varied(request: GenerationRequest) -> list[int]:
    """Tokens that differ between prompts and choices, with characters of one to four bytes."""
    letters = "aé世🙂 stop\n"
    start = (sum(request.prompt_token_ids) + request.sampling.seed) % len(letters)
    return ids_of((letters[start:] + letters) * 2)


def joined_logprobs(first: dict[str, Json] | None, second: dict[str, Json] | None) -> dict[str, Json] | None:
    if first is None or second is None:
        return second
    return {name: first[name] + second[name] for name in first}


def joined(chunks: list[dict[str, Json]]) -> dict[int, dict[str, Json]]:
    """Choices of a stream by index: text, token ids, finish and stop reason."""
    choices: dict[int, dict[str, Json]] = {}
    for chunk in chunks:
        for part in chunk["choices"]:
            empty: dict[str, Json] = {"text": "", "token_ids": [], "finish_reason": None, "logprobs": None}
            choice = choices.setdefault(part["index"], empty)
            assert choice["finish_reason"] is None, "nothing follows a finish reason"
            choice["logprobs"] = joined_logprobs(choice["logprobs"], part["logprobs"])
            choice["text"] += part["text"]
            choice["token_ids"] += part.get("token_ids", [])
            choice["finish_reason"] = part["finish_reason"]
            choice["stop_reason"] = part["stop_reason"]
    return choices


async def test_a_float_without_a_fraction_is_an_integer(served: Served) -> None:
    """As in JSON Schema, in which the OpenAPI document is written; with a fraction it is a 400."""
    fields: dict[str, Json] = {"n": 2.0, "max_tokens": 3.0, "seed": -7.0, "stop_token_ids": [1.0]}
    assert (await served.post(prompt=[[104.0, 105], [104]], **fields)).status_code == 200
    first, *others = served.engine.requests
    assert (first.prompt_token_ids, first.max_tokens, first.sampling.seed) == ([104, 105], 3, -7)
    assert len(others) == 3
    assert {type(token) for request in [first, *others] for token in request.prompt_token_ids} == {int}
    response = await served.client.post("/detokenize", json={"tokens": [104.0, 105]})
    assert response.json()["prompt"] == "hi"


async def test_whole_answer(served: Served) -> None:
    response = await served.post(seed=5)
    body = response.json()
    assert body["id"].startswith("cmpl-")
    assert body["created"] > 1.7e9
    assert body == {
        "id": body["id"],
        "object": "text_completion",
        "created": body["created"],
        "model": "default",
        "choices": [
            {"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "length", "stop_reason": None}
        ],
        "usage": USAGE,
    }
    (request,) = served.engine.requests
    assert request.prompt_token_ids == ids_of("hi")
    assert (request.sampling.seed, request.sampling.top_k, request.speculation) == (5, 0, True)


async def test_every_field_reaches_the_engine() -> None:
    sampling: dict[str, Json] = {
        "temperature": 0.5,
        "top_p": 0.9,
        "min_p": 0.1,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.1,
        "seed": -7,
    }
    others: dict[str, Json] = {
        "max_tokens": 9,
        "min_tokens": 3,
        "stop_token_ids": [7, 8],
        "ignore_eos": True,
        "speculation": False,
        "num_loops": 2,
        "priority": 4,
        "logprobs": 3,
        "cache_salt": "mine",
        "draft_policy": "earliest",
        "init_scale": 0.0,
    }
    async with serving(allow_priority=True) as served:
        response = await served.post(top_k=-1, logit_bias={"65": 1.5}, **sampling, **others)
    assert response.status_code == 200
    (request,) = served.engine.requests
    assert {name: getattr(request, name) for name in others} == others
    assert {name: getattr(request.sampling, name) for name in sampling} == sampling
    assert (request.sampling.top_k, request.sampling.logit_bias) == (0, {65: 1.5})


async def test_max_tokens_is_16_by_default(served: Served) -> None:
    await served.post(max_tokens=...)
    assert served.engine.requests[0].max_tokens == 16


async def test_seeds_of_choices_follow_the_requests_and_wrap(served: Served) -> None:
    await served.post(n=3, prompt=["a", "b"], seed=2**63 - 2)
    seeds = [request.sampling.seed for request in served.engine.requests]
    assert seeds == [2**63 - 2, 2**63 - 1, -(2**63)] * 2


async def test_requests_without_a_seed_differ(served: Served) -> None:
    await served.post()
    await served.post()
    first, second = served.engine.requests
    assert first.sampling.seed != second.sampling.seed


async def test_index_is_prompt_times_n_plus_choice() -> None:
    async with serving(FakeEngine(varied)) as served:
        choices = (await served.post(prompt=["p", "q", "r"], n=2, seed=1)).json()["choices"]
        alone = [
            (await served.post(prompt=prompt, seed=seed)).json()["choices"][0]["text"]
            for prompt in "pqr"
            for seed in (1, 2)
        ]
    assert [choice["index"] for choice in choices] == list(range(6))
    assert [choice["text"] for choice in choices] == alone
    assert len(set(alone)) > 1


PROMPTS = ["hi", ["hi", "ho"], [104, 105], [[104, 105], [104]], "Grüße 世"]
VARIANTS = [
    {},
    {"n": 3},
    {"echo": True},
    {"n": 2, "echo": True, "stop": ["st"]},
    {"stop": ["世🙂", "zzz"], "include_stop_str_in_output": True},
    {"stop": "op\na", "max_tokens": 11},
    {"stop_token_ids": [0xE4], "n": 2},
    {"max_tokens": 3},
    {"max_tokens": 0, "echo": True, "n": 2},
    {"max_tokens": 0},
    {"stop": ["a"], "min_tokens": 5},
    {"logprobs": 0},
    {"logprobs": 3, "n": 2, "stop": ["世🙂", "zzz"]},
    {"logprobs": 2, "echo": True, "stop": "op\na", "n": 2},
    {"logprobs": 1, "echo": True, "max_tokens": 0},
    {"logprobs": 1, "stop_token_ids": [0xE4]},
    {"logprobs": 1, "max_tokens": 2},
]


@pytest.mark.parametrize("prompt", PROMPTS, ids=str)
@pytest.mark.parametrize("fields", VARIANTS, ids=str)
@pytest.mark.parametrize("tokens_per_event", [1, 5])
async def test_joined_stream_is_the_whole_answer(
    prompt: Sequence[object] | str, fields: dict[str, Json], tokens_per_event: int
) -> None:
    async with serving(FakeEngine(varied, tokens_per_event=tokens_per_event)) as served:
        fields = {"prompt": prompt, "seed": 3, "return_token_ids": True, **fields}
        whole = (await served.post(**fields)).json()
        chunks = await served.chunks(stream_options={"include_usage": True}, **fields)
    choices = joined(chunks)
    for choice in whole["choices"]:
        parts = choices[choice["index"]]
        assert parts == {name: choice[name] for name in parts}
        assert choice["finish_reason"] in {"stop", "length"}
    assert len(choices) == len(whole["choices"])
    assert chunks[-1]["usage"] == whole["usage"]


async def test_no_split_character_in_a_stream(served: Served) -> None:
    texts = [chunk["choices"][0]["text"] for chunk in await served.chunks()]
    assert "".join(texts) == TEXT
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(texts)
    assert len(texts) > 20
    assert all(texts), "no chunk without news"


@settings(max_examples=40, deadline=None)
@given(
    text=st.text("ab🙂", min_size=1, max_size=30),
    stops=st.lists(st.text("ab🙂", min_size=1, max_size=4), min_size=1, max_size=3),
    tokens_per_event=st.integers(1, 7),
    include=st.booleans(),
)
async def test_stop_strings_never_leak(
    text: str, stops: list[str], tokens_per_event: int, include: bool
) -> None:
    engine = FakeEngine(lambda _: ids_of(text), tokens_per_event=tokens_per_event)
    async with serving(engine) as served:
        chunks = await served.chunks(stop=stops, include_stop_str_in_output=include)
    choice = joined(chunks)[0]
    ends = {text.find(stop) + len(stop): stop for stop in sorted(stops, key=len) if stop in text}
    if not ends:
        assert (choice["text"], choice["finish_reason"]) == (text, "length")
        return
    end = min(ends)
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", ends[end])
    assert choice["text"] == text[: end if include else end - len(ends[end])]


async def test_stop_string_ends_the_sequence_in_the_engine() -> None:
    engine = FakeEngine(lambda _: ids_of("one two three"), delay=0.002)
    async with serving(engine) as served:
        body = (await served.post(stop="tw", return_token_ids=True)).json()
        assert engine.aborted == [engine.requests[0].request_id]
    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("one ", "stop", "tw")
    assert choice["token_ids"] == ids_of("one tw")
    assert body["usage"]["completion_tokens"] == 6
    assert body["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] == 2


@pytest.mark.parametrize(
    ("fields", "text", "stop_reason"),
    [
        ({}, "ab", None),
        ({"stop_token_ids": [EOS]}, "ab", EOS),
        ({"skip_special_tokens": False}, "ab", None),
        ({"skip_special_tokens": False, "include_stop_str_in_output": True}, "ab<eos>", None),
        ({"stop_token_ids": [98]}, "a", 98),
        ({"stop_token_ids": [98], "include_stop_str_in_output": True}, "ab", 98),
    ],
    ids=str,
)
async def test_ending_token(fields: dict[str, Json], text: str, stop_reason: int | None) -> None:
    def script(request: GenerationRequest) -> list[int]:
        return [97, 98] if 98 in request.stop_token_ids else [97, 98, EOS]

    async with serving(FakeEngine(script)) as served:
        body = (await served.post(**fields)).json()
    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (text, "stop", stop_reason)
    assert body["usage"]["completion_tokens"] == (2 if 98 in fields.get("stop_token_ids", []) else 3)


async def test_echo_shows_the_prompt_once(served: Served) -> None:
    assert (await served.post(echo=True)).json()["choices"][0]["text"] == "hi" + TEXT
    body = (await served.post(echo=True, prompt=[[104, 105], [97]], max_tokens=0)).json()
    assert [choice["text"] for choice in body["choices"]] == ["hi", "a"]
    assert {choice["finish_reason"] for choice in body["choices"]} == {"length"}
    assert body["usage"]["completion_tokens"] == 0


async def test_return_token_ids(served: Served) -> None:
    choice = (await served.post(return_token_ids=True)).json()["choices"][0]
    assert choice["token_ids"] == ids_of(TEXT)
    assert choice["prompt_token_ids"] == ids_of("hi")
    chunks = await served.chunks(return_token_ids=True)
    assert chunks[0]["choices"][0]["prompt_token_ids"] == ids_of("hi")
    assert "prompt_token_ids" not in chunks[1]["choices"][0]


async def test_usage_counts_a_prompt_once_however_many_choices(served: Served) -> None:
    usage = (await served.post(prompt=["hi", "you"], n=3, max_tokens=4)).json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (5, 24, 29)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 2


async def test_usage_in_streams(served: Served) -> None:
    assert all("usage" not in chunk for chunk in await served.chunks())
    *chunks, last = await served.chunks(stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in chunks)
    assert (last["choices"], last["usage"]) == ([], USAGE)
    chunks = await served.chunks(stream_options={"include_usage": True, "continuous_usage_stats": True})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] == USAGE["completion_tokens"]


async def test_chunks_share_one_id(served: Served) -> None:
    chunks = await served.chunks(n=2)
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1


async def test_line_breaks_stay_inside_json(served: Served) -> None:
    """A frame is one line: clients split at the empty line."""
    served.engine.script = lambda _: ids_of("a\n\nb\r\nc\u2028d\x85e")
    assert joined(await served.chunks())[0]["text"] == "a\n\nb\r\nc\u2028d\x85e"


async def test_any_bytes_make_a_valid_answer(served: Served) -> None:
    served.engine.script = lambda _: [0xFF, 0xC3, 97, 0xE4, 0xB8]
    expected = byte_codec().decode([0xFF, 0xC3, 97, 0xE4, 0xB8], skip_special_tokens=True)
    assert (await served.post()).json()["choices"][0]["text"] == expected
    assert joined(await served.chunks())[0]["text"] == expected


async def test_request_with_charset_and_large_prompt(served: Served) -> None:
    body = json.dumps({"model": "default", "prompt": [1] * 100, "max_tokens": 1})
    response = await served.client.post(
        "/v1/completions", content=body, headers={"content-type": "application/json; charset=utf-8"}
    )
    assert response.json()["usage"]["prompt_tokens"] == 100


@pytest.mark.parametrize("prompt", ["def ", [100, 101, 102, 32]], ids=str)
async def test_suffix_asks_for_what_stands_between(prompt: list[int] | str) -> None:
    codec = fim_codec(["<fim_prefix>", "<fim_suffix>", "<fim_middle>"])
    engine = FakeEngine(lambda _: ids_of(TEXT), info=msgspec.structs.replace(INFO, vocab_size=260))
    async with serving(engine, codec=codec) as served:
        body = (await served.post(prompt=prompt, suffix=" end", logprobs=0)).json()
        assert body["choices"][0]["text"] == TEXT
        assert body["usage"]["prompt_tokens"] == 11
        await served.post(prompt=prompt, suffix="")
    assert [request.prompt_token_ids for request in served.engine.requests] == [
        [257, *ids_of("def "), 258, *ids_of(" end"), 259],
        ids_of("def "),
    ]


@pytest.mark.parametrize(
    ("limit", "max_tokens", "kept"),
    [
        (4, 100, "6789"),
        (10, 100, "0123456789"),
        (100, 100, "0123456789"),
        (-1, 195, "56789"),
        (-1, 190, "0123456789"),
    ],
)
async def test_prompts_are_cut_at_their_beginning_if_asked(
    served: Served, limit: int, max_tokens: int, kept: str
) -> None:
    fields: dict[str, Json] = {
        "truncate_prompt_tokens": limit,
        "max_tokens": max_tokens,
        "echo": True,
        "logprobs": 0,
    }
    body = (await served.post(prompt=["0123456789", "ab"], **fields)).json()
    assert [bytes(request.prompt_token_ids).decode() for request in served.engine.requests] == [kept, "ab"]
    assert [choice["text"] for choice in body["choices"]] == [kept + TEXT, "ab" + TEXT]
    assert body["choices"][0]["logprobs"]["text_offset"][: len(kept) + 1] == list(range(len(kept) + 1))


async def test_more_loops_than_the_models_own_are_taken_where_the_engine_has_slots_for_them() -> None:
    engine = FakeEngine(lambda _: ids_of(TEXT), info=msgspec.structs.replace(INFO, max_loops=6))
    async with serving(engine) as served:
        assert (await served.post(num_loops=6)).status_code == 200
        refused = await served.post(num_loops=7)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "num_loops")
        assert "has 6 loops" in refused.json()["error"]["message"]
        assert (await served.client.get("/v1/models")).json()["data"][0]["max_loops"] == 6


async def test_scores_of_a_prompt_that_is_read_both_ways_are_refused_with_the_reason() -> None:
    """An echo alone is fine, and so are scores of what is generated."""
    problem = "this model reads its prompt both ways"
    engine = FakeEngine(
        lambda _: ids_of(TEXT), info=msgspec.structs.replace(INFO, prompt_scores_problem=problem)
    )
    async with serving(engine) as served:
        refused = await served.post(echo=True, logprobs=1)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "logprobs")
        assert problem in refused.json()["error"]["message"]
        for fields in ({"echo": True}, {"logprobs": 1}):
            assert (await served.post(**fields)).status_code == 200
