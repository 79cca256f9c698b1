"""Signals to the server alone: it ends cleanly, or goes on."""

import signal
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import ServerProcess

BODY = {"model": "default", "prompt": "The house has", "max_tokens": 200, "ignore_eos": True, "stream": True}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_lets_a_stream_finish_and_ends_with_0(
    checkpoint: Path, number: signal.Signals
) -> None:
    """It ended by the signal, with a traceback at Ctrl-C; SIGHUP cut streams."""
    server = ServerProcess(str(checkpoint), "--shutdown-timeout", "60", "--log-level", "info")
    try:
        server.wait_ready()
        with httpx.stream("POST", f"{server.url}/v1/completions", json=BODY, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGHUP)
            server.process.send_signal(number)
            text = "".join(lines)
        assert '"finish_reason":"length"' in text
        _, said = server.process.communicate(timeout=30)
        assert server.process.returncode == 0
        assert "Traceback" not in said
        assert f"default is served at {server.url}" in said
    finally:
        server.process.kill()
        server.process.communicate()


def test_a_terminal_that_closes_ends_nothing(checkpoint: Path) -> None:
    with ServerProcess(str(checkpoint)) as server:
        server.process.send_signal(signal.SIGHUP)
        assert server.complete(max_tokens=3, ignore_eos=True).json()["usage"]["completion_tokens"] == 3
    assert server.process.returncode == 0
