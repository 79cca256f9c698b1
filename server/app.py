"""Wiring: an engine, a tokenizer and settings become an ASGI application. No globals, no decisions."""

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.routing import BaseRoute

from model.protocol import EngineClient
from server.auth import ApiKeyMiddleware, load_api_keys, open_paths
from server.batcher import AdmissionLimits, RequestBatcher
from server.chat_template import ChatTemplate
from server.defaults import NO_DEFAULTS, SamplingDefaults
from server.encodings import GzipBodyMiddleware
from server.error_answers import install_error_handlers
from server.hosts import HostMiddleware, allowed_hosts
from server.http_counts import StatusCountMiddleware
from server.lanes import Lanes
from server.logs import AccessLogMiddleware
from server.metrics import Metrics
from server.middleware import (
    BodyLimitMiddleware,
    HeadMiddleware,
    OriginMiddleware,
    RequestIdMiddleware,
    RootPathMiddleware,
)
from server.openapi import install_document
from server.output.formats import PLAIN, OutputFormats, output_formats
from server.routes import chat, completions, messages, models, operations, playground, responses, tokenize
from server.settings import Settings, SettingsError
from server.state import ServerState
from server.tokenizer import TextCodec
from server.version import package_version


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    state: ServerState = app.state.server
    await state.batcher.start()
    try:
        yield
    finally:
        await state.batcher.close()
        state.lanes.close()


def create_app(
    engine: EngineClient,
    tokenizer: TextCodec,
    settings: Settings,
    chat_template: ChatTemplate | None = None,
    defaults: SamplingDefaults = NO_DEFAULTS,
) -> FastAPI:
    """An application that starts and closes `engine` with its lifespan."""
    app = FastAPI(
        title="SPEED",
        version=package_version(),
        lifespan=_lifespan,
        docs_url=None,  # the library's page loads its scripts from elsewhere; ours is among the routes
        redoc_url=None,
    )
    metrics = Metrics(engine, settings.model_names[0])
    limits = AdmissionLimits(settings.max_queued_requests, settings.max_queued_tokens)
    app.state.server = ServerState(
        batcher=RequestBatcher(engine, limits, metrics),
        metrics=metrics,
        codec=tokenizer,
        chat_template=chat_template,
        formats=_formats(settings, chat_template, tokenizer),
        defaults=defaults,
        lanes=Lanes(),
        settings=settings,
        created=int(time.time()),
    )
    install_error_handlers(app)
    routes = [*app.routes]
    for module in (completions, chat, responses, messages, tokenize, models, operations, playground):
        app.include_router(module.router)
        routes += module.router.routes
    keys = load_api_keys(settings)
    _add_middleware(app, settings, keys, routes)
    install_document(
        app,
        settings.model_names,
        allow_unknown_fields=settings.allow_unknown_fields,
        open_paths=open_paths(settings) if keys else None,
    )
    return app


def _formats(settings: Settings, template: ChatTemplate | None, codec: TextCodec) -> OutputFormats:
    """In which format the model writes thoughts and calls; raises SettingsError for a contradiction."""
    if template is None:
        return PLAIN
    if template.describes_tools and settings.tool_call_parser not in ("auto", "hermes"):
        raise SettingsError(
            "--tool-template generic asks the model for calls in the format hermes, which "
            f"--tool-call-parser {settings.tool_call_parser} does not read"
        )
    return output_formats(
        settings.reasoning_parser,
        settings.tool_call_parser,
        template=template.source,
        describes_tools=template.describes_tools,
        added_tokens=codec.added_tokens,
        special_tokens=codec.special_ids,
    )


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
    app.add_middleware(StatusCountMiddleware, routes=routes, metrics=app.state.server.metrics)
    app.add_middleware(RootPathMiddleware, root_path=settings.root_path)
