"""The image of the Dockerfile, built and run without Docker: buildah builds it, podman and runc run it.

The base image, a small Debian with Python, is made of Debian's packages by debootstrap. Images lie in a
folder of their own (SPEED_IMAGE_STORE), so that a second run reuses layers. Python's packages come from
where this machine's pip finds them: its settings and certificates are mounted, not copied.
"""

import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import httpx
import psutil

from tests.loose import Json

ROOT = Path(__file__).resolve().parents[2]
STORE = Path(os.environ.get("SPEED_IMAGE_STORE", "/var/tmp/speed-image"))
IMAGE, BASE, SUITE = "speed-serve:test", "speed-base:1", "bookworm"
BASE_PACKAGES = "ca-certificates,python-is-python3,python3-venv"
# As Docker's slim images leave it out.
NOT_IN_BASE = (
    "usr/share/doc",
    "usr/share/info",
    "usr/share/locale",
    "usr/share/man",
    "var/cache/apt",
    "var/lib/apt/lists",
)
CERTIFICATES = Path("/etc/ssl/certs")
START_SECONDS = 180  # a cold machine that others keep busy; how long it took is printed


class Layer(NamedTuple):
    """A layer of the image: what made it, and the bytes of its files."""

    made_by: str
    num_bytes: int


def buildah(*words: str) -> str:
    """Runs it in the test's store; its output."""
    return _output(["buildah", *_store(), *words])


def podman(*words: str, check: bool = True) -> str:
    """The same."""
    return _output(["podman", "--cgroup-manager", "cgroupfs", "--runtime", "runc", *_store(), *words], check)


def make_base() -> None:
    """A base image like python:3.12-slim, with the Python of Debian."""
    if podman("images", "--quiet", BASE):
        return
    folder = STORE / "base"
    shutil.rmtree(folder, ignore_errors=True)
    _output(["debootstrap", "--variant=minbase", f"--include={BASE_PACKAGES}", SUITE, str(folder)])
    for name in NOT_IN_BASE:
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "var/lib/apt/lists/partial").mkdir(parents=True)
    archive = STORE / "base.tar"
    _output(["tar", "--create", "--file", str(archive), "--directory", str(folder), "."])
    container = buildah("from", "scratch")
    buildah("add", "--quiet", container, str(archive), "/")
    buildah("commit", "--quiet", "--rm", container, BASE)
    archive.unlink()
    shutil.rmtree(folder)


def build(context: Path = ROOT) -> None:
    """Builds the image of this checkout."""
    settings, paths = pip_settings()
    config = STORE / "pip.conf"
    config.write_text("".join(["[global]\n", *(f"{name} = {value}\n" for name, value in settings.items())]))
    mounts = {CERTIFICATES: CERTIFICATES, config: Path("/etc/pip.conf"), **{path: path for path in paths}}
    arguments = [f"BASE_IMAGE=localhost/{BASE}"]
    if {"index-url", "extra-index-url", "find-links"} & set(settings):
        arguments.append("TORCH_CPU_INDEX=")  # torch comes from there as well
    buildah(
        *("bud", "--format", "docker", "--layers", "--tag", IMAGE),
        *(word for argument in arguments for word in ("--build-arg", argument)),
        *(word for source, target in mounts.items() for word in ("--volume", f"{source}:{target}:ro")),
        str(context),
    )


def unmount() -> None:
    """Leaves only files: a build that failed keeps its container, and the store mounts its own folder."""
    buildah("rm", "--all")
    folder = STORE / "images" / "overlay"
    if folder.is_mount():
        _output(["umount", str(folder)])


def pip_settings() -> tuple[dict[str, str], list[Path]]:
    """What pip is told on this machine, wherever that is written, and the paths that this names."""
    lines = _output([sys.executable, "-m", "pip", "config", "list"]).splitlines()
    found = dict(re.findall(r"^(?:global|:env:)\.([\w-]+)='(.*)'$", line)[0] for line in lines)
    names = re.findall(r"(?:file://|(?<=\s)|^)(/[\w./-]+)", " ".join(found.values()))
    there = [Path(name) for name in names if not name.startswith(str(CERTIFICATES)) and Path(name).exists()]
    # An index on this machine names its files by their place beside it.
    paths = [path.parent if path.name == "simple" else path for path in there]
    return {name: value.replace("\\n", "\n    ") for name, value in found.items()}, paths


def layers() -> list[Layer]:
    """Those that hold something, the base first."""
    history = json.loads(podman("history", "--no-trunc", "--format", "json", IMAGE))
    return [Layer(entry["CreatedBy"], entry["size"]) for entry in reversed(history) if entry["size"] > 10**6]


def config() -> dict[str, Json]:
    """What the image says of how it is to be run."""
    return dict(json.loads(podman("inspect", IMAGE))[0])


class Container:
    """`docker run IMAGE`, locked up as far as that goes; a context manager that removes it."""

    def __init__(self, *options: str, command: Sequence[str] = ()) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        most_files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        self._started = time.monotonic()
        self.id = podman(
            *("run", "--detach", "--no-healthcheck", "--network", "host", "--env", f"SPEED_PORT={self.port}"),
            *("--ulimit", f"nofile={most_files}:{most_files}", "--ulimit", "nproc=4096:4096"),
            # No folder may be written but the volumes: podman's own /tmp would be more than Docker gives.
            *("--read-only", "--read-only-tmpfs=false", "--cap-drop", "all"),
            *("--security-opt", "no-new-privileges", *options, IMAGE, *command),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        if kind is not None:
            print(self.logs())
        podman("rm", "--force", "--volumes", self.id)

    @property
    def age(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    def busy_seconds(self) -> float:
        """Seconds that its processes have had of all cores."""
        first = psutil.Process(int(podman("inspect", "--format", "{{.State.Pid}}", self.id)))
        times = [process.cpu_times() for process in [first, *first.children(recursive=True)]]
        return float(sum(time.user + time.system for time in times))

    def wait_ready(self) -> None:
        """Until requests are served."""
        while self.age < START_SECONDS:
            assert podman("inspect", "--format", "{{.State.Running}}", self.id) == "true", self.logs()
            try:
                if httpx.get(f"{self.url}/ready").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise TimeoutError(self.logs())

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """A command inside, as the user of the image."""
        words = ["podman", "--cgroup-manager", "cgroupfs", "--runtime", "runc", *_store()]
        return subprocess.run(
            [*words, "exec", self.id, *command], capture_output=True, text=True, check=False
        )

    def logs(self) -> str:
        """What a user sees who started it in a terminal."""
        words = ["podman", *_store(), "logs", self.id]
        return subprocess.run(
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
        ).stdout

    def terminate(self) -> None:
        """What `docker stop` does first."""
        podman("kill", "--signal", "TERM", self.id)

    def exit_status(self) -> int:
        """Waits for the end."""
        return int(podman("wait", self.id))


def _store() -> list[str]:
    STORE.mkdir(parents=True, exist_ok=True)
    return ["--root", str(STORE / "images"), "--runroot", str(STORE / "run")]


def _output(command: Sequence[str], check: bool = True) -> str:
    environment = {**os.environ, "BUILDAH_ISOLATION": "chroot"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if check and result.returncode:
        raise RuntimeError(f"{' '.join(command)}: {result.stdout[-4000:]}{result.stderr[-4000:]}")
    return result.stdout.strip()
