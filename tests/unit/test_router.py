"""The router of a cluster as Ray calls it, without a cluster."""

import asyncio
import warnings
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from server.replicas.messages import Routing

if TYPE_CHECKING:
    from ray.serve.request_router import PendingRequest

    from server.replicas.router import PrefixRouter

pytest.importorskip("ray", reason="the cluster needs Ray: pip install '.[cluster]'")

REPLICAS: list[Any] = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in "abc"]
PROMPT = Routing(pages=[b"1", b"12", b"123"], pages_kept=100)


@pytest.fixture
def router() -> "PrefixRouter":
    """A router that nothing of Ray stands behind."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own, of pydantic
        from server.replicas.router import PrefixRouter  # noqa: PLC0415
    router = PrefixRouter.__new__(PrefixRouter)
    router.initialize_state()
    return router


def call(name: str, routing: Routing = PROMPT) -> "PendingRequest":
    from ray.serve._private.common import RequestMetadata  # noqa: PLC0415
    from ray.serve.request_router import PendingRequest  # noqa: PLC0415

    metadata = RequestMetadata(request_id=name, internal_request_id=name)
    return PendingRequest(args=[], kwargs={"routing": routing}, metadata=metadata)


async def chosen(router: "PrefixRouter", pending: "PendingRequest") -> Any:  # noqa: ANN401 - a stand-in
    """The replica that Ray is to try first."""
    first, *_ = await router.choose_replicas(REPLICAS, pending)
    return first[0]


async def test_prompts_that_come_together_go_to_one_replica(router: "PrefixRouter") -> None:
    """Although it has more to do by then, and nothing was sent anywhere yet."""
    first = (await chosen(router, call("1"))).replica_id.unique_id
    await chosen(router, call("2", Routing(only=first)))
    assert (await chosen(router, call("3"))).replica_id.unique_id == first


async def test_a_report_leaves_what_is_known_of_its_replica(router: "PrefixRouter") -> None:
    asked = call("1")
    first = await chosen(router, asked)
    router.on_request_routed(asked, first.replica_id, None)
    router.on_request_completed(first.replica_id, "1")
    for other in REPLICAS:
        name = f"report of {other.replica_id.unique_id}"
        report = call(name, Routing(only=other.replica_id.unique_id))
        assert await chosen(router, report) is other
        router.on_request_routed(report, other.replica_id, None)
        router.on_request_completed(other.replica_id, name)
    assert router._places.num_held(first.replica_id.unique_id, PROMPT.pages) == len(PROMPT.pages)


@pytest.mark.parametrize("is_left", [True, False])
async def test_a_call_that_is_left_before_it_is_sent_counts_no_longer(
    router: "PrefixRouter", *, is_left: bool
) -> None:
    pending = call("1")
    replica = await chosen(router, pending)
    if is_left:
        pending.future.cancel()
    else:
        pending.future.set_result(replica)
    await asyncio.sleep(0)
    assert router._places.load(replica.replica_id.unique_id) == (0 if is_left else 1)
