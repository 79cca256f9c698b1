"""`speed serve` as those see it who run it: signals, logs, counts, clients that leave in crowds."""

import json
import signal
import socket
import subprocess
import time
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from tests.e2e.conftest import ServerProcess, gauges, wait_until
from tests.loose import Field

SECRET, ANSWER = "swordfish", "porcupine"
# Tens of seconds of work: four passes a token.
ENDLESS = {
    "model": "default",
    "prompt": SECRET,
    "max_tokens": 1500,
    "n": 32,
    "ignore_eos": True,
    "speculation": False,
    "stream": True,
}
BUSY = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")


def test_a_second_signal_ends_everything_at_once(checkpoint: Path) -> None:
    server = ServerProcess(str(checkpoint), "--shutdown-timeout", "600")
    try:
        server.wait_ready()
        worker = server.worker
        with httpx.stream("POST", f"{server.url}/v1/completions", json=ENDLESS, timeout=60) as response:
            lines = response.iter_lines()  # kept: httpx closes the connection with the iterator
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + 10
            while httpx.get(f"{server.url}/ready").status_code != 503:
                assert time.monotonic() < deadline
            assert server.process.poll() is None
            server.process.send_signal(signal.SIGTERM)
            server.process.communicate(timeout=8)  # not 600 seconds
        psutil.wait_procs([worker], timeout=8)
        assert not worker.is_running()
    finally:
        server.process.kill()
        server.process.communicate()


def test_keys_logs_and_metrics_of_a_running_server(checkpoint: Path, tmp_path: Path) -> None:
    """The answer is a word that nothing else writes, since only one is allowed."""
    keys = tmp_path / "keys"
    keys.write_text("right\n")
    flags = ("--api-key-file", str(keys), "--access-log", "json", "--log-level", "debug")
    with ServerProcess(str(checkpoint), *flags, stdout=subprocess.PIPE) as server:
        with (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong") as stranger,
            pytest.raises(openai.AuthenticationError) as caught,
        ):
            stranger.models.list()
        assert caught.value.code == "invalid_api_key"
        only = {"structured_outputs": {"choice": [ANSWER]}}
        fields: dict[str, Field] = {
            "model": "default",
            "prompt": SECRET,
            "max_tokens": 20,
            "extra_body": only,
        }
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="right") as client:
            assert client.completions.create(**fields).choices[0].text == ANSWER
            streamed = client.completions.create(**fields, stream=True)
            assert "".join(chunk.choices[0].text for chunk in streamed) == ANSWER
        samples = gauges(server)
        assert samples["speed:request_success_total"] == 2
        assert samples["speed:time_to_first_token_seconds_count"] == 2
    stdout, stderr = server.output
    for said in (SECRET, ANSWER, "right", "wrong"):
        assert said not in stdout
        assert said not in stderr
    records = [json.loads(line) for line in stdout.splitlines()]
    assert [r["status"] for r in records if r["method"] == "POST"] == [200, 200]
    assert all(r["request_id"] and r["completed"] for r in records)


def test_a_crowd_that_opens_streams_and_leaves_holds_nothing(server: ServerProcess) -> None:
    """How fast it is forgotten is measured by `python -m bench.clients`."""
    content = json.dumps(ENDLESS | {"n": 1})
    head = ["POST /v1/completions HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"]
    request = "\r\n".join([*head, f"Content-Length: {len(content)}", "", content])
    crowd = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(200)]
    for connection in crowd:
        connection.sendall(request.encode())
    wait_until(lambda: gauges(server)["speed:num_requests_running"] > 0)
    for connection in crowd:
        connection.close()
    wait_until(lambda: not any(gauges(server)[f"speed:{name}"] for name in BUSY))
    assert server.complete(max_tokens=3, ignore_eos=True).json()["usage"]["completion_tokens"] == 3
