"""The client of `speed bench serve`, against the application and against servers that fail."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import httpx
import pytest

from bench.load_client import PATHS, Json, LoadError, answer, connect, first_model, load
from tests.contract.conftest import Served, serving
from tests.fake_engine import FakeEngine
from tests.text_tools import ids_of

BODY: Json = {"model": "default", "prompt": "hi", "stream": True, "stream_options": {"include_usage": True}}
PATH = PATHS["completions"]
WORDS = "one two three"


def client_of(*frames: str, status: int = 200) -> httpx.AsyncClient:
    """A client of a server that answers everything by these lines."""
    text = "".join(f"{frame}\n\n" for frame in frames)
    transport = httpx.MockTransport(lambda _: httpx.Response(status, text=text))
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")


async def test_every_answer_is_read_whole_and_in_its_order() -> None:
    engine = FakeEngine(lambda request: ids_of(WORDS[: request.max_tokens]), delay=0.001)
    async with serving(engine) as served:
        bodies = [{**BODY, "max_tokens": tokens} for tokens in (9, 3, 6)]
        answers, duration = await load(served.client, PATH, bodies, [0.0, 0.001, 0.002], None)
    assert [one.error for one in answers] == ["", "", ""]
    assert [one.output_tokens for one in answers] == [9, 3, 6]
    assert all(WORDS.startswith(one.text) and one.text for one in answers)
    assert all(0 < one.ttft <= one.e2el <= duration for one in answers)
    assert all(sum(one.itl) <= one.e2el - one.ttft + 1e-6 for one in answers)
    assert answers[0].input_tokens == 2


async def test_no_more_than_the_limit_are_in_flight(served: Served) -> None:
    answers, _ = await load(served.client, PATH, [BODY] * 8, [0.0] * 8, 2)
    assert not any(one.error for one in answers)
    starts = sorted(one.started for one in answers)
    ends = sorted(one.started + one.e2el for one in answers)
    assert all(starts[index + 2] >= ends[index] for index in range(6))


@pytest.mark.parametrize(
    ("frames", "told"),
    [
        (['data: {"choices": [{"text": "a"}]}'], "before [DONE]"),
        (['data: {"error": {"message": "worker died"}}', "data: [DONE]"], "worker died"),
        (["data: {"], "not an answer of OpenAI's API"),
        (['data: {"usage": {"tokens": 1}}'], "not an answer of OpenAI's API"),
    ],
)
async def test_a_broken_stream_is_a_failure_with_its_reason(frames: list[str], told: str) -> None:
    async with client_of(*frames) as client:
        assert told in (await answer(client, PATH, BODY, 0.0)).error


async def test_refusals_and_servers_that_are_gone_are_failures() -> None:
    async with client_of("busy", status=503) as client:
        assert (await answer(client, PATH, BODY, 0.0)).error.startswith("503: busy")
    async with httpx.AsyncClient(base_url="http://127.0.0.1:9") as client:
        assert "ConnectError" in (await answer(client, PATH, BODY, 0.0)).error
        with pytest.raises(LoadError, match="speed serve"):
            await first_model(client)


async def test_chat_streams_and_comments_are_read() -> None:
    frames = [": waiting", 'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}']
    frames += [f'data: {{"choices": [{{"delta": {{"content": "{text}"}}}}]}}' for text in "ab"]
    frames += ['data: {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 2}}', "data: [DONE]"]
    async with client_of(*frames) as client:
        got = await answer(client, PATHS["chat"], BODY, 0.0)
    assert (got.error, got.text, got.input_tokens, got.output_tokens) == ("", "ab", 4, 2)
    assert len(got.itl) == 1
    assert got.tpot is not None


@asynccontextmanager
async def answering(*parts: bytes, seconds: float = 0.0) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server that sends these bytes, one part after the other, and waits before the last."""

    serving = set[asyncio.Task[None] | None]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(asyncio.current_task())
        try:
            await reader.readuntil(b"}")  # the end of a small body
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(seconds if part is parts[-2] else 0.001)
        finally:  # also where the client has gone, or the test is over
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with connect(f"http://127.0.0.1:{port}", "key", 0.5) as client:
            yield client
    # A connection that outlives the test's event loop would be told of in the next test.
    await asyncio.gather(*(task for task in serving if task is not None), return_exceptions=True)


HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
FRAME = b'data: {"choices": [{"text": "ab"}]}\n\n'


async def test_a_stream_is_read_however_it_is_cut() -> None:
    """By a transport of its own: heads, chunks and lines end anywhere."""
    stream = HEAD + b"%x\r\n%s\r\n" % (len(FRAME), FRAME) + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
    for size in (1, 7, 64, len(stream)):
        parts = [stream[start : start + size] for start in range(0, len(stream), size)]
        async with answering(b"", *parts) as client:
            got = await answer(client, PATH, {"a": 1}, 0.0)
        assert (got.error, got.text) == ("", "ab")


@pytest.mark.parametrize(
    ("parts", "seconds", "told"),
    [
        ([HEAD, b"24\r\nda"], 0.0, "closed the connection"),
        ([HEAD, b"zz\r\n"], 0.0, "RemoteProtocolError"),
        ([b"HTTP/1.1 503 Busy\r\ncontent-length: 4\r\n\r\n", b"busy"], 0.0, "503: busy"),
        ([HEAD, b"0\r\n\r\n"], 1.0, "nothing came for 0.5 s"),
    ],
)
async def test_a_connection_that_fails_says_how(parts: list[bytes], seconds: float, told: str) -> None:
    async with answering(*parts, seconds=seconds) as client:
        assert told in (await answer(client, PATH, {"a": 1}, 0.0)).error
