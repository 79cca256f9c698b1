"""`python -m bench.fuzz`: many odd requests over all routes; none may break, hang or fatten the server.

Starts `speed serve` and sends requests that are valid after the server's own schemas, damaged in their JSON,
damaged in their bytes, with strange grammars, or with strange methods and headers, a bounded number at a
time. Faults are: a status of 500 or above, an error frame that blames the engine, no answer in time, a 4xx
whose body isn't an error, words about the inside of the server, and memory that grows over the last half.
Each fault is printed as one line of JSON; `--only NUMBER` sends that request again. The last line printed is
one JSON object; exit status 1 if anything was wrong.
"""

import argparse
import http.client
import json
import re
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from bench.fuzz_requests import FuzzRequest, RequestSource
from bench.latency import DEFAULT_MODEL
from bench.make_checkpoint import NANBEIGE, write
from bench.options import Extra, reporting
from bench.server_process import ServerProcess

if TYPE_CHECKING:
    import psutil
else:
    psutil = Extra("psutil")


REPORTS = 10  # readings of memory
LINE_SECONDS = 30.0  # between two lines of progress where there is no terminal
FLAT_SHARE, FLAT_BYTES = 1.10, 64 * 2**20  # growth that still counts as none
MAX_SHOWN = 300  # characters of an answer
FLAGS = (
    "--kv-cache-tokens",
    "4096",
    "--row-budget",
    "32",
    "--threads",
    "1",
    "--served-model-name",
    "default",
)
# Passes of a millisecond: what is tested is all around the model.
TINY = {
    **NANBEIGE,
    "vocab_size": 16384,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "num_loops": 3,
    "max_position_embeddings": 128,  # an answer without a limit is no long one
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BLAME = re.compile(r'"code": ?"(engine_error|internal_error)"')
INSIDE = re.compile(r"function-|functools|0x[0-9a-f]{8}|Traceback|<class '|pydantic")


class Fuzz:
    """Sends requests from several threads and keeps the books."""

    def __init__(self, server: ServerProcess, source: RequestSource, args: argparse.Namespace) -> None:
        self.statuses: Counter[tuple[str, int]] = Counter()
        self.faults: Counter[str] = Counter()
        self.memory: list[dict[str, int]] = []  # bytes of each process, at each tenth of the way
        self.slowest = 0.0
        self.num_sent = 0
        self._server = server
        self._source = source
        self._time_limit: float = args.time_limit
        self._console = Console(stderr=True)
        self._lock = threading.Lock()

    @property
    def cpu_seconds(self) -> dict[str, float]:
        """What each process has computed; checks of grammars are processes of their own."""
        api = psutil.Process(self._server.process.pid)
        times = api.cpu_times()
        engine = max((sum(child.cpu_times()[:2]) for child in api.children()), default=0.0)
        spent = {
            "client": time.process_time(),
            "api": times.user + times.system,
            "engine": engine,
            "checks": times.children_user + times.children_system,
        }
        return {name: round(seconds, 1) for name, seconds in spent.items()}

    def send_all(self, numbers: range, num_clients: int) -> None:
        """All requests of these numbers, a bounded number at a time."""
        self.memory = [self._memory()]
        left = iter(numbers)
        # A log that is followed gets a line of progress now and then, a terminal a bar.
        interval = 0.1 if sys.stderr.isatty() else LINE_SECONDS
        with tqdm(total=len(numbers), unit="request", mininterval=interval, maxinterval=interval) as bar:

            def work(_: int) -> None:
                with closing(Client(self._server.port, self._time_limit)) as client:
                    while (number := self._next(left)) is not None:
                        self._send(client, number)
                        self._count(len(numbers), bar)

            with ThreadPoolExecutor(num_clients) as threads:
                list(threads.map(work, range(num_clients)))

    def _next(self, left: Iterator[int]) -> int | None:
        with self._lock:
            return next(left, None)

    def _count(self, total: int, bar: "tqdm[None]") -> None:
        with self._lock:
            bar.update()
            self.num_sent += 1
            if self.num_sent * REPORTS // total >= len(self.memory):
                self.memory.append(self._memory())

    def _send(self, client: "Client", number: int) -> None:
        request = self._source.request(number)
        started = time.monotonic()
        try:
            answer = client.answer(request)
        except TimeoutError:
            self._fault("hung", number, request, f"no answer in {self._time_limit} s")
            return
        except (http.client.HTTPException, OSError) as error:
            self._fault("broken", number, request, repr(error))
            return
        with self._lock:
            self.slowest = max(self.slowest, time.monotonic() - started)
            self.statuses[request.kind, answer.status] += 1
        if fault := fault_of(request, answer):
            self._fault(fault, number, request, f"{answer.status} {answer.text[:MAX_SHOWN]}")

    def _fault(self, fault: str, number: int, request: FuzzRequest, answer: str) -> None:
        line = {"fault": fault, "number": number, "answer": answer, **request.as_json()}
        with self._lock:
            self.faults[fault] += 1
            tqdm.write(json.dumps(line))

    def _memory(self) -> dict[str, int]:
        api = psutil.Process(self._server.process.pid)
        engine = max((child.memory_info().rss for child in api.children()), default=0)
        return {"api": api.memory_info().rss, "engine": engine}

    def report(self) -> None:
        """Statuses by the kind of request, as a table."""
        table = Table(title="answers")
        statuses = sorted({status for _, status in self.statuses})
        for heading in ("requests", *map(str, statuses)):
            table.add_column(heading, justify="right")
        for kind in sorted({kind for kind, _ in self.statuses}):
            table.add_row(kind, *(str(self.statuses[kind, status]) for status in statuses))
        self._console.print(table)


class Answer(NamedTuple):
    """A whole answer; a stream is read to its end."""

    status: int
    text: str


class Client:
    """One connection that is kept, and opened again where the server has closed it."""

    def __init__(self, port: int, time_limit: float) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port)
        self._time_limit = time_limit

    def close(self) -> None:
        """Closes the connection."""
        self._connection.close()

    def answer(self, request: FuzzRequest) -> Answer:
        """Sends a request; raises TimeoutError, HTTPException or OSError if no whole answer comes."""
        connection = self._connection
        is_new = connection.sock is None
        try:
            return self._exchange(request)
        except (http.client.RemoteDisconnected, ConnectionError):
            connection.close()
            if is_new:
                raise
        except BaseException:
            connection.close()
            raise
        return self.answer(request)  # the server may close an idle connection at any time

    def _exchange(self, request: FuzzRequest) -> Answer:
        deadline = time.monotonic() + self._time_limit
        connection = self._connection
        connection.timeout = self._time_limit
        connection.putrequest(request.method, quote(request.path, safe="/%?="), skip_accept_encoding=True)
        for name, value in request.headers:
            connection.putheader(name, value.encode("latin-1"))
        connection.putheader("Content-Length", str(len(request.body)))
        connection.endheaders(request.body)
        assert connection.sock is not None
        sock = connection.sock
        sock.settimeout(self._time_limit)
        response, parts = connection.getresponse(), []
        while part := response.read1(2**16):
            parts.append(part)
            sock.settimeout(max(0.001, deadline - time.monotonic()))
        response.close()
        return Answer(response.status, b"".join(parts).decode(errors="replace"))


def fault_of(request: FuzzRequest, answer: Answer) -> str | None:
    """What is wrong with an answer, in a word."""
    if answer.status >= 500:
        return "status"
    if BLAME.search(answer.text):
        return "error frame"
    if answer.status < 400 or request.method == "HEAD":
        return None
    try:
        message = json.loads(answer.text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return "no error body"
    return "inside" if INSIDE.search(message) else None


def fat(memory: list[dict[str, int]]) -> list[str]:
    """The processes whose memory grew from the middle to the end."""
    middle, end = memory[len(memory) // 2], memory[-1]
    return [name for name in end if end[name] > middle[name] * FLAT_SHARE + FLAT_BYTES]


@reporting("python -m bench.fuzz")
def main() -> int:
    """Runs the fuzzer."""
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz", description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=16, help="requests at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="send the request of this number alone, and print it")
    parser.add_argument("--time-limit", type=float, default=180.0, help="seconds for one answer")
    parser.add_argument("--model", help="what the server serves (default: tiny random weights)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or write_tiny_model(Path(folder))
        with ServerProcess("--model", model, *FLAGS) as server:
            source = RequestSource(json.loads(server.get("/openapi.json")), args.seed)
            if args.only is not None:
                print(json.dumps(source.request(args.only).as_json()))
            numbers = range(args.requests) if args.only is None else range(args.only, args.only + 1)
            fuzz = Fuzz(server, source, args)
            started = time.monotonic()
            fuzz.send_all(numbers, args.clients)
            figures = {"seconds": round(time.monotonic() - started), "cpu_seconds": fuzz.cpu_seconds}
            restarts = server.total("engine_restarts_total")
    return _finish(fuzz, figures, restarts, args)


def write_tiny_model(folder: Path) -> str:
    """A checkpoint with random weights and the tokenizer and template of the embedded model."""
    write(folder, TINY, torch.float32)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEFAULT_MODEL / name, folder)
    return str(folder)


def _finish(fuzz: Fuzz, more: dict[str, Any], restarts: float, args: argparse.Namespace) -> int:
    fuzz.faults.update({f"{name} grew": 1 for name in fat(fuzz.memory)})
    if restarts:
        fuzz.faults["engine restarted"] = int(restarts)
    fuzz.report()
    memory = fuzz.memory
    readings = {"start": memory[0], "middle": memory[len(memory) // 2], "end": memory[-1]}
    figures: dict[str, Any] = {
        "requests": fuzz.num_sent,
        "seed": args.seed,
        "statuses": dict(sum((Counter({str(s): n}) for (_, s), n in fuzz.statuses.items()), Counter())),
        "faults": dict(fuzz.faults),
        "slowest_s": round(fuzz.slowest, 2),
        "memory_mb": {
            when: {name: round(size / 2**20) for name, size in reading.items()}
            for when, reading in readings.items()
        },
        **more,
    }
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures))
    return int(bool(fuzz.faults))


if __name__ == "__main__":
    raise SystemExit(main())
