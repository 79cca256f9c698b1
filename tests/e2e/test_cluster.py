"""Two replicas on a Ray of this machine alone, deployed from docker/cluster.yaml as `serve run` does.

One cluster for all tests: it takes half a minute to start on two cores. The tests that kill come last.
"""

import json
import re
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

pytest.importorskip("ray", reason="the cluster needs Ray: pip install '.[cluster]'")

from bench.cluster_process import ClusterProcess
from server.replicas.client import POLL_SECONDS
from tests.e2e.conftest import GREEDY
from tests.loose import Json
from tests.small_checkpoint import write_small_checkpoint

SECONDS = 60.0  # in which anything must have come about, however busy the machine is
NUM_CLIENTS = 64
TEXT = "The water of the river runs down to the sea, and the wind that comes from there brings rain. "


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterProcess]:
    model = write_small_checkpoint(tmp_path_factory.mktemp("cluster") / "small")
    # A known budget, lest each replica measure for seconds what passes cost on this busy machine.
    with ClusterProcess(num_replicas=2, model=str(model), row_budget=32, kv_cache_tokens=16384) as started:
        until(lambda: httpx.get(f"{started.url}/ready", timeout=SECONDS).status_code == 200)
        yield started


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def complete(cluster: ClusterProcess, prompt: str, **fields: object) -> Json:
    body = {"model": "small", "prompt": prompt, "max_tokens": 12, **GREEDY, **fields}
    answer = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=SECONDS)
    assert answer.status_code == 200, answer.text
    return answer.json()


def frames(cluster: ClusterProcess, prompt: str, **fields: object) -> Generator[Json, None, None]:
    """The frames of a stream, until the one that says it is whole."""
    body = {"model": "small", "prompt": prompt, "max_tokens": 12, "stream": True, **GREEDY, **fields}
    with httpx.stream("POST", f"{cluster.url}/v1/completions", json=body, timeout=SECONDS) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))
            elif line == "data: [DONE]":
                return
    raise AssertionError("the stream was cut")


def metric(cluster: ClusterProcess, name: str) -> float:
    found = re.findall(rf"^speed:{name}\{{.*\}} (.*)$", cluster.get("/metrics"), re.MULTILINE)
    assert found, name
    return sum(map(float, found))


def is_idle(cluster: ClusterProcess) -> bool:
    return not metric(cluster, "num_requests_running") and not metric(cluster, "kv_cache_usage_perc")


def test_streams_come_through_as_they_are_generated(cluster: ClusterProcess) -> None:
    whole = complete(cluster, TEXT, max_tokens=40, ignore_eos=True)
    pieces = list(frames(cluster, TEXT, max_tokens=40, ignore_eos=True))
    text = "".join(choice["text"] for frame in pieces for choice in frame["choices"])
    assert len(pieces) > 5
    assert text == whole["choices"][0]["text"]
    assert whole["usage"]["completion_tokens"] == 40
    plain = complete(cluster, TEXT, max_tokens=40, ignore_eos=True, speculation=False)
    assert plain["choices"] == whole["choices"]


def test_a_prompt_is_sent_where_its_beginning_was_read(cluster: ClusterProcess) -> None:
    """Also if its digests alone say otherwise: a stream keeps one replica busy in the first turn.

    Chance would send all 32 later prompts to the right one of two replicas once in four billion runs.
    """
    cached = []
    busy = frames(cluster, TEXT, max_tokens=1900, ignore_eos=True)
    next(busy)
    for turn in range(5):
        for group in range(8):
            usage = complete(cluster, f"group {group}: {TEXT * 8} turn {turn}", max_tokens=2)["usage"]
            if turn:
                cached.append(usage["prompt_tokens_details"]["cached_tokens"] / usage["prompt_tokens"])
        if not turn:
            busy.close()
            until(lambda: is_idle(cluster))
            time.sleep(3 * POLL_SECONDS)  # reports of replicas, which say nothing of prompts
    assert min(cached) > 0.7


def test_what_is_refused_costs_no_replica_anything(cluster: ClusterProcess) -> None:
    before = metric(cluster, "request_success_total")
    for fields, status in (({"max_tokens": 10**6}, 400), ({"model": "other"}, 404)):
        body = {"model": "small", "prompt": "x", **fields}
        answer = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=SECONDS)
        assert answer.status_code == status
    assert metric(cluster, "request_success_total") == before


def test_a_text_that_ends_at_a_stop_string_still_tells_what_it_cost(cluster: ClusterProcess) -> None:
    text = complete(cluster, TEXT, max_tokens=60, ignore_eos=True)["choices"][0]["text"]
    stopped = complete(cluster, TEXT, max_tokens=2000, ignore_eos=True, stop=text[20:24])
    assert stopped["choices"][0]["finish_reason"] == "stop"
    assert stopped["usage"]["completion_tokens_details"]["decode_passes"] > 0
    until(lambda: is_idle(cluster))


def test_a_client_that_leaves_frees_its_replica(cluster: ClusterProcess) -> None:
    streams = [frames(cluster, f"{number} {TEXT}", max_tokens=1900, ignore_eos=True) for number in range(8)]
    for stream in streams:
        next(stream)
    for stream in streams:
        stream.close()
    until(lambda: is_idle(cluster))


class Clients:
    """Many streams at once, and how each ended."""

    def __init__(self, cluster: ClusterProcess, *, max_tokens: int) -> None:
        self._cluster = cluster
        self._max_tokens = max_tokens
        self._begun = threading.Barrier(NUM_CLIENTS + 1)
        self._pool = ThreadPoolExecutor(NUM_CLIENTS)
        self._ends = [self._pool.submit(self._run, number) for number in range(NUM_CLIENTS)]
        self._begun.wait(SECONDS)

    def _run(self, number: int) -> str:
        stream = frames(self._cluster, f"{number} {TEXT}", max_tokens=self._max_tokens, ignore_eos=True)
        next(stream)
        self._begun.wait(SECONDS)
        for frame in stream:
            if "error" in frame:
                return "error"
            last = frame
        return str(last["choices"][0]["finish_reason"])

    def ends(self) -> list[str]:
        """How each ended; raises what it raised, TimeoutError where it hangs."""
        deadline = time.monotonic() + SECONDS
        found = [end.result(deadline - time.monotonic()) for end in self._ends]
        self._pool.shutdown()
        return found


def test_a_dead_worker_ends_its_own_streams_alone(cluster: ClusterProcess) -> None:
    replica, _ = cluster.replicas
    clients = Clients(cluster, max_tokens=400)
    [worker] = [child for child in replica.children() if "model.worker" in child.cmdline()]
    worker.kill()
    for number in range(8):
        complete(cluster, f"next {number}")  # each goes elsewhere, or waits for no restart
    ends = clients.ends()
    assert set(ends) == {"error", "length"}
    until(lambda: any("model.worker" in child.cmdline() for child in replica.children()))


def test_a_killed_replica_loses_its_own_streams_and_no_client_hangs(cluster: ClusterProcess) -> None:
    before = metric(cluster, "generation_tokens_total")
    clients = Clients(cluster, max_tokens=400)
    replica, _ = cluster.replicas
    replica.kill()
    for number in range(8):
        complete(cluster, f"after {number}")
    ends = clients.ends()
    assert set(ends) == {"error", "length"}
    assert metric(cluster, "generation_tokens_total") >= before
    until(lambda: len(cluster.replicas) == 2)  # Ray starts another one
