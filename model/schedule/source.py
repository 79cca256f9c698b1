"""What an encoder reads for a sequence, and where the K/V that its decoder makes of it lie. Pure Python.

A source is encoded whole, in the pass that runs the first rows of its sequence, and its K/V are only read
from then on: equal sources share them, whatever is written behind each. Invariant: a source owns pages
exactly while its sequence does.
"""

import hashlib
from array import array

from model.schedule.pages import PagePool, PageTable


class Source:
    """The tokens, their pages (None while the sequence waits), and whether K/V are there.

    `keys` are digests of its pages; each covers the whole source, since all of its tokens see one another,
    and the `salt`. Without `is_shared` there are none.
    """

    def __init__(self, tokens: list[int], salt: str, page_size: int, *, is_shared: bool = True) -> None:
        self.tokens = tokens
        self.table: PageTable | None = None
        self.is_written = False
        content = salt.encode() + b"\n" + array("q", tokens).tobytes()
        self.digest = hashlib.blake2b(content, digest_size=16, person=b"source").digest()
        num_pages = -(-len(tokens) // page_size) if is_shared else 0
        self.keys = [
            hashlib.blake2b(self.digest + page.to_bytes(8, "little"), digest_size=16).digest()
            for page in range(num_pages)
        ]

    @property
    def num_unread(self) -> int:
        """Tokens that the next pass with rows of its sequence encodes."""
        return 0 if self.is_written else len(self.tokens)

    def open(self, pool: PagePool, spare: int = 0) -> bool:
        """Takes pages of the pool, those of an equal source if it is known; False if too few are free."""
        known = pool.lookup(self.keys)
        is_known = bool(known) and len(known) == len(self.keys)
        length = len(self.tokens)
        self.table = pool.open(known if is_known else [], length, spare)
        self.is_written = self.table is not None and is_known
        return self.table is not None

    def written(self, pool: PagePool) -> None:
        """A pass has encoded it: from now on others may share its pages."""
        assert self.table is not None
        self.is_written = True
        if self.keys:
            pool.register(self.table, self.keys)

    def close(self, pool: PagePool) -> None:
        """Gives its pages back."""
        assert self.table is not None
        pool.free(self.table)
        self.table, self.is_written = None, False
