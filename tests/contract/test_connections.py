"""A real uvicorn with our protocol: what clients take before a request is whole; old and odd clients."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import pytest

from server.connections import MAX_PIPELINED
from server.serve import DrainingServer
from tests.contract.conftest import until
from tests.contract.test_shutdown import running
from tests.fake_engine import FakeEngine
from tests.text_tools import ids_of

TEXT = "abc"
BODY = json.dumps({"model": "default", "prompt": "hi", "max_tokens": 3}).encode()
STREAM = json.dumps({"model": "default", "prompt": "hi", "max_tokens": 3, "stream": True}).encode()
HEAD = b"Host: localhost\r\nContent-Type: application/json\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
# What Java's HttpClient, and by it LangChain4j and JetBrains' plugins, send with every request.
UPGRADE = b"Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\nUpgrade: h2c\r\n"


def post(body: bytes, headers: bytes = b"", version: bytes = b"1.1") -> bytes:
    length = b"Content-Length: %d\r\n\r\n" % len(body)
    return b"POST /v1/completions HTTP/" + version + b"\r\n" + HEAD + headers + length + body


class Client:
    """A connection, byte by byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self) -> tuple[int, dict[str, list[str]], bytes]:
        """Status, headers and body of an answer that announces its length or ends with the connection."""
        async with asyncio.timeout(20):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
            headers: dict[str, list[str]] = {}
            for line in head.splitlines()[1:-1]:
                name, _, value = line.partition(": ")
                headers.setdefault(name, []).append(value)
            if "content-length" in headers:
                body = await self.reader.readexactly(int(headers["content-length"][0]))
            else:
                body = await self.reader.read()
        return int(head.split()[1]), headers, body

    async def is_closed(self) -> None:
        """Waits until it is."""
        async with asyncio.timeout(20):
            with suppress(ConnectionError):
                assert not await self.reader.read()


@asynccontextmanager
async def served(
    engine: FakeEngine | None = None, **options: object
) -> AsyncIterator[tuple[Callable[[], Awaitable[Client]], DrainingServer]]:
    """Something that opens connections, and the server."""
    writers: list[asyncio.StreamWriter] = []
    async with running(engine or FakeEngine(lambda _: ids_of(TEXT)), 1, **options) as (server, url):

        async def connect() -> Client:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
            writers.append(writer)
            return Client(reader, writer)

        yield connect, server
        for writer in writers:
            writer.close()
            await asyncio.gather(writer.wait_closed(), return_exceptions=True)


def error_of(answer: tuple[int, dict[str, list[str]], bytes]) -> tuple[int, str]:
    status, headers, body = answer
    assert headers["connection"] == ["close"]
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return status, error["code"]


@pytest.mark.parametrize(
    "head",
    [
        b"".join(b"X-%d: %s\r\n" % (number, b"a" * 100) for number in range(100)),
        b"".join(b"X-%d: 1\r\n" % number for number in range(40)),
        b"X: " + b"a" * 9000,
        b"\r\n" * 5000,
    ],
    ids=["bytes", "count", "one line", "blank lines"],
)
@pytest.mark.parametrize("piece", [100, 2**20])
async def test_a_head_beyond_the_limit_is_431_however_it_is_cut(head: bytes, piece: int) -> None:
    """Headers of 300 MiB took 325 MB of memory without a key."""
    async with served(max_header_bytes=8000, max_header_count=32) as (connect, _):
        client = await connect()
        data = head if head.startswith(b"\r\n") else b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + head
        for start in range(0, len(data), piece):
            await client.send(data[start : start + piece])
            await asyncio.sleep(0)
        assert error_of(await client.answer()) == (431, "headers_too_large")


async def test_a_head_at_the_limits_passes_and_neither_bodies_nor_further_requests_count() -> None:
    async with served(max_header_bytes=1024, max_header_count=16) as (connect, _):
        client = await connect()
        fields = b"".join(b"X-%d: 1\r\n" % number for number in range(15))
        body = json.dumps({"model": "default", "prompt": "hi", "user": "x" * 900}).encode()
        await client.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + fields + b"\r\n" + post(body) * 5)
        for _ in range(6):
            assert (await client.answer())[0] == 200


async def test_trailers_count_as_headers() -> None:
    async with served(max_header_bytes=1024) as (connect, _):
        client = await connect()
        start = b"POST /v1/completions HTTP/1.1\r\n" + HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n"
        await client.send(start)
        await asyncio.sleep(0.05)
        await client.send(b"X: " + b"a" * 4000)
        assert error_of(await client.answer()) == (431, "headers_too_large")


@pytest.mark.parametrize("sent", [b"GET /hea", b"GET /health HTTP/1.1\r\nX: ", post(BODY)[:-1]])
async def test_a_request_that_is_not_whole_in_time_is_408(sent: bytes) -> None:
    engine = FakeEngine(lambda _: ids_of(TEXT))
    async with served(engine, request_timeout=0.2) as (connect, server):
        client = await connect()
        await client.send(sent)
        assert error_of(await client.answer()) == (408, "request_timeout")
        await until(lambda: not server.server_state.tasks)
        assert engine.requests == []


async def test_a_connection_without_a_request_is_closed_without_a_word() -> None:
    async with served(request_timeout=0.1) as (connect, _):
        await (await connect()).is_closed()


async def test_the_time_is_that_of_the_request_and_not_of_its_answer() -> None:
    engine = FakeEngine(lambda _: ids_of(TEXT), delay=0.2)
    async with served(engine, request_timeout=0.1) as (connect, _):
        client = await connect()
        for _ in range(2):
            await client.send(post(BODY))
            assert (await client.answer())[0] == 200


async def test_a_full_server_gives_up_who_waits_longest_for_a_new_client() -> None:
    """400 half-sent requests stayed open for ever; with all descriptors used up nobody got in."""
    async with served(max_connections=4) as (connect, _):
        halves = [await connect() for _ in range(4)]
        for half in halves:
            await half.send(b"GET /health HTTP/1.1\r\n")
        other = await connect()
        await other.send(HEALTH)
        assert (await other.answer())[0] == 200
        await halves[0].is_closed()
        await halves[1].send(b"Host: localhost\r\n\r\n")
        assert (await halves[1].answer())[0] == 200


async def test_a_server_full_of_running_requests_says_so() -> None:
    engine = FakeEngine(lambda _: ids_of(TEXT), delay=1000)
    async with served(engine, max_connections=2) as (connect, _):
        for _ in range(2):
            await (await connect()).send(post(BODY))
        await until(lambda: len(engine.requests) == 2)
        status, headers, body = await (await connect()).answer()
        assert (status, json.loads(body)["error"]["code"]) == (503, "too_many_connections")
        assert headers["retry-after"]
        assert engine.aborted == []


async def test_many_requests_sent_ahead_end_the_connection() -> None:
    async with served(FakeEngine(lambda _: ids_of(TEXT), delay=1000)) as (connect, _):
        client = await connect()
        await client.send(post(BODY) + HEALTH * (MAX_PIPELINED + 1))
        await client.is_closed()


@pytest.mark.parametrize("cut", [0, 1, 60, 300])
@pytest.mark.parametrize("body", [BODY, STREAM])
async def test_an_offer_of_http_2_is_answered_over_http_1_with_the_body_intact(body: bytes, cut: int) -> None:
    """The body was lost, so that every request of a Java client was 400."""
    async with served() as (connect, _):
        client = await connect()
        data = post(body, UPGRADE)
        await client.send(data[:cut])
        await asyncio.sleep(0.01)
        await client.send(data[cut:])
        head = await client.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        end = b"data: [DONE]\n\n\r\n0\r\n\r\n" if body is STREAM else b"}}"
        await client.reader.readuntil(end)
        for offer in (UPGRADE, b""):  # the connection goes on, with and without another offer
            await client.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + offer + b"\r\n")
            assert (await client.answer())[0] == 200


async def test_chunked_bodies_behind_an_offer_and_requests_behind_that() -> None:
    async with served() as (connect, _):
        client = await connect()
        chunked = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
        await client.send((b"POST /v1/completions HTTP/1.1\r\n" + HEAD + UPGRADE + chunked) * 3 + HEALTH)
        for _ in range(4):
            assert (await client.answer())[0] == 200


@pytest.mark.parametrize("body", [BODY, STREAM])
async def test_http_1_0_gets_no_chunks_and_one_connection_header(body: bytes) -> None:
    async with served() as (connect, _):
        client = await connect()
        await client.send(post(body, version=b"1.0"))
        status, headers, answer = await client.answer()
        assert status == 200
        assert headers["connection"] == ["close"]
        assert "transfer-encoding" not in headers
        assert answer.endswith(b"data: [DONE]\n\n" if body is STREAM else b"}}")
        assert answer.startswith(b"data: {" if body is STREAM else b"{")
        await client.is_closed()


@pytest.mark.parametrize(
    "sent", [b"nonsense\r\n\r\n", b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n", b"\x16\x03\x01"]
)
async def test_what_is_no_request_is_400_in_the_shape_of_all_errors(sent: bytes) -> None:
    async with served() as (connect, _):
        client = await connect()
        await client.send(sent)
        assert error_of(await client.answer()) == (400, "bad_request")
