"""Messages between the processes, and the arithmetic of the supervisor's patience."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.protocol import TokenEvent
from model.worker.messages import LENGTH, LONGEST, Events, Failed, FromWorker, MessageError, Unpacker, pack
from model.worker.patience import Patience, Restarts, Watchdog

PATIENCE = Patience(silence=10, loading=100, stopped=3, first_pauses=(1, 2), pauses=(0, 1, 2, 4), tick=1)


def unpacker() -> Unpacker[FromWorker]:
    return Unpacker(msgspec.msgpack.Decoder(FromWorker))


@given(st.lists(st.text(max_size=300), max_size=8), st.lists(st.integers(1, 400)))
def test_messages_arrive_however_their_bytes_are_cut(texts: list[str], sizes: list[int]) -> None:
    sent = [Failed(text) for text in texts] + [Events([TokenEvent(request_id="a", token_ids=[1, 2])])]
    stream, reader = b"".join(map(pack, sent)), unpacker()
    got: list[FromWorker] = []
    for size in [*sizes, len(stream)]:
        got += reader.feed(stream[:size])
        stream = stream[size:]
    assert got == sent


@pytest.mark.parametrize(
    "data",
    [
        LENGTH.pack(LONGEST + 1),
        LENGTH.pack(3) + b"\xc1\xc1\xc1",
        LENGTH.pack(1) + b"\x01",
        pack(Events([]))[:4] + b"\x00" * (len(pack(Events([]))) - 4),
        LENGTH.pack(16) + b"\x82\xa4type\xa6Failed\xa6re",
        LENGTH.pack(24) + b"\x82\xa4type\xa6Failed\xa6reason\xa2\xff\xff\x00",
    ],
)
def test_bytes_that_are_no_message_are_one_kind_of_error(data: bytes) -> None:
    with pytest.raises(MessageError):
        list(unpacker().feed(data))


def ask(dog: Watchdog, times: int, num_messages: int = 0, **state: bool) -> list[int]:
    """At which of so many ticks in turn it says that something is wrong."""
    given = {"is_ready": True, "is_stopped": False} | state
    return [tick for tick in range(1, times + 1) if dog.problem(num_messages, **given)]


def test_silence_is_counted_from_the_last_message() -> None:
    dog = Watchdog(PATIENCE)
    assert not ask(dog, 9)
    assert not ask(dog, 10, num_messages=1)
    assert ask(dog, 1, num_messages=1) == [1]


def test_loading_has_a_limit_of_its_own() -> None:
    assert ask(Watchdog(PATIENCE), 100, is_ready=False) == [100]


def test_a_stopped_process_is_a_problem_sooner_but_not_at_once() -> None:
    dog = Watchdog(PATIENCE)
    assert ask(dog, 3, is_stopped=True) == [3]
    assert not ask(dog, 1)
    assert ask(dog, 3, is_stopped=True) == [3]


def pauses(restarts: Restarts, *, was_ready: bool = True, proved: bool = False) -> list[float]:
    """Until it gives up."""
    found: list[float] = []
    while (pause := restarts.pause_after(was_ready=was_ready, has_proved_itself=proved)) is not None:
        found.append(pause)
        assert len(found) < 50
    return found


def test_deaths_in_a_row_make_pauses_longer_and_then_an_end() -> None:
    assert pauses(Restarts(PATIENCE)) == [0, 1, 2, 4]


def test_a_model_that_was_never_loaded_is_given_up_sooner() -> None:
    assert pauses(Restarts(PATIENCE), was_ready=False) == [1, 2]


def test_a_worker_that_loads_after_some_failures_begins_a_new_count() -> None:
    restarts = Restarts(PATIENCE)
    assert restarts.pause_after(was_ready=False, has_proved_itself=False) == 1
    assert pauses(restarts) == [0, 1, 2, 4]


def test_a_death_after_good_service_is_the_first_in_a_row() -> None:
    restarts = Restarts(PATIENCE)
    for _ in range(20):
        assert restarts.pause_after(was_ready=True, has_proved_itself=True) == 0
        assert restarts.pause_after(was_ready=False, has_proved_itself=False) == 1
        assert restarts.pause_after(was_ready=True, has_proved_itself=False) == 2
