"""A real uvicorn on a free port: what clients see while the server shuts down."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from model.options import WorkerOptions
from model.worker import EngineProcess, Patience
from server.announcer import Announcer
from server.app import create_app
from server.serve import ENGINE_FAILED, DrainingServer, EngineServer, uvicorn_config
from server.settings import Settings
from tests.contract.conftest import TEXT, until
from tests.fake_engine import FakeEngine
from tests.loose import Field
from tests.text_tools import byte_codec, ids_of

BODY = {"model": "default", "prompt": "hi", "max_tokens": 100}


@asynccontextmanager
async def running(
    engine: FakeEngine, drain_timeout: float, **options: Field
) -> AsyncIterator[tuple[DrainingServer, str]]:
    settings = Settings(port=0, log_level="critical", **options)
    app = create_app(engine, byte_codec(), settings)
    server = DrainingServer(uvicorn_config(app, settings), app.state.server.batcher, drain_timeout)
    task = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield server, f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        async with asyncio.timeout(10):
            await task


@pytest.mark.parametrize("stream", [False, True])
async def test_running_requests_finish_and_new_ones_get_503(stream: bool) -> None:
    engine = FakeEngine(lambda _: ids_of(TEXT), delay=0.02)
    async with running(engine, 10) as (server, url), httpx.AsyncClient(base_url=url) as client:
        task = asyncio.create_task(client.post("/v1/completions", json=BODY | {"stream": stream}))
        await until(lambda: engine.requests)
        server.should_exit = True
        await asyncio.sleep(0.2)
        refused = await client.post("/v1/completions", json=BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_draining")
        assert (await client.get("/ready")).status_code == 503
        assert (await client.get("/health")).status_code == 200
        assert '"finish_reason":"length"' in (await task).text
        assert engine.aborted == []


@pytest.mark.parametrize("stream", [False, True])
async def test_requests_that_take_too_long_end_with_abort(stream: bool) -> None:
    engine = FakeEngine(lambda _: ids_of(TEXT), delay=1000)
    async with running(engine, 0.2) as (server, url), httpx.AsyncClient(base_url=url) as client:
        task = asyncio.create_task(client.post("/v1/completions", json=BODY | {"stream": stream}))
        await until(lambda: engine.requests)
        server.should_exit = True
        response = await task
        assert response.status_code == 200
        assert '"finish_reason":"abort"' in response.text


async def test_client_that_closes_its_connection_is_noticed() -> None:
    engine = FakeEngine(lambda _: ids_of(TEXT), delay=0.02)
    async with running(engine, 10) as (_, url), httpx.AsyncClient(base_url=url) as client:
        async with client.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as response:
            await anext(response.aiter_bytes())
        await until(lambda: engine.aborted)


async def test_an_engine_that_cannot_be_started_ends_the_server_with_a_status_of_its_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It said "loading" for ever, and exit status 0 when somebody lost patience."""
    engine = EngineProcess(WorkerOptions(model_path="x"), Patience(first_pauses=(1000,)), ["/no/program"])
    settings = Settings(port=0, log_level="critical")
    app = create_app(engine, byte_codec(), settings)
    announcer = Announcer("default", "http://127.0.0.1")
    server = EngineServer(uvicorn_config(app, settings), app.state.server.batcher, 0, engine, announcer)
    task = asyncio.create_task(server.serve())
    await until(lambda: server.started and engine.health().num_failures == 1)
    port = server.servers[0].sockets[0].getsockname()[1]
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        ready = await client.get("/ready")
        assert ready.status_code == 503
        assert "failed and is started again (1 failure in a row)" in ready.text
        assert (await client.get("/health")).status_code == 200
    engine._give_up("no program")
    async with asyncio.timeout(10):
        await task
    assert server.exit_status == ENGINE_FAILED
    assert capsys.readouterr().err.count("the engine is given up: no program") == 1
