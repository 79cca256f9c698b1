"""Streams in which nothing comes for a while: what is sent meanwhile, read by every kind of client."""

import asyncio
import json
from collections.abc import Callable, Iterator

import pytest
from openai._streaming import SSEDecoder

from server.chat_template import ChatTemplate
from tests.contract.conftest import serving, until
from tests.fake_engine import FakeEngine
from tests.loose import Json
from tests.text_tools import ids_of

PAUSE = 0.05


def by_the_standard(data: bytes) -> Iterator[str]:
    """Lines; a blank one ends an event, which counts if it has data."""
    event: list[str] = []
    for line in data.decode().split("\n"):
        if line.startswith("data:"):
            event.append(line[5:].lstrip(" "))
        elif not line and event:
            yield "\n".join(event)
            event = []


def by_every_blank_line(data: bytes) -> Iterator[str]:
    """As openai-go did before 3.43: a blank line ends an event, whether it has data or not."""
    event = ""
    for line in data.decode().split("\n")[:-1]:
        if not line:
            yield event
            event = ""
        elif line.startswith("data: "):
            event += line[6:]


def by_blocks(data: bytes) -> Iterator[str]:
    """As vLLM's benchmark does: what comes between blank lines is an event, or a comment if it begins so."""
    for block in data.decode().split("\n\n"):
        if block.strip() and not block.startswith(":"):
            assert block.startswith("data: ")
            yield block.removeprefix("data: ")


def by_openai(data: bytes) -> Iterator[str]:
    """The decoder of OpenAI's own client."""
    for event in SSEDecoder().iter_bytes(iter([data])):
        yield event.data


READERS: list[Callable[[bytes], Iterator[str]]] = [by_the_standard, by_every_blank_line, by_blocks, by_openai]


def chat_text(chunk: dict[str, Json]) -> str:
    return "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])


def text(chunk: dict[str, Json]) -> str:
    return "".join(choice["text"] for choice in chunk["choices"])


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("gap", [3 * PAUSE, 0.0])
async def test_every_client_reads_a_stream_with_pauses(
    read: Callable[[bytes], Iterator[str]], gap: float
) -> None:
    engine = FakeEngine(lambda _: ids_of("abc"), delay=gap)
    async with serving(engine, ping_interval=PAUSE) as served:
        options = {"include_usage": True}
        response = await served.post(stream=True, stream_options=options, return_token_ids=True)
    assert not gap or b": ping\n" in response.content
    *chunks, done = read(response.content)
    assert done == "[DONE]"
    assert "".join(map(text, map(json.loads, chunks))) == "abc"
    assert json.loads(chunks[-1])["usage"]["completion_tokens"] == 3
    choices = [choice for chunk in chunks for choice in json.loads(chunk)["choices"]]
    assert [i for choice in choices for i in choice.get("token_ids") or ()] == ids_of("abc")
    assert any(choice.get("prompt_token_ids") for choice in choices)


@pytest.mark.parametrize("read", READERS)
async def test_every_client_reads_a_chat_with_pauses(read: Callable[[bytes], Iterator[str]]) -> None:
    engine = FakeEngine(lambda _: ids_of("abc"), delay=3 * PAUSE)
    async with serving(
        engine, chat_template=ChatTemplate("{{ messages[0].content }}"), ping_interval=PAUSE
    ) as served:
        fields = {"messages": [{"role": "user", "content": "hi"}], "prompt": ..., "return_token_ids": True}
        response = await served.post("/v1/chat/completions", stream=True, **fields)
    *chunks, done = map(str, read(response.content))
    parsed = list(map(json.loads, chunks))
    assert done == "[DONE]"
    assert "".join(map(chat_text, parsed)) == "abc"
    roles = [choice["delta"].get("role") for chunk in parsed for choice in chunk["choices"]]
    assert [role for role in roles if role] == ["assistant"]
    assert sum("prompt_token_ids" in chunk for chunk in parsed) == 1


async def test_headers_and_comments_come_while_a_prompt_is_read() -> None:
    """No byte came for 44 s: clients and proxies gave up."""
    engine = FakeEngine(lambda _: ids_of("abc"), delay=1000)
    async with serving(engine, ping_interval=PAUSE) as served:
        call = served.asgi_call(stream=True)
        await until(lambda: call.data.count(": ping\n") >= 2)
        assert call.sent[0]["status"] == 200
        assert call.data == ": ping\n" * call.data.count(": ping\n")
        call.disconnect()
        await call.finished()
        assert served.engine.aborted


async def test_a_failure_after_the_first_comment_is_an_error_frame() -> None:
    engine = FakeEngine(lambda _: ids_of("abc"), delay=1000)
    async with serving(engine, ping_interval=PAUSE) as served:
        call = served.asgi_call(stream=True)
        await until(lambda: ": ping\n" in call.data)
        engine.fail()
        await call.finished()
        filler, error, done = by_every_blank_line(call.data.encode())
    assert json.loads(filler)["choices"][0]["text"] == ""
    assert json.loads(error)["error"]["code"] == "engine_error"
    assert "secret" not in call.data
    assert done == "[DONE]"


async def test_a_stream_that_is_busy_has_no_comments() -> None:
    """The library's own came every so often, however busy the stream."""
    engine = FakeEngine(lambda _: ids_of("x" * 60), delay=PAUSE / 10)
    async with serving(engine, ping_interval=PAUSE) as served:
        response = await served.post(stream=True)
    assert response.text.count(": ping") <= 2  # a busy machine may pause
    assert response.text.count("data: ") > 20


async def test_separators_of_lines_in_a_text_do_not_cut_a_frame() -> None:
    """Python's splitlines, and clients made of it, end a line at each of these."""
    said = "a\u2028b\u2029c\u0085d\x0b\x0c\x1c\x1e 世界"
    async with serving(FakeEngine(lambda _: ids_of(said)), ping_interval=PAUSE) as served:
        response = await served.post(stream=True)
    assert [line for line in response.text.splitlines() if line and not line.startswith("data: ")] == []
    assert "世" in response.text
    chunks = [json.loads(frame) for frame in by_blocks(response.content) if frame != "[DONE]"]
    assert "".join(map(text, chunks)) == said


SAYS = ChatTemplate("{{ messages[0].content }}")


async def test_a_pause_of_a_response_is_a_comment() -> None:
    """Its events are read by the standard alone: no frame in between is needed."""
    async with serving(
        FakeEngine(lambda _: ids_of("abc"), delay=3 * PAUSE), chat_template=SAYS, ping_interval=PAUSE
    ) as served:
        fields = {"prompt": ..., "max_tokens": ..., "input": "hi"}
        response = await served.post("/v1/responses", stream=True, **fields)
    assert response.content.count(b": ping\n") >= 3
    events = [json.loads(data) for data in by_the_standard(response.content)]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert (
        "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta") == "abc"
    )
    names = [event.event for event in SSEDecoder().iter_bytes(iter([response.content]))]
    assert names == [event["type"] for event in events]


async def test_a_pause_of_a_message_is_an_event() -> None:
    async with serving(
        FakeEngine(lambda _: ids_of("abc"), delay=3 * PAUSE), chat_template=SAYS, ping_interval=PAUSE
    ) as served:
        fields = {"prompt": ..., "messages": [{"role": "user", "content": "hi"}]}
        response = await served.post("/v1/messages", stream=True, **fields)
    frames = [part.split("\n") for part in response.text.split("\n\n") if part]
    assert all(len(frame) == 2 for frame in frames)
    events = [json.loads(data.removeprefix("data: ")) for _, data in frames]
    assert [name for name, _ in frames] == [f"event: {event['type']}" for event in events]
    assert events[0] == {"type": "ping"}
    assert sum(event["type"] == "ping" for event in events) >= 3
    texts = [event["delta"]["text"] for event in events if event["type"] == "content_block_delta"]
    assert "".join(texts) == "abc"


@pytest.mark.parametrize(
    ("path", "fields", "expected"),
    [
        ("/v1/responses", {"input": "hi"}, ["response.created", "response.in_progress", "response.failed"]),
        ("/v1/messages", {"max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}, ["error"]),
    ],
    ids=["responses", "messages"],
)
async def test_a_failure_after_the_first_ping_ends_a_stream_of_events(
    path: str, fields: dict[str, Json], expected: list[str]
) -> None:
    """Nothing of the answer had come."""
    engine = FakeEngine(lambda _: ids_of("abc"), delay=1000)
    async with serving(engine, chat_template=SAYS, ping_interval=PAUSE) as served:
        body = {"model": "default", "stream": True, **fields}
        asked = asyncio.create_task(served.client.post(path, json=body))
        await until(lambda: engine.requests)
        await asyncio.sleep(4 * PAUSE)
        engine.fail()
        response = await asked
    events = [json.loads(data) for data in by_the_standard(response.content)]
    assert [event["type"] for event in events if event["type"] != "ping"] == expected
    assert "the engine failed" in response.text
