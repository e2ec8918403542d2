"""kill -9 of the server at random moments; `make soak` does so 200 times.

Each start checks what the one before accepted: every job ends, and an idempotency key finds its job again.
"""

import asyncio
import hashlib
import json
import random
from collections import Counter
from dataclasses import dataclass, field

import aiohttp
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
from support.http import Json
from support.servers import PREPARING, Server, events, serving, verified

from events.types import CancelRequested, Event, LoadRequested, UnloadRequested
from server.config import Config

LIVES = of_both(short=3, long=200)
LIFE_S = 1.2
RECOVERY_S = 0.3
CLIENTS = 4
SETTINGS = (
    *("--memory-budget=50000000", "--evict=idle", "--min-residency-s=0", "--drain-timeout-s=5"),
    *UNLIMITED,
)
"""Room for three or four of eight."""
SUBJECT = "alice"
FAILURES = {"insufficient_memory", "crash_loop", "timeout"}
"""Codes that loads of good models may fail with while the server is killed again and again."""


@dataclass(frozen=True)
class Request:
    """A request with an idempotency key, answered or not."""

    key: str
    path: str
    body: Json

    @property
    def key_hash(self) -> str:
        """The key as the ledger has it."""
        return hashlib.sha256(json.dumps([SUBJECT, self.key], separators=(",", ":")).encode()).hexdigest()


@dataclass
class Lives:
    """What clients were answered, over all lives of the server."""

    fleet: Fleet
    dice: random.Random
    accepted: list[str] = field(default_factory=list)
    unchecked: set[str] = field(default_factory=set)
    sent: list[Request] = field(default_factory=list)
    sources: set[Source] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)

    async def client(self, server: Server, dice: random.Random) -> None:
        """Send random requests until the server is gone."""
        try:
            await repeated(lambda: self._act(server, dice), lambda: True)
        except aiohttp.ClientError:
            return

    async def _act(self, server: Server, dice: random.Random) -> None:
        model_id = dice.choice(self.fleet.ids)
        if dice.random() < 0.3:
            await self._infer(server, dice, model_id)
            return
        path, body = self._operation(dice, model_id)
        headers = {}
        if dice.random() < 0.6:
            request = Request(f"key-{dice.getrandbits(64)}", path, body)
            self.sent.append(request)
            headers = {"Idempotency-Key": f'"{request.key}"'}
        answer = await server.api.post(path, json=body, headers=headers, wait=dice.choice((0, 0, 2)))
        assert answer.status in (200, 202, 409), answer
        if answer.status != 409:
            self.accepted.append(answer.json["id"])
            self.unchecked.add(answer.json["id"])

    def _operation(self, dice: random.Random, model_id: str) -> tuple[str, Json]:
        if self.accepted and dice.random() < 0.1:
            return f"/api/v1/jobs/{dice.choice(self.accepted[-8:])}/cancel", {}
        if dice.random() < 0.25:
            force = dice.choice(("?force=true", ""))
            return f"/api/v1/models/{model_id}/unload{force}", {}
        strategy = dice.choice(("beside", "in_place", "auto"))
        body = {"version": dice.choice(self.fleet.versions), "strategy": strategy, "timeout_s": 60}
        return f"/api/v1/models/{model_id}/load", body

    async def _infer(self, server: Server, dice: random.Random, model_id: str) -> None:
        asked = question(dice)
        answer = await server.api.infer(model_id, asked)
        if answer.status == 200:
            self.sources.add(check_inference(model_id, asked, answer))
        else:
            assert answer.status == 503, answer

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
                headers = {"Idempotency-Key": f'"{request.key}"'}
                again = await server.api.post(request.path, json=request.body, headers=headers)
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


async def live(lives: Lives, config: Config) -> None:
    """Start a server, check what the last one left, send requests, and kill it."""
    dice = lives.dice
    async with serving(config, *SETTINGS, environment=PREPARING) as server:
        clients: list[asyncio.Task[None]] = []
        if dice.random() < 0.75:  # else it is killed while it recovers
            await lives.check(server, config)
            own = [random.Random(dice.random()) for _ in range(CLIENTS)]
            clients = [asyncio.create_task(lives.client(server, each)) for each in own]
        await asyncio.sleep(dice.uniform(0, LIFE_S if clients else RECOVERY_S))  # a random moment
        await server.kill()
        await asyncio.gather(*clients)
    lives.counts["killed"] += 1
    verified(config)


async def test_server_killed_at_random_keeps_jobs_and_keys(config: Config) -> None:
    lives = Lives(Fleet(config.repository, 8), new_dice())
    for _ in range(LIVES):
        await live(lives, config)
    async with serving(config, *SETTINGS, environment=PREPARING) as server:
        await lives.check(server, config)
        await settled(server)
        for model_id, model in (await agreed(server)).items():
            asked = question(lives.dice)
            answer = await server.api.infer(model_id, asked)
            assert check_inference(model_id, asked, answer).version == model["version"]
        assert await server.stop() == 0
        output = server.output.read_text()
    ends, counts = await check_ledger(config, lives.sources, FAILURES)
    assert set(lives.accepted) <= ends.keys()
    tell(f"{len(lives.accepted)} accepted of {len(ends)} jobs; {as_text(counts | lives.counts)}")
    assert "Traceback" not in output
