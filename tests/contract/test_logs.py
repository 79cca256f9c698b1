"""The access log: one line a request, whatever happens to it, and nothing of what was said."""

import json
import logging
from collections.abc import Iterator

import pytest

from server.logs import access_logger, configure_logging
from server.settings import Settings
from tests.contract.conftest import TEXT, serving
from tests.fake_engine import FakeEngine
from tests.text_tools import ids_of

SECRET = "swordfish"


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The messages of the access log."""
    found: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    monkeypatch.setattr(access_logger, "handlers", [Collector()])
    level = access_logger.level
    access_logger.setLevel(logging.INFO)
    yield found
    access_logger.setLevel(level)


async def test_json_line_of_an_answer(lines: list[str]) -> None:
    async with serving(access_log="json") as served:
        response = await served.client.post(
            "/v1/completions?q=swordfish",
            json={"model": "default", "prompt": SECRET, "max_tokens": 100},
            headers={"x-request-id": "abc", "authorization": f"Bearer {SECRET}"},
        )
    (line,) = lines
    record = json.loads(line)
    assert {name: record[name] for name in ("request_id", "method", "path", "status", "completed")} == {
        "request_id": response.headers["x-request-id"],
        "method": "POST",
        "path": "/v1/completions",
        "status": 200,
        "completed": True,
    }
    assert record["response_bytes"] == len(response.content)
    assert 0 < record["first_byte_seconds"] <= record["seconds"]
    assert SECRET not in line
    assert TEXT[:5] not in line


async def test_a_stream_that_was_left_is_logged_as_cut_off(lines: list[str]) -> None:
    async with serving(FakeEngine(lambda _: ids_of(TEXT), delay=0.01), access_log="json") as served:
        call = served.asgi_call(stream=True)
        await call.first_frame()
        call.disconnect()
        await call.finished()
    record = json.loads(lines[0])
    assert (record["status"], record["completed"]) == (200, False)


async def test_refusals_and_bugs_are_logged_with_their_status(
    lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(access_log="json", api_keys="k") as served:
        await served.client.get("/v1/models")
        served.client.headers["authorization"] = "Bearer k"
        await served.client.get("/nothing")
        monkeypatch.setattr(served.engine, "submit", None)  # a bug
        await served.post()
    assert [json.loads(line)["status"] for line in lines] == [401, 404, 500]


async def test_a_path_cannot_forge_a_line(lines: list[str]) -> None:
    async with serving(access_log="plain") as served:
        await served.client.get('/a%0a200 OK"' + "x" * 1000)
    (line,) = lines
    assert "\n" not in line
    assert len(line) < 400


async def test_probes_have_their_lines_at_level_debug_only(lines: list[str]) -> None:
    """26,000 lines a day in compose."""
    for level, num_lines in ((logging.INFO, 1), (logging.DEBUG, 5)):
        lines.clear()
        access_logger.setLevel(level)
        async with serving(root_path="/llm") as served:
            for path in ("/health", "/ready", "/metrics", "/llm/health", "/version"):
                assert (await served.client.get(path)).status_code == 200
        assert len(lines) == num_lines


async def test_no_line_if_none_is_wanted(lines: list[str]) -> None:
    async with serving(access_log="off") as served:
        await served.post()
    assert lines == []


def test_libraries_may_not_log_what_they_send() -> None:
    root = logging.getLogger()
    level = root.level
    try:
        configure_logging(Settings(log_level="debug"))
        root.setLevel(logging.DEBUG)
        assert not logging.getLogger("sse_starlette.sse").isEnabledFor(logging.DEBUG)
    finally:
        root.setLevel(level)
        access_logger.handlers.clear()
