"""Event streams whose connections are cut at random; `make soak` cuts 1,000 times."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from support import models
from support.fleet import new_dice, of_both, tell
from support.http import LocalApi
from support.streams import following

CUTS = of_both(short=25, long=1000)


@asynccontextmanager
async def appending(api: LocalApi) -> AsyncIterator[None]:
    """Append events all the time: a loaded model is pinned and unpinned."""

    async def pin_and_unpin() -> None:
        pinned = False
        while True:
            pinned = not pinned
            await api.load("m", pinned=pinned)

    await api.load("m")
    task = asyncio.create_task(pin_and_unpin())
    try:
        yield
        assert not task.done(), task.result()
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_reconnecting_client_sees_every_event_once(start: Callable[..., Awaitable[LocalApi]]) -> None:
    # The server notices a cut at its next write.
    api = await start(streams_per_subject=1000, limit_reads="off", limit_management="off")
    api.save(models.add(1), "m")
    dice = new_dice()
    seen, last, messages = list[int](), 0, 0
    async with appending(api):
        for _ in range(CUTS):
            async with following(api, "?after=0", headers={"Last-Event-ID": str(last)}) as client:
                for _ in range(cut(dice)):
                    message = await client.message()
                    messages += 1
                    if message.id is not None and message.data:
                        seen.append(message.json["position"])
                    last = client.last_id or 0
                client.response.close()  # amid whatever is on its way
        async with following(api, headers={"Last-Event-ID": str(last)}) as client:
            head = (await client.until("live"))[-1].json["position"]
            assert head >= last
    recorded = [event.position for event in await api.events()]
    tell(f"{CUTS} cuts, {messages} messages, {len(seen)} events of {len(recorded)}")
    assert seen == recorded[: len(seen)]
    assert len(seen) > CUTS


def cut(dice: random.Random) -> int:
    """Return after how many messages the connection is cut: mostly few, sometimes none."""
    return int(dice.expovariate(1 / 8))
