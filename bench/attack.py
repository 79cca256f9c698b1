"""What one client can do to the others: `python -m bench.attack`, with the real server and model.

Eight streams run while bodies and connections that have stopped servers of this sort come in one after the
other. For each: the longest that a stream stood still, the longest that /health took, the most memory that
the API process and the engine's had, what the attacker was answered, and how long the next request took.
Everything is on this machine; a body's answer is waited for `--seconds` at most.
"""

import argparse
import asyncio
import json
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tqdm import tqdm

from bench.attack_bodies import ATTACKS, MIB, Attack
from bench.clients import Stream
from bench.options import Extra, reporting
from bench.server_process import ServerProcess

if TYPE_CHECKING:
    import psutil
else:
    psutil = Extra("psutil")


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
STREAM_TOKENS = 500
PROBE_SECONDS, SAMPLE_SECONDS = 0.05, 0.05
QUIET_SECONDS = 1.0  # that are watched before and after each attack
NUM_HALF_SENT, HALF_SENT_SECONDS = 400, 15.0
HEADER_BYTES = 300 * MIB
Action = Callable[[], Coroutine[None, None, Counter[str]]]


class Result(NamedTuple):
    """What an attack did. Seconds and megabytes; memory is the peak, and how much of it was new.

    `api_cpu` is what the API process computed, the streams included.
    """

    name: str
    body_bytes: int
    stream_gap: float
    health_gap: float
    next_request: float
    api_megabytes: float
    api_growth: float
    api_cpu: float
    engine_megabytes: float
    statuses: dict[str, int]


class Watch:
    """Streams, /health and memory, watched while attacks come."""

    def __init__(self, server: ServerProcess, num_streams: int) -> None:
        self._server = server
        self._num_streams = num_streams
        self._last_read = [time.perf_counter()] * num_streams
        self.reset()

    def reset(self) -> None:
        """Forgets all maxima; the gaps that are open go on."""
        self.stream_gap = self.health_gap = 0.0
        self.api_bytes = self.engine_bytes = 0

    async def run(self) -> None:
        """Until it is cancelled."""
        streams = (self._stream(i) for i in range(self._num_streams))
        await asyncio.gather(self._health(), self._memory(), *streams)

    async def _stream(self, index: int) -> None:
        """One stream after the other; only what lies between the first and the last frame counts."""
        while True:
            try:
                stream = await Stream.open(self._server.port, STREAM_TOKENS)
                await stream.read()
                self._last_read[index] = time.perf_counter()
                while await stream.read():
                    self._note(index)
                self._note(index)
                stream.drop()
            except OSError:
                await asyncio.sleep(PROBE_SECONDS)

    def _note(self, index: int) -> None:
        now = time.perf_counter()
        self.stream_gap = max(self.stream_gap, now - self._last_read[index])
        self._last_read[index] = now

    async def _health(self) -> None:
        while True:
            started = time.perf_counter()
            await send(self._server.port, b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 60)
            self.health_gap = max(self.health_gap, time.perf_counter() - started)
            await asyncio.sleep(PROBE_SECONDS)

    async def _memory(self) -> None:
        api = psutil.Process(self._server.process.pid)
        while True:
            self.api_bytes = max(self.api_bytes, api.memory_info().rss)
            children = sum(child.memory_info().rss for child in api.children(recursive=True))
            self.engine_bytes = max(self.engine_bytes, children)
            await asyncio.sleep(SAMPLE_SECONDS)


async def send(port: int, content: bytes, seconds: float) -> str:
    """The status that the server answers with, or what happened instead."""
    writer = None
    try:
        async with asyncio.timeout(seconds):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(content)
            return await _read_status(reader)
    except TimeoutError:
        return "left"
    except OSError as error:
        return type(error).__name__
    finally:
        if writer is not None:
            writer.transport.abort()


async def _read_status(reader: asyncio.StreamReader) -> str:
    """The status of an answer that is read to its end."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: ([0-9]+)", head, re.IGNORECASE)
        await reader.readexactly(int(length[1]) if length else 0)
    except asyncio.IncompleteReadError:
        return "closed"
    return head[9:12].decode()


def http_request(path: str, body: bytes) -> bytes:
    """One request as bytes."""
    head = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"]
    return "\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body


async def send_body(port: int, attack: Attack, body: bytes, seconds: float) -> Counter[str]:
    """All copies at once."""
    content = http_request(attack.path, body)
    limit = seconds if attack.leave_after is None else attack.leave_after
    return Counter(await asyncio.gather(*(send(port, content, limit) for _ in range(attack.copies))))


async def send_halves(port: int) -> Counter[str]:
    """Requests whose bodies never end; says how many the server has closed meanwhile."""
    half = http_request("/v1/completions", b"{" * 9)[:-8]
    return Counter(await asyncio.gather(*(send(port, half, HALF_SENT_SECONDS) for _ in range(NUM_HALF_SENT))))


async def send_headers(port: int) -> Counter[str]:
    """Headers without end."""
    line = b"X-Filler: " + b"a" * (2**16 - 12) + b"\r\n"
    try:
        async with asyncio.timeout(60):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n")
            for _ in range(HEADER_BYTES // len(line)):
                writer.write(line)
                await writer.drain()
            writer.write(b"\r\n")
            answer = await reader.read(12)
            writer.transport.abort()
            return Counter([answer[9:12].decode() or "closed"])
    except (OSError, TimeoutError) as error:
        return Counter([type(error).__name__])


async def next_request(port: int, seconds: float) -> float:
    """Seconds of a short request of somebody else."""
    body = json.dumps({"model": "default", "prompt": "a", "max_tokens": 1}).encode()
    started = time.perf_counter()
    await send(port, http_request("/v1/completions", body), seconds)
    return time.perf_counter() - started


async def measure(
    watch: Watch,
    server: ServerProcess,
    name: str,
    num_bytes: int,
    attack: Action,
) -> Result:
    """Attacks, and waits until a good request has been answered."""
    watch.reset()
    await asyncio.sleep(QUIET_SECONDS)
    before = watch.api_bytes
    watch.reset()
    api = psutil.Process(server.process.pid)
    spent = sum(api.cpu_times()[:2])
    # In a thread with a loop of its own, so that what is watched here isn't held up by the attacker.
    statuses = await asyncio.to_thread(asyncio.run, attack())
    after = await next_request(server.port, 300)
    await asyncio.sleep(QUIET_SECONDS)
    peak = max(watch.api_bytes, before)
    return Result(
        name=name,
        body_bytes=num_bytes,
        stream_gap=round(watch.stream_gap, 3),
        health_gap=round(watch.health_gap, 3),
        next_request=round(after, 3),
        api_megabytes=round(peak / 1e6, 1),
        api_growth=round((peak - before) / 1e6, 1),
        api_cpu=round(sum(api.cpu_times()[:2]) - spent, 2),
        engine_megabytes=round(watch.engine_bytes / 1e6, 1),
        statuses=dict(statuses),
    )


async def run(args: argparse.Namespace) -> list[Result]:
    """Everything, in turn."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        template = Path(folder) / "template.jinja"
        template.write_text(TEMPLATE)
        names = ("--served-model-name", "default", "--chat-template", str(template))
        with ServerProcess(*args.model, *names, *args.server_flags.split()) as server:
            watch = Watch(server, args.streams)
            task = asyncio.create_task(watch.run())
            await asyncio.sleep(QUIET_SECONDS)
            for name, num_bytes, attack in tqdm(list(attacks(server.port, args)), disable=None):
                results.append(await measure(watch, server, name, num_bytes, attack))
                tqdm.write(line(results[-1]))
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
    return results


def attacks(port: int, args: argparse.Namespace) -> Iterator[tuple[str, int, Action]]:
    """Name, bytes and action of each that `--only` leaves."""
    for attack in ATTACKS:
        for size in attack.sizes:
            if args.only in attack.name:
                body = attack.make(size)
                yield attack.name, len(body), partial(send_body, port, attack, body, args.seconds)
    for name, action in {"400 half-sent requests": send_halves, "300 MiB of headers": send_headers}.items():
        if args.only in name and not args.skip_connections:
            yield name, 0, partial(action, port)


def line(result: Result) -> str:
    """A result to read."""
    statuses = " ".join(f"{count}x{status}" for status, count in sorted(result.statuses.items()))
    return (
        f"{result.name:34} {result.body_bytes / 1e6:6.2f} MB | stream {result.stream_gap:7.3f} s "
        f"| health {result.health_gap:7.3f} s | next {result.next_request:7.3f} s "
        f"| API {result.api_megabytes:7.1f} MB (+{result.api_growth:.1f}), {result.api_cpu:.2f} s "
        f"| engine {result.engine_megabytes:7.1f} MB | {statuses}"
    )


@reporting("python -m bench.attack")
def main() -> int:
    """Parses options and runs."""
    parser = argparse.ArgumentParser(prog="python -m bench.attack", description=__doc__)
    parser.add_argument("--model", nargs=1, default=[], help="folder or Hugging Face id (default: embedded)")
    parser.add_argument("--streams", type=int, default=8, help="streams that run meanwhile")
    parser.add_argument("--seconds", type=float, default=120, help="that an attack's answer is waited for")
    parser.add_argument("--only", default="", help="attacks whose name contains this")
    parser.add_argument("--skip-connections", action="store_true", help="bodies alone")
    parser.add_argument("--server-flags", default="", help="more options of the server, in one string")
    parser.add_argument("--output", type=Path, help="file for the results as JSON")
    args = parser.parse_args()
    results = asyncio.run(run(args))
    if args.output is not None:
        args.output.write_text(json.dumps([result._asdict() for result in results], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
