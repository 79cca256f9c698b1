"""/metrics: every name of the contract, and figures that are those of the requests."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from model.protocol import EngineStats
from server.metrics import REFUSAL_REASONS
from tests.contract.conftest import Served, serving, until
from tests.fake_engine import INFO, STATS, FakeEngine
from tests.text_tools import ids_of

# API.md, section Metrics: type and labels of each name, besides the model's.
CONTRACT = {
    "speed:num_requests_running": ("gauge", set()),
    "speed:num_requests_waiting": ("gauge", set()),
    "speed:kv_cache_usage_perc": ("gauge", set()),
    "speed:rows_in_flight": ("gauge", set()),
    "speed:row_budget": ("gauge", set()),
    "speed:speculation_enabled": ("gauge", set()),
    "speed:engine_resident_memory_bytes": ("gauge", set()),
    "speed:engine_device_memory_bytes": ("gauge", set()),
    "speed:cache_config_info": ("gauge", {"block_size", "num_gpu_blocks"}),
    "speed:prompt_tokens": ("counter", set()),
    "speed:generation_tokens": ("counter", set()),
    "speed:request_success": ("counter", {"finished_reason"}),
    "speed:prefix_cache_queries": ("counter", set()),
    "speed:prefix_cache_hits": ("counter", set()),
    "speed:num_preemptions": ("counter", set()),
    "speed:admission_rejections": ("counter", {"reason"}),
    "speed:spec_decode_num_draft_tokens": ("counter", set()),
    "speed:spec_decode_num_accepted_tokens": ("counter", set()),
    "speed:spec_decode_flushes": ("counter", {"depth"}),
    "speed:spec_decode_compared_readouts": ("counter", {"depth"}),
    "speed:spec_decode_agreeing_readouts": ("counter", {"depth"}),
    "speed:http_requests": ("counter", {"handler", "status"}),
    "speed:passes": ("counter", set()),
    "speed:engine_restarts": ("counter", {"reason"}),
    "speed:time_to_first_token_seconds": ("histogram", set()),
    "speed:inter_token_latency_seconds": ("histogram", set()),
    "speed:e2e_request_latency_seconds": ("histogram", set()),
    "speed:request_queue_time_seconds": ("histogram", set()),
    "speed:passes_per_token": ("histogram", set()),
    "speed:pass_rows": ("histogram", set()),
}
COUNTS = EngineStats(
    num_requests_running=3,
    num_requests_waiting=2,
    kv_cache_usage=0.25,
    rows_in_flight=7,
    row_budget=32,
    speculation_enabled=1,
    passes=10,
    rows=31,
    pass_rows={1: 2, 4: 8},
    prompt_tokens=100,
    generation_tokens=50,
    draft_tokens=40,
    accepted_tokens=30,
    flushes={2: 4, 4: 1},
    compared_readouts={1: 40, 2: 30},
    agreeing_readouts={1: 20, 2: 27},
    resident_memory=2**28,
    device_memory=2**33,
    prefix_cache_queries=90,
    prefix_cache_hits=60,
    preemptions=1,
)


async def scrape(served: Served) -> dict[str, float]:
    """Samples by name and labels, the model's left out: `name{label=value}`."""
    response = await served.client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            if sample.name.startswith("speed:"):
                assert sample.labels.pop("model_name") == "default"
            labels = ",".join(f"{name}={value}" for name, value in sample.labels.items())
            samples[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return samples


@asynccontextmanager
async def served_and_refused() -> AsyncIterator[Served]:
    """A server that has counted one of everything: an answer, a refusal, what the engine reports."""
    engine = FakeEngine(lambda _: ids_of("abcd"), delay=0.001)
    engine.counts = COUNTS
    async with serving(engine, max_queued_requests=1) as served:
        assert (await served.post()).status_code == 200
        engine.delay = 1000
        waiting = asyncio.create_task(served.post())
        await until(lambda: len(engine.requests) == 2)
        assert (await served.post()).status_code == 429
        waiting.cancel()
        yield served


async def test_every_name_of_the_contract_with_its_type_and_labels() -> None:
    async with served_and_refused() as served:
        # What Prometheus 2 and 3 send; the names must not depend on it.
        for accept in ("application/openmetrics-text;version=1.0.0,*/*;q=0.1", "text/plain"):
            response = await served.client.get("/metrics", headers={"accept": accept})
            families = {f.name: f for f in text_string_to_metric_families(response.text)}
            # When a series began: the library adds these, each as a family of its own.
            ours = {name for name in families if "speed" in name and not name.endswith("_created")}
            assert ours == set(CONTRACT)
            for name, (type_, labels) in CONTRACT.items():
                assert families[name].type == type_, name
                own = {label for sample in families[name].samples for label in sample.labels}
                assert own - {"model_name", "le"} == labels, name


async def test_the_engines_counts_are_shown_as_they_are() -> None:
    engine = FakeEngine(lambda _: ids_of("abcd"))
    engine.counts = COUNTS
    async with serving(engine) as served:
        samples = await scrape(served)
    assert samples["speed:kv_cache_usage_perc"] == 0.25
    assert samples["speed:num_requests_running"] == 3
    assert samples["speed:generation_tokens_total"] == 50
    assert samples["speed:spec_decode_num_accepted_tokens_total"] == 30
    assert samples["speed:spec_decode_flushes_total{depth=2}"] == 4
    assert samples["speed:spec_decode_compared_readouts_total{depth=2}"] == 30
    assert samples["speed:spec_decode_agreeing_readouts_total{depth=2}"] == 27
    assert samples["speed:engine_resident_memory_bytes"] == 2**28
    assert samples["speed:engine_device_memory_bytes"] == 2**33
    assert samples["speed:pass_rows_bucket{le=1.0}"] == 2
    assert samples["speed:pass_rows_bucket{le=2.0}"] == 2
    assert samples["speed:pass_rows_bucket{le=4.0}"] == 10
    assert samples["speed:pass_rows_count"] == 10
    assert samples["speed:pass_rows_sum"] == 31


async def test_counters_go_on_when_another_engine_takes_over() -> None:
    engine = FakeEngine(lambda _: ids_of("abcd"))
    async with serving(engine) as served:
        engine.counts = COUNTS
        assert (await served.post()).status_code == 200  # no scrape: the counts are noted all the same
        await until(lambda: served.app.state.server.batcher.num_in_flight == 0)
        for restarts in (1, 2):
            engine.restarts, engine.counts = {"silent": restarts}, EngineStats()
            samples = await scrape(served)
            assert samples["speed:passes_total"] == 10 * restarts
            assert samples["speed:spec_decode_flushes_total{depth=4}"] == restarts
            assert samples["speed:pass_rows_count"] == 10 * restarts
            assert samples["speed:num_requests_running"] == 0
            engine.counts = COUNTS
            samples = await scrape(served)
            assert samples["speed:passes_total"] == 10 * (restarts + 1)
            assert samples["speed:engine_restarts_total{reason=silent}"] == restarts
            assert samples["speed:engine_restarts_total{reason=exited}"] == 0
            assert samples["speed:num_requests_running"] == 3


async def test_histograms_count_requests_and_tokens() -> None:
    engine = FakeEngine(lambda _: ids_of("abcdef"), tokens_per_event=2, delay=0.01)
    async with serving(engine) as served:
        assert (await served.post(n=2)).status_code == 200
        samples = await scrape(served)
    assert samples["speed:time_to_first_token_seconds_count"] == 2
    assert 0.02 <= samples["speed:time_to_first_token_seconds_sum"] < 2
    # The first event's two tokens are the first; each later event shares its time among its two.
    assert samples["speed:inter_token_latency_seconds_count"] == 8
    assert 0.04 <= samples["speed:inter_token_latency_seconds_sum"] < 2
    assert samples["speed:e2e_request_latency_seconds_count"] == 2
    assert samples["speed:request_queue_time_seconds_count"] == 2
    assert samples["speed:passes_per_token_count"] == 2
    assert samples["speed:passes_per_token_sum"] == pytest.approx(2 * STATS.passes / 5)


async def test_each_end_is_counted_by_what_the_client_sees() -> None:
    engine = FakeEngine(lambda _: ids_of("abcdef"), delay=0.001)
    async with serving(engine) as served:
        await served.post()
        await served.post(stop="c")  # the engine says "abort" here: the server stopped it
        call = served.asgi_call(stream=True)
        await call.first_frame()
        call.disconnect()
        await call.finished()
        engine.delay = 1000
        task = asyncio.create_task(served.post())
        await until(lambda: len(engine.requests) == 4)
        engine.fail()
        await task
        samples = await scrape(served)
    reasons = {
        reason: samples[f"speed:request_success_total{{finished_reason={reason}}}"]
        for reason in ("length", "stop", "abort", "error")
    }
    assert reasons == {"length": 1, "stop": 1, "abort": 1, "error": 1}


async def test_each_refusal_is_counted_by_its_reason() -> None:
    engine = FakeEngine(lambda _: ids_of("abcdef"), delay=1000)
    async with serving(engine, max_queued_requests=2, max_queued_tokens=100) as served:
        task = asyncio.create_task(served.post())
        await until(lambda: engine.requests)
        assert (await served.post(n=2, max_tokens=1)).status_code == 429
        assert (await served.post(max_tokens=50)).status_code == 429
        engine.state = "loading"
        assert (await served.post()).status_code == 503
        served.app.state.server.batcher.drain()
        assert (await served.post()).status_code == 503
        assert (await served.client.get("/ready")).status_code == 503  # no request was refused here
        samples = await scrape(served)
        task.cancel()
    reasons = {name: value for name, value in samples.items() if "rejections_total" in name}
    assert reasons == {
        f"speed:admission_rejections_total{{reason={reason}}}": int(reason != "engine_unavailable")
        for reason in REFUSAL_REASONS
    }


async def test_two_servers_in_one_process_count_apart() -> None:
    async with serving() as one, serving() as other:
        await one.post()
        assert (await scrape(one))["speed:request_success_total{finished_reason=length}"] == 1
        assert (await scrape(other))["speed:request_success_total{finished_reason=length}"] == 0


async def families_of(served: Served) -> dict[str, Metric]:
    text = (await served.client.get("/metrics")).text
    return {family.name: family for family in text_string_to_metric_families(text)}


async def test_every_series_is_there_before_its_first_event() -> None:
    """rate() and increase() don't see the step from nothing to 1: the first error would be missed."""
    async with serving() as fresh, served_and_refused() as used:
        before, after = await families_of(fresh), await families_of(used)
    for name in CONTRACT:
        had, has = (
            {tuple(sample.labels.items()) for sample in side[name].samples} for side in (before, after)
        )
        assert had >= has, name
        if CONTRACT[name][0] == "counter" and name != "speed:http_requests":
            assert not any(s.value for s in before[name].samples if s.name.endswith("_total")), name


async def test_each_gauge_has_one_series() -> None:
    """What routes requests or scales replicas reads a gauge by its name alone."""
    async with served_and_refused() as served:
        families = await families_of(served)
    gauges = [name for name, (type_, _) in CONTRACT.items() if type_ == "gauge"]
    assert {name: len(families[name].samples) for name in gauges} == dict.fromkeys(gauges, 1)


async def test_the_cache_says_its_size_once_it_has_one() -> None:
    engine = FakeEngine(
        lambda _: [], info=msgspec.structs.replace(INFO, kv_cache_tokens=320, kv_page_size=32)
    )
    async with serving(engine) as served:
        assert (await scrape(served))["speed:cache_config_info{block_size=32,num_gpu_blocks=10}"] == 1
        engine.state = "loading"
        assert not any("cache_config_info" in name for name in await scrape(served))


def answered(samples: dict[str, float]) -> dict[tuple[str, str], float]:
    """Counted answers by handler and status, without scrapes."""
    found = {
        re.fullmatch(r"speed:http_requests_total{handler=(.*),status=(\d+)}", name): value
        for name, value in samples.items()
    }
    return {
        (match[1], match[2]): value
        for match, value in found.items()
        if match and value and match[1] != "/metrics"
    }


async def test_answers_are_counted_by_route_and_status() -> None:
    engine = FakeEngine(lambda _: ids_of("abcd"), delay=0.001)
    async with serving(engine, api_keys=["secret"], max_queued_requests=1) as served:
        assert (await served.post()).status_code == 401  # before any route is found
        served.client.headers["authorization"] = "Bearer secret"
        assert (await served.post()).status_code == 200
        assert (await served.post(temperature=-1)).status_code == 400
        assert (await served.client.get("/v1/models/default")).status_code == 200
        assert (await served.client.get("/health")).status_code == 200
        samples = await scrape(served)
    assert answered(samples) == {
        ("/v1/completions", "401"): 1,
        ("/v1/completions", "200"): 1,
        ("/v1/completions", "400"): 1,
        ("/v1/models/{name:path}", "200"): 1,
        ("/health", "200"): 1,
    }


async def test_a_client_that_leaves_before_its_answer_is_counted_as_499() -> None:
    async with serving(FakeEngine(lambda _: ids_of("abcd"), delay=1000)) as served:
        task = asyncio.create_task(served.post())
        await until(lambda: served.app.state.server.batcher.num_in_flight)
        task.cancel()
        await until(lambda: not served.app.state.server.batcher.num_in_flight)
        assert answered(await scrape(served)) == {("/v1/completions", "499"): 1}


async def test_what_clients_send_makes_no_series() -> None:
    async with serving() as served:
        before = len(await scrape(served))
        for number in range(50):
            assert (await served.client.get(f"/none/{number}")).status_code == 404
            assert (await served.client.get(f"/v1/models/none-{number}")).status_code == 404
        samples = await scrape(served)
    assert answered(samples) == {("other", "404"): 50, ("/v1/models/{name:path}", "404"): 50}
    assert len(samples) <= before + 4  # an unexpected status of a route is a series, and when it began
