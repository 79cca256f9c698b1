"""The clients that are run as processes, and how one is."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 300  # for all checks of one client


@dataclass(frozen=True)
class Client:
    """One client. `cannot` is what it has and this server doesn't."""

    package: str
    requirements: tuple[str, ...]
    speaks: str
    cannot: str

    @property
    def module(self) -> str:
        """Where its checks are."""
        return f"tests.clients.with_{self.package.replace('-slim', '').replace('-', '_')}"


CLIENTS = (
    Client("litellm", ("litellm>=1.110,<2",), "chat, completions, responses, messages", "embeddings, images"),
    Client(
        "instructor",
        ("instructor>=1.17,<2",),
        "chat",
        "images; parallel tools, unless the model chooses to call some",
    ),
    Client(
        "pydantic-ai-slim",
        ("pydantic-ai-slim[anthropic,openai]>=1.107,<2",),
        "chat, responses, messages",
        "images",
    ),
    Client("llm", ("llm>=0.36,<1",), "chat, completions", "attachments, embeddings"),
    Client("lm-eval", ("lm-eval[api]>=0.4.9,<0.5", "transformers>=5,<6"), "completions", "none known"),
    Client("inspect-ai", ("inspect-ai>=0.3.285,<0.4", "openai"), "completions, chat", "none known"),
)


class Outcome(NamedTuple):
    """What one check showed; `problem` is empty where it held."""

    shows: str
    problem: str


def version_of(client: Client, python: str = sys.executable) -> str | None:
    """The version that the environment of `python` has, or None."""
    if python == sys.executable:
        try:
            return metadata.version(client.package)
        except metadata.PackageNotFoundError:
            return None
    program = f"import importlib.metadata as m; print(m.version({client.package!r}))"
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def run_checks(client: Client, python: str, url: str, checkpoint: Path, folder: Path) -> list[Outcome]:
    """Drives the client in the environment of `python`; a client that ends before its time is a problem."""
    command = [python, "-P", "-m", "tests.clients.checks", client.module, url, str(checkpoint), str(folder)]
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "HOME": str(folder),
        "XDG_DATA_HOME": str(folder),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    try:
        done = subprocess.run(
            command, env=environment, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return [Outcome("all checks", f"took more than {SECONDS} s")]
    outcomes = [
        Outcome(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith('{"shows"')
    ]
    if done.returncode == 0 or any(outcome.problem for outcome in outcomes):
        return outcomes
    return [*outcomes, Outcome("all checks", f"status {done.returncode}\n{done.stderr[-3000:]}")]
