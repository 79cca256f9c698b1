"""`speed serve` as a process of its own, for benchmarks that measure it from outside."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from typing import IO, Self

from model.machine import process_memory

START_SECONDS, STOP_SECONDS = 300, 30


class ServerProcess:
    """A server on a free port of this machine; use as a context manager."""

    def __init__(
        self,
        *flags: str,
        environment: Mapping[str, str] | None = None,
        stderr: IO[bytes] | None = None,
        own_group: bool = False,
    ) -> None:
        """`environment` is added to this process's; `own_group`: signals to its group are for it alone."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        command = [sys.executable, "-m", "cli.main", "serve", "--port", str(self.port)]
        self.process = subprocess.Popen(
            [*command, "--log-level", "warning", *flags],
            env={**os.environ, **(environment or {})},
            stderr=stderr,
            start_new_session=own_group,
        )

    @property
    def resident_bytes(self) -> int:
        """Memory of the API process, without the engine's."""
        return process_memory(self.process.pid)

    def get(self, path: str) -> str:
        """The text at `path`; raises OSError unless its status is 200."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as response:
            return str(response.read().decode())

    def post(self, path: str, body: object, *, timeout: float = 30) -> str:
        """The answer to a JSON body; raises OSError unless its status is 200 within `timeout` seconds."""
        url, headers = f"http://127.0.0.1:{self.port}{path}", {"Content-Type": "application/json"}
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return str(response.read().decode())

    def gauge(self, name: str) -> float:
        """One sample of /metrics, by its name without the prefix."""
        found = re.search(rf"^speed:{name}\{{.*\}} (.*)$", self.get("/metrics"), re.MULTILINE)
        assert found is not None, name
        return float(found[1])

    def total(self, name: str) -> float:
        """All samples of a metric together, whatever their labels."""
        found = re.findall(rf"^speed:{name}\{{.*\}} (.*)$", self.get("/metrics"), re.MULTILINE)
        assert found, name
        return sum(map(float, found))

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
                if self.process.poll() is not None:
                    raise OSError(f"the server ended with exit status {self.process.returncode}") from None
                if time.monotonic() > deadline:
                    self.__exit__()
                    raise OSError(f"the server was not ready after {START_SECONDS} seconds") from None
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
