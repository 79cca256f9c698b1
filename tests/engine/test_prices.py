"""Prices of passes: what disturbs a measurement shows, and what is wrong is measured again.

Passes take what the test says, so that nothing here depends on this machine.
"""

import json
import logging
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest

from model.engine import Engine
from model.options import EngineOptions, KVCacheDtypeName
from model.passes.backend import BackendMaker
from model.passes.torch.backend import TorchMaker
from model.protocol import GenerationRequest, SamplingParams
from model.schedule.batch import ScheduledRun
from model.schedule.cost import MeasuredCost, speculates_alone
from model.schedule.watch import PASSES, PassWatch
from model.worker import prices
from model.worker.prices import PriceKeeper
from tests.loose import Field
from tests.tiny_models import tiny_model

GREEDY = SamplingParams(temperature=0)
BASE, ROW = 20.0, 0.5  # milliseconds of a pass on the quiet machine, and of a row more
SCORE = 0.25  # of a row that scores its prompt
Slower = Callable[[int, int], tuple[float, float]]
Files = Callable[[], list[Path]]


class Machine:
    """What passes take: `slower(batch, number)` is how many times longer the clock and the wall say."""

    def __init__(self) -> None:
        self.num_passes = 0
        self.slower: Slower = lambda rows, number: (1.0, 1.0)

    def once(self, batch: Sequence[ScheduledRun]) -> tuple[float, float]:
        self.num_passes += 1
        rows = sum(item.num_rows for item in batch)
        sequences = len({id(item.sequence) for item in batch})
        clock, wall = self.slower(rows, self.num_passes)
        took = (BASE + ROW * (rows - sequences) + SCORE * sum(item.num_prompt_rows for item in batch)) * clock
        return took, took * wall


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(prices._Stopwatch, "_once", lambda _, batch: machine.once(batch))
    monkeypatch.setattr(prices, "SECONDS", math.inf)  # whatever else this machine does
    monkeypatch.setattr(prices, "SEQUENCES", (1, 4))
    monkeypatch.setattr(prices, "READOUT_ROUNDS", 3)
    monkeypatch.setattr(prices, "FIRST_PAUSE", 0.0)
    return machine


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return lambda: list(tmp_path.glob("speed-serve/*.json"))


def started(maker: BackendMaker | None = None, **options: Field) -> Engine:
    """An engine whose prices are kept or measured."""
    engine = Engine(tiny_model(), EngineOptions(kv_cache_tokens=2048, **options), maker=maker)
    engine.prices = PriceKeeper(engine)
    engine.check_integrity()
    return engine


def idle(engine: Engine) -> None:
    """Lets an engine without requests do what it has to do."""
    for _ in range(5000):
        if not engine.has_work:
            break
        assert engine.step() == []
    assert not engine.has_work
    engine.check_integrity()


def request(prompt: list[int], max_tokens: int, **fields: Field) -> GenerationRequest:
    return GenerationRequest(
        request_id="0",
        prompt_token_ids=prompt,
        max_tokens=max_tokens,
        sampling=GREEDY,
        ignore_eos=True,
        **fields,
    )


def poison(file: Path) -> None:
    """Rows as dear as passes, as a neighbour on the machine made them."""
    kept = json.loads(file.read_text())
    kept["prices"] = [[[base, base] for base, _ in row] for row in kept["prices"]]
    file.write_text(json.dumps(kept))


def test_a_quiet_machine_is_measured_once(machine: Machine, files: Files) -> None:
    engine = started()
    assert engine.speculates
    assert engine.scheduler.cost.price(1, 64).base == pytest.approx(BASE)
    assert engine.scheduler.cost.price(1, 64).row == pytest.approx(ROW + prices.OWN_MILLISECONDS)
    assert engine.scheduler.cost.scored_row == pytest.approx(SCORE)
    assert len(files()) == 1
    first, machine.num_passes = machine.num_passes, 0
    again = started()
    first_cost, cost = engine.scheduler.cost, again.scheduler.cost
    assert isinstance(first_cost, MeasuredCost)
    assert isinstance(cost, MeasuredCost)
    assert cost.prices == first_cost.prices
    assert machine.num_passes < first / 4
    assert not again.has_work


def test_each_type_of_k_and_v_has_prices_of_its_own(machine: Machine, files: Files) -> None:
    """Reading fewer bytes takes less time: prices in fp32 would stop speculation too early in int8."""
    types: tuple[KVCacheDtypeName, ...] = ("float32", "float16", "int8", "int8")
    for number, kv in enumerate(types, start=1):
        started(TorchMaker(kv_dtype=kv))
        assert len(files()) == min(number, 3)


@pytest.mark.parametrize("share", [0.2, 0.4])
def test_single_disturbances_are_not_in_the_prices(machine: Machine, files: Files, share: float) -> None:
    rng = Random(1)
    machine.slower = lambda rows, number: (5.0, 2.0) if rng.random() < share else (1.0, 1.0)
    engine = started()
    assert engine.scheduler.cost.price(1, 64).base == pytest.approx(BASE)
    assert engine.speculates
    assert len(files()) == 1


@pytest.mark.parametrize(
    "slower",
    [
        lambda rows, number: (1.0 + number % 7 * (rows > 1), 1.0),  # rounds differ
        lambda rows, number: (1.0, 3.0),  # the core is somebody else's most of the time
        lambda rows, number: (1.0 + 2.0 * (number > 40), 1.0),  # the end is not as the beginning
    ],
)
def test_a_disturbed_measurement_is_used_but_neither_kept_nor_trusted(
    machine: Machine, files: Files, slower: Slower
) -> None:
    machine.slower = slower
    engine = started()
    assert not files()
    machine.slower = lambda rows, number: (1.0, 1.0)
    assert engine.has_work
    idle(engine)
    assert engine.scheduler.cost.price(1, 64).base == pytest.approx(BASE)
    assert engine.speculates
    assert len(files()) == 1


def test_a_poisoned_file_is_renewed_at_the_next_start(
    machine: Machine, files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    """It was believed, and switched speculation off at every start: 4 passes a token instead of 1.08."""
    started()
    poison(files()[0])
    engine = started()
    assert engine.speculates
    assert "are not those of this machine" in caplog.text
    caplog.clear()
    assert started().speculates
    assert not caplog.records


def test_a_busy_start_does_not_spoil_good_prices(machine: Machine, files: Files) -> None:
    started()
    kept = files()[0].read_text()
    machine.slower = lambda rows, number: (4.0, 2.0)
    engine = started()
    assert engine.scheduler.cost.price(1, 64).base == pytest.approx(BASE)
    assert files()[0].read_text() == kept


def test_passes_that_contradict_their_prices_have_them_measured_again(machine: Machine, files: Files) -> None:
    machine.slower = lambda rows, number: (10.0, 1.0)
    engine = started()
    machine.slower = lambda rows, number: (1.0, 1.0)
    for _ in range(PASSES):
        assert not engine.has_work
        assert engine.prices is not None
        engine.prices.note(10 * BASE, BASE)
    idle(engine)
    assert engine.scheduler.cost.price(1, 64).base == pytest.approx(BASE)
    assert json.loads(files()[0].read_text())["prices"][0][0][0] == pytest.approx(BASE)


def test_the_engine_notes_its_passes_of_decoding_alone(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = started()
    noted: list[tuple[float | None, float]] = []
    monkeypatch.setattr(engine.prices, "note", lambda expected, took: noted.append((expected, took)))
    engine.run([request(list(range(40)), 8, draft_policy="none")])
    decoding = [expected for expected, took in noted if expected]
    assert len(noted) == engine.stats.passes
    assert len(decoding) == 3 * 7  # the first token comes out of reading the prompt
    assert all(BASE <= expected <= BASE + 5 * ROW + 1 for expected in decoding)
    assert all(took > 0 for _, took in noted)


def test_a_request_is_not_kept_waiting_by_a_measurement(machine: Machine, files: Files) -> None:
    machine.slower = lambda rows, number: (1.0, 3.0)
    engine = started()
    for _ in range(10):
        engine.step()
    assert engine.pool.num_free_pages < engine.pool.num_pages  # in the middle of it
    engine.run([request([1, 2, 3], 4)])
    engine.check_integrity()
    machine.slower = lambda rows, number: (1.0, 1.0)
    idle(engine)
    assert len(files()) == 1


def test_doubts_that_stay_are_looked_into_less_and_less(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(prices, "monotonic", lambda: now[0])
    monkeypatch.setattr(prices, "FIRST_PAUSE", 10.0)
    machine.slower = lambda rows, number: (1.0, 3.0)
    engine, begun = started(), []
    for second in range(0, 4000, 5):
        now[0] = float(second)
        if engine.has_work:
            begun.append(second)
            idle(engine)
    assert begun[:4] == [10, 30, 70, 150]
    assert max(b - a for a, b in pairwise(begun)) <= prices.LONGEST_PAUSE + 5
    assert len(begun) < 15


@pytest.mark.parametrize("content", ["", "{", "[]", '{"num_sequences": []}', "null"])
def test_a_file_that_cannot_be_used_is_measured_anew(machine: Machine, files: Files, content: str) -> None:
    started()
    whole = json.loads(files()[0].read_text())
    for text in (content, json.dumps({**whole, "prices": []}), json.dumps({**whole, "num_sequences": [1]})):
        files()[0].write_text(text)
        assert started().speculates
        assert json.loads(files()[0].read_text()) == whole


def test_speculation_that_prices_switch_off_is_said(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    machine.slower = lambda rows, number: (float(rows), 1.0)  # such a machine is slow, not noisy
    engine = started()
    assert not engine.speculates
    assert (engine.info.speculation_enabled, engine.stats.speculation_enabled) == (False, 0)
    assert [r.levelno for r in caplog.records if "speculation is off" in r.message] == [logging.WARNING]


def test_speculation_that_is_on_is_said_in_the_facts(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    engine = started()
    assert (engine.info.speculation_enabled, engine.stats.speculation_enabled) == (True, 1)
    assert not caplog.records
    assert not started(draft_policy="none").speculates
    assert not caplog.records
    assert not Engine(tiny_model(), EngineOptions(row_budget=1)).speculates
    assert not speculates_alone(Engine(tiny_model(), EngineOptions(row_budget=1)).scheduler.cost)


def test_a_watch_judges_by_the_middle_of_many_passes() -> None:
    watch = PassWatch()
    for number in range(PASSES):
        watch.note(10.0, 1000.0 if number % 3 == 0 else 10.0)  # a third of them was interrupted
        watch.note(0.0, 10.0)  # of no known price
    assert not watch.is_doubtful
    for _ in range(PASSES):
        watch.note(10.0, 5.0)
    assert watch.is_doubtful
    watch.reset()
    assert not watch.is_doubtful
