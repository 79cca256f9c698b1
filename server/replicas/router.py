"""How Ray Serve chooses a replica for a call: by the `Routing` that the call brings.

Ray makes a router in every process that calls the deployment. It knows what was sent from there only, which
is all there is while one front serves.
"""

import asyncio

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from server.replicas.messages import Routing
from server.replicas.places import Places

DEFAULT_SLACK = 4


class PrefixRouter(RequestRouter):
    """Sends a prompt where its beginning was read, and other calls to the replica that they name."""

    def initialize_state(self, slack: int = DEFAULT_SLACK) -> None:
        """Called by Ray with `request_router_kwargs`: see `Places` for `slack`."""
        self._places = Places(slack)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Replicas to try, in groups: Ray takes one with a free place of the first group that has any."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # lest it ask again and again without a pause
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        self._places.keep(by_name)
        routing = _routing(pending_request)
        names = self._ranked(routing, list(by_name))
        if names:
            self._choose(pending_request, names[0], routing)
        return [[by_name[name]] for name in names]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: object
    ) -> None:
        """Called by Ray when a replica has a call."""
        del result
        routing = _routing(pending_request)
        request = pending_request.metadata.internal_request_id
        self._places.sent(request, replica_id.unique_id, routing.pages, routing.pages_kept)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Called by Ray when a call has ended, however it did."""
        del replica_id
        self._places.ended(internal_request_id)

    def _choose(self, call: PendingRequest, replica: str, routing: Routing) -> None:
        """Notes where a call is to go until Ray says where it went, or that its caller has left."""
        request = call.metadata.internal_request_id
        self._places.chosen(request, replica, routing.pages, routing.pages_kept)

        def left(future: "asyncio.Future[RunningReplica]") -> None:
            if future.cancelled():
                self._places.ended(request)

        call.future.add_done_callback(left)

    def _ranked(self, routing: Routing, names: list[str]) -> list[str]:
        """The best replica, then the less busy ones; none where the one that was named is gone."""
        if routing.only:
            return [routing.only] if routing.only in names else []
        wanted = [name for name in names if name not in routing.avoid] or names
        if not wanted:
            return []
        best = self._places.best(routing.pages, wanted)
        return [best, *sorted(set(wanted) - {best}, key=self._places.load)]


def _routing(call: PendingRequest) -> Routing:
    routing: object = call.kwargs.get("routing")
    assert isinstance(routing, Routing)
    return routing
