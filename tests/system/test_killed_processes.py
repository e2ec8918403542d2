"""kill -9 of the server leaves no process, whatever its processes do; `make soak` does so 500 times.

Models load beside a client's inferences, and serve; some of the workers are stopped.
"""

import asyncio
import os
import random
import signal
from contextlib import suppress
from uuid import uuid4

import aiohttp
from support import leaks, models
from support.fleet import UNLIMITED, new_dice, of_both, tell
from support.http import ONE, Api
from support.servers import serving
from support.workers import until

from server.config import Config

KILLS = of_both(short=3, long=500)
SOON_S, LATER_S = 0.3, 1.2
"""After the start of a load: half of the kills come so soon."""


async def infer_until_gone(api: Api) -> None:
    """Infer again and again until the server is gone."""
    with suppress(aiohttp.ClientError, ConnectionError):
        while True:
            await api.infer("small", ONE)


async def live(config: Config, dice: random.Random, *, is_soon: bool) -> int:
    """Start a server, kill it after a load has begun, and wait until it has no process; returns how many."""
    run = uuid4().hex
    environment = {leaks.MARK: run}
    async with serving(config, *UNLIMITED, environment=environment) as server:
        await server.api.load("small")
        client = asyncio.create_task(infer_until_gone(server.api))
        if dice.random() < 0.5:
            os.kill(server.worker(), signal.SIGSTOP)
        name = dice.choice(["a", "b"])
        await server.api.post(f"/api/v1/models/{name}/load", json={"version": dice.choice([1, 2])})
        await asyncio.sleep(dice.uniform(0, SOON_S if is_soon else LATER_S))  # a random moment
        found = len(list(leaks.find_processes(run)))
        server.send(signal.SIGKILL)
        await server.ended()
        await client
        await until(lambda: not list(leaks.find_processes(run)))
    return found


async def test_killed_server_leaves_no_process(config: Config) -> None:
    models.save(models.add(), config.repository, "small")
    for seed, name in enumerate(("a", "b")):
        for version in (1, 2):
            models.save(models.weights(20, seed=10 * seed + version), config.repository, name, version)
    dice = new_dice()
    killed = [await live(config, dice, is_soon=number % 2 == 0) for number in range(KILLS)]
    tell(f"{sum(killed)} processes of {KILLS} killed servers: none is left")
