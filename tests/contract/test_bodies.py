"""Bodies made to stop a server: refused with words, early, off the event loop, and the next request works."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import httpx
import pytest
from pydantic import BaseModel

from bench.attack_bodies import ATTACKS, Attack
from server import answers, intake
from server.chat_template import ChatTemplate
from server.intake import SMALL_BODY
from server.json_parts import json_bytes
from server.lanes import Lane
from server.limits import BODY_FLOOR, ID_BYTES, TEXT_FLOOR
from server.schemas.base import RequestModel
from server.tokenizer import TextCodec
from tests.contract.conftest import Served, serving
from tests.contract.test_errors import error_of, works
from tests.fake_engine import INFO
from tests.loose import Json
from tests.text_tools import byte_codec, word_tokenizer

TEMPLATE = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}")
CHAT_LIMIT = BODY_FLOOR + INFO.max_model_len * max(ID_BYTES, 3 * byte_codec().longest_piece)
SIZE = 300_000
FAIR = {"nothing, to compare with"}  # the one that is no attack
JSON = {"content-type": "application/json"}


@pytest.mark.parametrize("attack", [a for a in ATTACKS if a.name not in FAIR], ids=lambda a: a.name)
async def test_bodies_that_stopped_servers_are_refused(attack: Attack) -> None:
    async with serving(chat_template=TEMPLATE) as served:
        for size, status in ((SIZE, 400), (2 * CHAT_LIMIT, 413)):
            response = await served.client.post(attack.path, content=attack.make(size), headers=JSON)
            assert len(error_of(response, status)["message"]) < 500
        await works(served)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize", "/detokenize"])
@pytest.mark.parametrize("announced", [True, False])
async def test_the_limit_of_a_body_follows_from_the_context(
    served: Served, path: str, announced: bool
) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b" " * 10**6
        yield b" " * (CHAT_LIMIT - 10**6)
        yield b" "

    content = b" " * (CHAT_LIMIT + 1) if announced else chunks()
    error = error_of(await served.client.post(path, content=content, headers=JSON), 413)
    assert str(CHAT_LIMIT) in error["message"]
    assert error_of(await served.client.post(path, content=b" " * CHAT_LIMIT, headers=JSON), 400)
    many = await served.client.post("/v1/completions", content=b" " * (CHAT_LIMIT + 1), headers=JSON)
    assert error_of(many, 400), "a list of prompts needs more room than one"


async def test_large_bodies_are_parsed_in_a_thread_and_small_ones_at_once(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def parse(content: bytes, kind: type[RequestModel], **options: bool) -> RequestModel:
        threads.append(threading.current_thread())
        return original(content, kind, **options)

    original = intake.parse_body
    monkeypatch.setattr(intake, "parse_body", parse)
    await served.post(prompt="a")
    await served.post(prompt="a" * SMALL_BODY)
    assert [thread is threading.main_thread() for thread in threads] == [True, False]


@contextmanager
def busy(lane: Lane, num_threads: int) -> Iterator[None]:
    """All threads of a lane at work until the block is left."""
    release = threading.Event()
    tasks = [asyncio.ensure_future(lane.run(release.wait)) for _ in range(num_threads)]
    try:
        yield
    finally:
        release.set()
    assert all(not task.cancelled() for task in tasks)


@pytest.mark.parametrize("work", ["parse", "tokenise"])
async def test_work_of_a_client_that_left_is_not_started(
    served: Served, monkeypatch: pytest.MonkeyPatch, work: str
) -> None:
    """Forty megabytes of conversations went on for 157 seconds after their clients had gone."""
    done: list[str] = []

    def encode(self: TextCodec, text: str, **options: bool) -> list[int]:
        done.append(text)
        return [1]

    monkeypatch.setattr(TextCodec, "encode", encode)
    state = served.app.state.server
    if work == "parse":
        lane, num_threads, fields = state.lanes.bodies, 1, {"prompt": "a" * 2 * SMALL_BODY}
    else:
        lane, num_threads, fields = state.lanes.short_texts, 2, {"prompt": "a"}
    with busy(lane, num_threads):
        call = served.asgi_call(**fields)
        await asyncio.sleep(0.05)
        assert not call.task.done()
        call.disconnect()
        await call.finished()
    await lane.run(lambda: None)  # whatever waited has had its turn
    assert done == []
    assert served.engine.requests == []
    assert [m["status"] for m in call.sent if "status" in m] == [499]


async def test_a_conversation_that_waits_does_not_hold_up_completions() -> None:
    async with serving(chat_template=TEMPLATE) as served:
        with busy(served.app.state.server.lanes.templates, 1):
            chat = asyncio.create_task(chat_of(served))
            await works(served)
            assert not chat.done()
        assert (await chat).status_code == 200


async def chat_of(served: Served) -> httpx.Response:
    fields = {"prompt": ..., "max_tokens": 1, "messages": [{"role": "user", "content": "a"}]}
    return await served.post("/v1/chat/completions", **fields)


@pytest.mark.parametrize("fields", [{}, {"truncate_prompt_tokens": 5}], ids=str)
async def test_a_text_that_cannot_fit_is_not_tokenised(
    served: Served, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Json]
) -> None:
    texts = watch_tokenising(monkeypatch)
    error = error_of(await served.post(prompt="x" * (TEXT_FLOOR + 1), **fields), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    assert str(TEXT_FLOOR + 1) in error["message"]
    assert f"maximum context length is {INFO.max_model_len} tokens" in error["message"]
    assert texts == []


async def test_of_a_text_that_hardly_fits_only_the_beginning_is_tokenised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With one very long token in the vocabulary most of that length are still far too many tokens."""
    async with serving(codec=TextCodec(word_tokenizer(["long" * 100]))) as served:
        texts = watch_tokenising(monkeypatch)
        length = INFO.max_model_len * 400
        for path in ("/v1/completions", "/tokenize"):
            more = {} if path == "/v1/completions" else {"max_tokens": ...}
            error = error_of(await served.post(path, prompt="x" * length, **more), 400)
            assert error["code"] == "context_length_exceeded"
        assert texts == [TEXT_FLOOR, TEXT_FLOOR]


def watch_tokenising(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the texts that are tokenised from now on."""
    lengths: list[int] = []
    original = TextCodec.encode

    def encode(self: TextCodec, text: str, **options: bool) -> list[int]:
        lengths.append(len(text))
        return original(self, text, **options)

    monkeypatch.setattr(TextCodec, "encode", encode)
    return lengths


@pytest.fixture
def writers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The threads that have written an answer in parts, so far."""
    threads: list[str] = []
    original = json_bytes

    def write(model: BaseModel) -> bytes:
        threads.append(threading.current_thread().name)
        return original(model)

    monkeypatch.setattr(answers, "json_bytes", write)
    return threads


@pytest.mark.parametrize(("num_top", "is_long"), [(0, False), (20, True)])
async def test_scores_of_a_prompt_are_written_in_a_thread_too(
    served: Served, writers: list[str], num_top: int, is_long: bool
) -> None:
    """Only tokens that are echoed counted: 2,000 of a prompt with 20 beside each took the event loop."""
    body: Json = {"prompt": "x" * 150, "max_tokens": 1, "prompt_logprobs": num_top}
    [choice] = (await served.post(**body)).json()["choices"]
    assert len(choice["prompt_logprobs"]) == 150
    assert [name.startswith("answers") for name in writers] == [True] * is_long


@pytest.mark.parametrize("stream", [False, True])
async def test_long_answers_are_written_in_a_thread_and_say_the_same(
    served: Served, monkeypatch: pytest.MonkeyPatch, writers: list[str], stream: bool
) -> None:
    """An echo of long prompts with 20 log-probabilities took seconds in the event loop."""
    fields: dict[str, Json] = {
        "prompt": ["hello", "world"],
        "echo": True,
        "logprobs": 3,
        "seed": 1,
        "stream": stream,
    }
    at_once = await served.post(**fields)
    assert not writers
    monkeypatch.setattr(answers, "SHORT_ANSWER", 0)
    in_parts = await served.post(**fields)
    assert writers
    assert all(name.startswith("answers") for name in writers)
    assert told(served, in_parts, stream=stream) == told(served, at_once, stream=stream)


def told(served: Served, response: httpx.Response, *, stream: bool) -> dict[tuple[int, str], list[object]]:
    """What an answer says of each choice; a stream may be cut into other chunks each time."""
    bodies = served.frames(response) if stream else [response.json()]
    said: dict[tuple[int, str], list[object]] = {}
    for choice in (choice for body in bodies for choice in body["choices"]):
        for name, value in {"text": choice["text"], **choice["logprobs"]}.items():
            said.setdefault((choice["index"], name), []).extend(value)
    return said


@pytest.mark.parametrize(("headers", "part"), [({"content-encoding": "gzip"}, b"no gzip"), ({}, b"x" * 9000)])
async def test_a_body_that_no_route_wants_breaks_no_answer_off(headers: dict[str, str], part: bytes) -> None:
    """The page came without its 1,931 bytes: who listened for a disconnect met the fault of the body."""

    async def parts() -> AsyncIterator[bytes]:
        yield part

    async with serving(body_limit=1000) as served:
        response = await served.client.request("GET", "/", content=parts(), headers=headers)
    assert response.status_code == 200
    assert len(response.content) == int(response.headers["content-length"]) > 0
