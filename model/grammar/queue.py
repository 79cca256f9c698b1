"""Requests whose grammars are being compiled, in a thread beside the engine's loop.

An ordinary schema takes a millisecond, the worst that `check_grammar` lets through half a second: nobody
else waits for it. Invariant: a request that was added leaves by `compiled` or by `remove`, once.
"""

import logging
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import NamedTuple

from model.grammar.check import GrammarError
from model.grammar.state import Matchers, Vocabulary
from model.protocol import GenerationRequest

log = logging.getLogger(__name__)


class Compiled(NamedTuple):
    """A request and the matchers of its grammar, or why there are none."""

    request: GenerationRequest
    matchers: Matchers | None
    problem: str


class GrammarQueue:
    """Compiles over one vocabulary, one grammar after the other."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._waiting: dict[str, tuple[GenerationRequest, Future[Matchers]]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, request: GenerationRequest, *, with_drafts: bool) -> None:
        """Begins to compile the grammar of `request`; `with_drafts`: its sequence may speculate."""
        assert request.grammar is not None
        future = self._thread.submit(self.vocabulary.matchers, request.grammar, with_drafts=with_drafts)
        self._waiting[request.request_id] = request, future

    def remove(self, request_id: str) -> GenerationRequest | None:
        """Gives a request up; None if it is not here."""
        if request_id not in self._waiting:
            return None
        request, future = self._waiting.pop(request_id)
        future.cancel()
        return request

    def compiled(self, patience: float) -> list[Compiled]:
        """Requests with grammars that are done, oldest first; waits up to `patience` seconds for one."""
        futures = [future for _, future in self._waiting.values()]
        if patience and futures:
            wait(futures, timeout=patience, return_when=FIRST_COMPLETED)
        done = [name for name, (_, future) in self._waiting.items() if future.done()]
        return [_result(*self._waiting.pop(name)) for name in done]


def _result(request: GenerationRequest, future: "Future[Matchers]") -> Compiled:
    error = future.exception()
    if error is None:
        return Compiled(request, future.result(), "")
    if isinstance(error, GrammarError):
        return Compiled(request, None, str(error))
    log.error("a grammar broke its compiler", exc_info=error)  # a panic is no Exception
    return Compiled(request, None, "the grammar cannot be compiled")
