"""A cluster on this machine: hits, throughput, a killed replica. `python -m bench.cluster --replicas 2`.

The model is tiny, with random weights: what is measured is where prompts go, what passes through Ray and what
becomes of clients, none of which depends on the model. Replicas have one thread each, so that more replicas
than cores bring nothing. Exit status 1 if a client hangs or a request behind the fault is not served.
"""

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from bench.cluster_process import ClusterProcess
from bench.fault_drill import TINY
from bench.make_checkpoint import write
from bench.options import Extra, positive, reporting
from bench.server_process import ServerProcess

if TYPE_CHECKING:
    import httpx
else:
    httpx = Extra("httpx")

CONTEXT, VOCABULARY = 2048, 512
PREFIX, TURN = 256, 48  # tokens of a beginning, and of what each further prompt adds to it
AT_ONCE = 4  # prompts of the measurement of hits
CACHE_TOKENS = 5120  # of one replica, which hold 10 whole sessions
NUM_CLIENTS, NUM_TOKENS, NUM_STREAMS = 64, 200, 128
END_SECONDS = 60.0  # a stream that has not ended so long after the fault hangs
# (sessions, prompts of each): few prompts that share a beginning, many, more sessions than one cache holds
SHAPES = {"pairs": (16, 2), "eights": (6, 8), "sessions": (16, 6)}
NUM_ROUNDS = 4  # of each shape with other prompts: where a router draws lots one round says little


class Usage(NamedTuple):
    """What one answer cost, in tokens."""

    prompt: int
    cached: int
    completion: int


def prompts(num_sessions: int, num_turns: int, seed: int) -> list[list[int]]:
    """The prompts of all sessions, turn by turn: each is the one before it, and more."""
    rng = random.Random(seed)
    length = PREFIX + num_turns * TURN
    texts = [[rng.randrange(3, VOCABULARY) for _ in range(length)] for _ in range(num_sessions)]
    return [text[: PREFIX + (turn + 1) * TURN] for turn in range(num_turns) for text in texts]


def write_model(folder: Path) -> None:
    """A checkpoint of random weights whose tokens are the 256 bytes and as many words."""
    write(folder, {**TINY, "max_position_embeddings": CONTEXT}, torch.float32)
    pieces = [*sorted(ByteLevel.alphabet()), *(f"\u0120{i}" for i in range(256))]
    tokenizer = Tokenizer(BPE({piece: number for number, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    tokenizer.save(str(folder / "tokenizer.json"))


async def complete(client: "httpx.AsyncClient", prompt: list[int], max_tokens: int) -> Usage:
    """Sends a prompt, and reads the answer to its end."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0}
    answer = await client.post("/v1/completions", json=body)
    usage = answer.raise_for_status().json()["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return Usage(usage["prompt_tokens"], cached, usage["completion_tokens"])


async def stream(
    client: "httpx.AsyncClient", prompt: list[int], max_tokens: int, begun: Callable[[], None]
) -> str:
    """How a stream ended: whole, error (a frame says so) or cut. `begun` is called at its first frame."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    first = True
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != httpx.codes.OK:
            return f"status {answer.status_code}"
        async for line in answer.aiter_lines():
            if line.startswith("data: {") and "error" in json.loads(line.removeprefix("data: ")):
                return "error"
            if line == "data: [DONE]":
                return "whole"
            if first:
                begun()
                first = False
    return "cut"


async def complete_all(
    client: "httpx.AsyncClient", texts: list[list[int]], max_tokens: int, at_once: int
) -> list[Usage]:
    """The answers to all prompts, so many at a time, begun in their order."""
    gate = asyncio.Semaphore(at_once)

    async def one(text: list[int]) -> Usage:
        async with gate:
            return await complete(client, text, max_tokens)

    return await asyncio.gather(*map(one, texts))


def connect(url: str) -> "httpx.AsyncClient":
    """A client for any number of requests at once."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(base_url=url, timeout=END_SECONDS, limits=limits, trust_env=False)


async def hits(url: str) -> dict[str, float]:
    """The share of prompt tokens that a cache held, for each of `SHAPES`."""
    found = {}
    async with connect(url) as client:
        for number, (name, (num_sessions, num_turns)) in enumerate(SHAPES.items()):
            usages = []
            for seed in range(number * NUM_ROUNDS, (number + 1) * NUM_ROUNDS):
                texts = prompts(num_sessions, num_turns, seed)
                usages += await complete_all(client, texts, 4, AT_ONCE)
            found[name] = sum(usage.cached for usage in usages) / sum(usage.prompt for usage in usages)
    return found


def most_hits(num_sessions: int, num_turns: int) -> float:
    """The share of prompt tokens that a cache holds if each prompt finds all of the one before it."""
    lengths = [len(text) for text in prompts(num_sessions, num_turns, seed=0)]
    return sum(lengths[:-num_sessions]) / sum(lengths)


async def throughput(url: str) -> float:
    """Tokens/s of `NUM_STREAMS` answers, 32 at a time."""
    texts = [text[:32] for text in prompts(NUM_STREAMS, 1, seed=99)]
    async with connect(url) as client:
        await complete_all(client, texts[:8], 16, 8)
        began = time.perf_counter()
        usages = await complete_all(client, texts, 64, 32)
        return sum(usage.completion for usage in usages) / (time.perf_counter() - began)


async def kill_one(cluster: ClusterProcess) -> tuple[Counter[str], Counter[str], float]:
    """Ends one replica under `NUM_CLIENTS` streams.

    How they ended, how requests behind the fault did, and the seconds until there was another replica.
    """
    num_begun = 0

    def begun() -> None:
        nonlocal num_begun
        num_begun += 1

    texts = prompts(NUM_CLIENTS, 1, seed=7)
    async with connect(cluster.url) as client:
        clients = [asyncio.create_task(stream(client, text[:32], NUM_TOKENS, begun)) for text in texts]
        while num_begun < NUM_CLIENTS and not any(task.done() for task in clients):  # one was refused
            await asyncio.sleep(0.01)
        killed = cluster.replicas
        killed[0].kill()
        struck = time.perf_counter()
        after = Counter([await stream(client, text[:16], 8, lambda: None) for text in texts[:16]])
        done, hung = await asyncio.wait(clients, timeout=END_SECONDS)
        ends = Counter(_end(task) for task in done) + Counter({"hung": len(hung)})
        while len(cluster.replicas) < len(killed) and time.perf_counter() < struck + END_SECONDS:
            await asyncio.sleep(0.1)
        return ends, after, time.perf_counter() - struck


def _end(task: "asyncio.Task[str]") -> str:
    return task.result() if task.exception() is None else type(task.exception()).__name__


def tell_hits(shares: dict[str, dict[str, float]]) -> None:
    """Prints the shares of hits by routing and shape, and how often as often ours hits, and could at best."""
    ours, rays = shares.values()
    best = {shape: most_hits(*size) for shape, size in SHAPES.items()}
    ratios = {
        "times as often": {shape: ours[shape] / rays[shape] for shape in SHAPES},
        "at most": {shape: best[shape] / rays[shape] for shape in SHAPES},
    }
    for name, row in {**shares, "one cache for all": best, **ratios}.items():
        print(f"{name:17}", *(f"{shape} {value:.3f}" for shape, value in row.items()), sep="  ")


def measure(model: Path, num_replicas: int, log: Path) -> bool:
    """Prints all figures; whether nobody hung and all requests behind the fault were served."""
    with log.open("wb") as file:
        shares = {}
        for name, ray_routing in {"by prefix": False, "Ray's default": True}.items():
            settings = {"model": str(model), "kv_cache_tokens": CACHE_TOKENS, "row_budget": 32}
            with ClusterProcess(
                num_replicas=num_replicas, log=file, ray_routing=ray_routing, **settings
            ) as cluster:
                shares[name] = asyncio.run(hits(cluster.url))
                if not ray_routing:
                    rate = asyncio.run(throughput(cluster.url))
                    ends, after, seconds = asyncio.run(kill_one(cluster))
    tell_hits(shares)
    print(f"throughput: {rate:.0f} tokens/s with {num_replicas} replicas")
    print(f"killed replica: streams {dict(ends)}, later ones {dict(after)}, replaced after {seconds:.1f} s")
    return ends.keys() <= {"whole", "error"} and after.keys() == {"whole"}


def alone(model: Path) -> float:
    """Tokens/s of `speed serve` with one thread."""
    flags = ["--model", str(model), "--kv-cache-tokens", str(CACHE_TOKENS), "--row-budget", "32"]
    with ServerProcess(*flags, "--threads", "1") as server:
        return asyncio.run(throughput(f"http://127.0.0.1:{server.port}"))


@reporting("bench.cluster")
def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.cluster", description="A cluster on this machine.")
    parser.add_argument("--replicas", type=positive, default=2, help="default: 2")
    parser.add_argument("--log", type=Path, default=Path("/dev/null"), help="file for what Ray says")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "tiny"
        write_model(model)
        print(f"speed serve alone: {alone(model):.0f} tokens/s")
        is_good = measure(model, args.replicas, args.log)
    return int(not is_good)


if __name__ == "__main__":
    raise SystemExit(main())
