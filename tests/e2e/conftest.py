"""The real server as a process, on a free port, with a small checkpoint made for the tests."""

import gc
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.native import put_in_place
from tests.small_checkpoint import write_small_checkpoint

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS, STOP_SECONDS = 120, 30
put_in_place()  # servers started here run what users run

GREEDY = {"temperature": 0, "repetition_penalty": 1}  # a model may have other defaults


class ServerProcess:
    """`speed serve` with the given arguments; a context manager. `output` is there when it has ended."""

    def __init__(self, *arguments: str, stdout: int | None = None, port: int | None = None) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = port or probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-P", "-m", "cli.main", "serve", "--port", str(self.port)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "SPEED_THREADS": "1"}
        self.process = subprocess.Popen(
            [*command, "--log-level", "warning", *arguments],
            env=environment,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a test may send signals to the whole group
        )
        self.output = ("", "")

    def __enter__(self) -> "ServerProcess":
        self.wait_ready()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.process.stderr and self.process.stderr.read()
            try:
                if httpx.get(f"{self.url}/ready").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise TimeoutError("the server did not become ready")

    def stop(self) -> None:
        """SIGTERM, and no process may be left."""
        everyone = [
            psutil.Process(self.process.pid),
            *psutil.Process(self.process.pid).children(recursive=True),
        ]
        self.process.send_signal(signal.SIGTERM)
        self.output = self.process.communicate(timeout=STOP_SECONDS)
        _, alive = psutil.wait_procs(everyone, timeout=STOP_SECONDS)
        for process in alive:
            process.kill()
        assert not alive

    @property
    def worker(self) -> psutil.Process:
        """The engine's process."""
        children = psutil.Process(self.process.pid).children()
        return next(child for child in children if "model.worker" in child.cmdline())

    def complete(self, **fields: object) -> httpx.Response:
        """A completion, greedy unless `fields` say otherwise."""
        body = {"model": "default", "prompt": "The house has", **GREEDY, **fields}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=120)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def gauges(server: ServerProcess) -> dict[str, float]:
    """Samples of /metrics by name, those of all labels added up."""
    found: dict[str, float] = {}
    for line in httpx.get(f"{server.url}/metrics").text.splitlines():
        if line.startswith("speed:"):
            name = line.split("{")[0]
            found[name] = found.get(name, 0.0) + float(line.rsplit(" ", 1)[1])
    return found


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder's name is the one that it is served under."""
    return write_small_checkpoint(tmp_path_factory.mktemp("checkpoints") / "default")


@pytest.fixture(scope="session")
def server(checkpoint: Path) -> Iterator[ServerProcess]:
    names = ("--served-model-name", "default,alias")
    with ServerProcess(str(checkpoint), *names, "--tool-template", "generic") as running:
        yield running


@pytest.fixture(autouse=True, scope="module")
def _no_leaks() -> Iterator[None]:
    """A socket that a module leaves open is told of at its end, not while some later test runs."""
    yield
    gc.collect()
