"""GET /: one page to try the model with. Its files are static and ask nobody but this server."""

from pathlib import Path

from fastapi import APIRouter
from starlette.responses import FileResponse

FOLDER = Path(__file__).resolve().parent.parent / "playground"
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


def _file(name: str) -> FileResponse:
    return FileResponse(FOLDER / name, headers=HEADERS)


@router.get("/")
async def page() -> FileResponse:
    """The page."""
    return _file("index.html")


@router.get("/playground/app.js")
async def script() -> FileResponse:
    """What the page does."""
    return _file("app.js")


@router.get("/playground/style.css")
async def style() -> FileResponse:
    """How it looks."""
    return _file("style.css")
