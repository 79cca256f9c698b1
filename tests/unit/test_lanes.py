"""Lanes of threads: what is given up is not started, and what runs keeps its place."""

import asyncio
import threading
from functools import partial

import pytest

from server.lanes import SHORT_TEXT, Lane, Lanes


async def test_work_that_was_given_up_is_never_started() -> None:
    lane, release = Lane("test", 1), threading.Event()
    started: list[int] = []
    busy = asyncio.create_task(lane.run(release.wait))
    waiting = [asyncio.create_task(lane.run(partial(started.append, i))) for i in range(5)]
    await asyncio.sleep(0.01)
    for task in waiting[:4]:
        task.cancel()
    await asyncio.gather(*waiting[:4], return_exceptions=True)
    release.set()
    await asyncio.gather(busy, waiting[4])
    assert started == [4]
    lane.close()


async def test_work_that_runs_keeps_its_place_after_its_client_left() -> None:
    """Else clients who come and go would have any number of threads at work."""
    lane, release, order = Lane("test", 1), threading.Event(), []

    def slow() -> None:
        release.wait()
        order.append("slow")

    left = asyncio.create_task(lane.run(slow))
    await asyncio.sleep(0.01)
    left.cancel()
    with pytest.raises(asyncio.CancelledError):
        await left
    behind = asyncio.create_task(lane.run(lambda: order.append("next")))
    await asyncio.sleep(0.01)
    assert order == []
    release.set()
    await behind
    assert order == ["slow", "next"]
    lane.close()


async def test_a_short_text_does_not_wait_for_long_ones() -> None:
    lanes, release = Lanes(), threading.Event()
    long = [asyncio.create_task(lanes.texts(SHORT_TEXT + 1).run(release.wait)) for _ in range(10)]
    assert await lanes.texts(SHORT_TEXT).run(lambda: 7) == 7
    release.set()
    await asyncio.gather(*long)
    lanes.close()
