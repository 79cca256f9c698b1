"""Two small checkpoints in one server, and the commands that talk to a model in the terminal."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.conftest import GREEDY, ROOT, ServerProcess, wait_until
from tests.small_checkpoint import write_small_checkpoint

PROMPT = "The house has"
QUICK = ("--row-budget", "32", "--kv-cache-tokens", "4096")  # prices aren't measured
# A proxy that can't be reached: a command that asks it for its own server waits for ever.
NO_WAY = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of other weights, so of other texts."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("first", "second"), start=11):
        write_small_checkpoint(folder / name, seed=seed)
    return folder


@pytest.fixture(scope="module")
def both(folder: Path) -> Iterator[ServerProcess]:
    models = (str(folder / "first"), f"other,second={folder / 'second'}")
    with ServerProcess(*models, *QUICK) as server:
        yield server


def states(server: ServerProcess) -> dict[str, str]:
    cards = httpx.get(f"{server.url}/v1/models").json()["data"]
    return {card["id"]: card["state"] for card in cards}


def text(server: ServerProcess, model: str) -> str:
    response = server.complete(model=model, max_tokens=12, ignore_eos=True)
    assert response.status_code == 200, response.text
    assert response.json()["model"] == model
    return str(response.json()["choices"][0]["text"])


def workers(server: ServerProcess) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(server.process.pid).children():
        with suppress(psutil.NoSuchProcess):  # it has just ended
            if "model.worker" in child.cmdline():
                found.append(child)
    return found


def test_each_says_what_it_says_alone_and_one_may_die(both: ServerProcess, folder: Path) -> None:
    assert states(both) == {"first": "ready", "other": "unloaded", "second": "unloaded"}
    (first_worker,) = workers(both)
    with ThreadPoolExecutor(8) as pool:
        names = ["first", "second", "other", "first"] * 4
        texts = dict(zip(names, pool.map(lambda name: text(both, name), names), strict=True))
    assert texts["second"] == texts["other"] != texts["first"]
    assert set(states(both).values()) == {"ready"}
    assert len(workers(both)) == 2

    body = {"model": "second", "prompt": PROMPT, "max_tokens": 1500, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{both.url}/v1/completions", json=body | GREEDY, timeout=120) as response:
        lines = response.iter_lines()
        next(lines)
        first_worker.kill()
        # 500 if it still reached the worker that dies, else 503.
        assert both.complete(model="first", max_tokens=3).status_code in {500, 503}
        rest = "".join(lines)
    assert '"finish_reason":"length"' in rest
    assert '"error"' not in rest
    wait_until(lambda: states(both)["first"] == "ready")
    assert text(both, "first") == texts["first"]

    command = [sys.executable, "-m", "cli.main", "complete", "--model", str(folder / "second"), PROMPT]
    options = ["--max-tokens", "12", "--temperature", "0"]
    alone = subprocess.run(
        [*command, *options],
        cwd=ROOT,
        env={**os.environ, **NO_WAY, "SPEED_ROW_BUDGET": "32", "SPEED_PORT": "1", "SPEED_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    body = {"model": "second", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    same = httpx.post(f"{both.url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
    assert alone.stdout == same + "\n" * (not same.endswith("\n"))
    assert "passes per token" in alone.stderr


def test_one_place_is_enough_for_two_and_what_is_idle_is_unloaded(folder: Path) -> None:
    with ServerProcess("--model-dir", str(folder), "--unload-idle", "2", *QUICK) as server:
        assert states(server) == {"first": "unloaded", "second": "unloaded"}
        assert workers(server) == []
        texts = {name: text(server, name) for name in ("first", "second")}
        assert states(server) == {"first": "unloaded", "second": "ready"}
        assert len(workers(server)) == 1
        wait_until(lambda: not workers(server))
        assert states(server) == {"first": "unloaded", "second": "unloaded"}
        assert text(server, "second") == texts["second"] != texts["first"]
    assert server.process.returncode == 0
