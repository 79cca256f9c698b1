"""Wiring: an engine, a tokenizer and settings become an ASGI application. No globals, no decisions."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from model.protocol import Engine
from server.batcher import RequestBatcher
from server.chat_template import ChatTemplate
from server.errors import install_error_handlers
from server.middleware import BodyLimitMiddleware, RequestIdMiddleware
from server.routes import chat, completions, models, operations, tokenize
from server.settings import Settings
from server.state import ServerState
from server.tokenizer import TextCodec


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    state: ServerState = app.state.server
    await state.batcher.start()
    try:
        yield
    finally:
        await state.batcher.close()


def create_app(
    engine: Engine, tokenizer: TextCodec, settings: Settings, chat_template: ChatTemplate | None = None
) -> FastAPI:
    """An application that starts and closes `engine` with its lifespan."""
    app = FastAPI(title="SPEED", version=operations.package_version(), lifespan=_lifespan)
    app.state.server = ServerState(
        batcher=RequestBatcher(engine, settings.max_queued_requests),
        codec=tokenizer,
        chat_template=chat_template,
        settings=settings,
        created=int(time.time()),
    )
    install_error_handlers(app)
    app.add_middleware(BodyLimitMiddleware, limit=settings.body_limit)
    app.add_middleware(RequestIdMiddleware)
    for module in (completions, chat, tokenize, models, operations):
        app.include_router(module.router)
    return app
