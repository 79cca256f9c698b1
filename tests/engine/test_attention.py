"""Every attention implementation gives what plain causal attention over the same tokens gives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.attention import GatheredAttention, KVStore, ViewedAttention
from model.attention.store import RowRun
from model.cache import PagePool, PageTable
from model.layers import causal_attention
from tests.tiny_models import tiny_config

LENGTH, PAGE = 40, 4
CONFIG = tiny_config(num_loops=4, num_block_layers=1)
HEADS, KV_HEADS, DIM = CONFIG.num_heads, CONFIG.num_kv_heads, CONFIG.head_dim


def two_tables(scattered: bool) -> tuple[PagePool, list[PageTable]]:
    """Tables of two sequences whose pages are neighbours, or no two of which are."""
    pool = PagePool(4 * LENGTH // PAGE, PAGE)
    if scattered:
        held = [pool.allocate(PAGE) for _ in range(pool.num_pages)]
        for table in held[::2]:
            pool.free(table)
    return pool, [pool.allocate(LENGTH) for _ in range(2)]


def cache_and_truth(
    scattered: bool, seed: int
) -> tuple[KVStore, list[PageTable], torch.Tensor, torch.Tensor]:
    """Two sequences' random q, k, v at every loop, K/V stored; truth is (sequences, loops, tokens, ...)."""
    generator = torch.Generator().manual_seed(seed)
    pool, tables = two_tables(scattered)
    assert all((table.base is None) == scattered for table in tables)
    store = KVStore(CONFIG, pool.num_tokens, torch.device("cpu"), torch.float32)
    q = torch.randn(2, 4, LENGTH, HEADS, DIM, generator=generator)
    k, v = torch.randn(2, 2, 4, LENGTH, KV_HEADS, DIM, generator=generator)
    for sequence, table in enumerate(tables):
        for loop in range(4):
            slots = store.entries([RowRun(table, 0, LENGTH, loop)])
            store.write(0, slots, k[sequence, loop], v[sequence, loop])
    truth = causal_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)).unflatten(0, (2, 4))
    return store, tables, q, truth


runs_of_one_sequence = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, LENGTH - 9), st.integers(1, 8)),
    min_size=1,
    max_size=4,
    unique_by=lambda run: run[0],
)


def implementations() -> list[type]:
    # Imported here: conftest has asked for Triton's interpreter by now.
    from model.attention.triton_paged import TritonAttention  # noqa: PLC0415

    return [GatheredAttention, ViewedAttention, TritonAttention]


@pytest.mark.parametrize("number", range(3), ids=["gathered", "viewed", "triton"])
@given(
    first=runs_of_one_sequence,
    second=runs_of_one_sequence,
    width_one=st.booleans(),
    scattered=st.booleans(),
    seed=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_ragged_rows_equal_plain_causal_attention(number, first, second, width_one, scattered, seed):
    """Waves, prompt chunks, any loops, any pages. The rows' K/V are written again, as in a pass."""
    store, tables, q, truth = cache_and_truth(scattered, seed)
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


def test_a_row_does_not_see_what_stands_behind_it() -> None:
    """After a flush stale entries remain behind the end; they must not matter."""
    store, tables, q, truth = cache_and_truth(scattered=False, seed=1)
    store.keys[0][:, tables[0].slot(20) :] = 1e4
    run = RowRun(tables[0], 19, 1, 2)
    entries = store.entries([run])
    for implementation in implementations():
        keys, values = store.keys[0].flatten(0, 1)[entries], store.values[0].flatten(0, 1)[entries]
        got = implementation(store).bind([run])(0, q[0, 2, 19:20], keys, values)
        assert torch.allclose(got, truth[0, 2, 19:20], atol=1e-5)
