"""What bad clients cost good ones: `python -m bench.clients`, with the real server and model.

Crowds of streams that are opened and dropped: how long until their rows and pages are free. Readers that
take a few bytes a second: what a token then takes for others, against as many readers that keep up; and
what it takes when the slow ones' texts are complete but unread, against no other client at all.
"""

import argparse
import asyncio
import json
import socket
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

from bench.options import at_least, positive, reporting
from bench.server_process import ServerProcess

BODY = {"model": "default", "prompt": "def fibonacci(n):", "ignore_eos": True, "stream": True}
SLOW_BYTES, SLOW_SECONDS, SLOW_BUFFER = 512, 1.0, 4096


class Stream:
    """One streamed completion over a plain socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.num_frames = 0

    @classmethod
    async def open(cls, port: int, max_tokens: int, *, slow: bool = False, **fields: object) -> "Stream":
        """Sends the request; the answer is not waited for."""
        sock = socket.socket()
        if slow:  # the kernel's own buffers are so large that they hide a slow reader
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SLOW_BUFFER)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        reader, writer = await asyncio.open_connection(sock=sock, limit=SLOW_BUFFER if slow else 2**16)
        content = json.dumps({**BODY, "max_tokens": max_tokens, **fields}).encode()
        head = ["Host: 127.0.0.1", "Content-Type: application/json", f"Content-Length: {len(content)}"]
        writer.write("\r\n".join(["POST /v1/completions HTTP/1.1", *head, "", ""]).encode() + content)
        return cls(reader, writer)

    async def read(self, num_bytes: int = 65536) -> bytes:
        """What has come; empty at the end of the stream."""
        data = await self._reader.read(num_bytes)
        self.num_frames += data.count(b"data: {")
        return b"" if b"[DONE]" in data else data

    async def read_slowly(self) -> None:
        """A few hundred bytes a second, to the end."""
        while await self.read(SLOW_BYTES):
            await asyncio.sleep(SLOW_SECONDS)

    async def read_all(self) -> None:
        """Keeps up, to the end."""
        while await self.read():
            pass

    def drop(self) -> None:
        """Breaks the connection off."""
        self._writer.transport.abort()


async def until(condition: Callable[[], bool], seconds: float) -> float:
    """Seconds until `condition` holds; raises TimeoutError."""
    started = time.perf_counter()
    async with asyncio.timeout(seconds):
        while not await asyncio.to_thread(condition):
            await asyncio.sleep(0.01)
    return time.perf_counter() - started


class Drop(NamedTuple):
    """A crowd that left: seconds until everything was free, seconds of the next request."""

    freed_after: float
    next_request: float


async def drop_crowd(server: ServerProcess, num_streams: int) -> Drop:
    """Opens streams, waits for the first token of some, drops all."""
    streams = [await Stream.open(server.port, 900) for _ in range(num_streams)]
    await asyncio.wait([asyncio.create_task(s.read()) for s in streams], timeout=2)
    waiting = server.gauge("num_requests_waiting")
    running = server.gauge("num_requests_running")
    print(f"{running:.0f} running, {waiting:.0f} waiting; dropped", end=": ", flush=True)
    for stream in streams:
        stream.drop()
    freed = await until(lambda: server.is_idle, 60)
    started = time.perf_counter()
    await (await Stream.open(server.port, 8)).read_all()
    return Drop(freed, time.perf_counter() - started)


async def seconds_per_token(server: ServerProcess, num_clients: int, num_tokens: int) -> list[float]:
    """For each of a few good clients, from its first chunk to its last."""

    async def client() -> float:
        stream = await Stream.open(server.port, num_tokens)
        await stream.read()
        started, before = time.perf_counter(), stream.num_frames
        await stream.read_all()
        return (time.perf_counter() - started) / (num_tokens - before)

    return await asyncio.gather(*(client() for _ in range(num_clients)))


async def beside(server: ServerProcess, args: argparse.Namespace, *, slow: bool) -> list[float]:
    """Good clients' seconds per token while others generate, and read slowly or keep up."""
    others = [await Stream.open(server.port, 900, slow=slow) for _ in range(args.slow)]
    await asyncio.gather(*(other.read(SLOW_BYTES) for other in others))
    tasks = [asyncio.create_task(o.read_slowly() if slow else o.read_all()) for o in others]
    times = await seconds_per_token(server, args.good, args.tokens)
    assert server.gauge("num_requests_running") >= args.slow, "the others ended too early"
    await leave(server, others, tasks)
    return times


async def leave(server: ServerProcess, others: list[Stream], tasks: list[asyncio.Task[None]]) -> None:
    """All of them, at once."""
    for task in tasks:
        task.cancel()
    for other in others:
        other.drop()
    await asyncio.gather(*tasks, return_exceptions=True)
    await until(lambda: server.is_idle, 60)


async def beside_unread(server: ServerProcess, args: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Good clients' seconds per token alone, and while texts of slow readers lie there unread."""
    alone = await seconds_per_token(server, args.good, args.tokens)
    before = server.resident_bytes
    options = {"continuous_usage_stats": True}  # long frames
    others = [
        await Stream.open(server.port, 900, slow=True, stream_options=options) for _ in range(args.slow)
    ]
    tasks = [asyncio.create_task(other.read_slowly()) for other in others]
    await until(lambda: server.gauge("num_requests_running") >= args.slow, 60)
    await until(lambda: server.is_idle, 300)
    unread = await seconds_per_token(server, args.good, args.tokens)
    grown = (server.resident_bytes - before) / 1e6
    still = sum(not task.done() for task in tasks)
    print(f"{still} of {args.slow} texts of 900 tokens unread; the API process has grown by {grown:.0f} MB")
    await leave(server, others, tasks)
    return alone + await seconds_per_token(server, args.good, args.tokens), unread


def report(name: str, times: list[float], baseline: list[float]) -> float:
    """Prints both medians and returns their ratio."""
    one, other = statistics.median(times), statistics.median(baseline)
    print(
        f"{name}: {1e3 * one:.2f} ms a token, otherwise {1e3 * other:.2f} ms: {one / other:.3f}x", flush=True
    )
    return one / other


async def run(args: argparse.Namespace) -> None:
    """Everything, in turn."""
    options = ("--max-num-seqs", "128", "--max-queued-requests", "512", "--served-model-name", "default")
    with ServerProcess(*args.model, *options) as server:
        await seconds_per_token(server, args.good, 20)
        drops = []
        for _ in range(args.rounds):
            drops.append(await drop_crowd(server, args.dropped))
            print(f"{args.dropped} streams freed after {drops[-1].freed_after:.3f} s", end="; ")
            print(f"next request answered in {drops[-1].next_request:.3f} s", flush=True)
        alone, unread = await beside_unread(server, args)
        unread_ratio = report(f"beside {args.slow} unread texts", unread, alone)
        fast: list[float] = []
        slow: list[float] = []
        for _ in range(args.rounds):
            fast += await beside(server, args, slow=False)
            slow += await beside(server, args, slow=True)
        slow_ratio = report(f"beside {args.slow} slow readers that generate", slow, fast)
        figures = {"slow_ratio": slow_ratio, "unread_ratio": unread_ratio}
        print(json.dumps({"freed_after": [drop.freed_after for drop in drops], **figures}))


@reporting("python -m bench.clients")
def main() -> int:
    """Parses options and runs."""
    parser = argparse.ArgumentParser(prog="python -m bench.clients", description=__doc__)
    parser.add_argument("--model", nargs=1, default=[], help="folder or Hugging Face id (default: embedded)")
    parser.add_argument("--dropped", type=positive, default=200, help="streams that are opened and dropped")
    parser.add_argument("--slow", type=positive, default=100, help="readers that take a few bytes a second")
    parser.add_argument("--good", type=positive, default=4, help="clients that are measured")
    parser.add_argument("--tokens", type=at_least(2), default=64, help="tokens of each of those")
    parser.add_argument("--rounds", type=positive, default=3)
    asyncio.run(run(parser.parse_args()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
