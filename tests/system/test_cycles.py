"""Load and unload again and again: nothing is left over of it. `make soak` does so 1,000 times."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from support import models
from support.http import LIMIT_S, Api, Json, when
from support.process import Server, serving, verified
from support.soak import SOAK, of_both, tell
from support.workers import descriptors, threads

from bench.memory import tree_bytes
from server.config import Config

CYCLES = of_both(short=10, long=1000)
WARM_UP = of_both(short=5, long=100)
"""Before anything is counted: pools of connections, threads and buffers fill."""
MEMORY_GOAL = 1.02
"""DESIGN.md, "Numbers to reach"."""
FLOATS: Json = {"name": "x", "shape": [1, 790], "datatype": "FP32", "data": [0.5] * 790}


@dataclass(frozen=True)
class Left:
    """What a server has of what could be left over."""

    descriptors: Counter[str]
    threads: int
    fork_server_descriptors: Counter[str]
    fork_server_threads: int
    processes: int
    files: frozenset[Path]


def left(server: Server, config: Config) -> Left:
    fork_server = server.children()[0]
    return Left(
        Counter(descriptors(server.pid)),
        threads(server.pid),
        Counter(descriptors(fork_server)),
        threads(fork_server),
        len(server.children()),
        frozenset([*temporary_folder(config).rglob("*"), *config.data.rglob("*")]),
    )


def temporary_folder(config: Config) -> Path:
    """The server's own: others are busy in the usual one."""
    return config.data.with_name("temporary")


async def fill_pools(server: Server) -> None:
    """Have the server start all the threads that it ever will, by asking much at once; connections close."""
    async with aiohttp.ClientSession() as session:
        api = Api(session, server.url, server.api.config)
        await asyncio.gather(*(api.get("/api/v1/models") for _ in range(64)))


async def the_same_twice(cycle: Callable[[], Awaitable[None]], look: Callable[[], Left]) -> Left:
    """Go on until a cycle changes nothing: what is on its way out for a moment more is no measure."""
    before = look()
    async with asyncio.timeout(LIMIT_S):
        while True:
            await cycle()
            if (now := look()) == before:
                return now
            before = now


async def test_nothing_is_left_over_of_loads_and_unloads(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    models.save(models.weights(20), repository, "m")
    config = Config(repository=repository, data=tmp_path / "data")
    temporary_folder(config).mkdir()
    environment = {"TMPDIR": str(temporary_folder(config))}
    async with serving(
        config, "--limit-management=off", "--limit-reads=off", environment=environment
    ) as server:

        async def cycle() -> None:
            await server.api.load("m")
            assert (await server.api.infer("m", FLOATS)).status == 200
            await server.api.unload("m")

        await fill_pools(server)
        for _ in range(WARM_UP + 1):
            await cycle()
        before = await the_same_twice(cycle, lambda: left(server, config))
        before_bytes = tree_bytes(server.pid)
        for _ in range(CYCLES):
            await cycle()

        async def look() -> Left:
            return left(server, config)

        tell(f"before: {before}")
        await when(look, lambda after: after == before)
        ratio = tree_bytes(server.pid) / before_bytes
        tell(
            f"memory of the tree after {CYCLES} cycles / before: {ratio:.3f}, of {before_bytes / 1e6:.1f} MB"
        )
        assert not SOAK or ratio <= MEMORY_GOAL
        assert await server.stop() == 0
    verified(config)
