"""What those who run a server ask: /health, /ready, /metrics, /version."""

from fastapi import APIRouter
from starlette.responses import PlainTextResponse, Response

from server.metrics import CONTENT_TYPE
from server.models import AllModels
from server.openapi import errors
from server.version import package_version

router = APIRouter(tags=["operations"])


@router.get("/health")
async def health() -> dict[str, str]:
    """Whether the process lives; restarting it would not make the engine load faster."""
    return {"status": "ok"}


@router.get("/ready", responses=errors(503))
async def ready(models: AllModels) -> dict[str, str]:
    """Whether a request would be served now; 503 with the reason if not."""
    models.check_ready()
    return {"status": "ready"}


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(models: AllModels) -> Response:
    """Gauges, counters and histograms in Prometheus' text format."""
    return Response(models.families.render(), headers={"content-type": CONTENT_TYPE})


@router.get("/version")
async def get_version() -> dict[str, str]:
    """The server's version."""
    return {"version": package_version()}
