"""How long a worker may be silent, and how often it may die. Pure arithmetic: no clock, no process."""

from dataclasses import dataclass
from typing import NamedTuple

from model.protocol import RestartReason


@dataclass(frozen=True)
class Patience:
    """Limits of the supervisor; times are seconds."""

    silence: float = (
        300.0  # of a loaded engine, whose loop speaks after every pass and every second when idle
    )
    loading: float = 1800.0  # until a worker has loaded its model
    stopped: float = 3.0  # that a process may stand still because of a signal
    proof: float = 60.0  # a worker that lived so long, or answered a request, has proved itself
    first_pauses: tuple[float, ...] = (1, 2, 4)  # before further workers while none has loaded the model yet
    pauses: tuple[float, ...] = (0, 1, 2, 4, 8, 15, 30, 30, 30)  # after deaths in a row later on
    tick: float = 1.0  # between two looks at the worker


class Problem(NamedTuple):
    """Why a worker is to be replaced, in a word and in words."""

    reason: RestartReason
    text: str


class Watchdog:
    """Says when a worker is taken for hung. Asked once a tick.

    Time that passes while nobody asks doesn't count: if this process itself was stopped or busy, the worker
    had no chance of being heard.
    """

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._num_messages = 0
        self._silent = 0.0
        self._stopped = 0.0

    def problem(self, num_messages: int, *, is_ready: bool, is_stopped: bool) -> Problem | None:
        """What is wrong with a worker that has sent `num_messages` in all, or None."""
        patience = self._patience
        self._silent = 0.0 if num_messages != self._num_messages else self._silent + patience.tick
        self._stopped = self._stopped + patience.tick if is_stopped else 0.0
        self._num_messages = num_messages
        if self._stopped >= patience.stopped:
            text = f"the engine process has been stopped by a signal for {self._stopped:g} s"
            return Problem("stopped", text)
        if is_ready and self._silent >= patience.silence:
            return Problem("silent", f"the engine has been silent for {self._silent:g} s (--worker-timeout)")
        if not is_ready and self._silent >= patience.loading:
            text = f"the model has not been loaded within {self._silent:g} s (--load-timeout)"
            return Problem("load_timeout", text)
        return None


class Restarts:
    """Counts deaths in a row, and says how long to wait before the next worker."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self.any_loaded = False  # whether any worker has loaded the model
        self.num_failures = 0  # since a worker last proved itself

    @property
    def num_attempts(self) -> int:
        """How many failures in a row are the end."""
        return len(self._pauses) + 1

    def pause_after(self, *, was_ready: bool, has_proved_itself: bool) -> float | None:
        """Seconds to wait after the death of such a worker; None: give up."""
        if was_ready and not self.any_loaded:
            self.any_loaded, self.num_failures = True, 0
        self.num_failures = 1 if has_proved_itself else self.num_failures + 1
        if self.num_failures > len(self._pauses):
            return None
        return self._pauses[self.num_failures - 1]

    @property
    def _pauses(self) -> tuple[float, ...]:
        return self._patience.pauses if self.any_loaded else self._patience.first_pauses
