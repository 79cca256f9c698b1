"""Streamed requests to a server with OpenAI's API, and when each piece of their answers came."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from tqdm import tqdm

from bench.options import Extra

if TYPE_CHECKING:
    import httpx
else:
    httpx = Extra("httpx")

Json = dict[str, object]
PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


@dataclass
class Answer:
    """What became of one request; times are seconds, those of a failed request mean nothing."""

    error: str = ""  # empty: it was answered whole
    text: str = ""
    input_tokens: int = 0
    output_tokens: int = 0
    started: float = 0.0  # since the run began
    ttft: float = 0.0  # until the first piece of text
    itl: list[float] = field(default_factory=list)  # between neighbouring pieces
    e2el: float = 0.0  # until the end of the answer

    @property
    def tpot(self) -> float | None:
        """Seconds for each token after the first; None where there is no such token."""
        if self.output_tokens < 2:
            return None
        return (self.e2el - self.ttft) / (self.output_tokens - 1)


class LoadError(ValueError):
    """There is no server, or it answers nothing."""


def connect(url: str, api_key: str | None, timeout: float) -> "httpx.AsyncClient":
    """A client with as many connections as it needs; `timeout` is in seconds without a byte."""
    client = httpx.AsyncClient  # first of all: where httpx is missing, this says so
    from bench.plain_transport import PlainTransport  # noqa: PLC0415

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        return client(
            base_url=url.rstrip("/"), headers=headers, transport=PlainTransport(timeout), trust_env=False
        )
    except httpx.InvalidURL as error:
        raise LoadError(f"{url!r} is no address of a server: {error}") from None


async def first_model(client: "httpx.AsyncClient") -> str:
    """The first model that /v1/models tells; raises LoadError."""
    try:
        response = await client.get("/v1/models")
        return str(response.raise_for_status().json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
        raise LoadError(f"no model is served at {client.base_url} ({error!r}): start `speed serve`") from None


async def load(
    client: "httpx.AsyncClient", path: str, bodies: Iterable[Json], times: list[float], most: int | None
) -> tuple[list[Answer], float]:
    """The answers in the order of their requests, and the seconds that all of them took.

    A request arrives at its time, in seconds from now, whether or not earlier ones have ended; at most
    `most` are in flight (None: no limit), and the clock of one that waits for a place starts when it has it.
    """
    gate = nullcontext() if most is None else asyncio.Semaphore(most)
    began = time.perf_counter()

    async def one(body: Json) -> Answer:
        async with gate:
            got = await answer(client, path, body, began)
        progress.update()
        return got

    with tqdm(total=len(times), unit="request", disable=None) as progress:
        async with asyncio.TaskGroup() as group:
            tasks: list[asyncio.Task[Answer]] = []
            for body, moment in zip(bodies, times, strict=True):
                await asyncio.sleep(max(0.0, began + moment - time.perf_counter()))
                tasks.append(group.create_task(one(body)))
    return [task.result() for task in tasks], time.perf_counter() - began


async def answer(client: "httpx.AsyncClient", path: str, body: Json, began: float) -> Answer:
    """Sends a body and reads its answer to the end; whatever goes wrong is told in `error`.

    `began` is the time of `time.perf_counter` at which the run began.
    """
    result = Answer(started=time.perf_counter() - began)
    try:
        await _read(client, path, body, result, began)
    except httpx.HTTPError as error:
        result.error = f"{type(error).__name__}: {error}"
    except (ValueError, KeyError, IndexError, TypeError) as error:
        result.error = f"not an answer of OpenAI's API: {error!r}"
    return result


async def _read(client: "httpx.AsyncClient", path: str, body: Json, result: Answer, began: float) -> None:
    last = start = result.started + began
    is_whole = False
    async with client.stream("POST", path, json=body) as response:
        if response.status_code != httpx.codes.OK:
            told = (await response.aread()).decode(errors="replace")
            result.error = f"{response.status_code}: {told[:300]}"
            return
        async for data in _events(response):
            if data == b"[DONE]":
                is_whole = True
                break
            text = _take(cast("Json", json.loads(data)), result)
            now = time.perf_counter()
            if text and not result.text:
                result.ttft = now - start
            elif text:
                result.itl.append(now - last)
            if text:
                result.text += text
                last = now
    result.e2el = time.perf_counter() - start
    if not result.text:
        result.ttft = result.e2el
    if not is_whole and not result.error:
        result.error = "the stream ended before [DONE]"


async def _events(response: "httpx.Response") -> AsyncIterator[bytes]:
    """The data of the events of a stream; comments and other fields are left out."""
    rest = b""  # of a line that isn't whole
    async for part in response.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line.removeprefix(b"data:").strip()


def _take(frame: Json, result: Answer) -> str:
    """Writes down the usage or the error of a frame, and returns its text."""
    if error := frame.get("error"):
        result.error = str(error)
        return ""
    if usage := frame.get("usage"):
        counts = cast("dict[str, int]", usage)
        result.input_tokens, result.output_tokens = counts["prompt_tokens"], counts["completion_tokens"]
    choices = cast("list[Json]", frame.get("choices") or [])
    if not choices:
        return ""
    delta = cast("Json", choices[0].get("delta") or {})
    return str(choices[0].get("text") or delta.get("content") or delta.get("reasoning_content") or "")
