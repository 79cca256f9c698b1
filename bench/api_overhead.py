"""What a streamed token costs the API process: `python -m bench.api_overhead`.

A server over an engine without a model is kept on one core, its clients on another. Counted is the
CPU time of the server's process, user and system, while it streams at a given rate, and then at the
highest rate that it reaches.
"""

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from itertools import islice
from typing import Any, NamedTuple

import uvicorn

from bench.options import positive, reporting
from bench.paced_engine import PacedEngine
from model.machine import process_seconds
from server.app import create_app
from server.chat_template import ChatTemplate
from server.serve import uvicorn_config
from server.settings import Settings, embedded_model
from server.tokenizer import TextCodec

Body = dict[str, Any]
MODEL = embedded_model()
TEMPLATE = ChatTemplate("{% for message in messages %}{{ message.content }}\n{% endfor %}")
COMPLETION: Body = {"prompt": "def fibonacci(n):"}
CHAT: Body = {"messages": [{"role": "user", "content": "Fibonacci?"}]}
CASES: dict[str, tuple[str, Body]] = {
    "completions": ("/v1/completions", COMPLETION),
    "completions, 4 stop strings": (
        "/v1/completions",
        {**COMPLETION, "stop": ["\n\n\n\n", "@@", "%%", "??"]},
    ),
    "completions, logprobs 5": ("/v1/completions", {**COMPLETION, "logprobs": 5}),
    "chat": ("/v1/chat/completions", CHAT),
}


class Load(NamedTuple):
    """What was measured in a window of time."""

    tokens_per_second: float
    cpu_share: float  # of one core

    def __str__(self) -> str:
        per_token = 1e6 * self.cpu_share / self.tokens_per_second
        rate = f"{self.tokens_per_second:.0f} tokens/s"
        return f"{rate}, {self.cpu_share:.1%} of a core, {per_token:.0f} us a token"


@reporting("python -m bench.api_overhead")
def main() -> int:
    """Measures each kind of request at the given rate and at the highest one."""
    parser = argparse.ArgumentParser(prog="python -m bench.api_overhead", description=__doc__)
    parser.add_argument("--clients", type=positive, default=32)
    parser.add_argument("--rate", type=float, default=1000, help="tokens/s of all clients together")
    parser.add_argument("--passes", type=float, default=125, help="passes/s of the engine")
    parser.add_argument("--seconds", type=float, default=8, help="length of each measurement")
    parser.add_argument("--serve", type=int, metavar="PORT", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.rate, args.passes)
        return 0
    report: dict[str, object] = {"clients": args.clients}
    for name, (path, fields) in CASES.items():
        steady = measure(args, path, fields, args.rate, args.passes)
        highest = measure(args, path, fields, 1e6, 1000)
        print(f"{name}: {steady}; at most {highest.tokens_per_second:.0f} tokens/s", flush=True)
        report[name] = {**steady._asdict(), "highest_tokens_per_second": highest.tokens_per_second}
    print(json.dumps(report))
    return 0


def serve(port: int, rate: float, passes: float) -> None:
    """The server's process."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    options: dict[str, Any] = {"port": port, "log_level": "warning", "max_queued_tokens": 2**40}
    settings = Settings(**options)
    codec = TextCodec.from_folder(MODEL)
    engine = PacedEngine(word_ids(codec, 1000), rate, passes)
    uvicorn.Server(uvicorn_config(create_app(engine, codec, settings, TEMPLATE), settings)).run()


def word_ids(codec: TextCodec, count: int) -> list[int]:
    """The first `count` tokens, or fewer, that are a blank and letters: no text meets a stop string."""
    pieces = ((token_id, codec.token_bytes(token_id)) for token_id in range(2**16))
    words = (token_id for token_id, piece in pieces if piece[:1] == b" " and piece[1:].isalpha())
    return list(islice(words, count))


def measure(args: argparse.Namespace, path: str, fields: Body, rate: float, passes: float) -> Load:
    """One server from start to end, streaming to all clients."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "bench.api_overhead", "--serve", str(port)]
    process = subprocess.Popen([*command, "--rate", str(rate), "--passes", str(passes)])
    cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {max(cores)})
        request = _request(path, {"model": "default", "max_tokens": 500_000, "stream": True, **fields})
        return asyncio.run(_load(process.pid, port, [request] * args.clients, args.seconds))
    finally:
        os.sched_setaffinity(0, cores)
        process.kill()
        process.wait()


async def _load(server: int, port: int, requests: list[bytes], seconds: float) -> Load:
    counts = [0] * len(requests)
    await _until_it_listens(port)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_client(port, r, counts, i)) for i, r in enumerate(requests)]
        while not all(counts):
            await asyncio.sleep(0.05)
        await asyncio.sleep(1)
        cpu, tokens, started = process_seconds(server), sum(counts), time.perf_counter()
        await asyncio.sleep(seconds)
        wall = time.perf_counter() - started
        load = Load((sum(counts) - tokens) / wall, (process_seconds(server) - cpu) / wall)
        for task in tasks:
            task.cancel()
    return load


async def _until_it_listens(port: int) -> None:
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except ConnectionRefusedError:
            await asyncio.sleep(0.05)
        else:
            writer.close()
            return


def _request(path: str, body: Body) -> bytes:
    content = json.dumps(body).encode()
    head = ["Host: 127.0.0.1", "Content-Type: application/json", f"Content-Length: {len(content)}"]
    return "\r\n".join([f"POST {path} HTTP/1.1", *head, "", ""]).encode() + content


async def _client(port: int, request: bytes, counts: list[int], index: int) -> None:
    """Counts the frames of one stream."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError(f"{status!r} {await reader.read(1000)!r}")
    while data := await reader.read(65536):
        counts[index] += data.count(b"data: ")


if __name__ == "__main__":
    raise SystemExit(main())
