"""What every route needs, made once by `create_app` and handed to routes by `Depends`."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from server.auth import TENANT
from server.batcher import RequestBatcher
from server.chat_template import ChatTemplate
from server.defaults import SamplingDefaults
from server.errors import ModelNotFoundError, UnsupportedMediaTypeError, quote
from server.lanes import Lanes
from server.metrics import Metrics
from server.output.formats import OutputFormats
from server.planning import Caller
from server.settings import Settings
from server.tokenizer import TextCodec


@dataclass(frozen=True)
class ServerState:
    """The parts of one server. `created` is when it started, in seconds since 1970."""

    batcher: RequestBatcher
    metrics: Metrics
    codec: TextCodec
    chat_template: ChatTemplate | None
    formats: OutputFormats
    defaults: SamplingDefaults
    lanes: Lanes
    settings: Settings
    created: int

    def caller(self, request: Request) -> Caller:
        """Who asks, and what that means for the request."""
        tenant = request.scope.get(TENANT, "")
        salt = "" if self.settings.share_prefix_cache else tenant
        return Caller(
            tenant,
            salt,
            may_set_priority=self.settings.allow_priority,
            max_stop_token_ids=self.settings.max_stop_token_ids,
        )

    def check_model(self, name: str) -> None:
        """Raises ModelNotFoundError unless `name` is served."""
        if name not in self.settings.model_names:
            raise ModelNotFoundError(name)


def server_state(request: Request) -> ServerState:
    """The parts of the server that `request` came to."""
    state = request.app.state.server
    assert isinstance(state, ServerState)
    return state


def require_json(request: Request) -> None:
    """A body of another type is refused before it is looked at."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise UnsupportedMediaTypeError(f"the content type must be application/json, not {quote(media_type)}")


State = Annotated[ServerState, Depends(server_state)]
