"""Every attention implementation gives what plain causal attention over the same tokens gives."""

import mmap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from model.network.config import LoopedConfig
from model.network.layers import causal_attention
from model.passes.rows import RowRun
from model.passes.torch.attention import GatheredAttention, KVStore
from model.passes.torch.attention.store import zeros
from model.schedule.pages import PageTable
from tests.tiny_models import tiny_config

LENGTH, PAGE = 40, 4
WINDOWS: dict[str, dict[str, object]] = {
    "none": {},
    "sliding": {"sliding_window": 5, "sliding_layers": (0,)},
    "sliding, one token": {"sliding_window": 1, "sliding_layers": (0,)},
    "from the second loop on": {"sliding_window": 33, "first_loop_gate": True},
}
CONFIGS = {name: tiny_config(num_loops=4, num_block_layers=1, **window) for name, window in WINDOWS.items()}
CONFIG = CONFIGS["none"]
HEADS, KV_HEADS, DIM = CONFIG.num_heads, CONFIG.num_kv_heads, CONFIG.head_dim


NUM_PAGES = 4 * LENGTH // PAGE
LAYOUTS: dict[str, list[list[int]]] = {
    "neighbours": [[*range(10)], [*range(20, 30)]],
    "stretches": [[*range(6), *range(30, 34)], [*range(10, 13), *range(34, 37), *range(20, 24)]],
    "scattered": [[*range(0, 20, 2)], [*range(39, 19, -2)]],
}


def tables_of(layout: str) -> list[PageTable]:
    """Tables of two sequences, whose pages are neighbours, lie in a few stretches, or anywhere."""
    tables = [PageTable(PAGE), PageTable(PAGE)]
    for table, pages in zip(tables, LAYOUTS[layout], strict=True):
        for page in pages:
            table.pages.append(page)
    return tables


def cache_and_truth(
    layout: str, seed: int, config: LoopedConfig = CONFIG
) -> tuple[KVStore, list[PageTable], torch.Tensor, torch.Tensor]:
    """Two sequences' random q, k, v at every loop, K/V stored; truth is (sequences, loops, tokens, ...)."""
    generator = torch.Generator().manual_seed(seed)
    tables = tables_of(layout)
    store = KVStore(config, NUM_PAGES * PAGE, torch.device("cpu"), torch.float32)
    q = torch.randn(2, 4, LENGTH, HEADS, DIM, generator=generator)
    k, v = torch.randn(2, 2, 4, LENGTH, KV_HEADS, DIM, generator=generator)
    for sequence, table in enumerate(tables):
        for loop in range(4):
            entries = store.entries([RowRun(table, 0, LENGTH, loop)])
            store.write(0, entries, k[sequence, loop], v[sequence, loop])
    loops = [causal_attention(q[:, r], k[:, r], v[:, r], config.window(0, r)) for r in range(4)]
    truth = torch.stack(loops, 1)
    return store, tables, q, truth


runs_of_one_sequence = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, LENGTH - 9), st.integers(1, 8)),
    min_size=1,
    max_size=4,
    unique_by=lambda run: run[0],
)


def implementations() -> list[type]:
    # Imported here: conftest has asked for Triton's interpreter by now.
    from model.passes.cuda.triton_paged import TritonAttention  # noqa: PLC0415

    return [GatheredAttention, TritonAttention]


@pytest.mark.parametrize("number", range(2), ids=["gathered", "triton"])
@given(
    first=runs_of_one_sequence,
    second=runs_of_one_sequence,
    width_one=st.booleans(),
    layout=st.sampled_from(sorted(LAYOUTS)),
    seed=st.integers(0, 3),
    window=st.sampled_from(sorted(WINDOWS)),
)
@settings(max_examples=50, deadline=None)
def test_ragged_rows_equal_plain_causal_attention(
    number: int,
    first: list[tuple[int, int, int]],
    second: list[tuple[int, int, int]],
    width_one: bool,
    layout: str,
    seed: int,
    window: str,
) -> None:
    """Waves, prompt chunks, any loops, pages, windows. The rows' K/V are written again, as in a pass."""
    store, tables, q, truth = cache_and_truth(layout, seed, CONFIGS[window])
    rows = [
        (sequence, RowRun(tables[sequence], start, 1 if width_one else count, loop))
        for sequence, runs in enumerate((first, second))
        for loop, start, count in sorted(runs)
    ]
    batch = [run for _, run in rows]
    places = [(s, run.loop, slice(run.start, run.start + run.num_rows)) for s, run in rows]
    queries = torch.cat([q[place] for place in places])
    entries = store.entries(batch)
    keys, values = store.keys[0].flatten(0, 1)[entries], store.values[0].flatten(0, 1)[entries]
    got = implementations()[number](store).bind(batch)(0, queries, keys, values)
    assert torch.allclose(got, torch.cat([truth[place] for place in places]), atol=1e-5)


@pytest.mark.parametrize("window", [1, 2, 7, 40, 99])
def test_a_window_of_so_many_tokens_counts_the_token_itself(window: int) -> None:
    """Against a softmax written out token by token: off by one is the usual mistake."""
    q, k, v = torch.randn(3, 40, 1, DIM, generator=torch.Generator().manual_seed(3))
    got = causal_attention(q, k, v, window)
    for token in range(40):
        seen = range(max(0, token - window + 1), token + 1)
        weights = torch.stack([q[token, 0] @ k[p, 0] / DIM**0.5 for p in seen]).softmax(0)
        wanted = sum(weight * v[p, 0] for weight, p in zip(weights, seen, strict=True))
        assert torch.allclose(got[token, 0], wanted, atol=1e-5)


def test_a_binding_that_only_reads_leaves_the_cache_as_it_is() -> None:
    """IQuest's later loops read what the first one stored; k and v are not the first loop's."""
    store, tables, q, truth = cache_and_truth(
        layout="neighbours", seed=2, config=CONFIGS["from the second loop on"]
    )
    run = RowRun(tables[0], 21, 3, 0)
    before = store.keys[0].clone(), store.values[0].clone()
    junk = torch.full((3, KV_HEADS, DIM), 1e3)
    for implementation in implementations():
        got = implementation(store).bind([run], write=False)(0, q[0, 0, 21:24], junk, junk)
        assert torch.allclose(got, truth[0, 0, 21:24], atol=1e-5)
    assert torch.equal(store.keys[0], before[0])
    assert torch.equal(store.values[0], before[1])


def test_what_an_earlier_owner_left_in_a_page_cannot_reach_a_row_under_the_mask() -> None:
    """The rest of a page is read under a mask, and no mask hides a NaN: the cache never holds one."""
    store, tables, q, truth = cache_and_truth(layout="neighbours", seed=2)
    attention, bad = GatheredAttention(store), torch.full((1, KV_HEADS, DIM), torch.nan)
    attention.bind([RowRun(tables[0], 21, 1, 2)])(0, q[0, 2, 21:22], bad, bad / 0)
    runs = [RowRun(tables[0], 20, 1, 2), RowRun(tables[1], 30, 1, 2)]  # padded to one length
    keys, values = (cache[0].flatten(0, 1)[store.entries(runs)] for cache in (store.keys, store.values))
    got = attention.bind(runs)(0, torch.stack((q[0, 2, 20], q[1, 2, 30])), keys, values)
    assert torch.allclose(got, torch.stack((truth[0, 2, 20], truth[1, 2, 30])), atol=1e-5)


def test_a_row_does_not_see_what_stands_behind_it() -> None:
    """After a flush stale entries remain behind the end; they must not matter."""
    store, tables, q, truth = cache_and_truth(layout="neighbours", seed=1)
    store.keys[0][:, tables[0].cell(20) :] = 1e4
    run = RowRun(tables[0], 19, 1, 2)
    entries = store.entries([run])
    for implementation in implementations():
        keys, values = store.keys[0].flatten(0, 1)[entries], store.values[0].flatten(0, 1)[entries]
        got = implementation(store).bind([run])(0, q[0, 2, 19:20], keys, values)
        assert torch.allclose(got, truth[0, 2, 19:20], atol=1e-5)


def test_attention_for_training_equals_the_fused_one_forwards_and_backwards() -> None:
    """Where gradients are wanted on a CPU another implementation runs."""
    seeded = torch.Generator().manual_seed(0)
    shapes = ((2, 11, 6, 8), (2, 11, 2, 8), (2, 11, 2, 8))
    tensors = [torch.randn(shape, generator=seeded) for shape in shapes]
    q, k, v = tensors
    wanted = causal_attention(q, k, v)
    trained = [tensor.clone().requires_grad_(True) for tensor in tensors]
    q, k, v = trained
    out = causal_attention(q, k, v)
    torch.testing.assert_close(out.detach(), wanted)
    weights = torch.randn(wanted.shape, generator=seeded)
    (out * weights).sum().backward()
    fused = [tensor.clone().requires_grad_(True) for tensor in tensors]
    q, k, v = (tensor.transpose(1, 2) for tensor in fused)
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    (plain * weights).sum().backward()
    for mine, theirs in zip(trained, fused, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the size of the process from Linux")
def test_a_token_in_many_layers_takes_pages_of_memory_not_megabytes() -> None:
    """A sequence's first token writes to every layer and loop, each far from the next."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    caches = [zeros((4, 8192, 2, 64), torch.device("cpu"), torch.float32) for _ in range(8)]  # 16 MB each
    before = resident()
    for cache in caches:
        cache[:, 0] = 1.0
    assert resident() - before < 2**22
    assert all(cache[:, 0].min() == 1.0 and not cache[:, 1:].any() for cache in caches)
