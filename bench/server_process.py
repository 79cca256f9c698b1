"""`speed serve` as a process of its own, for benchmarks that measure it from outside."""

import re
import socket
import subprocess
import sys
import time
import urllib.request
from typing import Self

import psutil

START_SECONDS, STOP_SECONDS = 300, 30


class ServerProcess:
    """A server on a free port of this machine; use as a context manager."""

    def __init__(self, *flags: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        command = [sys.executable, "-m", "server.cli", "serve", "--port", str(self.port)]
        self.process = subprocess.Popen([*command, "--log-level", "warning", *flags])

    @property
    def resident_bytes(self) -> int:
        """Memory of the API process, without the engine's."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def get(self, path: str) -> str:
        """The text at `path`; raises OSError unless its status is 200."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as response:
            return str(response.read().decode())

    def gauge(self, name: str) -> float:
        """One sample of /metrics, by its name without the prefix."""
        found = re.search(rf"^speed:{name}\{{.*\}} (.*)$", self.get("/metrics"), re.MULTILINE)
        assert found is not None, name
        return float(found[1])

    @property
    def is_idle(self) -> bool:
        """Whether no request runs or waits, and none of its pages are held."""
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        return not any(self.gauge(name) for name in names)

    def __enter__(self) -> Self:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                self.get("/ready")
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
            else:
                return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
