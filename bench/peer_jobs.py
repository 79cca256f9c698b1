"""The side of `bench.peers` that every peer's process shares: jobs in, figures out, one JSON object a line.

Only of the standard library, for it also runs in environments that have nothing else of this project.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Job(NamedTuple):
    """Requests to be run at once, greedy, to exactly `max_tokens` each.

    `token_ids` are the embedded model's; a peer with another tokenizer takes `texts` where they are given,
    else the ids as they are.
    """

    token_ids: list[list[int]]
    texts: list[str]
    max_tokens: int


class Figures(NamedTuple):
    """Seconds to the first token of all and to the last, tokens written, bytes of memory held."""

    first: float
    seconds: float
    tokens: int
    memory: int


class Watch:
    """Counts tokens as they come, from its creation on."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._first = 0.0
        self._tokens = 0

    def count(self, tokens: int) -> None:
        """Notes that so many tokens have come."""
        if tokens and not self._tokens:
            self._first = time.perf_counter() - self._started
        self._tokens += tokens

    def figures(self) -> Figures:
        """All requests have ended."""
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        memory = pages * os.sysconf("SC_PAGE_SIZE")
        return Figures(self._first, time.perf_counter() - self._started, self._tokens, memory)


def answer_jobs(run: Callable[[Job], Figures]) -> None:
    """Says that the peer is ready, then runs jobs until there are no more."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints doesn't come between
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(Job(**json.loads(line)))), file=out, flush=True)
