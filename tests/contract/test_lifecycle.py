"""Clients that leave or don't read, engines that die: nothing hangs, nothing goes on running."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator

import pytest
from sse_starlette.sse import SendTimeoutError
from starlette.types import Message

from server import sse
from server.sse import Frame, StreamResponse, StreamStyle
from tests.contract.conftest import TEXT, serving, until
from tests.fake_engine import FakeEngine
from tests.loose import Field
from tests.text_tools import ids_of


def slow_engine(**options: Field) -> FakeEngine:
    return FakeEngine(lambda _: ids_of(TEXT), delay=0.01, **options)


def silent_engine() -> FakeEngine:
    return FakeEngine(lambda _: ids_of(TEXT), delay=1000)


def ids(engine: FakeEngine) -> list[str]:
    return sorted(request.request_id for request in engine.requests)


async def test_disconnect_during_a_stream_aborts_every_sequence() -> None:
    async with serving(slow_engine()) as served:
        call = served.asgi_call(stream=True, n=3)
        await call.first_frame()
        call.disconnect()
        await call.finished()
        assert sorted(served.engine.aborted) == ids(served.engine)
        assert len(served.engine.aborted) == 3
        assert served.app.state.server.batcher.num_in_flight == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_disconnect_before_the_first_token_aborts(stream: bool) -> None:
    async with serving(silent_engine()) as served:
        call = served.asgi_call(stream=stream, n=2)
        await until(lambda: len(served.engine.requests) == 2)
        call.disconnect()
        await call.finished()
        assert sorted(served.engine.aborted) == ids(served.engine)
        assert served.app.state.server.batcher.num_in_flight == 0


async def test_disconnect_of_one_client_leaves_others_alone() -> None:
    async with serving(slow_engine()) as served:
        call = served.asgi_call(stream=True)
        await call.first_frame()
        other = asyncio.create_task(served.post())
        await until(lambda: len(served.engine.requests) == 2)
        call.disconnect()
        assert (await other).json()["choices"][0]["text"] == TEXT


@pytest.mark.parametrize("stream", [False, True])
async def test_dying_engine_before_the_first_token_is_a_500(stream: bool) -> None:
    async with serving(silent_engine()) as served:
        task = asyncio.create_task(served.post(stream=stream, n=2))
        await until(lambda: len(served.engine.requests) == 2)
        served.engine.fail()
        response = await task
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "engine_error"
        assert "secret" not in response.text
        assert (await served.client.get("/ready")).status_code == 503
        assert (await served.client.get("/health")).status_code == 200


async def test_dying_engine_during_a_stream_is_an_error_frame() -> None:
    async with serving(slow_engine()) as served:
        call = served.asgi_call(stream=True)
        await call.first_frame()
        served.engine.fail()
        await call.finished()
        *_, error, done = [frame for frame in call.data.split("\n\n") if frame]
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "engine_error"
        assert done == "data: [DONE]"
        assert "secret" not in call.data


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("error", [None, RuntimeError("pipe")])
async def test_engine_that_falls_silent_leaves_nobody_waiting(
    stream: bool, error: RuntimeError | None
) -> None:
    async with serving(silent_engine()) as served:
        task = asyncio.create_task(served.post(stream=stream))
        await until(lambda: served.engine.requests)
        served.engine.break_off(error)
        assert (await task).status_code == 500
        ready = await served.client.get("/ready")
        assert (ready.status_code, ready.json()["error"]["code"]) == (503, "engine_unavailable")


async def test_slow_reader_gets_everything_in_few_chunks_and_blocks_nobody() -> None:
    engine = FakeEngine(lambda _: ids_of("x" * 90), delay=0.001)
    async with serving(engine) as served:
        call = served.asgi_call(stream=True)
        await call.first_frame()
        call.blocked = True
        assert (await served.post()).json()["choices"][0]["text"] == "x" * 90
        assert served.app.state.server.batcher.num_in_flight == 0
        num_frames = len(call.sent)
        assert num_frames < 20
        call.disconnect()
        await call.finished()


def _first() -> asyncio.Future[Frame]:
    future: asyncio.Future[Frame] = asyncio.get_running_loop().create_future()
    future.set_result("first")
    return future


async def test_client_that_takes_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[int] = []
    first = _first()
    response = StreamResponse(
        first,
        _never(),
        lambda: closed.append(1),
        StreamStyle(filler=None),
        shutdown_grace_period=1,
        ping_seconds=15,
        send_timeout=0.01,
    )

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    try:
        await response({"type": "http", "method": "POST"}, _wait, send)
    except SendTimeoutError:
        pytest.fail("a dead client is no error of the server")
    assert closed == [1]


async def test_stream_that_never_starts_frees_its_resources() -> None:
    """The generator's own finally does not run then."""
    closed: list[int] = []
    response = StreamResponse(
        _first(),
        _never(),
        lambda: closed.append(1),
        StreamStyle(filler=None),
        shutdown_grace_period=1,
        ping_seconds=15,
    )

    async def send(message: Message) -> None:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        await response({"type": "http", "method": "POST"}, _wait, send)
    assert closed == [1]


async def _never() -> AsyncIterator[Frame]:
    await asyncio.Event().wait()
    yield ""


async def _wait() -> Message:
    await asyncio.Event().wait()
    raise AssertionError("nobody sets it")


async def test_comments_while_nothing_comes() -> None:
    engine = FakeEngine(lambda _: ids_of("abc"), delay=0.05)
    async with serving(engine, ping_interval=0.01) as served:
        response = await served.post(stream=True)
    assert sse.COMMENT.decode() in response.text
    assert sse.COMMENT.decode() + "\n" not in response.text  # openai-go read an event without data there
    assert "\r" not in response.text


@pytest.mark.parametrize("stream", [False, True])
async def test_shutdown_ends_running_requests_with_abort(stream: bool) -> None:
    async with serving(silent_engine()) as served:
        batcher = served.app.state.server.batcher
        task = asyncio.create_task(served.post(stream=stream))
        await until(lambda: served.engine.requests)
        batcher.drain()
        assert (await served.client.get("/ready")).json()["error"]["code"] == "server_draining"
        assert (await served.post()).status_code == 503
        batcher.abort_all()
        response = await task
        assert response.status_code == 200
        assert '"finish_reason":"abort"' in response.text


@pytest.mark.parametrize("module", ["server.app", "cli.main", "server.serve"])
def test_torch_is_never_imported(module: str) -> None:
    """The API process starts in a second and stays small."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
