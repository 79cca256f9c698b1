"""GET / and /docs: the page to try the model with, and the API's description to read.

Their files are static and ask nobody but this server.
"""

from pathlib import Path

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse

FOLDER = Path(__file__).resolve().parent.parent / "playground"
NAMES = frozenset(path.name for path in FOLDER.iterdir() if path.suffix in {".css", ".html", ".js"})
# Nothing from elsewhere, no scripts within the page, no framing.
POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

router = APIRouter(include_in_schema=False)


@router.get("/")
async def page() -> FileResponse:
    """The page to try the model with."""
    return _file("index.html")


@router.get("/docs")
async def docs() -> FileResponse:
    """The API's description, drawn from /openapi.json."""
    return _file("docs.html")


@router.get("/playground/{name}")
async def part(name: str) -> FileResponse:
    """Scripts and styles of both."""
    if name not in NAMES:
        raise HTTPException(404)
    return _file(name)


def _file(name: str) -> FileResponse:
    return FileResponse(FOLDER / name, headers=HEADERS)
