"""Wiring: engines, tokenizers and settings become an ASGI application. No globals, no decisions."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.routing import BaseRoute

from model.protocol import EngineClient
from server.auth import ApiKeyMiddleware, load_api_keys, open_paths
from server.chat_template import ChatTemplate
from server.defaults import NO_DEFAULTS, SamplingDefaults
from server.encodings import GzipBodyMiddleware
from server.error_answers import install_error_handlers
from server.hosts import HostMiddleware, allowed_hosts
from server.http_counts import StatusCountMiddleware
from server.logs import AccessLogMiddleware
from server.metrics import AnswerCounts
from server.middleware import (
    BodyLimitMiddleware,
    HeadMiddleware,
    OriginMiddleware,
    RequestIdMiddleware,
    RootPathMiddleware,
)
from server.models import Models
from server.openapi import install_document
from server.routes import chat, completions, messages, models, operations, playground, responses, tokenize
from server.served import ModelSource
from server.settings import Settings
from server.tokenizer import TextCodec
from server.version import package_version


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    served: Models = app.state.server
    await served.start()
    try:
        yield
    finally:
        await served.close()


def create_app(
    engine: EngineClient,
    tokenizer: TextCodec,
    settings: Settings,
    chat_template: ChatTemplate | None = None,
    defaults: SamplingDefaults = NO_DEFAULTS,
) -> FastAPI:
    """An application of one model; starts and closes `engine` with its lifespan."""
    source = ModelSource(settings, lambda: engine, lambda: tokenizer, chat_template, defaults)
    return create_app_of([source])


def create_app_of(sources: Sequence[ModelSource], *, starts_first: bool = True) -> FastAPI:
    """An application of several models; `starts_first`: the first one is loaded with its lifespan.

    Settings that are of the server are those of the first model.
    """
    app = FastAPI(
        title="SPEED",
        version=package_version(),
        lifespan=_lifespan,
        docs_url=None,  # the library's page loads its scripts from elsewhere; ours is among the routes
        redoc_url=None,
    )
    served = Models(sources, starts_first=starts_first)
    app.state.server, settings = served, served.settings
    install_error_handlers(app)
    routes = [*app.routes]
    for module in (completions, chat, responses, messages, tokenize, models, operations, playground):
        app.include_router(module.router)
        routes += module.router.routes
    keys = load_api_keys(settings)
    _add_middleware(app, settings, keys, routes)
    install_document(
        app,
        served.names,
        allow_unknown_fields=settings.allow_unknown_fields,
        open_paths=open_paths(settings) if keys else None,
    )
    return app


def _add_middleware(app: FastAPI, settings: Settings, keys: list[str], routes: Sequence[BaseRoute]) -> None:
    """From the inside out: what is added last sees a request first."""
    app.add_middleware(HeadMiddleware)
    app.add_middleware(BodyLimitMiddleware, limit=settings.body_limit)
    app.add_middleware(GzipBodyMiddleware)  # outside of the limit, which is that of the unpacked body
    if keys:
        app.add_middleware(ApiKeyMiddleware, keys=keys, open_paths=open_paths(settings))
    if settings.cors_origins:  # outside of the keys: a browser asks for permission without one
        app.add_middleware(OriginMiddleware, origins=settings.cors_origins)
    hosts = allowed_hosts(settings)
    if hosts is not None:
        app.add_middleware(HostMiddleware, names=hosts)
    if settings.access_log != "off":
        app.add_middleware(AccessLogMiddleware, as_json=settings.access_log == "json")
    app.add_middleware(RequestIdMiddleware)
    served: Models = app.state.server
    counts = AnswerCounts(served.families, [model.name for model in served])
    app.add_middleware(StatusCountMiddleware, routes=routes, counts=counts)
    app.add_middleware(RootPathMiddleware, root_path=settings.root_path)
