"""What runs a pass on one kind of device: the seam between the engine and everything that computes.

The engine, the scheduler and the waves do not know which backend runs. Invariants: all that a pass says
leaves by its `PassResult`; a backend writes nothing on a sequence; what it keeps between two passes (K/V,
states in flight) lies at cells, so that a flush leaves nothing to clean up.
"""

from typing import NamedTuple, Protocol

from model.network.looped import LoopedTransformer
from model.passes.rows import Rows
from model.schedule.batch import PassResult, Readouts


class BackendFacts(NamedTuple):
    """What is said of a backend to users: `is_exact` if a row's bits never depend on the other rows."""

    name: str
    device: str
    dtype: str
    is_exact: bool
    bytes_per_token: int  # of the cache: K/V of all slots, and the states in flight
    kv_cache_dtype: str  # what K/V is held in


class CacheBytes(NamedTuple):
    """Bytes that a backend keeps for one token: K/V of all slots, in a type, and the states in flight."""

    keys_and_values: int
    states: int
    dtype: str  # of K/V

    @property
    def per_token(self) -> int:
        """Both together."""
        return self.keys_and_values + self.states


class BackendMaker(Protocol):
    """Makes a backend of a model; chosen once, before weights are read."""

    @property
    def name(self) -> str:
        """The backend's name, as `BackendFacts` has it."""

    def cache_bytes(self, model: LoopedTransformer) -> CacheBytes:
        """What a token takes of the cache. The model needs no weights."""

    def make(self, model: LoopedTransformer, num_tokens: int, max_positions: int) -> "Backend":
        """A backend with a cache of `num_tokens`, for positions below `max_positions`."""


class Backend(Protocol):
    """A loaded model that runs passes."""

    @property
    def facts(self) -> BackendFacts:
        """What it is; never changes."""

    def run(self, rows: Rows, readouts: Readouts) -> PassResult:
        """Runs one loop for every row and reads out what is asked for.

        Writes K/V and states of the rows' positions. Raises what the device raises; the cache of the rows'
        positions is then undefined, and they must be read again.
        """
