"""An application over a fake engine, and clients: httpx's, and one that speaks ASGI by hand."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

import httpx
import pytest
from fastapi import FastAPI
from starlette.types import Message

from server.app import create_app
from server.chat_template import ChatTemplate
from server.defaults import NO_DEFAULTS, SamplingDefaults
from server.serve import DrainingServer, uvicorn_config
from server.settings import Settings
from server.tokenizer import TextCodec
from tests.fake_engine import FakeEngine
from tests.loose import Field, Json
from tests.text_tools import byte_codec, ids_of

TEXT = "Grüße, 世界! 🙂 The end.\nAnd more."


class Served:
    """A running application with its engine and a client."""

    def __init__(
        self,
        engine: FakeEngine,
        settings: Settings,
        chat_template: ChatTemplate | None = None,
        codec: TextCodec | None = None,
        defaults: SamplingDefaults = NO_DEFAULTS,
    ) -> None:
        self.engine = engine
        self.app = create_app(engine, codec or byte_codec(), settings, chat_template, defaults)
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=10)

    async def post(self, path: str = "/v1/completions", **fields: Json) -> httpx.Response:
        """A field that is `...` is left out."""
        body = {"model": "default", "prompt": "hi", "max_tokens": 100} | fields
        # json.dumps, not httpx's json=: the tests send NaN.
        content = json.dumps({name: value for name, value in body.items() if value is not ...})
        return await self.client.post(path, content=content, headers={"content-type": "application/json"})

    async def chunks(self, **fields: Json) -> list[Json]:
        """The frames of a streamed completion."""
        return self.frames(await self.post(stream=True, **fields))

    def frames(self, response: httpx.Response) -> list[Json]:
        """The frames of a stream, checked for their form and parsed; without [DONE]."""
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        assert "\r" not in response.text
        frames = [part for part in response.text.split("\n\n") if part and not part.startswith(":")]
        assert all(frame.startswith("data: ") and "\n" not in frame for frame in frames)
        assert frames[-1] == "data: [DONE]"
        return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-1]]

    def asgi_call(self, **fields: Json) -> "AsgiCall":
        body = {"model": "default", "prompt": "hi", "max_tokens": 100} | fields
        return AsgiCall(self.app, json.dumps(body).encode())


class AsgiCall:
    """One POST /v1/completions at the level of receive and send."""

    def __init__(self, app: FastAPI, body: bytes) -> None:
        self.sent: list[Message] = []
        self.arrived = asyncio.Event()
        self.blocked = False  # a client that reads nothing
        self._disconnect = asyncio.Event()
        self._messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": "/v1/completions",
            "raw_path": b"/v1/completions",
            "root_path": "",
            "scheme": "http",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("test", 80),
        }
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    def disconnect(self) -> None:
        self._disconnect.set()

    @property
    def data(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()

    async def first_frame(self) -> None:
        async with asyncio.timeout(5):
            await self.arrived.wait()

    async def finished(self) -> None:
        async with asyncio.timeout(5):
            await self.task

    async def _receive(self) -> Message:
        if self._messages:
            return self._messages.pop(0)
        await self._disconnect.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if self.blocked:
            await asyncio.Event().wait()
        self.sent.append(message)
        if message["type"] == "http.response.body":
            self.arrived.set()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


@asynccontextmanager
async def serving(
    engine: FakeEngine | None = None,
    *,
    chat_template: ChatTemplate | None = None,
    codec: TextCodec | None = None,
    defaults: SamplingDefaults = NO_DEFAULTS,
    **options: Field,
) -> AsyncIterator[Served]:
    engine = engine or FakeEngine(lambda _: ids_of(TEXT))
    served = Served(engine, Settings(**options), chat_template, codec, defaults)
    async with served.app.router.lifespan_context(served.app), served.client:
        yield served


@contextmanager
def serving_thread(engine: FakeEngine, chat_template: ChatTemplate | None = None) -> Iterator[str]:
    """The address of a server in a thread of its own, for clients that need a socket."""
    options = Settings(port=0, log_level="critical")
    app = create_app(engine, byte_codec(), options, chat_template)
    server = DrainingServer(uvicorn_config(app, options), app.state.server.batcher, 1)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving() as one:
        yield one
