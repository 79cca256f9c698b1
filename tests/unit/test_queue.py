"""Who is admitted next: priorities, then tenants in turn, then arrival; and who makes way."""

from itertools import groupby

from hypothesis import given
from hypothesis import strategies as st

from model.options import SchedulerLimits
from model.schedule.queue import WaitingQueue
from model.schedule.sequence import Sequence
from tests.fake_model import Harness, waiting_sequence


def order_of(queue: WaitingQueue) -> list[Sequence]:
    order = []
    while (sequence := queue.first()) is not None:
        queue.pop()
        queue.admitted(sequence)
        order.append(sequence)
    return order


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from("abc")), max_size=30))
def test_tenants_take_turns_within_a_priority(arrivals: list[tuple[int, str]]) -> None:
    """Of one priority, nobody has been admitted more than once oftener than one who waits; none is lost."""
    queue = WaitingQueue()
    sequences = [
        waiting_sequence(str(index), priority=priority, tenant=tenant, arrival=index)
        for index, (priority, tenant) in enumerate(arrivals)
    ]
    for sequence in sequences:
        queue.push(sequence)
    assert (len(queue), set(queue)) == (len(sequences), set(sequences))
    order = order_of(queue)
    assert set(order) == set(sequences)
    assert [sequence.precedence for sequence in order] == sorted(s.precedence for s in order)
    assert [s.request.priority for s in order] == sorted(priority for priority, _ in arrivals)
    for _, level in groupby(order, key=lambda sequence: sequence.request.priority):
        names = [sequence.request.tenant for sequence in level]
        for index in range(len(names)):
            for waiting in set(names[index:]):
                assert max(map(names[:index].count, names)) <= names[:index].count(waiting) + 1
        for name in set(names):
            mine = [s.arrival for s in order if s.request.tenant == name and s.request.priority == 0]
            assert mine == sorted(mine)


def test_one_who_sends_always_one_does_not_go_before_those_who_wait() -> None:
    queue = WaitingQueue()
    for index in range(4):
        queue.push(waiting_sequence(f"a{index}", tenant="a", arrival=index))
    order = []
    for index in range(4, 8):
        queue.push(waiting_sequence(f"b{index}", tenant="b", arrival=index))
        for _ in range(2):
            sequence = queue.first()
            assert sequence is not None
            queue.pop()
            queue.admitted(sequence)
            order.append(sequence.request.tenant)
    assert order.count("a") == 4


def test_a_tenant_whose_requests_were_aborted_is_due_no_later() -> None:
    queue = WaitingQueue()
    for index in range(50):
        queue.push(waiting_sequence(f"a{index}", tenant="a", arrival=index))
    for index in range(50):
        assert queue.remove(f"a{index}") is not None
    assert queue.remove("a0") is None
    queue.push(waiting_sequence("a", tenant="a", arrival=50))
    queue.push(waiting_sequence("b", tenant="b", arrival=51))
    assert [sequence.request.request_id for sequence in order_of(queue)] == ["a", "b"]


def test_a_full_queue_of_one_key_does_not_keep_another_out() -> None:
    """Twenty requests of one tenant wait; the first of another joins when the first place is free."""
    harness = Harness(SchedulerLimits(max_num_seqs=2))
    for index in range(20):
        harness.add(f"a{index}", [index], 5, tenant="a")
    for _ in range(3):
        harness.step()
    harness.add("b", [99], 5, tenant="b")
    harness.finish()
    ended = sorted(harness.answers, key=lambda name: harness.stats(name).queue_seconds)
    assert ended.index("b") <= 3


def test_who_was_admitted_in_turn_is_not_the_first_to_make_way() -> None:
    """The later arrival of another tenant has the earlier round: it keeps its pages."""
    harness = Harness(SchedulerLimits(max_num_seqs=2), num_pages=12)
    for name in ("a0", "a1", "a2"):
        harness.add(name, [ord(name[1])] * 8, 20 if name == "a2" else 2, tenant="a")
    harness.step()
    harness.add("b", [2] * 8, 20, tenant="b")
    harness.finish()
    assert (harness.stats("a2").preemptions > 0, harness.stats("b").preemptions) == (True, 0)
    for name in ("a2", "b"):
        assert len(harness.text(name)) == 20
