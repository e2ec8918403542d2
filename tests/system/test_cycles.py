"""Loads, unloads and failed loads leave nothing behind. `make soak` repeats them 1,000 times."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp
from support import models
from support.fleet import SOAK, of_both, tell
from support.http import LIMIT_S, Api, Json, when
from support.servers import Server, limited, serving, verified
from support.workers import descriptors, threads

from runtime.memory import tree_bytes
from server.config import Config

CYCLES = of_both(short=5, long=1000)
WARM_UP = of_both(short=3, long=100)
"""Cycles before the first measurement, in which pools of connections, threads and buffers fill."""
MEMORY_GOAL = 1.02
"""Memory of the process tree after the cycles, as a share of that before."""
FAILING = ("invalid", "crash")
MAX_LATE_THREADS = 3
"""Threads that may still be added to a bounded pool, when two looks at files happen to meet."""
FLOATS: Json = {"name": "x", "shape": [1, 790], "datatype": "FP32", "data": [0.5] * 790}


@dataclass(frozen=True)
class Resources:
    """Descriptors, mappings, threads, processes and files of a server."""

    descriptors: Counter[str]
    mapped_files: frozenset[str]
    threads: int
    fork_server_descriptors: Counter[str]
    fork_server_threads: int
    processes: int
    files: frozenset[Path]


def resources(server: Server, config: Config) -> Resources:
    fork_server = server.children()[0]
    return Resources(
        Counter(descriptors(server.pid)),
        mapped_files(server.pid),
        threads(server.pid),
        Counter(descriptors(fork_server)),
        threads(fork_server),
        len(server.children()),
        frozenset([*temporary_folder(config).rglob("*"), *config.data.rglob("*")]),
    )


def mapped_files(pid: int) -> frozenset[str]:
    """Return the files that a process has mapped; SQLite maps more or less of its own."""
    lines = (Path("/proc") / str(pid) / "maps").read_text().splitlines()
    return frozenset(line[73:] for line in lines if line[73:].startswith("/"))


def temporary_folder(config: Config) -> Path:
    """Return a folder of this server alone: other tests use /tmp."""
    return config.data.with_name("temporary")


async def fill_pools(server: Server) -> None:
    """Have the server start all its threads, by many requests at once."""
    async with aiohttp.ClientSession() as session:
        api = Api(session, server.url, server.api.config)
        paths = ("", *(f"/{model_id}" for model_id in (*FAILING, "m")))
        await asyncio.gather(*(api.get(f"/api/v1/models{path}") for path in paths for _ in range(32)))


async def measure_when_stable(
    cycle: Callable[[], Awaitable[None]], look: Callable[[], Resources]
) -> Resources:
    """Repeat the cycle until it changes nothing, and return what was measured then."""
    before = await look_when_idle(look)
    async with asyncio.timeout(LIMIT_S):
        while True:
            await cycle()
            if (now := await look_when_idle(look)) == before:
                return now
            before = now


async def look_when_idle(look: Callable[[], Resources]) -> Resources:
    """Return what stays the same for a while: a thread or socket of the last load may be about to end."""
    seen, times = look(), 0
    while times < 25:
        await asyncio.sleep(0.01)
        now = look()
        seen, times = now, times + 1 if now == seen else 0
    return seen


async def test_loads_and_unloads_leave_nothing_behind(config: Config) -> None:
    models.save(models.weights(20), config.repository, "m")
    models.save_bytes(models.TEXT, config.repository, "invalid")
    models.save(models.crash_on_load(), config.repository, "crash")
    temporary_folder(config).mkdir()
    environment = {"TMPDIR": str(temporary_folder(config))}
    async with serving(
        config, "--threads=1", "--limit-management=off", command=limited(), environment=environment
    ) as server:

        async def cycle() -> None:
            for model_id in FAILING:
                await server.api.failed_load(model_id)
            await server.api.load("m")
            assert (await server.api.infer("m", FLOATS)).status == 200
            await server.api.unload("m")

        await fill_pools(server)
        for _ in range(WARM_UP + 1):
            await cycle()
        before = await measure_when_stable(cycle, lambda: resources(server, config))
        before_bytes = tree_bytes(server.pid)
        for _ in range(CYCLES):
            await cycle()

        async def look() -> Resources:
            return resources(server, config)

        def is_as_before(after: Resources) -> bool:
            is_bounded = after.threads <= before.threads + MAX_LATE_THREADS
            return is_bounded and replace(after, threads=before.threads) == before

        tell(f"before: {before}")
        await when(look, is_as_before)
        ratio = tree_bytes(server.pid) / before_bytes
        tell(
            f"memory of the tree after {CYCLES} cycles / before: {ratio:.3f}, of {before_bytes / 1e6:.1f} MB"
        )
        assert not SOAK or ratio <= MEMORY_GOAL
        assert await server.stop() == 0
    verified(config)
