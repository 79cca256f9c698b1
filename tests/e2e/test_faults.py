"""What is done to a running server from outside: signals to its group, the death of either process."""

import os
import signal
from pathlib import Path

import httpx
import psutil

from tests.e2e.conftest import ServerProcess

BODY = {"model": "default", "prompt": "The house has", "max_tokens": 400, "ignore_eos": True, "stream": True}


def test_a_signal_to_the_whole_group_lets_running_requests_finish(checkpoint: Path) -> None:
    """As systemd, `timeout` and a shell send it. The worker died of it, and another was started meanwhile."""
    server = ServerProcess(str(checkpoint), "--shutdown-timeout", "60")
    try:
        server.wait_ready()
        worker = server.worker
        with httpx.stream("POST", f"{server.url}/v1/completions", json=BODY, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            os.killpg(server.process.pid, signal.SIGTERM)
            text = "".join(lines)
        assert '"finish_reason":"length"' in text
        assert "error" not in text
        _, said = server.process.communicate(timeout=30)
        assert "another is started" not in said
        assert not worker.is_running()
    finally:
        server.process.kill()
        server.process.communicate()


def test_a_worker_never_outlives_its_server(checkpoint: Path) -> None:
    """Whatever it is doing; it has nothing to leave behind."""
    server = ServerProcess(str(checkpoint))
    server.wait_ready()
    worker = server.worker
    with httpx.stream("POST", f"{server.url}/v1/completions", json=BODY, timeout=60) as response:
        next(response.iter_lines())
        server.process.kill()
        server.process.communicate()
    _, alive = psutil.wait_procs([worker], timeout=30)
    assert not alive
