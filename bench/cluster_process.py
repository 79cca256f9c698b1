"""A cluster on this machine alone: Ray, and what `serve run` makes of docker/cluster.yaml, as a process.

`ClusterProcess` starts it as `ServerProcess` starts a server; the process itself is `bench.cluster_main`. All
connections are to loopback addresses.
"""

import socket
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

from bench.options import Extra
from model.machine import child_environment

if TYPE_CHECKING:
    import psutil
    import yaml
else:
    psutil, yaml = Extra("psutil"), Extra("yaml")

CONFIG = Path(__file__).resolve().parents[1] / "docker" / "cluster.yaml"
APPLICATION, ENGINE = "speed", "Engine"
STOP_SECONDS = 60.0
DEFAULT_ROUTER = "ray.serve._private.request_router:PowerOfTwoChoicesRequestRouter"


class ClusterProcess:
    """A cluster with an HTTP address of its own; use as a context manager."""

    def __init__(
        self,
        *,
        num_replicas: int,
        log: IO[bytes] | None = None,
        ray_routing: bool = False,
        **settings: object,
    ) -> None:
        """`settings` are options of `speed serve`; `ray_routing`: Ray's own choice of a replica, not ours."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self._folder = tempfile.TemporaryDirectory(prefix="cluster")
        config = Path(self._folder.name) / "cluster.yaml"
        config.write_text(yaml.safe_dump(self._config(num_replicas, settings, ray_routing=ray_routing)))
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "bench.cluster_main", str(config), str(num_replicas)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log or subprocess.DEVNULL,
            env=child_environment(RAY_USAGE_STATS_ENABLED="0", RAY_SERVE_LOG_TO_STDERR="0"),
            start_new_session=True,
        )

    def _config(self, num_replicas: int, settings: dict[str, object], *, ray_routing: bool) -> object:
        """The configuration of docker/cluster.yaml with another port, model and number of replicas."""
        config: Any = yaml.safe_load(CONFIG.read_text())
        config["http_options"]["port"] = self.port
        [application] = config["applications"]
        application["args"] = settings
        engine = next(each for each in application["deployments"] if each["name"] == ENGINE)
        del engine["autoscaling_config"]
        engine |= {"num_replicas": num_replicas, "health_check_period_s": 1}
        if ray_routing:
            engine["request_router_config"] = {"request_router_class": DEFAULT_ROUTER}
        return config

    def get(self, path: str) -> str:
        """The text at `path`; raises OSError unless its status is 200."""
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            return str(response.read().decode())

    @property
    def replicas(self) -> "list[psutil.Process]":
        """The processes of replicas of the engine, each of which has a worker among its children."""
        everyone = psutil.Process(self.process.pid).children(recursive=True)
        title = f"ray::ServeReplica:{APPLICATION}:{ENGINE}"
        return [process for process in everyone if any(title in part for part in _title(process))]

    def __enter__(self) -> Self:
        assert self.process.stdout is not None
        said = [b""]
        for line in self.process.stdout:  # `serve run` says something as well
            said.append(line)
            if line == b"ready\n":
                return self
            if line.startswith(b"not ready"):
                break
        self.__exit__()
        raise OSError(f"the cluster was not ready: {said[-1].decode(errors='replace')}")

    def __exit__(self, *_: object) -> None:
        """Lets Ray end in order; whatever of it is left then is killed."""
        everyone = _family(self.process.pid)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        _, alive = psutil.wait_procs(everyone, timeout=5)
        for process in alive:
            process.kill()
        self._folder.cleanup()


def _title(process: "psutil.Process") -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:  # it has just ended
        return []


def _family(pid: int) -> "list[psutil.Process]":
    try:
        return [*psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return []
