"""Pages of the KV cache: which token positions of which sequence live where. Pure Python, no tensors.

One page is `page_size` cells in a row. A cell holds one position of one sequence, for every slot (loop,
layer) at once; the positions of a page are consecutive. A full page whose K/V is final is known by a digest
of all tokens up to its end; a later sequence that begins with the same tokens shares it (prefix cache).
Pages that nobody holds keep their contents until they are needed, the least recently used first. Invariants:
the holders of a page are the live tables that list it; a shared page is never written; `check_integrity`
proves the books.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np


class CacheIntegrityError(RuntimeError):
    """The page pool lost or doubled a page: a bug in the engine."""


class Segment(NamedTuple):
    """Positions start .. start + length - 1, which lie side by side in the pool from `cell` on."""

    start: int
    cell: int
    length: int


class PageTable:
    """Where the positions of one sequence live; grown by its pool alone."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.pages: list[int] = []
        self.segments: list[Segment] = []
        self.num_registered = 0  # first pages that the prefix cache knows

    @property
    def capacity(self) -> int:
        """Positions that fit."""
        return len(self.pages) * self.page_size

    @property
    def base(self) -> int | None:
        """The cell of position 0 if all pages are neighbours in order, else None."""
        return self.segments[0].cell if len(self.segments) == 1 else None

    def cell(self, position: int) -> int:
        """The cell of one position."""
        return self.pages[position // self.page_size] * self.page_size + position % self.page_size

    def cells(self, start: int, count: int) -> Iterable[int]:
        """The cells of positions start .. start + count - 1."""
        base = self.base
        if base is not None:
            return range(base + start, base + start + count)
        return [self.cell(position) for position in range(start, start + count)]

    def segments_of(self, count: int) -> list[Segment]:
        """The first `count` positions as stretches of neighbouring cells, in order."""
        parts = [part for part in self.segments if part.start < count]
        last = parts[-1]
        parts[-1] = last._replace(length=min(last.length, count - last.start))
        return parts

    def append(self, page: int) -> None:
        """Adds a page behind the last one."""
        cell, size = page * self.page_size, self.page_size
        last = self.segments[-1] if self.segments else None
        if last is not None and last.cell + last.length == cell:
            self.segments[-1] = last._replace(length=last.length + size)
        else:
            self.segments.append(Segment(len(self.pages) * size, cell, size))
        self.pages.append(page)


class PrefixKeys:
    """Digests of a sequence's full pages: each covers every token up to the page's end, and the salt.

    `salt` holds whatever else K/V depends on.
    """

    def __init__(self, salt: str, page_size: int) -> None:
        self._page_size = page_size
        self._digests = [hashlib.blake2b(salt.encode(), digest_size=16).digest()]

    def upto(self, tokens: Sequence[int], num_pages: int) -> list[bytes]:
        """The first `num_pages` digests of final tokens."""
        size = self._page_size
        for page in range(len(self._digests) - 1, num_pages):
            content = array("q", tokens[page * size : (page + 1) * size]).tobytes()
            self._digests.append(hashlib.blake2b(self._digests[-1] + content, digest_size=16).digest())
        return self._digests[1 : num_pages + 1]


class PagePool:
    """A fixed number of pages.

    A new table gets a stretch of neighbouring pages planned for its whole possible length, where there
    is one: attention reads neighbours without a copy. A plan holds nothing; under pressure others take
    its pages.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"num_pages {num_pages} and page_size {page_size} must be at least 1")
        self.num_pages, self.page_size = num_pages, page_size
        self._holders = np.zeros(num_pages, np.int32)
        self._free = OrderedDict[int, None].fromkeys(range(num_pages))  # next to be taken first
        self._digest_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._used_at = np.zeros(num_pages, np.int64)  # when the page was given back; 0: nothing cached
        self._clock = 0
        self._planned = np.zeros(num_pages, np.int32)  # plans over each page
        self._live: dict[PageTable, range] = {}  # each table's plan

    @property
    def num_free_pages(self) -> int:
        """Pages that no table holds, cached ones included."""
        return len(self._free)

    @property
    def num_cached_pages(self) -> int:
        """Pages that the prefix cache knows, held or not."""
        return len(self._digest_of)

    @property
    def num_tokens(self) -> int:
        """How many cells there are."""
        return self.num_pages * self.page_size

    def pages_for(self, num_tokens: int) -> int:
        """Pages that so many positions need."""
        return -(-num_tokens // self.page_size)

    def lookup(self, digests: Sequence[bytes]) -> list[int]:
        """The pages of the longest known beginning."""
        pages = []
        for digest in digests:
            page = self._page_of.get(digest)
            if page is None:
                break
            pages.append(page)
        return pages

    def open(
        self, shared: Sequence[int], num_tokens: int, length_limit: int, spare: int = 0
    ) -> PageTable | None:
        """A table that begins with the `shared` pages and has room for `num_tokens`; None if it can't.

        `length_limit` is what it may grow to; `spare` pages must stay free.
        """
        own = max(0, self.pages_for(num_tokens) - len(shared))
        revived = sum(page in self._free for page in shared)
        if own + revived + spare > len(self._free):
            return None
        table = PageTable(self.page_size)
        for page in shared:
            self._hold(page, table)
        table.num_registered = len(shared)
        plan = self._plan(max(own, self.pages_for(length_limit) - len(shared)), table)
        self._planned[plan.start : plan.stop] += 1
        self._live[table] = plan
        grown = self.grow(table, num_tokens)
        assert grown
        return table

    def grow(self, table: PageTable, num_tokens: int) -> bool:
        """Makes room for `num_tokens` positions; False, with nothing changed, if too few pages are free."""
        missing = self.pages_for(num_tokens) - len(table.pages)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            page = self._next_page(table)
            self._forget(page)
            self._hold(page, table)
        return True

    def register(self, table: PageTable, digests: Sequence[bytes]) -> None:
        """The table's first pages, one for each digest, are full and final: others may share them."""
        for index in range(table.num_registered, len(digests)):
            if digests[index] not in self._page_of:
                self._page_of[digests[index]] = table.pages[index]
                self._digest_of[table.pages[index]] = digests[index]
        table.num_registered = max(table.num_registered, len(digests))

    def forget(self, table: PageTable) -> None:
        """Nobody shares the table's pages from now on: what is in them may be wrong."""
        for page in table.pages:
            self._forget(page)
        table.num_registered = 0

    def free(self, table: PageTable) -> None:
        """Takes the pages of a live table back. Raises CacheIntegrityError for any other table."""
        plan = self._live.pop(table, None)
        if plan is None:
            raise CacheIntegrityError("a page table was freed twice, or belongs to another pool")
        self._planned[plan.start : plan.stop] -= 1
        self._clock += 1
        for page in reversed(table.pages):  # the end of a text is the first to be overwritten
            self._holders[page] -= 1
            if self._holders[page] == 0:
                cached = page in self._digest_of
                self._used_at[page] = self._clock if cached else 0
                self._free[page] = None
                if not cached:
                    self._free.move_to_end(page, last=False)

    def check_integrity(self) -> None:
        """Raises CacheIntegrityError unless holders, free pages, plans and digests fit together."""
        pages = [page for table in self._live for page in table.pages]
        holders = np.bincount(np.array(pages, np.int64), minlength=self.num_pages)
        if (holders != self._holders).any():
            raise CacheIntegrityError(f"pages in tables {sorted(pages)} differ from those counted as held")
        if set(np.flatnonzero(holders == 0).tolist()) != set(self._free):
            raise CacheIntegrityError("the free pages are not those that no table holds")
        if {digest: page for page, digest in self._digest_of.items()} != self._page_of:
            raise CacheIntegrityError("pages and digests don't match one to one")
        planned = np.zeros_like(self._planned)
        for plan in self._live.values():
            planned[plan.start : plan.stop] += 1
        if (planned != self._planned).any():
            raise CacheIntegrityError("plans of tables that are gone are left")

    def _hold(self, page: int, table: PageTable) -> None:
        self._free.pop(page, None)
        self._holders[page] += 1
        table.append(page)

    def _forget(self, page: int) -> None:
        """The page's contents are about to be overwritten."""
        digest = self._digest_of.pop(page, None)
        if digest is not None:
            del self._page_of[digest]

    def _next_page(self, table: PageTable) -> int:
        """A neighbour that is free and meant for this table or for nobody; else the next to be reused."""
        plan = self._live[table]
        neighbours = [table.pages[-1] + 1] if table.pages else []
        if plan and not (table.pages and table.pages[-1] in plan):
            neighbours.insert(0, plan.start)
        for page in neighbours:
            if page in self._free and (page in plan or not self._planned[page]):
                return page
        unplanned = (page for page in self._free if not self._planned[page])
        return next(unplanned, next(iter(self._free)))

    def _plan(self, num_pages: int, table: PageTable) -> range:
        """Neighbouring pages that are free and in nobody's plan, those out of use the longest; or none."""
        available = (self._holders == 0) & (self._planned == 0)
        after = table.pages[-1] + 1 if table.pages else 0
        if table.pages and available[after : after + num_pages].sum() == num_pages:
            return range(after, after + num_pages)
        if not 0 < num_pages <= self.num_pages:
            return range(0)
        usable = _window_sums(available, num_pages) == num_pages
        if not usable.any():
            return range(0)
        ages = np.where(usable, _window_sums(self._used_at, num_pages), np.iinfo(np.int64).max)
        first = int(ages.argmin())
        return range(first, first + num_pages)


def _window_sums(values: "np.ndarray[tuple[int], np.dtype[Any]]", length: int) -> "np.ndarray[Any, Any]":
    """Sums of every `length` neighbours."""
    upto = np.concatenate(([0], np.cumsum(values, dtype=np.int64)))
    return upto[length:] - upto[:-length]
