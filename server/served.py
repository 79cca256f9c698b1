"""One of the models of a server: what is known of it before it is loaded, and what serves it while it is.

`server.models` decides when a model is loaded and unloaded. Invariants: a model that is in use, by a request
or a sequence, is not idle; its metrics outlive its engines.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.protocol import EngineClient, EngineHealth, EngineInfo
from server.batcher import AdmissionLimits, RequestBatcher
from server.chat_template import ChatTemplate, load_chat_template
from server.defaults import NO_DEFAULTS, SamplingDefaults, load_defaults
from server.errors import ApiError, UnavailableError
from server.lanes import Lanes
from server.metrics import MetricFamilies, Metrics
from server.output.formats import PLAIN, OutputFormats, output_formats
from server.schemas.models import ModelStatus
from server.settings import Settings, SettingsError
from server.state import ServerState
from server.tokenizer import TextCodec, load_codec


@dataclass(frozen=True)
class ModelSource:
    """What a model is made of. Engine and tokenizer are made anew each time that it is loaded."""

    settings: Settings
    make_engine: Callable[[], EngineClient]
    load_codec: Callable[[], TextCodec]
    chat_template: ChatTemplate | None = None
    defaults: SamplingDefaults = NO_DEFAULTS


def model_source(settings: Settings, make_engine: Callable[[], EngineClient]) -> ModelSource:
    """A model from the files of its folder, `settings.model`, which may be read later, and engines for it.

    Raises SettingsError for a file that can't be used.
    """
    folder = Path(settings.model)
    template = load_chat_template(
        folder,
        settings.chat_template,
        content_format=settings.chat_template_content_format,
        trusts_content=settings.allow_special_tokens_in_content,
        describes_tools=settings.tool_template == "generic",
    )
    defaults = load_defaults(folder) if settings.generation_config == "auto" else NO_DEFAULTS

    def load() -> TextCodec:
        codec = load_codec(folder)
        if template is not None and not template.trusts_content:
            codec.prepare_for_chats()
        return codec

    return ModelSource(settings, make_engine, load, template, defaults)


class ServedModel:
    """A model with the names that it is served under. One event loop uses it."""

    def __init__(self, source: ModelSource, lanes: Lanes, families: MetricFamilies, created: int) -> None:
        self.source = source
        self.names = source.settings.model_names
        self.name = self.names[0]
        self.metrics = Metrics(None, self.name, families)
        self.state: ServerState | None = None  # while it is loaded, or loading its weights
        # The load that requests began and wait for; how it ended is its result.
        self.loading: asyncio.Task[ServerState | ApiError] | None = None
        self.holds_place = False  # one of those that may be loaded at once; until its worker has ended
        self.makes_way = False  # for a model that waits for a place: new requests wait for its next turn
        self.expected_until = (
            0.0  # seconds of time.monotonic: those it refused for want of a place come again
        )
        self.turn_ends = 0.0  # seconds of time.monotonic: until then it makes way only when it is idle
        self.failed_at: float | None = None  # seconds of time.monotonic, if its last load or life failed
        self.last_used = time.monotonic()
        self.num_waiting = 0  # requests that wait for it to be loaded
        self.num_lives = 0  # how often it was opened
        self._lanes = lanes
        self._created = created
        self._num_users = 0

    @property
    def status(self) -> ModelStatus:
        """What a client is told of it."""
        if self.loading is not None:
            return "loading"
        if self.state is None:
            return "unloaded" if self.failed_at is None else "failed"
        health = self.health().state
        if health == "dead":
            return "failed"
        return "ready" if health == "ready" else "loading"

    @property
    def info(self) -> EngineInfo | None:
        """Facts of the model, if it is loaded."""
        if self.state is None:
            return None
        try:
            return self.state.batcher.engine_info()
        except UnavailableError:
            return None

    def health(self) -> EngineHealth:
        """The state of its engine."""
        return EngineHealth(state="unloaded") if self.state is None else self.state.batcher.health()

    @property
    def num_in_flight(self) -> int:
        """Sequences that its engine runs or keeps waiting."""
        return 0 if self.state is None else self.state.batcher.num_in_flight

    @property
    def is_idle(self) -> bool:
        """Whether it is loaded and nobody would miss it; those who wait for its next turn would not."""
        if self.state is None or self._num_users > self.num_waiting or self.num_in_flight:
            return False
        is_wanted = self.loading is not None or self.num_waiting
        return not (is_wanted and not self.makes_way) and self.health().state != "loading"

    @contextmanager
    def used(self) -> Iterator[None]:
        """Keeps it from being unloaded; what is in flight does so by itself."""
        self._num_users += 1
        try:
            yield
        finally:
            self._num_users -= 1
            self.last_used = time.monotonic()

    def open(self, codec: TextCodec | None = None) -> ServerState:
        """Makes what serves it. The engine loads from `start` on. Raises SettingsError.

        `codec`: its tokenizer, if that was loaded already.
        """
        source, settings = self.source, self.source.settings
        engine = source.make_engine()
        codec = source.load_codec() if codec is None else codec
        formats = _formats(settings, source.chat_template, codec)
        limits = AdmissionLimits(settings.max_queued_requests, settings.max_queued_tokens)
        self.metrics.follow(engine)
        self.state = ServerState(
            batcher=RequestBatcher(engine, limits, self.metrics),
            metrics=self.metrics,
            codec=codec,
            chat_template=source.chat_template,
            formats=formats,
            defaults=source.defaults,
            lanes=self._lanes,
            settings=settings,
            created=self._created,
        )
        self.failed_at = None
        self.makes_way = False
        self.num_lives += 1
        return self.state

    def close(self) -> Coroutine[Any, Any, None]:
        """Serves nothing from this call on, and ends its engine when that is awaited.

        Whatever still runs ends with "abort". It may be opened again then.
        """
        state, self.state = self.state, None
        return self._end(state)

    async def _end(self, state: ServerState | None) -> None:
        try:
            if state is not None:
                await state.batcher.close()
        finally:
            self.metrics.follow(None)
            self.holds_place = False


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
