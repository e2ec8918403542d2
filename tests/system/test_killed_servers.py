"""kill -9 of the server at random moments; `make soak` does so 200 times.

It leaves no process, whatever its workers do. Each start checks what the one before accepted: every job ends,
and an idempotency key finds its job again.
"""

import asyncio
import os
import random
import signal
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from uuid import uuid4

import aiohttp
from support import leaks
from support.fleet import (
    UNLIMITED,
    Fleet,
    Source,
    agreed,
    as_text,
    check_inference,
    check_ledger,
    new_dice,
    of_both,
    question,
    repeated,
    settled,
    tell,
)
from support.servers import Server, events, serving, verified
from support.traffic import KeyedRequest, Traffic
from support.workers import until

from events.types import CancelRequested, Event, LoadRequested, UnloadRequested
from server.config import Config

LIVES = of_both(short=2, long=200)
LIFE_S = 1.2
RECOVERY_S = 0.3
CLIENTS = 4
SETTINGS = (
    *("--memory-budget=50000000", "--evict=idle", "--min-residency-s=0", "--drain-timeout-s=5"),
    *UNLIMITED,
)
"""Room for three or four of eight."""
FAILURES = {"insufficient_memory", "crash_loop", "timeout"}
"""Codes that loads of good models may fail with while the server is killed again and again."""


@dataclass
class Lives:
    """What clients were answered, over all lives of the server."""

    fleet: Fleet
    dice: random.Random
    accepted: set[str] = field(default_factory=set)
    unchecked: set[str] = field(default_factory=set)
    sent: list[KeyedRequest] = field(default_factory=list)
    sources: set[Source] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, traffic: Traffic) -> None:
        """Add what the clients of one life were answered."""
        self.accepted |= traffic.accepted.keys()
        self.unchecked |= traffic.accepted.keys()
        self.sent += traffic.sent
        self.sources |= traffic.sources

    async def check(self, server: Server, config: Config) -> None:
        """Check that jobs and keys of the lives before are kept."""
        for job_id in self.unchecked:
            job = await server.api.ended(job_id)
            self.counts[f"{job['kind']} {job['status']}"] += 1
        self.unchecked.clear()
        first = _by_key(await events(config))
        for request in self.sent:
            job_id_of_key = first.get(request.key_hash)
            if job_id_of_key is not None:  # else it was refused, changed nothing, or never arrived
                again = await server.api.post(request.path, json=request.body, headers=request.headers)
                assert again.status in (200, 202), again
                assert again.json["id"] == job_id_of_key
                self.counts["keys"] += 1
        self.sent.clear()


def _by_key(log: list[Event]) -> dict[str, str]:
    """Return the job of each key; no two events have the same key."""
    found: dict[str, str] = {}
    for event in log:
        data = event.data
        if isinstance(data, LoadRequested | UnloadRequested | CancelRequested) and data.idempotency:
            assert data.idempotency.key_hash not in found
            assert event.job_id is not None
            found[data.idempotency.key_hash] = event.job_id
    return found


async def ask_until_gone(traffic: Traffic, dice: random.Random) -> None:
    """Send random requests until the server is gone."""
    with suppress(aiohttp.ClientError):
        await repeated(lambda: traffic.act(dice), lambda: True)


async def live(lives: Lives, config: Config) -> None:
    """Start a server, check what the last one left, send requests, and kill it."""
    dice = lives.dice
    run = uuid4().hex
    async with serving(config, *SETTINGS, environment={leaks.MARK: run}) as server:
        clients, traffic = list[asyncio.Task[None]](), Traffic(server, lives.fleet)
        if dice.random() < 0.75:  # else it is killed while it recovers
            await lives.check(server, config)
            own = [random.Random(dice.random()) for _ in range(CLIENTS)]
            clients = [asyncio.create_task(ask_until_gone(traffic, each)) for each in own]
        await asyncio.sleep(dice.uniform(0, LIFE_S if clients else RECOVERY_S))  # a random moment
        if len(server.children()) > 1 and dice.random() < 0.5:
            os.kill(server.children()[-1], signal.SIGSTOP)
        server.send(signal.SIGKILL)
        await server.ended()
        await until(lambda: not list(leaks.find_processes(run)))
        await asyncio.gather(*clients)
    lives.add(traffic)
    lives.counts["killed"] += 1
    verified(config)


async def test_server_killed_at_random_keeps_jobs_and_keys(config: Config) -> None:
    lives = Lives(Fleet(config.repository, 8), new_dice())
    for _ in range(LIVES):
        await live(lives, config)
    async with serving(config, *SETTINGS) as server:
        await lives.check(server, config)
        await settled(server)
        for model_id, model in (await agreed(server)).items():
            asked = question(lives.dice)
            answer = await server.api.infer(model_id, asked)
            assert check_inference(model_id, asked, answer).version == model["version"]
        assert await server.stop() == 0
        output = server.output.read_text()
    ends, counts = await check_ledger(config, lives.sources, FAILURES)
    assert lives.accepted <= ends.keys()
    tell(f"{len(lives.accepted)} accepted of {len(ends)} jobs; {as_text(counts | lives.counts)}")
    assert "Traceback" not in output
