"""The batcher alone: mailboxes merge, everything ends, nothing that was left goes on running."""

import asyncio
from collections.abc import AsyncIterator, Callable

import msgspec
import pytest

from model.protocol import MOST_WAVE_PASSES, GenerationRequest, SamplingParams, TokenEvent
from server.batcher import AdmissionLimits, RequestBatcher
from server.errors import QueueFullError, UnavailableError
from server.metrics import Metrics
from tests.fake_engine import INFO, FakeEngine, logprobs_of, loops_of

IDS = list(range(50, 70))


def request(name: str, max_tokens: int = 20) -> GenerationRequest:
    return GenerationRequest(
        request_id=name, prompt_token_ids=[1], max_tokens=max_tokens, sampling=SamplingParams()
    )


async def started(engine: FakeEngine, limit: int = 8, max_tokens: int = 10**6) -> RequestBatcher:
    batcher = RequestBatcher(engine, AdmissionLimits(limit, max_tokens), Metrics(engine, "m"))
    await batcher.start()
    return batcher


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


async def drained(stream: AsyncIterator[TokenEvent]) -> list[TokenEvent]:
    async with asyncio.timeout(5):
        return [event async for event in stream]


async def test_slow_reader_finds_its_deltas_merged() -> None:
    engine = FakeEngine(lambda _: IDS)
    batcher = await started(engine)
    stream = batcher.open([request("a"), request("b")])
    await until(lambda: batcher.num_in_flight == 0)
    events = await drained(stream)
    assert [(event.request_id, event.token_ids) for event in events] == [("a", IDS), ("b", IDS)]
    assert all(event.finish_reason == "length" and event.stats for event in events)
    await batcher.close()


async def test_slow_reader_finds_all_scores_of_all_tokens() -> None:
    batcher = await started(FakeEngine(lambda _: IDS))
    asked = msgspec.structs.replace(request("a"), logprobs=1, loop_logprobs=2)
    stream = batcher.open([asked])
    await until(lambda: batcher.num_in_flight == 0)
    (event,) = await drained(stream)
    assert event.logprobs == [logprobs_of(token_id, 1 + i, 1) for i, token_id in enumerate(IDS)]
    assert event.loop_logprobs == [loops_of(token_id, 1 + i, 2) for i, token_id in enumerate(IDS)]
    await batcher.close()


async def test_slow_reader_finds_the_latest_passes_of_its_wave() -> None:
    ids = [7] * 150
    batcher = await started(FakeEngine(lambda _: ids))
    asked = msgspec.structs.replace(request("a", len(ids)), include_wave=True)
    stream = batcher.open([asked])
    await until(lambda: batcher.num_in_flight == 0)
    (event,) = await drained(stream)
    assert event.token_ids == ids
    assert event.wave is not None
    assert event.wave.omitted == len(ids) - MOST_WAVE_PASSES
    assert [one.position for one in event.wave.passes] == list(range(1 + event.wave.omitted, 1 + len(ids)))
    await batcher.close()


async def test_every_sequence_of_a_stream_is_read_in_turn() -> None:
    engine = FakeEngine(lambda _: IDS, delay=0.001)
    batcher = await started(engine)
    events = await drained(batcher.open([request("a"), request("b")]))
    for name in "ab":
        assert [i for e in events if e.request_id == name for i in e.token_ids] == IDS
        assert [bool(e.finish_reason) for e in events if e.request_id == name][-1]
    await batcher.close()


@pytest.mark.parametrize("error", [None, RuntimeError("broken pipe")])
async def test_streams_end_when_the_engine_falls_silent(error: RuntimeError | None) -> None:
    engine = FakeEngine(lambda _: IDS, delay=1000)
    batcher = await started(engine)
    stream = batcher.open([request("a"), request("b")])
    engine.break_off(error)
    events = await drained(stream)
    assert [event.finish_reason for event in events] == ["error", "error"]
    with pytest.raises(UnavailableError):
        batcher.open([request("c")])
    await batcher.close()


async def test_leaving_a_stream_aborts_what_still_runs() -> None:
    engine = FakeEngine(lambda r: IDS if r.request_id == "slow" else IDS[:1], delay=0.01)
    batcher = await started(engine)

    async def leave_after_the_fast_one() -> None:
        async with batcher.open([request("slow"), request("fast", 1)]) as stream:
            async for event in stream:
                if event.request_id == "fast":
                    raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await leave_after_the_fast_one()
    assert engine.aborted == ["slow"]
    assert batcher.num_in_flight == 0
    await batcher.close()


async def test_late_events_of_an_abandoned_request_are_ignored() -> None:
    engine = FakeEngine(lambda _: IDS)
    batcher = await started(engine)
    batcher.open([request("a")]).close()
    assert len(await drained(batcher.open([request("b", 3)]))) >= 1
    await batcher.close()


async def test_abort_of_one_sequence_still_brings_its_last_event() -> None:
    engine = FakeEngine(lambda _: IDS, delay=0.001)
    batcher = await started(engine)
    async with batcher.open([request("a")]) as stream:
        await anext(stream)
        stream.abort("a")
        last = (await drained(stream))[-1]
    assert last.finish_reason == "abort"
    assert last.stats is not None
    await batcher.close()


async def test_admission_is_all_or_nothing() -> None:
    engine = FakeEngine(lambda _: IDS, delay=1000)
    batcher = await started(engine, limit=3)
    stream = batcher.open([request("a"), request("b")])
    with pytest.raises(QueueFullError):
        batcher.open([request("c"), request("d")])
    assert [r.request_id for r in engine.requests] == ["a", "b"]
    stream.close()
    batcher.open([request("c"), request("d")]).close()
    await batcher.close()


async def test_tokens_in_flight_are_bounded_but_one_request_is_always_taken() -> None:
    engine = FakeEngine(lambda _: IDS, delay=1000)
    batcher = await started(engine, max_tokens=60)
    alone = batcher.open([request("large", 100)])
    with pytest.raises(QueueFullError) as caught:
        batcher.open([request("small", 1)])
    assert caught.value.reason == "tokens"
    alone.close()
    first = batcher.open([request("a"), request("b")])  # a prompt of 1 token and 20 tokens each
    with pytest.raises(QueueFullError):
        batcher.open([request("c", 18)])
    batcher.open([request("c", 17)]).close()
    first.close()
    batcher.open([request("large", 100)]).close()
    await batcher.close()


async def test_submission_that_fails_half_way_aborts_the_first_half(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine(lambda _: IDS, delay=1000)
    batcher = await started(engine)
    submit = engine.submit

    def submit_and_die(r: GenerationRequest) -> None:
        submit(r)
        engine.state = "dead"

    monkeypatch.setattr(engine, "submit", submit_and_die)
    with pytest.raises(UnavailableError):
        batcher.open([request("a"), request("b")])
    assert engine.aborted == ["a"]
    assert batcher.num_in_flight == 0
    await batcher.close()


async def test_drain_lets_running_requests_finish_and_refuses_new_ones() -> None:
    engine = FakeEngine(lambda _: IDS, delay=0.001)
    batcher = await started(engine)
    stream = batcher.open([request("a")])
    batcher.drain()
    with pytest.raises(UnavailableError, match="shutting down"):
        batcher.open([request("b")])
    assert (await drained(stream))[-1].finish_reason == "length"
    await batcher.close()


@pytest.mark.parametrize("how", ["abort_all", "close"])
async def test_shutdown_ends_streams_with_abort(how: str) -> None:
    engine = FakeEngine(lambda _: IDS, delay=1000)
    batcher = await started(engine)
    stream = batcher.open([request("a")])
    if how == "close":
        await batcher.close()
    else:
        batcher.abort_all()
    assert [event.finish_reason for event in await drained(stream)] == ["abort"]
    await batcher.close()


@pytest.mark.parametrize(
    ("max_num_seqs", "max_model_len", "kv_cache_tokens"), [(32, 65536, 10**6), (2, 100, 5000), (8, 200, 1000)]
)
def test_by_default_so_many_tokens_may_wait_as_the_engine_runs_eight_times_over(
    max_num_seqs: int, max_model_len: int, kv_cache_tokens: int
) -> None:
    """A fixed 2^20 was sixteen chats of a model with a context of 65,536 tokens."""
    info = msgspec.structs.replace(
        INFO, max_num_seqs=max_num_seqs, max_model_len=max_model_len, kv_cache_tokens=kv_cache_tokens
    )
    most = AdmissionLimits(256).most_tokens(info)
    assert most >= 8 * max_num_seqs * max_model_len
    assert most == 8 * max(max_num_seqs * max_model_len, kv_cache_tokens)
    assert AdmissionLimits(256, 100).most_tokens(info) == 100


async def test_the_default_limit_of_tokens_is_kept() -> None:
    engine = FakeEngine(lambda _: IDS, delay=1000)
    batcher = RequestBatcher(engine, AdmissionLimits(1000), Metrics(engine, "m"))
    await batcher.start()
    most = AdmissionLimits(1000).most_tokens(INFO)
    streams = [
        batcher.open([request(str(i), INFO.max_model_len - 1)]) for i in range(most // INFO.max_model_len)
    ]
    with pytest.raises(QueueFullError, match=str(most)):
        batcher.open([request("one more", INFO.max_model_len - 1)])
    for stream in streams:
        stream.close()
    await batcher.close()
