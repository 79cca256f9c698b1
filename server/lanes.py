"""Threads for work that is too slow for the event loop, each kind in a lane of its own.

Invariants: work of one kind never waits behind work of another; work that is given up before its turn
(its task was cancelled because the client left) is never started, while work that runs keeps its place
in the lane until it ends, so that clients who come and go do not pile it up.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

MAX_GRAMMAR_CHECKS = 4  # each a process of its own
SHORT_TEXT = 2**14  # characters that are tokenised in some 10 ms


class Lane:
    """A few threads that work one thing after the other."""

    def __init__(self, name: str, num_threads: int) -> None:
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix=name)

    async def run(self, work: Callable[[], T]) -> T:
        """The result of `work`. Cancelling the caller takes it out of the queue if it has not begun."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        """Drops what waits; what runs is not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class Lanes:
    """One lane for each kind of slow work."""

    def __init__(self) -> None:
        self.bodies = Lane("bodies", 1)  # parsing holds the interpreter's lock: more threads gain nothing
        self.templates = Lane("templates", 1)
        self.grammars = Lane("grammars", MAX_GRAMMAR_CHECKS)
        self.short_texts = Lane("short-texts", 2)
        self.long_texts = Lane("long-texts", 1)  # leaves the other cores to the model
        self.answers = Lane("answers", 1)

    def texts(self, num_characters: int) -> Lane:
        """The lane for tokenising so many characters: a short prompt never waits for a long one."""
        return self.short_texts if num_characters <= SHORT_TEXT else self.long_texts

    def close(self) -> None:
        """Ends all lanes; call once, when no request is left."""
        for lane in vars(self).values():
            lane.close()
