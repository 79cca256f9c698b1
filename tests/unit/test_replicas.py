"""Replicas of an engine behind the interface of one: no Ray, and replicas that do as they are told."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from model.protocol import (
    EngineHealth,
    EngineStats,
    EngineUnavailableError,
    GenerationRequest,
    SamplingParams,
    TokenEvent,
)
from model.schedule.pages import PagePool, PrefixKeys, prefix_salt
from server.engine_counts import GAUGES
from server.replicas.census import STALE_SECONDS, Census
from server.replicas.client import ReplicatedEngine
from server.replicas.messages import Answer, ReplicaLostError, Report, Routing
from server.replicas.options import OPTIONS_OF_RAY, OPTIONS_OF_SEVERAL, settings_of
from server.replicas.places import Places
from server.replicas.replica import EngineDeadError, Replica
from server.settings import Settings, SettingsError
from tests.fake_engine import INFO, STATS, FakeEngine
from tests.loose import Json

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 30  # in which anything must have come about, however busy the machine is
NAMES = ["a", "b", "c"]


def request(
    request_id: str, *, tokens: int = 40, cache_salt: str = "", num_loops: int | None = None
) -> GenerationRequest:
    return GenerationRequest(
        request_id=request_id,
        prompt_token_ids=list(range(tokens)),
        max_tokens=100,
        sampling=SamplingParams(),
        cache_salt=cache_salt,
        num_loops=num_loops,
    )


def pages(text: str, count: int) -> list[bytes]:
    return [f"{text[: i + 1]}".encode() for i in range(count)]


# ---- where a prompt goes -----------------------------------------------------------------------


def test_a_beginning_is_read_once_however_many_replicas_there_are() -> None:
    places = Places(slack=4)
    texts = [f"{i}bcdef" for i in range(9)]
    where: dict[str, str] = {}
    for number, text in enumerate(3 * texts):
        chosen = places.best(pages(text, 6), NAMES)
        places.chosen(str(number), chosen, pages(text, 6), 1000)
        places.ended(str(number))
        assert where.setdefault(text, chosen) == chosen
    assert set(where.values()) == set(NAMES)  # and not all in one place


def test_the_longest_beginning_decides() -> None:
    places = Places(slack=4)
    places.chosen("1", "a", pages("xxab", 2), 100)
    places.chosen("2", "b", pages("xxab", 4), 100)
    assert places.best(pages("xxabcd", 6), NAMES) == "b"


def test_a_busy_replica_gets_no_more_than_its_slack() -> None:
    places = Places(slack=2)
    held = pages("abcd", 4)
    for number in range(30):
        places.chosen(str(number), places.best(held, NAMES), held, 100)
        loads = [places.load(name) for name in NAMES]
        assert max(loads) - min(loads) <= 3
    assert sum(loads) == 30


def test_a_replica_that_read_nothing_counts_by_its_queue_alone() -> None:
    places = Places(slack=4)
    places.chosen("1", "a", [], 0)
    places.chosen("2", "b", [], 0)
    assert places.best([], NAMES) == "c"
    places.ended("2")
    places.chosen("3", "c", [], 0)
    assert places.best([], NAMES) == "b"


def test_two_fronts_send_a_new_beginning_to_one_place() -> None:
    for text in ("abc", "xyz", "hello"):
        assert len({Places(slack=4).best(pages(text, 3), order) for order in (NAMES, NAMES[::-1])}) == 1


def test_what_does_not_fit_into_the_cache_is_forgotten_first_the_ends_of_old_texts() -> None:
    places = Places(slack=4)
    places.chosen("1", "a", pages("abcd", 4), 6)
    places.chosen("2", "a", pages("xyzw", 4), 6)
    assert places.num_held("a", pages("abcd", 4)) == 2
    assert places.num_held("a", pages("xyzw", 4)) == 4


def test_a_replica_that_is_gone_is_forgotten_and_its_name_can_come_back() -> None:
    places = Places(slack=4)
    places.chosen("1", "a", pages("ab", 2), 10)
    places.keep(["b"])
    assert places.num_held("a", pages("ab", 2)) == 0


def test_calls_that_bring_no_prompt_leave_what_is_known_of_a_replica() -> None:
    """Reports are asked for twice a second; each of them once emptied what was known of its replica."""
    places = Places(slack=4)
    places.chosen("1", "a", pages("abcd", 4), 100)
    for name in NAMES:
        places.chosen("report", name, [], 0)
        places.sent("report", name, [], 0)
        places.ended("report")
    assert places.num_held("a", pages("abcd", 4)) == 4


def test_what_comes_together_goes_to_one_place_before_anything_was_sent() -> None:
    places = Places(slack=4)
    where = set()
    for number in range(4):
        where.add(places.best(pages("abcd", 4), NAMES))
        places.chosen(str(number), min(where), pages("abcd", 4), 100)
    assert len(where) == 1


def test_a_request_that_went_elsewhere_than_was_chosen_counts_where_it_is() -> None:
    places = Places(slack=4)
    places.chosen("1", "a", pages("ab", 2), 100)
    places.sent("1", "b", pages("ab", 2), 100)
    assert [places.load(name) for name in NAMES] == [0, 1, 0]
    assert places.num_held("b", pages("ab", 2)) == 2
    places.ended("1")
    assert [places.load(name) for name in NAMES] == [0, 0, 0]


def test_no_load_is_left_by_a_request_that_ended_before_it_was_told_where_it_went() -> None:
    places = Places(slack=4)
    places.chosen("1", "a", [], 0)
    places.ended("1")
    places.sent("1", "a", [], 0)
    places.ended("1")
    assert places.load("a") == 0


@pytest.mark.parametrize("num_loops", [None, 2])
async def test_the_digests_are_those_of_the_prefix_cache(num_loops: int | None) -> None:
    """A pool that knows the prompt as the engine registers it finds all of the pages that decide."""
    asked = request("r", tokens=70, cache_salt="tenant", num_loops=num_loops)
    replicas = FakeReplicas({"a": answering()})
    async with running(replicas) as engine:
        await last_events(engine, asked)
    [routing] = replicas.routings
    pool = PagePool(8, INFO.kv_page_size)
    table = pool.open([], 70)
    assert table is not None
    keys = PrefixKeys(prefix_salt(asked, num_loops or INFO.num_loops), INFO.kv_page_size)
    pool.register(table, keys.upto(asked.prompt_token_ids, 4))
    assert len(pool.lookup(routing.pages)) == len(routing.pages) == 4
    assert routing.pages_kept == INFO.kv_cache_tokens // INFO.kv_page_size


async def test_another_salt_or_another_number_of_loops_is_another_beginning() -> None:
    replicas = FakeReplicas({"a": answering()})
    async with running(replicas) as engine:
        await last_events(
            engine,
            request("1"),
            request("2", cache_salt="x"),
            request("3", num_loops=3),
            request("4", num_loops=4),
        )
    first = [routing.pages[0] for routing in replicas.routings]
    assert first[0] == first[3]  # four loops are what the model has
    assert len(set(first)) == 3


# ---- what becomes of a request -----------------------------------------------------------------

Fate = Callable[[str, GenerationRequest], AsyncGenerator[Answer, None]]


def answering(num_events: int = 3) -> Fate:
    async def answers(name: str, asked: GenerationRequest) -> AsyncGenerator[Answer, None]:
        for number in range(num_events):
            is_last = number == num_events - 1
            event = TokenEvent(
                request_id=asked.request_id, token_ids=[number], finish_reason="stop" if is_last else None
            )
            yield Answer(replica=name, event=event)

    return answers


def lost(after: int) -> Fate:
    async def answers(name: str, asked: GenerationRequest) -> AsyncGenerator[Answer, None]:
        for number in range(after):
            yield Answer(replica=name, event=TokenEvent(request_id=asked.request_id, token_ids=[number]))
        raise ReplicaLostError("killed")

    return answers


async def refusing(name: str, asked: GenerationRequest) -> AsyncGenerator[Answer, None]:
    yield Answer(replica=name, refusal="the engine is loading the model")


async def silent(name: str, asked: GenerationRequest) -> AsyncGenerator[Answer, None]:
    await asyncio.Event().wait()
    yield Answer(replica=name)


async def broken(name: str, asked: GenerationRequest) -> AsyncGenerator[Answer, None]:
    raise ZeroDivisionError("a bug")
    yield Answer(replica=name)


async def endless(name: str, asked: GenerationRequest) -> AsyncGenerator[Answer, None]:
    yield Answer(replica=name, event=TokenEvent(request_id=asked.request_id, token_ids=[1]))


class FakeReplicas:
    """Replicas by name, each with what it does to requests; calls go to the first that may be called."""

    def __init__(self, fates: dict[str, Fate]) -> None:
        self.fates = fates
        self.routings: list[Routing] = []
        self.tried: list[str] = []
        self.left = 0  # answers that were not read to their end
        self.stops: list[str] = []
        self.reports: dict[str, Report] = {name: report(name) for name in fates}

    def _choose(self, routing: Routing) -> str:
        wanted = [name for name in self.fates if name not in routing.avoid] or list(self.fates)
        return routing.only or wanted[0]

    async def generate(self, asked: GenerationRequest, routing: Routing) -> AsyncGenerator[Answer, None]:
        self.routings.append(routing)
        name = self._choose(routing)
        self.tried.append(name)
        is_whole = False
        try:
            async for answer in self.fates[name](name, asked):
                yield answer
            is_whole = True
        finally:
            self.left += not is_whole

    async def stop(self, request_id: str, routing: Routing) -> None:
        self.stops.append(f"{request_id}@{self._choose(routing)}")

    async def report(self, routing: Routing) -> Report:
        if not self.reports:
            await asyncio.Event().wait()
        found = self.reports[self._choose(routing)]
        await asyncio.sleep(0)
        return found


def report(name: str, *, stats: EngineStats | None = None, is_ready: bool = True) -> Report:
    return Report(
        replica=name,
        health=EngineHealth(state="ready" if is_ready else "loading"),
        info=INFO if is_ready else None,
        stats=stats or EngineStats(),
        restarts={},
    )


@asynccontextmanager
async def running(replicas: FakeReplicas) -> AsyncIterator[ReplicatedEngine]:
    engine = ReplicatedEngine(replicas)
    await engine.start()
    try:
        async with asyncio.timeout(SECONDS):
            while engine.health().state != "ready":
                await asyncio.sleep(0)
            yield engine
    finally:
        await engine.close()


async def all_events(engine: ReplicatedEngine, *requests: GenerationRequest) -> list[TokenEvent]:
    """The events of these requests, which are submitted at once, until each has ended."""
    for each in requests:
        engine.submit(each)
    found: list[TokenEvent] = []
    async for batch in engine.events():
        found += batch
        if sum(event.finish_reason is not None for event in found) == len(requests):
            return found
    return found


async def last_events(engine: ReplicatedEngine, *requests: GenerationRequest) -> list[TokenEvent]:
    return [event for event in await all_events(engine, *requests) if event.finish_reason]


async def test_events_come_in_order_and_end_once() -> None:
    async with running(FakeReplicas({"a": answering(5), "b": answering()})) as engine:
        events = await all_events(engine, *(request(str(number)) for number in range(20)))
        await asyncio.sleep(0)
        assert engine._queue.empty()
    for number in range(20):
        mine = [event for event in events if event.request_id == str(number)]
        assert [event.token_ids for event in mine] == [[0], [1], [2], [3], [4]]
        assert [bool(event.finish_reason) for event in mine] == [False] * 4 + [True]


async def test_a_request_that_one_replica_refuses_is_served_by_another() -> None:
    replicas = FakeReplicas({"a": refusing, "b": refusing, "c": answering()})
    async with running(replicas) as engine:
        [last] = await last_events(engine, request("r"))
    assert last.finish_reason == "stop"
    assert replicas.tried == ["a", "b", "c"]


async def test_a_request_that_all_refuse_ends_and_tells_why() -> None:
    replicas = FakeReplicas({"a": refusing, "b": refusing})
    async with running(replicas) as engine:
        [last] = await last_events(engine, request("r"))
    assert last.finish_reason == "error"
    assert last.error == "no replica is ready: the engine is loading the model"
    assert len(replicas.tried) == 3


async def test_a_replica_that_reported_not_to_be_ready_is_the_last_to_be_tried() -> None:
    replicas = FakeReplicas({"a": answering(), "b": answering()})
    replicas.reports["a"] = report("a", is_ready=False)
    async with running(replicas) as engine:
        await last_events(engine, request("r"))
    assert replicas.tried == ["b"]


async def test_a_stream_ends_with_its_replica_and_is_not_begun_anew() -> None:
    replicas = FakeReplicas({"a": lost(2)})
    async with running(replicas) as engine:
        events = await all_events(engine, request("r"))
    assert [event.finish_reason for event in events] == [None, None, "error"]
    assert events[-1].error == "the replica ended: killed"
    assert replicas.tried == ["a"]


async def test_a_request_whose_replica_had_said_nothing_is_given_to_one_more() -> None:
    """Not to more than one: it may be the request that ends them."""
    replicas = FakeReplicas({"a": lost(0)})
    async with running(replicas) as engine:
        [last] = await last_events(engine, request("r"))
    assert last.finish_reason == "error"
    assert replicas.tried == ["a", "a"]


@pytest.mark.parametrize(
    ("fate", "error"), [(broken, "ZeroDivisionError: a bug"), (endless, "the answer of replica a has no end")]
)
async def test_whatever_a_replica_does_a_request_ends(
    fate: Fate, error: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(FakeReplicas({"a": fate})) as engine:
        [last] = await last_events(engine, request("r"))
    assert (last.finish_reason, last.error) == ("error", error)


async def test_an_abort_before_the_first_event_leaves_the_answer() -> None:
    replicas = FakeReplicas({"a": silent})
    async with running(replicas) as engine:
        engine.submit(request("r"))
        while not replicas.tried:
            await asyncio.sleep(0)
        engine.abort("r")
        engine.abort("r")
        engine.abort("unknown")
        async for [event] in engine.events():
            assert event == TokenEvent(request_id="r", finish_reason="abort")
            break
    assert (replicas.left, replicas.stops) == (1, [])


async def test_an_abort_of_a_stream_asks_its_replica_and_waits_for_what_it_cost() -> None:
    stopped = asyncio.Event()

    async def until_stopped(name: str, asked: GenerationRequest) -> AsyncGenerator[Answer, None]:
        yield Answer(replica=name, event=TokenEvent(request_id=asked.request_id, token_ids=[1]))
        await stopped.wait()
        yield Answer(replica=name, event=TokenEvent(request_id=asked.request_id, finish_reason="abort"))

    replicas = FakeReplicas({"a": refusing, "b": until_stopped})
    async with running(replicas) as engine:
        engine.submit(request("r"))
        async for [event] in engine.events():
            if event.finish_reason:
                break
            engine.abort("r")
            while not replicas.stops:
                await asyncio.sleep(0)
            stopped.set()
    assert (event.finish_reason, replicas.stops) == ("abort", ["r@b"])


async def test_an_abort_that_the_replica_does_not_follow_leaves_the_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.replicas.client.STOP_SECONDS", 0.01)

    async def deaf(name: str, asked: GenerationRequest) -> AsyncGenerator[Answer, None]:
        yield Answer(replica=name, event=TokenEvent(request_id=asked.request_id, token_ids=[1]))
        await asyncio.Event().wait()

    replicas = FakeReplicas({"a": deaf})
    async with running(replicas) as engine:
        engine.submit(request("r"))
        async for [event] in engine.events():
            if event.finish_reason:
                break
            engine.abort("r")
    assert (event.finish_reason, replicas.left) == ("abort", 1)


async def test_closing_ends_every_request_also_one_that_has_not_begun() -> None:
    replicas = FakeReplicas({"a": silent})
    async with running(replicas) as engine:
        engine.submit(request("1"))
        await asyncio.sleep(0.01)
        engine.submit(request("2"))
        await engine.close()
        events = [event async for batch in engine.events() for event in batch]
        assert {event.request_id: event.finish_reason for event in events} == {"1": "abort", "2": "abort"}
        with pytest.raises(EngineUnavailableError, match="shutting down"):
            engine.submit(request("3"))


async def test_without_a_ready_replica_nothing_is_accepted() -> None:
    replicas = FakeReplicas({"a": answering()})
    replicas.reports = {}
    engine = ReplicatedEngine(replicas)
    await engine.start()
    await asyncio.sleep(0)
    with pytest.raises(EngineUnavailableError, match="no replica is ready"):
        engine.submit(request("r"))
    assert engine.health().state == "loading"
    await engine.close()


async def test_the_places_of_all_replicas_count_together() -> None:
    async with running(FakeReplicas({name: answering() for name in NAMES})) as engine:
        assert engine.info.max_num_seqs == 3 * INFO.max_num_seqs


# ---- what all have done ------------------------------------------------------------------------

BEFORE = EngineStats(
    passes=10, generation_tokens=7, num_requests_running=2, kv_cache_usage=0.5, pass_rows={1: 4}
)


def test_no_counter_falls_when_a_replica_goes_or_is_not_heard_of() -> None:
    now = 0.0
    census = Census(clock=lambda: now)
    rounds: list[tuple[float, dict[str, int], bool]] = [
        (0, {"a": 10, "b": 5}, True),
        (1, {"a": 11}, False),  # b was not heard of: it may be there
        (2, {"a": 12, "b": 9}, True),
        (3, {"a": 13}, True),  # b is gone
        (4, {"c": 1}, True),  # and a: c took its place
        (5, {"a": 14, "c": 2}, True),  # it was not
        (6 + STALE_SECONDS, {"c": 2}, False),
    ]
    seen = []
    for now, passes, is_complete in rounds:  # noqa: B007 - the clock reads it
        stats = {name: EngineStats(passes=count, num_requests_running=1) for name, count in passes.items()}
        census.take({name: report(name, stats=each) for name, each in stats.items()}, is_complete=is_complete)
        seen.append((census.stats.passes, census.stats.num_requests_running))
    assert all(first[0] <= second[0] for first, second in pairwise(seen))
    assert seen == [(15, 2), (16, 2), (21, 2), (22, 1), (23, 1), (25, 2), (25, 1)]


def test_gauges_of_replicas_are_sums_and_shares_are_averages() -> None:
    census = Census()
    census.take({name: report(name, stats=BEFORE) for name in "ab"}, is_complete=True)
    assert census.stats.num_requests_running == 4
    assert census.stats.kv_cache_usage == 0.5
    assert census.stats.pass_rows == {1: 8}
    census.take({}, is_complete=True)
    assert (census.info, census.stats.passes) == (None, 20)
    assert not any(getattr(census.stats, name) for name in GAUGES)


# ---- options ----------------------------------------------------------------------------------


def test_the_configuration_that_comes_along_names_options_that_there_are() -> None:
    config: Json = yaml.safe_load((ROOT / "docker" / "cluster.yaml").read_text())
    [application] = config["applications"]
    assert settings_of(application["args"]).access_log == "plain"
    assert [each["name"] for each in application["deployments"]] == ["Front", "Engine"]
    assert config["http_options"]["host"] == "127.0.0.1"


def test_texts_and_numbers_are_taken_as_an_option_would_be() -> None:
    settings = settings_of({"max_num_seqs": "8", "kv_cache_memory": "1GiB", "row_budget": 32, "threads": 2})
    assert (settings.max_num_seqs, settings.kv_cache_memory, settings.row_budget) == (8, 2**30, 32)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"max_num_seqs": "0"}, "max_num_seqs '0' is not valid: Input should be greater than or equal to 1"),
        ({"replicas": "2"}, "replicas '2' is not valid: Extra inputs are not permitted"),
        ({"port": "80"}, "port: this is up to Ray Serve"),
        ({"unload_idle": 60}, "unload_idle 60.0: replicas have one model"),
        ({"max_loaded": 1}, "max_loaded 1: replicas have one model"),
        ({"model_dir": "/models"}, "model_dir /models: replicas have one model"),
        ({"api_keys": "kept secret"}, "api_keys is not valid"),
    ],
)
def test_an_option_that_is_none_is_refused_by_its_name(args: dict[str, object], words: str) -> None:
    with pytest.raises(SettingsError, match=f"^{words}") as error:
        settings_of(args)
    assert "secret" not in str(error.value)


def test_an_option_of_the_environment_is_refused_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """The front used to close its engine after so many idle seconds, for good."""
    monkeypatch.setenv("SPEED_UNLOAD_IDLE", "60")
    with pytest.raises(SettingsError, match=r"^unload_idle 60\.0: replicas"):
        settings_of({})


def test_what_is_refused_are_options_of_the_server() -> None:
    assert Settings.model_fields.keys() >= OPTIONS_OF_RAY | OPTIONS_OF_SEVERAL


# ---- one replica -------------------------------------------------------------------------------


@asynccontextmanager
async def replica_of(engine: FakeEngine) -> AsyncIterator[Replica]:
    replica = Replica("a", engine)
    await replica.start()
    try:
        async with asyncio.timeout(SECONDS):
            yield replica
    finally:
        await replica.close()


async def test_a_replica_answers_with_the_events_of_its_engine() -> None:
    async with replica_of(FakeEngine(lambda _: [5, 6, 7])) as replica:
        answers = [answer async for answer in replica.generate(request("r"))]
    events = [answer.event for answer in answers if answer.event]
    assert [token for event in events for token in event.token_ids] == [5, 6, 7]
    assert [event.finish_reason is not None for event in events] == [False] * (len(events) - 1) + [True]


async def test_answers_are_fewer_and_longer_where_there_are_many_streams(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each piece that goes through Ray costs the front about as much as the engine takes for a token."""
    engine = FakeEngine(lambda _: list(range(60)), delay=0.001)
    async with replica_of(engine) as replica:

        async def pieces(name: str) -> list[list[int]]:
            answers = [answer.event async for answer in replica.generate(request(name))]
            return [event.token_ids for event in answers if event]

        monkeypatch.setattr("server.replicas.replica.ANSWER_SECONDS", 0.01)
        many = await asyncio.gather(*(pieces(str(number)) for number in range(10)))
        monkeypatch.setattr("server.replicas.replica.ANSWER_SECONDS", 0.0)
        alone = await pieces("alone")
    for each in [*many, alone]:
        assert [token for piece in each for token in piece] == list(range(60))
    assert max(map(len, many)) < len(alone) / 4


async def test_an_answer_that_is_left_aborts_its_request() -> None:
    engine = FakeEngine(lambda _: list(range(100)), delay=0.001)
    async with replica_of(engine) as replica:
        answers = replica.generate(request("r"))
        await anext(answers)
        assert isinstance(answers, AsyncGenerator)
        await answers.aclose()
        assert engine.aborted == ["r"]


async def test_a_stopped_request_still_has_its_last_event() -> None:
    engine = FakeEngine(lambda _: list(range(100)), delay=0.001)
    async with replica_of(engine) as replica:
        replica.stop("unknown")
        answers = []
        async for answer in replica.generate(request("r")):
            replica.stop("r")
            answers.append(answer)
    assert answers[-1].event == TokenEvent(request_id="r", finish_reason="abort", stats=STATS)


async def test_a_replica_that_is_not_ready_says_so_and_takes_nothing() -> None:
    engine = FakeEngine(lambda _: [5])
    async with replica_of(engine) as replica:
        engine.state = "loading"
        assert [answer async for answer in replica.generate(request("r"))] == [
            Answer(replica="a", refusal="the engine is loading the model")
        ]
        assert replica.report().info is None
        assert not engine.requests
        engine.state = "ready"


async def test_a_replica_whose_engine_is_given_up_is_not_healthy() -> None:
    engine = FakeEngine(lambda _: [5])
    async with replica_of(engine) as replica:
        replica.check_health()
        engine.state = "dead"
        with pytest.raises(EngineDeadError):
            replica.check_health()
        engine.state = "ready"
