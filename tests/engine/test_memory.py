"""The cache is planned so that weights, cache and passes fit in what a machine or a container leaves."""

from collections.abc import Callable

import pytest
import torch

from model.engine import Engine, EngineConfigError
from model.machine import Memory
from model.options import EngineOptions, SchedulerLimits
from model.passes import memory
from model.passes.torch.backend import TorchMaker
from tests.tiny_models import tiny_model

MIB = 2**20
CPU = torch.device("cpu")
Leaves = Callable[[int, bool], None]


@pytest.fixture
def leaves(monkeypatch: pytest.MonkeyPatch) -> Leaves:
    """Sets what the machine has free, and whether a container's limit says so."""

    def set_free(free: int, is_limited: bool) -> None:
        monkeypatch.setattr(memory, "free_main_memory", lambda: Memory(free, is_limited))

    return set_free


@pytest.mark.parametrize("free", [0, 100 * MIB, 400 * MIB, 2000 * MIB, 2**36])
@pytest.mark.parametrize("is_limited", [False, True])
def test_cache_and_pass_fit_together(leaves: Leaves, free: int, is_limited: bool) -> None:
    leaves(free, is_limited)
    model, limits = tiny_model(vocab_size=5000), SchedulerLimits()
    planned = memory.cache_memory(model, CPU, limits)
    assert planned == 0 or planned + memory.pass_bytes(model, limits) <= free
    assert memory.cache_memory(model, CPU, limits, to_come=free) == 0


def test_a_container_of_one_gib_holds_a_full_context_of_the_embedded_model(leaves: Leaves) -> None:
    """380 MB are left beside weights, libraries and the API process; it planned 5.4 GB by /proc/meminfo."""
    leaves(380 * MIB, True)
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_heads": 9, "num_kv_heads": 3, "head_dim": 64}
    with torch.device("meta"):
        model = tiny_model(vocab_size=16384, num_block_layers=15, num_loops=4, **shape)
    planned = memory.cache_memory(model, CPU, SchedulerLimits(prefill_rows=256))
    assert 2048 * 82944 < planned < 380 * MIB - memory.pass_bytes(model, SchedulerLimits())


def test_memory_that_is_shared_is_not_taken_whole(leaves: Leaves) -> None:
    leaves(2**36, False)
    assert memory.cache_memory(tiny_model(), CPU, SchedulerLimits()) < 2**34


def test_engines_that_share_a_machine_take_equal_parts(leaves: Leaves) -> None:
    model = tiny_model()
    each = TorchMaker().cache_bytes(model).per_token
    limits = SchedulerLimits(prefill_rows=64 * model.config.num_loops)
    leaves(memory.pass_bytes(model, limits) + int(1600 * each / memory.OWN_SHARE), True)
    alone, shared = (Engine(model, EngineOptions(cache_sharers=n)).info.kv_cache_tokens for n in (1, 4))
    assert 1500 <= alone <= 1600
    assert alone // 4 - 16 <= shared <= alone // 4 + 16
    # A size that was asked for is each one's own.
    for options in (
        EngineOptions(cache_sharers=4, kv_cache_tokens=320),
        EngineOptions(cache_sharers=4, kv_cache_memory=320 * each),
    ):
        assert Engine(model, options).info.kv_cache_tokens == 320


def test_the_engine_plans_by_it(leaves: Leaves, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    limits = SchedulerLimits(prefill_rows=64 * model.config.num_loops)
    leaves(
        memory.pass_bytes(model, limits)
        + int(100 * TorchMaker().cache_bytes(model).per_token / memory.OWN_SHARE),
        True,
    )
    assert 64 <= Engine(model, EngineOptions()).info.max_model_len <= 100
    assert "needs more memory than there is" in caplog.text


def test_without_room_for_a_page_the_engine_says_so(leaves: Leaves) -> None:
    leaves(50 * MIB, True)
    with pytest.raises(EngineConfigError, match=r"max_model_len 128 needs \d+ bytes"):
        Engine(tiny_model())


def test_a_size_that_memory_does_not_hold_is_warned_of(
    leaves: Leaves, caplog: pytest.LogCaptureFixture
) -> None:
    leaves(MIB, True)
    model = tiny_model()
    Engine(model, EngineOptions(kv_cache_memory=8 * MIB))
    assert "KV cache may grow to" in caplog.text
    caplog.clear()
    leaves(64 * MIB, True)
    Engine(model, EngineOptions(kv_cache_memory=8 * MIB))
    assert not caplog.records
