"""What serves a request to a model, handed to routes by `Depends`.

Made when the model is loaded. Which model a request means is found out by its body (`server.intake`), so that
no route knows whether there are several.
"""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from server.auth import TENANT
from server.batcher import RequestBatcher
from server.chat_template import ChatTemplate
from server.defaults import SamplingDefaults
from server.errors import UnsupportedMediaTypeError, quote
from server.lanes import Lanes
from server.metrics import Metrics
from server.output.formats import OutputFormats
from server.planning import Caller
from server.settings import Settings
from server.tokenizer import TextCodec

# In the scope of a request, once it is known which model it means: the model's main name, and its state.
MODEL = "speed.model"
STATE = "speed.state"


@dataclass(frozen=True)
class ServerState:
    """The parts that serve one loaded model; `lanes` are those of the server.

    `created` is when the server started, in seconds since 1970.
    """

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


def server_state(request: Request) -> ServerState:
    """What serves the model that the body of `request` names."""
    state = request.scope[STATE]
    assert isinstance(state, ServerState)
    return state


def require_json(request: Request) -> None:
    """A body of another type is refused before it is looked at."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise UnsupportedMediaTypeError(f"the content type must be application/json, not {quote(media_type)}")


State = Annotated[ServerState, Depends(server_state)]
