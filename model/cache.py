"""Pages of the KV cache: which token positions of which sequence live where. Pure Python, no tensors.

One page holds `page_size` consecutive positions of one sequence, for every slot (loop, layer) at once.
Invariant: a page is free or owned by exactly one live table; `check_integrity` proves it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

FREE, USED = 1, 0


class CacheIntegrityError(RuntimeError):
    """The page pool lost or doubled a page: a bug in the engine."""


@dataclass(frozen=True, eq=False)
class PageTable:
    """Where the positions of one sequence live: position p is token slot `slot(p)` of the pool.

    `base` is the token slot of position 0 when the pages are neighbours in order (then slot(p) is
    base + p and attention reads the cache through a view), else None.
    """

    pages: tuple[int, ...]
    page_size: int
    base: int | None

    @property
    def capacity(self) -> int:
        """Positions that fit."""
        return len(self.pages) * self.page_size

    def slot(self, position: int) -> int:
        """Token slot of one position."""
        return self.pages[position // self.page_size] * self.page_size + position % self.page_size

    def slots(self, start: int, count: int) -> Iterable[int]:
        """Token slots of positions start .. start + count - 1."""
        if self.base is not None:
            return range(self.base + start, self.base + start + count)
        return [self.slot(position) for position in range(start, start + count)]


class PagePool:
    """A fixed number of pages, given out neighbours first."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"num_pages {num_pages} and page_size {page_size} must be at least 1")
        self.page_size = page_size
        self._free = bytearray([FREE]) * num_pages
        self._live: dict[int, PageTable] = {}

    @property
    def num_pages(self) -> int:
        """Pages in all."""
        return len(self._free)

    @property
    def num_free_pages(self) -> int:
        """Pages that no table owns."""
        return self._free.count(FREE)

    @property
    def num_tokens(self) -> int:
        """Token slots in all."""
        return self.num_pages * self.page_size

    def pages_for(self, num_tokens: int) -> int:
        """Pages that so many positions need."""
        return -(-num_tokens // self.page_size)

    def can_allocate(self, num_tokens: int) -> bool:
        """Whether `allocate(num_tokens)` would succeed now."""
        return self.pages_for(num_tokens) <= self.num_free_pages

    def allocate(self, num_tokens: int) -> PageTable:
        """A table for `num_tokens` positions; neighbouring pages if any such run is free.

        Raises CacheIntegrityError when the pages aren't there: ask `can_allocate` first.
        """
        count = self.pages_for(num_tokens)
        if count > self.num_free_pages:
            raise CacheIntegrityError(f"{count} pages wanted, {self.num_free_pages} are free")
        first = self._free.find(bytes([FREE]) * count)
        pages = tuple(range(first, first + count)) if first >= 0 else self._scattered(count)
        for page in pages:
            self._free[page] = USED
        base = first * self.page_size if first >= 0 else None
        table = PageTable(pages, self.page_size, base)
        self._live[id(table)] = table
        return table

    def free(self, table: PageTable) -> None:
        """Takes the pages of a live table back. Raises CacheIntegrityError for any other table."""
        if self._live.pop(id(table), None) is None:
            raise CacheIntegrityError("a page table was freed twice, or belongs to another pool")
        for page in table.pages:
            self._free[page] = FREE

    def check_integrity(self) -> None:
        """Raises CacheIntegrityError unless every page is free or owned by exactly one live table."""
        owned = [page for table in self._live.values() for page in table.pages]
        used = [page for page, state in enumerate(self._free) if state == USED]
        if sorted(owned) != used:
            raise CacheIntegrityError(f"pages in tables {sorted(owned)} differ from pages in use {used}")

    def _scattered(self, count: int) -> tuple[int, ...]:
        def free_pages() -> Iterator[int]:
            page = self._free.find(FREE)
            while page >= 0:
                yield page
                page = self._free.find(FREE, page + 1)

        pages = free_pages()
        return tuple(next(pages) for _ in range(count))
