"""Random loads, unloads, inferences and reads, which go on while its server is attacked."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp

from support.campaign import Attack
from support.fleet import Fleet, Source, check_inference, question, repeated
from support.http import Answer

CLIENTS = 3
LOAD_TIMEOUT_S = 10
"""Of loads here: one whose worker is stopped ends within it."""
READS = ("/api/v1/events", "/api/v1/events/head", "/api/v1/jobs", "/api/v1/models?at=3", "/metrics")
FAIR = {200, 202, 409, 503, 504}
"""What may be answered while workers, disks or descriptors are short."""


@dataclass(slots=True)
class Traffic:
    """Clients of one server.

    Attributes:
        fair: the statuses that are right.
        accepted: jobs that were answered 202 or 200.
        sources: the loads that answers named.
        counts: answers by kind and status.
        may_close: whether the server may close connections and go on.
    """

    attack: Attack
    fleet: Fleet
    fair: Collection[int] = frozenset(FAIR)
    accepted: set[str] = field(default_factory=set)
    sources: set[Source] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)
    may_close: bool = False
    goes_on: bool = True

    async def run(self, dice: random.Random) -> None:
        """Send requests until the traffic ends, or the server."""
        while self.goes_on:
            try:
                await repeated(lambda: self._act(dice), lambda: self.goes_on)
            except aiohttp.ClientError:
                self.counts["closed"] += 1
                assert self.may_close or self.attack.is_disturbing, "the server closed a connection"
                if not self.may_close:
                    return

    async def _act(self, dice: random.Random) -> None:
        model_id = dice.choice(self.fleet.ids)
        action = dice.choices((self._infer, self._load, self._unload, self._read), (60, 20, 10, 10))[0]
        await action(dice, model_id)

    async def _infer(self, dice: random.Random, model_id: str) -> None:
        asked = question(dice)
        answer = await self.attack.server.api.infer(model_id, asked)
        self._check("infer", answer)
        if answer.status == 200:
            self.sources.add(check_inference(model_id, asked, answer))

    async def _load(self, dice: random.Random, model_id: str) -> None:
        body = {"version": dice.choice(self.fleet.versions), "timeout_s": LOAD_TIMEOUT_S}
        path = f"/api/v1/models/{model_id}/load"
        answer = await self.attack.server.api.post(path, json=body, wait=dice.choice((0, 0, 2)))
        self._take_job("load", answer)

    async def _unload(self, dice: random.Random, model_id: str) -> None:
        path = f"/api/v1/models/{model_id}/unload{dice.choice(('?force=true', ''))}"
        self._take_job("unload", await self.attack.server.api.post(path, wait=dice.choice((0, 2))))

    async def _read(self, dice: random.Random, _: str) -> None:
        self._check("read", await self.attack.server.api.get(dice.choice(READS)))

    def _take_job(self, kind: str, answer: Answer) -> None:
        self._check(kind, answer)
        if answer.status in (200, 202):
            self.accepted.add(answer.json["id"])

    def _check(self, kind: str, answer: Answer) -> None:
        assert answer.status in self.fair, answer
        assert answer.status != 503 or "Retry-After" in answer.headers, answer
        self.counts[f"{kind} {answer.status}"] += 1


@asynccontextmanager
async def traffic(
    attack: Attack, fleet: Fleet, dice: random.Random, *, may_close: bool = False
) -> AsyncIterator[Traffic]:
    """Have clients send requests while the block runs."""
    ours = Traffic(attack, fleet, may_close=may_close)
    each = [random.Random(dice.random()) for _ in range(CLIENTS)]
    tasks = [asyncio.create_task(ours.run(own)) for own in each]
    try:
        yield ours
        ours.goes_on = False
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    attack.counts += ours.counts
    attack.accepted |= ours.accepted
    attack.sources |= ours.sources
