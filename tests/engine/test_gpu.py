"""What only a GPU can show: golden folders, many texts with and without speculation, and memory.

`pytest -m gpu` runs these and the tests of the kernels there; they are skipped where there is no GPU.
"""

import json
import random
from pathlib import Path

import pytest
import torch

from model import load_model
from model.engine import Engine
from model.options import EngineOptions
from model.passes.backend import BackendMaker
from model.passes.cuda.backend import CudaOptions
from model.passes.cuda.weights import CudaUnavailableError, check_covered
from model.passes.torch.backend import TorchMaker
from model.protocol import GenerationRequest, SamplingParams
from tests.engine.test_golden import FOLDERS, continuations, wanted_continuations
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_familys_golden_texts_come_from_the_gpu(folder: Path) -> None:
    """By the kernels where they cover the family, else by torch's modules."""
    loaded, expected = load_model(folder, "cuda"), json.loads((folder / "expected.json").read_text())
    maker: BackendMaker = CudaOptions()
    try:
        check_covered(loaded.config)
    except CudaUnavailableError:
        maker = TorchMaker()
    wanted = wanted_continuations(expected, range(1, expected["loops"] + 1))
    assert continuations(loaded, expected, None, wanted, together=True, maker=maker) == wanted


def requests(count: int, *, speculation: bool) -> list[GenerationRequest]:
    """Prompts of many lengths; two of three texts are drawn, one of three with a filter."""
    drawn = random.Random(7)
    return [
        GenerationRequest(
            request_id=str(index),
            prompt_token_ids=[drawn.randrange(61) for _ in range(1 + index % 23)],
            max_tokens=24,
            sampling=SamplingParams(
                temperature=(0.0, 3.0, 5.0)[index % 3], top_p=(1.0, 1.0, 0.9)[index % 3], seed=index
            ),
            speculation=speculation,
            ignore_eos=True,
        )
        for index in range(count)
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_two_thousand_texts_are_the_same_with_speculation_and_among_others(dtype: torch.dtype) -> None:
    """Bit for bit in every weight type: passes of 1 to 128 rows meet the same row."""
    model = tiny_model(
        num_prelude_layers=1, num_coda_layers=1, input_injection=True, num_loops=4, num_block_layers=3
    )
    found = []
    for speculation, at_once in ((False, 8), (True, 64)):
        options = EngineOptions(
            max_model_len=64,
            kv_cache_tokens=64 * 64,
            max_num_seqs=at_once,
            row_budget=128,
            draft_policy="single",
        )
        engine = Engine(model.to("cuda", dtype), options, maker=CudaOptions())
        events = engine.run(requests(2000, speculation=speculation))
        engine.check_integrity()
        found.append({name: [t for e in each for t in e.token_ids] for name, each in events.items()})
    assert found[0] == found[1]
    assert all(len(text) == 24 for text in found[0].values())


def test_device_memory_does_not_grow_with_passes() -> None:
    """Buffers and graphs are made at the start; what a pass takes beside them is given back."""
    options = EngineOptions(max_model_len=64, kv_cache_tokens=64 * 32, row_budget=64)
    engine = Engine(tiny_model().to("cuda", torch.bfloat16), options, maker=CudaOptions())
    engine.run(requests(60, speculation=True))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        engine.run(requests(60, speculation=True))
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before < 2**20
