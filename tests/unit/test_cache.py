"""The page pool: neighbours first, nothing lost, nothing given twice."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.cache import CacheIntegrityError, PagePool


@given(steps=st.lists(st.tuples(st.booleans(), st.integers(1, 30)), max_size=60), page_size=st.integers(1, 8))
@settings(max_examples=200, deadline=None)
def test_live_tables_never_share_a_page(steps: list[tuple[bool, int]], page_size: int) -> None:
    pool = PagePool(20, page_size)
    live = []
    for take, amount in steps:
        if take and pool.can_allocate(amount):
            live.append(pool.allocate(amount))
        elif live:
            pool.free(live.pop(amount % len(live)))
        pool.check_integrity()
        pages = [page for table in live for page in table.pages]
        assert len(pages) == len(set(pages)) == pool.num_pages - pool.num_free_pages


def test_pages_are_neighbours_when_a_run_of_them_is_free_and_scattered_otherwise() -> None:
    pool = PagePool(6, 4)
    tables = [pool.allocate(4) for _ in range(6)]
    for index in (0, 2, 3, 5):
        pool.free(tables[index])
    neighbours = pool.allocate(8)
    assert (neighbours.pages, neighbours.base) == ((2, 3), 8)
    scattered = pool.allocate(8)
    assert (scattered.pages, scattered.base) == ((0, 5), None)
    assert list(scattered.slots(2, 4)) == [2, 3, 20, 21]
    assert list(neighbours.slots(3, 3)) == [11, 12, 13]


def test_freeing_twice_and_taking_too_much_are_errors() -> None:
    pool = PagePool(2, 4)
    table = pool.allocate(8)
    with pytest.raises(CacheIntegrityError, match="1 pages wanted, 0 are free"):
        pool.allocate(1)
    pool.free(table)
    with pytest.raises(CacheIntegrityError, match="freed twice"):
        pool.free(table)


def test_check_integrity_sees_a_page_that_nobody_owns() -> None:
    pool = PagePool(3, 4)
    pool.allocate(4)
    pool._free[2] = 0
    with pytest.raises(CacheIntegrityError):
        pool.check_integrity()
