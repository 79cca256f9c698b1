"""What those who run a server ask: /health, /ready, /metrics, /version."""

from fastapi import APIRouter
from starlette.responses import PlainTextResponse, Response

from server.metrics import CONTENT_TYPE
from server.openapi import errors
from server.state import State
from server.version import package_version

router = APIRouter(tags=["operations"])


@router.get("/health")
async def health() -> dict[str, str]:
    """Whether the process lives; restarting it would not make the engine load faster."""
    return {"status": "ok"}


@router.get("/ready", responses=errors(503))
async def ready(state: State) -> dict[str, str]:
    """Whether a request would be served now; 503 with the reason if not."""
    state.batcher.check_ready()
    return {"status": "ready"}


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(state: State) -> Response:
    """Gauges, counters and histograms in Prometheus' text format."""
    return Response(state.metrics.render(), headers={"content-type": CONTENT_TYPE})


@router.get("/version")
async def get_version() -> dict[str, str]:
    """The server's version."""
    return {"version": package_version()}
