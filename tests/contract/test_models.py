"""Several models in one server: each has its own engine, loaded when it is named, unloaded when idle."""

import asyncio
import random
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import httpx
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tokenizers.models import BPE

import server.models
from model.protocol import EngineStats
from server.app import create_app_of
from server.chat_template import ChatTemplate
from server.defaults import SamplingDefaults
from server.models import Models
from server.served import ModelSource
from server.settings import Settings, SettingsError
from server.tokenizer import TextCodec
from tests.contract.conftest import Served, until
from tests.contract.test_pauses import READERS
from tests.fake_engine import INFO, FakeEngine
from tests.loose import Field, Json
from tests.text_tools import byte_codec, byte_tokenizer, ids_of

TEMPLATE = ChatTemplate("{% for message in messages %}{{ message.content }}{% endfor %}")


def codec_of_hi() -> TextCodec:
    """Of bytes, and one token for "hi"."""
    tokenizer = byte_tokenizer()
    vocabulary = {**tokenizer.get_vocab(), "hi": 257}
    tokenizer.model = BPE(vocab=vocabulary, merges=[("h", "i")])
    return TextCodec(tokenizer)


class SlowEngine(FakeEngine):
    """Loads until `state` is set, and notes that it was closed."""

    def __init__(self, text: str, context: int, *, is_quick: bool) -> None:
        info = msgspec.structs.replace(INFO, max_model_len=context, vocab_size=258)
        super().__init__(lambda _: ids_of(text), info=info)
        self.is_quick = is_quick
        self.state = "loading"
        self.is_closed = False

    async def start(self) -> None:
        if self.is_quick:
            self.state = "ready"

    async def close(self) -> None:
        await super().close()
        self.state = "dead"
        self.is_closed = True


class Several(Served):
    """A running application of several models, named by letters; each says its name."""

    def __init__(self, names: str, starts_first: bool, options: dict[str, Field]) -> None:
        self.made: dict[str, list[SlowEngine]] = {name: [] for name in names}
        self.is_quick = True  # whether engines load by themselves
        self.broken: set[str] = set()  # models whose files can't be read
        sources = [self._source(name, 150 + 100 * i, options) for i, name in enumerate(names)]
        self.app = create_app_of(sources, starts_first=starts_first)
        self.models: Models = self.app.state.server
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=10)

    def _source(self, name: str, context: int, options: dict[str, Field]) -> ModelSource:
        def make_engine() -> SlowEngine:
            engine = SlowEngine(f"I am {name}.", context, is_quick=self.is_quick)
            self.made[name].append(engine)
            return engine

        def load_codec() -> TextCodec:
            if name in self.broken:
                raise SettingsError(f"{name} has no readable tokenizer")
            return byte_codec() if name == "a" else codec_of_hi()

        settings = Settings(**{"served_model_name": [name, f"{name}-alias"], **options})
        template = TEMPLATE if name == "a" else None
        defaults = SamplingDefaults({"temperature": 0.0} if name == "a" else {})
        return ModelSource(settings, make_engine, load_codec, template, defaults)

    def engine_of(self, name: str) -> SlowEngine:
        return self.made[name][-1]

    @property
    def num_open(self) -> int:
        return sum(not engine.is_closed for engines in self.made.values() for engine in engines)

    async def states(self) -> dict[str, str]:
        cards = (await self.client.get("/v1/models")).json()["data"]
        assert [card["id"] for card in cards] == self.models.names
        return {card["id"]: card["state"] for card in cards if "alias" not in card["id"]}

    async def text_of(self, name: str) -> str:
        response = await self.post(model=name)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["text"])

    async def samples(self) -> dict[tuple[str, ...], float]:
        """By name, model and values of other labels."""
        text = (await self.client.get("/metrics")).text
        return {
            (sample.name, sample.labels.pop("model_name", ""), *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }


@asynccontextmanager
async def several(
    names: str = "abc", *, starts_first: bool = True, **options: Field
) -> AsyncIterator[Several]:
    served = Several(names, starts_first, options)
    async with served.app.router.lifespan_context(served.app), served.client:
        yield served


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.models, "TICK_SECONDS", 0.002)


async def refused(response: httpx.Response, code: str) -> None:
    assert (response.status_code, response.json()["error"]["code"]) == (503, code)
    assert int(response.headers["retry-after"]) > 0


# ---- which model answers ---------------------------------------------------------------------------


async def test_each_name_is_answered_by_its_own_model() -> None:
    async with several() as served:
        for name in ("b", "a-alias", "c", "a", "b-alias"):
            assert await served.text_of(name) == f"I am {name[0]}."
        assert [len(engines) for engines in served.made.values()] == [1, 1, 1]
        missing = await served.post(model="d")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
        assert (await served.client.get("/v1/models/d")).status_code == 404


async def test_tokenizer_template_context_and_defaults_are_the_models_own() -> None:
    async with several("ab") as served:
        counts = [
            (await served.post("/tokenize", model=name, prompt="hi", max_tokens=...)).json()["count"]
            for name in ("a", "b")
        ]
        assert counts == [2, 1]
        path = "/v1/chat/completions"
        chat: dict[str, Json] = {"prompt": ..., "messages": [{"role": "user", "content": "x"}]}
        assert (await served.post(path, model="a", **chat)).status_code == 200
        without = await served.post(path, model="b", **chat)
        assert without.status_code == 400
        assert "template" in without.text
        assert (await served.post(model="a", max_tokens=200)).status_code == 400  # of 150
        assert (await served.post(model="b", max_tokens=200)).status_code == 200  # of 250
        temperatures = [served.engine_of(name).requests[-1].sampling.temperature for name in ("a", "b")]
        assert temperatures == [0, 1]


async def test_a_request_that_names_no_model_means_the_first() -> None:
    async with several("ab") as served:
        assert (await served.post("/tokenize", model=..., prompt="hi", max_tokens=...)).json()["count"] == 2


async def test_a_body_may_be_as_large_as_the_model_that_takes_most_allows() -> None:
    """Which model it is for is known when it was read: that of the smallest context must not decide."""
    async with several("ab", body_limit=2**22) as served:
        await served.text_of("b")
        served.engine_of("a")._info = msgspec.structs.replace(INFO, max_model_len=10)
        served.engine_of("b")._info = msgspec.structs.replace(INFO, max_model_len=10**6)
        body: Json = {"prompt": [[1] * 600_000], "max_tokens": 1}
        assert (await served.post(model="b", **body)).status_code == 200
        assert (await served.post(model="a", **body)).status_code == 400


# ---- loading ---------------------------------------------------------------------------------------


async def test_the_first_is_loaded_at_the_start_and_others_by_their_first_request() -> None:
    async with several() as served:
        assert await served.states() == {"a": "ready", "b": "unloaded", "c": "unloaded"}
        cards = {card["id"]: card for card in (await served.client.get("/v1/models")).json()["data"]}
        assert (cards["a"]["supports_chat"], cards["b"]["supports_chat"]) == (True, False)
        assert (cards["a"]["max_model_len"], "max_model_len" in cards["b"]) == (150, False)
        served.is_quick = False
        waiting = [asyncio.create_task(served.post(model="b")) for _ in range(5)]
        await until(lambda: served.made["b"])
        assert (await served.states())["b"] == "loading"
        assert await served.text_of("a") == "I am a."  # nobody else waits
        served.engine_of("b").state = "ready"
        assert [(await task).json()["choices"][0]["text"] for task in waiting] == ["I am b."] * 5
        assert await served.states() == {"a": "ready", "b": "ready", "c": "unloaded"}
        assert len(served.made["b"]) == 1


async def test_without_a_first_one_nothing_is_loaded_at_the_start() -> None:
    async with several(starts_first=False) as served:
        assert (await served.client.get("/ready")).status_code == 200
        assert served.num_open == 0
        assert set((await served.states()).values()) == {"unloaded"}
        assert await served.text_of("c") == "I am c."


async def test_requests_to_the_first_one_are_refused_until_it_has_loaded_as_with_one_model() -> None:
    served = Several("ab", True, {})
    served.engine_of("a").is_quick = False
    async with served.app.router.lifespan_context(served.app), served.client:
        await refused(await served.client.get("/ready"), "engine_loading")
        await refused(await served.post(model="a"), "engine_loading")
        served.engine_of("a").state = "ready"
        assert (await served.client.get("/ready")).status_code == 200


@pytest.mark.parametrize("read", READERS)
async def test_a_stream_hears_of_us_while_its_model_loads(read: Callable[[bytes], Field]) -> None:
    async with several(ping_interval=0.01) as served:
        served.is_quick = False
        task = asyncio.create_task(served.post(model="b", stream=True))
        await until(lambda: served.made["b"])
        await asyncio.sleep(0.05)
        assert not task.done()
        served.engine_of("b").state = "ready"
        response = await task
        assert response.content.startswith(b": ping\n: ping\n")
        *chunks, done = read(response.content)
        assert done == "[DONE]"
        choices = [choice for chunk in chunks for choice in msgspec.json.decode(chunk)["choices"]]
        assert "".join(choice["text"] for choice in choices) == "I am b."
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-request-id"]


BODIES: dict[str, dict[str, Json]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
    "/v1/messages": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 10},
    "/v1/responses": {"input": "x"},
}


@pytest.mark.parametrize("path", BODIES)
async def test_every_api_streams_behind_a_load(path: str) -> None:
    async with several("ba", ping_interval=0.01) as served:
        served.is_quick = False
        fields = {"prompt": ..., "max_tokens": ...} | BODIES[path]
        task = asyncio.create_task(served.post(path, model="a", stream=True, **fields))
        await until(lambda: served.made["a"])
        await asyncio.sleep(0.03)
        served.engine_of("a").state = "ready"
        text = (await task).text
        assert "ping" in text.partition("message_start")[0].partition("data: {")[0]
        assert "event: error" not in text
        assert "I am a." in "".join(re.findall(r'"(?:content|text|delta)":"([^"]*)"', text))


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("/v1/completions", '{"error": {"message"'),
        ("/v1/chat/completions", '{"error": {"message"'),
        ("/v1/messages", '{"type": "error", "error": {"type": "overloaded_error"'),
        ("/v1/responses", '{"type": "error", "sequence_number": 0, "code": "engine_unavailable"'),
    ],
)
async def test_a_load_that_fails_late_ends_a_stream_in_the_shape_of_its_api(path: str, shape: str) -> None:
    async with several("ab", ping_interval=0.01) as served:
        served.is_quick = False
        fields = {"prompt": ..., "max_tokens": ...} | BODIES.get(path, {"prompt": "x"})
        task = asyncio.create_task(served.post(path, model="b", stream=True, **fields))
        await until(lambda: served.made["b"])
        await asyncio.sleep(0.03)
        served.engine_of("b").state = "dead"
        response = await task
        assert response.status_code == 200
        assert shape in response.text
        if "completions" in path:
            for read in READERS:  # those that drop what stands behind a comment too
                *_, error, done = read(response.content)
                assert (done, "error" in msgspec.json.decode(error)) == ("[DONE]", True)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_load_that_fails_is_an_answer_and_tried_again_later(
    monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    async with several("ab") as served:
        served.broken = {"b"}
        await refused(await served.post(model="b", stream=stream), "engine_unavailable")
        assert await served.states() == {"a": "ready", "b": "failed"}
        served.broken = set()
        await refused(await served.post(model="b", stream=stream), "engine_unavailable")  # at once
        assert len(served.made["b"]) == 0
        monkeypatch.setattr(server.models, "RETRY_SECONDS", 0)
        assert await served.text_of("b") == "I am b."
        assert await served.text_of("a") == "I am a."
        samples = await served.samples()
        assert samples["speed:admission_rejections_total", "b", "engine_unavailable"] == 2
        assert samples["speed:admission_rejections_total", "a", "engine_unavailable"] == 0


async def test_so_many_may_wait_for_a_model_and_no_more() -> None:
    async with several("ab", max_queued_requests=3) as served:
        served.is_quick = False
        waiting = [asyncio.create_task(served.post(model="b")) for _ in range(3)]
        await until(lambda: served.models.find("b").num_waiting == 3)
        refusal = await served.post(model="b")
        assert (refusal.status_code, refusal.json()["error"]["code"]) == (429, "queue_full")
        served.engine_of("b").state = "ready"
        assert [(await task).status_code for task in waiting] == [200] * 3


async def test_clients_that_leave_during_a_load_leave_nothing_behind() -> None:
    async with several("ab", ping_interval=0.01, unload_idle=0.05) as served:
        served.is_quick = False
        calls = [served.asgi_call(model="b", stream=stream) for stream in (True, False)]
        await until(lambda: served.models.find("b").num_waiting == 2)
        await calls[0].first_frame()
        for call in calls:
            call.disconnect()
            await call.finished()
        assert served.models.find("b").num_waiting == 0
        served.engine_of("b").state = "ready"  # the load goes on, and then nobody needs it
        await until(lambda: served.engine_of("b").is_closed)
        assert served.engine_of("b").requests == []


# ---- making room -----------------------------------------------------------------------------------


async def test_the_one_that_was_idle_for_longest_makes_way() -> None:
    async with several(max_loaded=2) as served:
        await served.text_of("b")
        await served.text_of("a")
        await served.text_of("c")
        assert await served.states() == {"a": "ready", "b": "unloaded", "c": "ready"}
        await served.text_of("b")
        assert await served.states() == {"a": "unloaded", "b": "ready", "c": "ready"}
        assert [len(engines) for engines in served.made.values()] == [1, 2, 1]


async def test_a_model_in_use_is_not_unloaded_and_the_request_waits_for_it() -> None:
    async with several("ab", max_loaded=1) as served:
        served.engine_of("a").delay = 0.02
        running = served.asgi_call(model="a", stream=True)
        await running.first_frame()
        task = asyncio.create_task(served.post(model="b"))
        await asyncio.sleep(0.05)
        assert not served.made["b"]
        assert (await served.states())["b"] == "loading"
        await until(lambda: served.made["b"])
        await until(lambda: '"finish_reason":"length"' in running.data)
        running.disconnect()
        await running.finished()
        assert (await task).status_code == 200
        assert served.engine_of("a").is_closed
        assert served.engine_of("a").aborted == []


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_would_wait_too_long_is_refused(
    monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setattr(server.models, "PLACE_SECONDS", 0.02)
    async with several("ab", max_loaded=1) as served:
        served.engine_of("a").delay = 1000
        running = served.asgi_call(model="a")
        await until(lambda: served.models.num_in_flight)
        await refused(await served.post(model="b", stream=stream), "models_busy")
        assert (await served.samples())["speed:admission_rejections_total", "b", "models_busy"] == 1
        assert (await served.states()) == {
            "a": "ready",
            "b": "loading",
        }  # it keeps its place in line for a while
        running.disconnect()
        await running.finished()
        assert await served.text_of("b") == "I am b."


@asynccontextmanager
async def steady_traffic(served: Several, names: str) -> AsyncIterator[list[int]]:
    """Requests to each of `names` of which two run at any time; the statuses of their answers so far."""
    statuses: list[int] = []

    async def ask_for_ever(name: str, pause: float) -> None:
        await asyncio.sleep(pause)
        while True:
            statuses.append((await served.post(model=name)).status_code)

    tasks = [asyncio.create_task(ask_for_ever(name, pause)) for name in names for pause in (0, 0.025)]
    try:
        await until(lambda: all(served.models.find(name).num_in_flight == 2 for name in names))
        yield statuses
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize(("names", "max_loaded"), [("a", 1), ("ab", 2)])
async def test_steady_traffic_to_loaded_models_does_not_keep_another_one_waiting(
    monkeypatch: pytest.MonkeyPatch, names: str, max_loaded: int
) -> None:
    """Two requests to each model overlap, so that it is never idle; the one to "c" still gets its turn.

    It used to be refused after `PLACE_SECONDS`, as often as it came.
    """
    monkeypatch.setattr(server.models, "TURN_SECONDS", 0.1)
    async with several(max_loaded=max_loaded) as served:
        for name in names:
            await served.text_of(name)
            served.engine_of(name).delay = 0.005
        async with steady_traffic(served, names) as statuses:
            assert await asyncio.wait_for(served.text_of("c"), timeout=5) == "I am c."
            first = served.made["a"][0]
            assert first.is_closed  # of the two, the one that had served for longer
            assert first.aborted == []  # its requests went on to their end
            await until(lambda: len(served.made["a"]) == 2 and served.models.find("a").num_in_flight)
            assert max_loaded == 1 or len(served.made["b"]) == 1
            assert set(statuses) == {200}
        assert served.num_open <= max_loaded


async def test_a_model_that_was_loaded_keeps_its_turn_while_others_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Steady traffic to two models in one place: they take turns, and not at every request."""
    monkeypatch.setattr(server.models, "TURN_SECONDS", 0.2)
    async with several("ab", max_loaded=1) as served:
        served.engine_of("a").delay = 0.005
        async with steady_traffic(served, "a") as statuses:
            asks_b = asyncio.create_task(served.post(model="b"))
            await until(lambda: served.made["b"])
            assert len(statuses) >= 2  # its own turn came first
            assert (await asks_b).status_code == 200
            await until(lambda: len(served.made["a"]) == 2)


async def test_a_client_that_leaves_gives_its_models_turn_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that were held back for it are served at once, by the worker that was never unloaded."""
    monkeypatch.setattr(server.models, "TURN_SECONDS", 0.0)
    async with several("ab", max_loaded=1) as served:
        served.engine_of("a").delay = 1000
        running = served.asgi_call(model="a")
        await until(lambda: served.models.num_in_flight)
        asks_b = served.asgi_call(model="b")
        await until(lambda: served.models.find("a").makes_way)
        held = asyncio.create_task(served.post(model="a"))
        await until(lambda: served.models.find("a").num_waiting)
        assert served.models.num_in_flight == 1
        served.engine_of("a").delay = 0
        asks_b.disconnect()
        await asks_b.finished()
        assert (await held).status_code == 200
        assert (len(served.made["a"]), len(served.made["b"])) == (1, 0)
        running.disconnect()
        await running.finished()
        assert await served.text_of("b") == "I am b."


async def test_who_was_refused_for_want_of_a_place_finds_it_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that outlasts what a client waits must not send the next try to the end of the line."""
    monkeypatch.setattr(server.models, "TURN_SECONDS", 0.0)
    monkeypatch.setattr(server.models, "PLACE_SECONDS", 0.05)
    async with several("ab", max_loaded=1) as served:
        served.engine_of("a").delay = 1000
        running = served.asgi_call(model="a")
        await until(lambda: served.models.num_in_flight)
        await refused(await served.post(model="b"), "models_busy")
        await refused(await served.post(model="a"), "models_busy")  # it would keep "b" waiting
        running.disconnect()
        await running.finished()
        await until(lambda: served.made["b"])
        assert await served.text_of("b") == "I am b."
        assert await served.text_of("a") == "I am a."


async def test_never_more_workers_than_may_be_and_every_request_is_answered() -> None:
    """200 requests for 5 models in 2 places, 16 at once, with waits of their own."""
    chance = random.Random(1)
    most = 0
    async with several("abcde", max_loaded=2) as served:
        gate = asyncio.Semaphore(16)

        async def ask(name: str, seconds: float) -> str:
            nonlocal most
            async with gate:
                await asyncio.sleep(seconds)
                text = await served.text_of(name)
                most = max(most, served.num_open)
                return text

        names = [chance.choice("abcde") for _ in range(200)]
        texts = await asyncio.gather(*(ask(name, chance.random() / 100) for name in names))
        assert texts == [f"I am {name}." for name in names]
        assert served.models.num_in_flight == 0
    assert most == 2
    assert served.num_open == 0


# ---- unloading -------------------------------------------------------------------------------------


async def test_what_is_idle_is_unloaded_and_loaded_again_when_it_is_asked_for() -> None:
    async with several("ab", unload_idle=0.2) as served:
        served.engine_of("a").counts = EngineStats(passes=7, num_requests_running=1)
        assert await served.text_of("b") == "I am b."
        await until(lambda: served.num_open == 0)
        assert await served.states() == {"a": "unloaded", "b": "unloaded"}
        assert (await served.client.get("/ready")).status_code == 200
        assert await served.text_of("a") == "I am a."
        served.engine_of("a").counts = EngineStats(passes=5)
        samples = await served.samples()
        assert samples["speed:passes_total", "a"] == 12  # a counter never falls
        assert samples["speed:num_requests_running", "a"] == 0
        assert samples["speed:request_success_total", "a", "length"] == 1
        assert samples["speed:request_success_total", "b", "length"] == 1


async def test_a_stream_that_runs_keeps_its_model_loaded() -> None:
    async with several("ab", unload_idle=0.05) as served:
        served.engine_of("a").delay = 0.1  # between two tokens
        response = await served.post(model="a", stream=True)
        assert '"finish_reason":"length"' in response.text
        assert "error" not in response.text
        assert len(served.made["a"]) == 1


async def test_one_model_alone_may_be_unloaded_too() -> None:
    async with several("a", unload_idle=0.03) as served:
        await until(lambda: served.num_open == 0)
        assert await served.text_of("a") == "I am a."
        assert len(served.made["a"]) == 2


# ---- faults and the end ----------------------------------------------------------------------------


async def test_the_death_of_one_engine_is_nothing_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    async with several("ab") as served:
        await served.text_of("b")
        for name in ("a", "b"):
            served.engine_of(name).delay = 0.01
        a, b = (asyncio.create_task(served.post(model=name, stream=True)) for name in ("a", "b"))
        await until(lambda: served.models.num_in_flight == 2)
        served.engine_of("a").fail()
        assert '"error"' in (await a).text
        whole = (await b).text
        assert '"finish_reason":"length"' in whole
        assert "error" not in whole
        await until(lambda: served.engine_of("a").is_closed)
        assert await served.states() == {"a": "failed", "b": "ready"}
        assert (await served.client.get("/ready")).status_code == 200
        await refused(await served.post(model="a"), "engine_unavailable")
        monkeypatch.setattr(server.models, "RETRY_SECONDS", 0)
        assert await served.text_of("a") == "I am a."


async def test_the_server_has_nothing_to_do_if_the_model_that_it_starts_with_cannot_be_loaded() -> None:
    served = Several("ab", True, {})
    served.engine_of("a").is_quick = False
    async with served.app.router.lifespan_context(served.app), served.client:
        assert served.models.health().state == "loading"
        served.engine_of("a").state = "dead"
        assert served.models.health().state == "dead"
    async with several("ab") as served:
        assert (await served.client.get("/ready")).status_code == 200
        served.engine_of("a").fail()  # later, the other one is still worth serving
        assert served.models.health().state == "unloaded"


async def test_who_waits_for_a_load_is_told_that_the_server_ends() -> None:
    async with several("ab", ping_interval=0.01) as served:
        served.is_quick = False
        whole, stream = (asyncio.create_task(served.post(model="b", stream=s)) for s in (False, True))
        await until(lambda: served.models.find("b").num_waiting == 2)
        await asyncio.sleep(0.03)
        served.models.drain()
        await refused(await whole, "server_draining")
        assert "server_draining" in (await stream).text
        for name in ("a", "b"):
            await refused(await served.post(model=name), "server_draining")
        await refused(await served.client.get("/ready"), "server_draining")
    assert served.num_open == 0


async def test_a_drain_lets_all_models_finish_and_an_abort_ends_what_is_left() -> None:
    async with several("ab") as served:
        await served.text_of("b")
        served.engine_of("a").delay = 1000
        a = asyncio.create_task(served.post(model="a"))
        await until(lambda: served.models.num_in_flight == 1)
        b = asyncio.create_task(served.post(model="b"))
        await until(lambda: served.engine_of("b").requests[1:])  # it is in: the first was the one above
        served.models.drain()
        assert (await b).json()["choices"][0]["finish_reason"] == "length"
        served.models.abort_all()
        assert (await a).json()["choices"][0]["finish_reason"] == "abort"
        assert served.models.num_in_flight == 0


# ---- what is told ----------------------------------------------------------------------------------


async def test_every_model_has_its_series_from_the_start() -> None:
    async with several("ab") as served:
        before = await served.samples()
        await served.text_of("b")
        await served.post(model="b", temperature=-1)
        await served.post(model="d")
        after = await served.samples()
    names = {key[0] for key in before if key[0].startswith("speed:")}
    by_model = {model: {key[0] for key in before if model in key[1:]} for model in ("a", "b")}
    # What an engine tells of itself comes with it; all else is there for the one that isn't loaded.
    told = {name for name in names if "cache_config" in name or re.search("flushes|_readouts", name)}
    assert names - told == by_model["b"]
    assert by_model["a"] == names
    assert after["speed:http_requests_total", "b", "/v1/completions", "200"] == 1
    # Of no model: the body broke a rule before its model counted, and there is no model d.
    assert after["speed:http_requests_total", "", "/v1/completions", "400"] == 1
    assert after["speed:http_requests_total", "", "/v1/completions", "404"] == 1
    assert {key[-1] for key in after if key[0] == "speed:http_requests_total"} >= {"499", "503"}


async def test_the_document_names_all_models() -> None:
    async with several("ab") as served:
        document = (await served.client.get("/openapi.json")).json()
        schema = document["components"]["schemas"]["CompletionRequest"]
        assert schema["properties"]["model"]["enum"] == ["a", "a-alias", "b", "b-alias"]
