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
from collections import Counter, OrderedDict
from collections.abc import Sequence

from model.protocol import GenerationRequest


class CacheIntegrityError(RuntimeError):
    """The page pool lost or doubled a page: a bug in the engine."""


class PageTable:
    """Where the positions of one sequence live; grown by its pool alone."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.pages = array("i")
        self.num_registered = 0  # first pages that the prefix cache knows

    @property
    def capacity(self) -> int:
        """Positions that fit."""
        return len(self.pages) * self.page_size

    def cell(self, position: int) -> int:
        """The cell of one position."""
        return self.pages[position // self.page_size] * self.page_size + position % self.page_size

    def cells(self, start: int, count: int) -> list[int]:
        """The cells of positions start .. start + count - 1."""
        return [self.cell(position) for position in range(start, start + count)]


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


def prefix_salt(request: GenerationRequest, num_loops: int, whole: str = "") -> str:
    """All that K/V depends on beside the tokens before it; `whole` stands for a prompt read in one piece."""
    noise = (request.init_scale, request.sampling.seed) if request.init_scale > 0 else ""
    return f"{num_loops}\n{noise}\n{whole}\n{request.cache_salt}"


class PagePool:
    """A fixed number of pages."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"num_pages {num_pages} and page_size {page_size} must be at least 1")
        self.num_pages, self.page_size = num_pages, page_size
        self._holders = [0] * num_pages
        self._free = OrderedDict[int, None].fromkeys(range(num_pages))  # next to be taken first
        self._digest_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._live: set[PageTable] = set()

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

    def open(self, shared: Sequence[int], num_tokens: int, spare: int = 0) -> PageTable | None:
        """A table that begins with the `shared` pages and has room for `num_tokens`; None if it can't.

        `spare` pages must stay free.
        """
        own = max(0, self.pages_for(num_tokens) - len(shared))
        revived = sum(page in self._free for page in shared)
        if own + revived + spare > len(self._free):
            return None
        table = PageTable(self.page_size)
        for page in shared:
            self._hold(page, table)
        table.num_registered = len(shared)
        self._live.add(table)
        grown = self.grow(table, num_tokens)
        assert grown
        return table

    def grow(self, table: PageTable, num_tokens: int) -> bool:
        """Makes room for `num_tokens` positions; False, with nothing changed, if too few pages are free."""
        missing = -(-num_tokens // self.page_size) - len(table.pages)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            page = next(iter(self._free))
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
        if table not in self._live:
            raise CacheIntegrityError("a page table was freed twice, or belongs to another pool")
        self._live.remove(table)
        for page in reversed(table.pages):  # the end of a text is the first to be overwritten
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free[page] = None
                if page not in self._digest_of:
                    self._free.move_to_end(page, last=False)

    def check_integrity(self) -> None:
        """Raises CacheIntegrityError unless holders, free pages and digests fit together."""
        holders = Counter(page for table in self._live for page in table.pages)
        if [holders[page] for page in range(self.num_pages)] != self._holders:
            raise CacheIntegrityError(f"pages in tables {sorted(holders)} differ from those counted as held")
        if set(range(self.num_pages)) - holders.keys() != self._free.keys():
            raise CacheIntegrityError("the free pages are not those that no table holds")
        if {digest: page for page, digest in self._digest_of.items()} != self._page_of:
            raise CacheIntegrityError("pages and digests don't match one to one")

    def _hold(self, page: int, table: PageTable) -> None:
        self._free.pop(page, None)
        self._holders[page] += 1
        table.pages.append(page)

    def _forget(self, page: int) -> None:
        """The page's contents are about to be overwritten."""
        digest = self._digest_of.pop(page, None)
        if digest is not None:
            del self._page_of[digest]
