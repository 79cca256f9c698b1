"""Requests whose grammars are being compiled, in a thread beside the engine's loop.

An ordinary schema takes a millisecond, the worst that `check_grammar` lets through half a second: nobody
else waits for it. Invariant: a request that was added leaves by `compiled` or by `remove`, once.
"""

from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import NamedTuple

from llguidance import LLMatcher

from model.grammar import GrammarError
from model.matching import Vocabulary
from model.protocol import GenerationRequest


class Compiled(NamedTuple):
    """A request and the matcher of its grammar, or why there is none."""

    request: GenerationRequest
    matcher: LLMatcher | None
    problem: str


class GrammarQueue:
    """Compiles over one vocabulary, one grammar after the other."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._waiting: dict[str, tuple[GenerationRequest, Future[LLMatcher]]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, request: GenerationRequest) -> None:
        """Begins to compile the grammar of `request`."""
        assert request.grammar is not None
        future = self._thread.submit(self.vocabulary.matcher, request.grammar)
        self._waiting[request.request_id] = request, future

    def remove(self, request_id: str) -> GenerationRequest | None:
        """Gives a request up; None if it is not here."""
        if request_id not in self._waiting:
            return None
        request, future = self._waiting.pop(request_id)
        future.cancel()
        return request

    def compiled(self, patience: float) -> list[Compiled]:
        """Those that are done, oldest first; waits at most `patience` seconds for the first of them."""
        futures = [future for _, future in self._waiting.values()]
        if patience and futures:
            wait(futures, timeout=patience, return_when=FIRST_COMPLETED)
        done = [name for name, (_, future) in self._waiting.items() if future.done()]
        return [_result(*self._waiting.pop(name)) for name in done]


def _result(request: GenerationRequest, future: "Future[LLMatcher]") -> Compiled:
    try:
        return Compiled(request, future.result(), "")
    except GrammarError as error:
        return Compiled(request, None, str(error))
