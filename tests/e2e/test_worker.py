"""The engine process without a web server: messages, aborts, load failures, shutdown."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from model.options import WorkerOptions
from model.protocol import EngineUnavailableError, GenerationRequest, SamplingParams, TokenEvent
from model.worker import EngineProcess
from tests.small_checkpoint import LOOPS


def request(request_id: str, max_tokens: int = 8) -> GenerationRequest:
    return GenerationRequest(
        request_id=request_id,
        prompt_token_ids=[5, 6, 7],
        max_tokens=max_tokens,
        sampling=SamplingParams(temperature=0),
        ignore_eos=True,
    )


@asynccontextmanager
async def running(checkpoint: Path) -> AsyncIterator[EngineProcess]:
    engine = EngineProcess(WorkerOptions(model_path=str(checkpoint), threads=1))
    await engine.start()
    try:
        async with asyncio.timeout(120):
            while engine.health().state == "loading":
                await asyncio.sleep(0.02)
        yield engine
    finally:
        await engine.close()


async def answer(engine: EngineProcess, count: int) -> dict[str, list[TokenEvent]]:
    """Events by request until `count` requests have ended."""
    events: dict[str, list[TokenEvent]] = {}
    async with asyncio.timeout(60):
        async for batch in engine.events():
            for event in batch:
                events.setdefault(event.request_id, []).append(event)
            if sum(e.finish_reason is not None for es in events.values() for e in es) == count:
                break
    return events


async def test_requests_are_answered_together_and_aborted_alone(checkpoint: Path) -> None:
    async with running(checkpoint) as engine:
        assert engine.info.num_loops == LOOPS
        engine.submit(request("short"))
        engine.submit(request("long", 900))
        engine.abort("long")
        engine.abort("unknown")
        events = await answer(engine, 2)
        assert sum(len(e.token_ids) for e in events["short"]) == 8
        assert events["long"][-1].finish_reason == "abort"
        assert sum(len(e.token_ids) for e in events["long"]) < 900


async def test_close_answers_what_is_in_flight_and_leaves_no_process(checkpoint: Path) -> None:
    async with running(checkpoint) as engine:
        assert engine.pid is not None
        worker = psutil.Process(engine.pid)
        engine.submit(request("long", 900))
        await engine.close()
        events = [event async for batch in engine.events() for event in batch]
        assert [e.finish_reason for e in events if e.finish_reason] == ["abort"]
        assert not worker.is_running()
        with pytest.raises(EngineUnavailableError):
            engine.submit(request("late"))


async def test_a_model_that_cannot_be_loaded_is_said_so_and_not_tried_again(tmp_path: Path) -> None:
    engine = EngineProcess(WorkerOptions(model_path=str(tmp_path / "nothing")))
    await engine.start()
    async with asyncio.timeout(60):
        await engine.gave_up.wait()
    assert engine.load_failed
    assert engine.health().state == "dead"
    assert "is not a local folder" in engine.health().reason
    assert engine.num_restarts == 0
    await engine.close()
