"""What the engine refuses after it has taken a request, and grammars that could not be checked."""

import asyncio
import logging

import pytest

from model.grammar.check import CheckUnavailableError
from model.protocol import GenerationRequest, Grammar, TokenEvent
from server import guides, lanes
from tests.contract.conftest import serving
from tests.fake_engine import STATS, FakeEngine
from tests.text_tools import ids_of

REASON = "the grammar is too complex to go on behind this text (lexer error: too many states)"


class RefusingEngine(FakeEngine):
    """Gives two tokens, and refuses to go on."""

    async def _run(self, request: GenerationRequest) -> None:
        event = TokenEvent(request_id=request.request_id, token_ids=ids_of("{ "))
        self._events.put_nowait(event)
        await asyncio.sleep(0)
        last = TokenEvent(
            request_id=request.request_id,
            finish_reason="error",
            stats=STATS,
            error=REASON,
            is_refusal=True,
        )
        self._running.pop(request.request_id, None)
        self._events.put_nowait(last)


def refusing() -> RefusingEngine:
    return RefusingEngine(lambda _: [])


async def test_what_the_engine_refuses_is_a_400_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    """A grammar whose lexer exploded was a 500, and an error of the server in its log."""
    async with serving(refusing()) as served:
        response = await served.post(structured_outputs={"regex": "a+"})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "request_refused")
    assert error["type"] == "invalid_request_error"
    assert REASON in error["message"]
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_a_stream_that_is_refused_ends_with_a_frame_that_says_why() -> None:
    async with serving(refusing()) as served:
        frames = await served.chunks(structured_outputs={"regex": "a+"})
    assert frames[0]["choices"][0]["text"] == "{ "
    assert frames[-1]["error"]["code"] == "request_refused"
    assert REASON in frames[-1]["error"]["message"]


async def test_a_grammar_that_cannot_be_checked_is_a_503_to_try_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The machine had no process left for it: that is nobody's fault, and no verdict."""

    def fails(grammar: Grammar) -> None:
        raise CheckUnavailableError("no more processes")

    async with serving(refusing()) as served:
        monkeypatch.setattr(guides, "check_grammar", fails)
        response = await served.post(structured_outputs={"regex": "a+"})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (503, "check_unavailable")
    assert "structured_outputs" in error["message"]
    assert "processes" not in error["message"]
    assert int(response.headers["retry-after"]) > 0


async def test_only_so_many_grammars_are_checked_at_a_time_and_prompts_do_not_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each takes a process: forty at a time held every thread that prompts are encoded in."""
    running, most = 0, 0
    release = asyncio.Event()
    loop = asyncio.get_running_loop()

    async def wait() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await release.wait()
        running -= 1

    monkeypatch.setattr(
        guides, "check_grammar", lambda _: asyncio.run_coroutine_threadsafe(wait(), loop).result()
    )
    async with serving(FakeEngine(lambda _: ids_of("done"))) as served:
        asked = [
            asyncio.create_task(served.post(structured_outputs={"regex": f"a{{{i}}}"})) for i in range(45)
        ]
        while running < lanes.MAX_GRAMMAR_CHECKS:
            await asyncio.sleep(0)
        free = await served.post()
        release.set()
        answers = await asyncio.gather(*asked)
    assert free.status_code == 200
    assert most == lanes.MAX_GRAMMAR_CHECKS
    assert {answer.status_code for answer in answers} <= {200, 429}
