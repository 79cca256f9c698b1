"""The supervisor with a worker that has no model: whatever becomes of it, nobody waits for ever."""

import asyncio
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from signal import Signals

import psutil
import pytest

from model.options import WorkerOptions
from model.protocol import EngineUnavailableError, TokenEvent
from model.worker import EngineProcess, Patience, link
from tests.fake_worker import COMMAND, num_starts, request
from tests.loose import Field

REASONS = {"nonsense": "not_understood", "hang": "silent", "stop": "stopped"}
QUICK = Patience(first_pauses=(0.01, 0.02), pauses=(0, 0.01, 0.02), tick=0.05)
SECONDS = 60  # in which anything must have come about, however busy the machine is


@asynccontextmanager
async def running(
    folder: Path, fates: str = "serve", patience: Patience = QUICK, command: Sequence[str] = COMMAND
) -> AsyncIterator[EngineProcess]:
    """An engine whose workers meet these fates, started but perhaps not ready."""
    (folder / "fates").write_text(fates)
    engine = EngineProcess(WorkerOptions(model_path=str(folder / "fates")), patience, command)
    await engine.start()
    try:
        async with asyncio.timeout(SECONDS):
            yield engine
    finally:
        await engine.close()


async def until_ready(engine: EngineProcess) -> None:
    while engine.health().state != "ready":
        assert not engine.gave_up.is_set(), engine.health().reason
        await asyncio.sleep(0.01)


async def ends(engine: EngineProcess, *request_ids: str) -> dict[str, TokenEvent]:
    """The last event of each request, after these have been submitted."""
    for request_id in request_ids:
        engine.submit(request(request_id))
    found: dict[str, TokenEvent] = {}
    async for batch in engine.events():
        found |= {event.request_id: event for event in batch if event.finish_reason}
        if found.keys() >= set(request_ids):
            break
    return found


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("die", "exit code 3"),
        ("nonsense", "not understood"),
        ("hang", "has been silent for"),
        ("stop", "stopped by a signal"),
        ("orphan", "exit code 3"),
    ],
)
async def test_a_fault_answers_all_that_ran_and_another_worker_serves(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], fault: str, reason: str
) -> None:
    patience = Patience(silence=3, stopped=0.2, tick=0.05)
    async with running(tmp_path, patience=patience) as engine:
        await until_ready(engine)
        first = psutil.Process(engine.pid)
        found = await ends(engine, "wait", fault)
        assert {event.finish_reason for event in found.values()} == {"error"}
        assert all(reason in str(event.error) for event in found.values())
        assert engine.restarts == {REASONS.get(fault, "exited"): 1}
        assert not first.is_running()
        await until_ready(engine)
        assert (await ends(engine, "x"))["x"].finish_reason == "stop"
    if fault == "hang":
        assert "fake_worker.py" in capfd.readouterr().err  # where it hung


async def test_a_request_ends_once_and_no_stranger_gets_through(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:
        await until_ready(engine)
        engine.submit(request("twice"))
        engine.submit(request("last"))
        seen: list[str] = []
        async for batch in engine.events():
            seen += [event.request_id for event in batch]
            if "last" in seen:
                break
        assert seen == ["twice", "last"]


async def test_a_worker_that_dies_while_loading_is_tried_again_until_one_loads(tmp_path: Path) -> None:
    async with running(tmp_path, "die die serve") as engine:
        await until_ready(engine)
        assert num_starts(tmp_path / "fates") == 3
        assert (await ends(engine, "x"))["x"].finish_reason == "stop"


@pytest.mark.parametrize(
    ("fates", "starts"),
    [("die", 3), ("die_when_ready", 4), ("die die_when_ready die", 5)],
)
async def test_workers_that_die_again_and_again_are_given_up(tmp_path: Path, fates: str, starts: int) -> None:
    async with running(tmp_path, fates) as engine:
        await engine.gave_up.wait()
        assert num_starts(tmp_path / "fates") == starts
        assert engine.health().state == "dead"
        assert "exit code 3" in engine.health().reason
        assert "in a row" in engine.health().reason
        assert not engine.load_failed
        with pytest.raises(EngineUnavailableError):
            engine.submit(request("late"))


async def test_workers_that_die_after_they_answered_are_always_replaced(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:
        for _ in range(len(QUICK.pauses) + 1):
            await until_ready(engine)
            await ends(engine, "x", "die")
        await until_ready(engine)


async def test_a_model_that_is_refused_is_not_tried_again(tmp_path: Path) -> None:
    async with running(tmp_path, "refuse") as engine:
        await engine.gave_up.wait()
        assert engine.load_failed
        assert num_starts(tmp_path / "fates") == 1
        assert engine.health().reason == "no such model"


async def test_a_model_that_is_refused_for_a_while_after_it_was_served_is_tried_again(tmp_path: Path) -> None:
    async with running(tmp_path, "serve refuse serve") as engine:
        await until_ready(engine)
        await ends(engine, "die")
        await until_ready(engine)
        assert num_starts(tmp_path / "fates") == 3


async def test_a_load_that_never_ends_is_ended(tmp_path: Path) -> None:
    async with running(tmp_path, "hang", Patience(loading=2, first_pauses=(1000,), tick=0.05)) as engine:
        while engine.num_restarts == 0:
            await asyncio.sleep(0.01)
        assert "has not been loaded" in engine.health().reason


async def test_a_process_that_cannot_be_started_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spawn, failures = link._spawn, iter([OSError(24, "Too many open files"), OSError(11, "no fork")])

    def fails_at_first(*args: Field) -> subprocess.Popen[bytes]:
        for error in failures:
            raise error
        return spawn(*args)

    monkeypatch.setattr(link, "_spawn", fails_at_first)
    async with running(tmp_path) as engine:
        await until_ready(engine)
    assert [r.levelname for r in caplog.records if "Too many open files" in r.getMessage()] == ["ERROR"]


async def test_a_program_that_is_not_there_is_given_up_with_its_reason(tmp_path: Path) -> None:
    async with running(tmp_path, command=[str(tmp_path / "nothing")]) as engine:
        await engine.gave_up.wait()
        assert "can't be started" in engine.health().reason


async def test_descriptors_that_are_used_up_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pair of sockets is the first that is missed."""
    pair, failures = socket.socketpair, iter([OSError(24, "Too many open files")])

    def fails_at_first() -> tuple[socket.socket, socket.socket]:
        for error in failures:
            raise error
        return pair()

    monkeypatch.setattr(socket, "socketpair", fails_at_first)
    async with running(tmp_path) as engine:
        await until_ready(engine)


async def test_an_error_of_the_supervisor_itself_is_no_endless_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(EngineProcess, "_take", broken)
    async with running(tmp_path) as engine:
        await engine.gave_up.wait()
        assert engine.health().reason == "ZeroDivisionError: a bug"
        assert engine.pid is None


async def test_no_temporary_folder_is_needed_and_none_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A socket in a folder whose name was too long kept the engine loading for ever."""
    folder = tmp_path / ("long" * 50)
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    async with running(tmp_path) as engine:
        await until_ready(engine)
        assert not list(folder.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_signals_for_the_parent_never_end_a_worker(tmp_path: Path, number: Signals) -> None:
    """The first comes before the worker's interpreter runs."""
    async with running(tmp_path) as engine:
        while engine.pid is None:
            await asyncio.sleep(0)
        process = psutil.Process(engine.pid)
        process.send_signal(number)
        await until_ready(engine)
        process.send_signal(number)
        assert (await ends(engine, "x"))["x"].finish_reason == "stop"
        assert engine.num_restarts == 0


@pytest.mark.parametrize("fates", ["serve", "hang", "die", "linger"])
async def test_close_leaves_no_process_at_any_time(tmp_path: Path, fates: str) -> None:
    """Nor one that is given time to leave and doesn't; a pause between two workers ends as well."""
    patience = Patience(first_pauses=(1000,), tick=0.05)
    of_others = psutil.Process().children()  # such as helpers of libraries that other tests have started
    async with running(tmp_path, fates, patience) as engine:
        while not num_starts(tmp_path / "fates"):
            await asyncio.sleep(0.01)
        if fates == "linger":
            while engine.health().reason != "the engine process ended":
                await asyncio.sleep(0.01)
        workers = [child for child in psutil.Process().children() if child not in of_others]
        assert workers or fates == "die"
    assert not any(process.is_running() for process in workers)


async def test_the_worker_that_stands_by_takes_over_and_another_stands_by(tmp_path: Path) -> None:
    of_others = psutil.Process().children()
    options = WorkerOptions(model_path=str(tmp_path / "fates"))
    (tmp_path / "fates").write_text("serve")
    engine = EngineProcess(options, QUICK, COMMAND, has_standby=True)
    await engine.start()

    async def standing_by() -> psutil.Process:
        """The one worker that neither serves nor has served."""
        while True:
            workers = [child for child in psutil.Process().children() if child not in of_others]
            if len(workers) == 2 and engine.health().state == "ready":
                return next(child for child in workers if child.pid != engine.pid)
            await asyncio.sleep(0.01)

    async with asyncio.timeout(SECONDS):
        second = await standing_by()
        assert num_starts(tmp_path / "fates") == 1  # it has no options yet
        await ends(engine, "die")
        third = await standing_by()
        assert engine.pid == second.pid
        third.kill()
        third.wait()
        await ends(engine, "die")  # the one that should take over is gone: a new one does
        await standing_by()
        assert engine.pid != third.pid
        assert engine.restarts == {"exited": 2}
    await engine.close()
    assert not [child for child in psutil.Process().children() if child not in of_others]


async def test_the_next_worker_is_told_the_prices_of_the_one_before(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:
        await until_ready(engine)
        assert engine.options.prices == b"+"
        await ends(engine, "die")
        await until_ready(engine)
        assert engine.options.prices == b"++"  # each adds one to what it was told
