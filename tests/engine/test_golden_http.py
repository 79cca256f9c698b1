"""Every golden folder through the HTTP application, by token ids, since none has a tokenizer.

Greedy continuations at the model's depth and below, with speculation on and off, alone and in a batch
with other lengths, are the reference's. The vectors lie beside the repository (see tests/golden.py).
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from model import load_model
from model.engine import Engine
from model.options import EngineOptions
from model.passes.backend import BackendMaker
from server.app import create_app
from server.settings import Settings
from server.tokenizer import load_codec
from tests.engine.native_tools import BACKENDS
from tests.golden import GOLDEN, golden_folders
from tests.local_engine import LocalEngine
from tests.loose import Json

FOLDERS = golden_folders()


@asynccontextmanager
async def serving(folder: Path, maker: BackendMaker | None = None) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application over the folder's model, by torch unless said otherwise."""
    limits = EngineOptions(max_model_len=128, kv_cache_tokens=4096)
    engine = Engine(load_model(folder).model, limits, maker=maker)
    app = create_app(LocalEngine(engine), load_codec(folder), Settings(model=str(folder)))
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost", timeout=60)
    async with app.router.lifespan_context(app), client:
        yield client


async def complete(client: httpx.AsyncClient, folder: Path, **fields: Json) -> list[list[int]]:
    """Continuations by prompt; each is greedy and of 64 tokens unless `fields` say otherwise."""
    body = {"model": folder.name, "max_tokens": 64, "temperature": 0, "ignore_eos": True, **fields}
    answer = await client.post("/v1/completions", json={**body, "return_token_ids": True})
    assert answer.status_code == 200, answer.text
    choices = answer.json()["choices"]
    assert {choice["text"] for choice in choices} == {""}
    return [choice["token_ids"] for choice in choices]


@pytest.mark.parametrize("maker", BACKENDS)
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
async def test_greedy_continuations_are_the_references(folder: Path, maker: BackendMaker) -> None:
    expected = json.loads((folder / "expected.json").read_text())
    if expected.get("encoder_decoder"):
        pytest.skip("its prompts are sources: see below")
    prompts = list(expected["prompts"].values())

    def wanted(depth: int) -> list[list[int]]:
        return [expected["greedy"][name][f"depth_{depth}"] for name in expected["prompts"]]

    loops = expected["loops"]
    async with serving(folder, maker) as client:
        for speculation in (True, False):
            together = await complete(client, folder, prompt=prompts, speculation=speculation)
            assert together == wanted(loops)
            alone = await complete(client, folder, prompt=prompts[-1], speculation=speculation)
            assert alone == wanted(loops)[-1:]
        depths = [complete(client, folder, prompt=prompts, num_loops=d) for d in range(1, loops)]
        assert await asyncio.gather(*depths) == [wanted(depth) for depth in range(1, loops)]


@pytest.mark.parametrize("maker", BACKENDS)
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
async def test_texts_behind_an_encoder_are_the_references(folder: Path, maker: BackendMaker) -> None:
    """The prompt is the source, `decoder_prompt` what the text begins with, behind the start token."""
    expected = json.loads((folder / "expected.json").read_text())
    if not expected.get("encoder_decoder"):
        pytest.skip("no encoder")
    async with serving(folder, maker) as client:

        async def text(name: str, depth: int, **fields: Json) -> bool:
            (found,) = await complete(
                client,
                folder,
                prompt=expected["sources"][name],
                decoder_prompt=expected["prompts"][name][1:],
                num_loops=depth,
                **fields,
            )
            return bool(found == expected["greedy"][name][f"depth_{depth}"])

        every = [(name, depth) for name in expected["prompts"] for depth in range(1, expected["loops"] + 1)]
        for speculation in (True, False):
            assert all([await text(*one, speculation=speculation) for one in every])
            assert all(await asyncio.gather(*(text(*one, speculation=speculation) for one in every)))
        # Sources of different length in one request, each with the start token alone.
        alone = [await complete(client, folder, prompt=source) for source in expected["sources"].values()]
        together = await complete(client, folder, prompt=list(expected["sources"].values()))
        assert together == [found for (found,) in alone]
        assert together[0] == expected["greedy"]["p0"][f"depth_{expected['loops']}"]


@pytest.mark.skipif(not FOLDERS, reason="no shared/golden beside the repository")
async def test_a_start_from_noise_is_reproduced_by_its_seed() -> None:
    """With and without speculation, alone or beside others; zeros, the default, know no seed."""
    folder = GOLDEN / "huginn_r4"
    prompt, other = [5, 6, 7, 8, 9], [1] * 30
    async with serving(folder) as client:
        (first,) = await complete(client, folder, prompt=prompt, init_scale=1.0, seed=1)
        noisy = {"init_scale": 1.0, "prompt": [other, prompt]}
        assert (await complete(client, folder, seed=1, **noisy))[1] == first
        assert (await complete(client, folder, seed=1, speculation=False, **noisy))[1] == first
        assert (await complete(client, folder, seed=2, **noisy))[1] != first
        zeros = [await complete(client, folder, prompt=prompt, seed=seed) for seed in (1, 2)]
        assert zeros[0] == zeros[1] != [first]


def test_vectors_are_there() -> None:
    """Without this, a moved folder would turn the test above into nothing."""
    if not GOLDEN.is_dir():
        pytest.skip("no shared/golden beside the repository")
    assert len(FOLDERS) >= 16
