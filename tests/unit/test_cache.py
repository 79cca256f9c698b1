"""The page pool: nothing lost, what is shared is never written."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.schedule.pages import CacheIntegrityError, PagePool, PageTable, PrefixKeys


@given(
    steps=st.lists(st.tuples(st.sampled_from("ogrf"), st.integers(0, 30), st.integers(0, 3)), max_size=80),
    page_size=st.integers(1, 4),
)
@settings(max_examples=300, deadline=None)
def test_any_use_keeps_the_books_and_shares_only_what_was_registered(
    steps: list[tuple[str, int, int]], page_size: int
) -> None:
    """Tables open with shared prefixes, grow, register and go; a page is written by one table at most."""
    pool = PagePool(20, page_size)
    live: list[tuple[PageTable, int, int]] = []  # table, text, pages that were shared
    for action, amount, text in steps:
        digests = PrefixKeys("", page_size).upto([text] * 20 * page_size, 20)
        if action == "o":
            shared = pool.lookup(digests[: amount // page_size])
            table = pool.open(shared, amount + 1)
            if table is not None:
                live.append((table, text, len(shared)))
        elif live:
            table, its_text, _ = live[amount % len(live)]
            if action == "g":
                pool.grow(table, table.capacity + amount % 3)
            elif action == "r":
                digests = PrefixKeys("", page_size).upto([its_text] * 20 * page_size, 20)
                pool.register(table, digests[: len(table.pages)])
            else:
                pool.free(table)
                live.pop(amount % len(live))
        pool.check_integrity()
        written = [page for table, _, shared in live for page in table.pages[shared:]]
        assert len(written) == len(set(written))
    for table, _, _ in live:
        pool.free(table)
    assert pool.num_free_pages == pool.num_pages


def table_of(pool: PagePool, num_tokens: int) -> PageTable:
    table = pool.open([], num_tokens)
    assert table is not None
    return table


def test_a_position_keeps_its_cell_wherever_the_pages_of_its_table_lie() -> None:
    pool = PagePool(6, 4)
    tables = [table_of(pool, 4) for _ in range(6)]
    for index in (0, 2, 5):
        pool.free(tables[index])
    scattered = table_of(pool, 8)
    cells = list(scattered.cells(0, 8))
    assert len({cell // 4 for cell in cells}) == 2
    assert {cell // 4 for cell in cells} <= {0, 2, 5}
    assert pool.grow(scattered, 12)
    assert cells == [scattered.cell(position) for position in range(8)]


def test_shared_pages_outlive_their_first_holder_and_the_oldest_are_overwritten_first() -> None:
    pool = PagePool(4, 4)
    keys = {text: PrefixKeys("", 4).upto([text] * 8, 1) for text in (1, 2)}
    for text in (1, 2):
        table = table_of(pool, 4)
        pool.register(table, keys[text])
        pool.free(table)
    assert [len(pool.lookup(keys[text])) for text in (1, 2)] == [1, 1]
    sharer = pool.open(pool.lookup(keys[1]), 8)
    assert sharer is not None
    pool.free(sharer)  # 1 was used last
    table_of(pool, 12)
    assert [len(pool.lookup(keys[text])) for text in (1, 2)] == [1, 0]


def test_salt_and_every_earlier_token_are_part_of_a_digest() -> None:
    base = PrefixKeys("a", 2).upto([1, 2, 3, 4], 2)
    assert PrefixKeys("a", 2).upto([1, 2, 3, 4, 5, 6], 3)[:2] == base
    assert PrefixKeys("b", 2).upto([1, 2, 3, 4], 2)[0] != base[0]
    assert PrefixKeys("a", 2).upto([9, 2, 3, 4], 2)[1] != base[1]


def test_freeing_twice_is_an_error_and_taking_too_much_is_refused() -> None:
    pool = PagePool(2, 4)
    table = table_of(pool, 8)
    assert pool.open([], 1) is None
    pool.free(table)
    assert pool.open([], 8, spare=1) is None
    with pytest.raises(CacheIntegrityError, match="freed twice"):
        pool.free(table)


def test_check_integrity_sees_books_that_are_wrong() -> None:
    pool = PagePool(3, 4)
    table_of(pool, 4)
    pool._holders[2] = 1
    with pytest.raises(CacheIntegrityError):
        pool.check_integrity()
