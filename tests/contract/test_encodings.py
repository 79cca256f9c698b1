"""Bodies in gzip, and how little a bomb of them can do."""

import gzip
import json
import tracemalloc
import zlib
from collections.abc import AsyncIterator

import httpx
import pytest

from tests.contract.conftest import TEXT, Served, serving
from tests.contract.test_errors import error_of

BODY = json.dumps({"model": "default", "prompt": "hi", "max_tokens": 100}).encode()


async def send(served: Served, content: bytes, encoding: str) -> httpx.Response:
    headers = {"content-type": "application/json", "content-encoding": encoding}
    return await served.client.post("/v1/completions", content=content, headers=headers)


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "x-gzip"])
async def test_a_body_in_gzip_is_read(served: Served, encoding: str) -> None:
    response = await send(served, gzip.compress(BODY), encoding)
    assert response.json()["choices"][0]["text"] == TEXT


async def test_a_body_that_comes_in_small_parts_is_read(served: Served) -> None:
    packed = gzip.compress(BODY)

    async def parts() -> AsyncIterator[bytes]:
        for byte in packed:
            yield bytes([byte])

    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    response = await served.client.post("/v1/completions", content=parts(), headers=headers)
    assert response.json()["choices"][0]["text"] == TEXT


async def test_a_long_body_is_read_whole() -> None:
    async with serving(body_limit=2**21) as served:
        padded = BODY[:-1] + b" " * 2**20 + b"}"
        assert (await send(served, gzip.compress(padded), "gzip")).status_code == 200


async def test_a_bomb_is_refused_before_it_has_gone_off() -> None:
    """64 MiB of blanks are 64 KiB packed."""
    bomb = gzip.compress(b" " * 2**26)
    async with serving(body_limit=2**20) as served:
        await send(served, gzip.compress(BODY), "gzip")
        tracemalloc.start()
        error = error_of(await send(served, bomb, "gzip"), 413)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert error["code"] == "request_entity_too_large"
    assert peak < 8 * 2**20


@pytest.mark.parametrize(
    "content",
    [BODY, gzip.compress(BODY)[:-9], gzip.compress(BODY) + b"x", b"", zlib.compress(BODY)],
    ids=["plain", "cut", "more", "empty", "zlib"],
)
async def test_what_is_no_gzip_is_400(served: Served, content: bytes) -> None:
    assert "gzip" in error_of(await send(served, content, "gzip"), 400)["message"]


@pytest.mark.parametrize("encoding", ["br", "deflate", "zstd", "gzip, gzip"])
async def test_another_encoding_is_415_and_says_what_is_read(served: Served, encoding: str) -> None:
    response = await send(served, BODY, encoding)
    assert error_of(response, 415)["code"] == "unsupported_media_type"
    assert encoding in response.json()["error"]["message"]
    assert response.headers["accept-encoding"] == "gzip"


async def test_identity_is_no_encoding(served: Served) -> None:
    assert (await send(served, BODY, "identity")).status_code == 200
