"""Random loads, unloads, cancellations, inferences and reads, whatever happens to the server meanwhile."""

import asyncio
import hashlib
import json
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from uuid import uuid4

import aiohttp

from support.campaign import Attack
from support.fleet import Fleet, Source, check_inference, of_both, question, repeated
from support.http import Answer, Json
from support.servers import Server

CLIENTS = 3
SUBJECT = "alice"
"""Of the requests, by default."""
LOAD_TIMEOUT_S = 10
"""Of loads here: one whose worker is stopped ends within it."""
READS = ("/api/v1/events", "/api/v1/events/head", "/api/v1/jobs", "/api/v1/models?at=3", "/metrics")
PRIORITIES = of_both(short=("high", "normal"), long=("high", "normal", "low"))
"""A load with low priority waits up to a minute while the machine is under pressure."""
FAIR = {200, 202, 409, 503, 504}
"""What may be answered while workers, disks or descriptors are short."""


@dataclass(frozen=True, slots=True)
class KeyedRequest:
    """A request with an idempotency key, answered or not."""

    key: str
    path: str
    body: Json

    @property
    def headers(self) -> dict[str, str]:
        return {"Idempotency-Key": f'"{self.key}"'}

    @property
    def key_hash(self) -> str:
        """The key as the ledger has it."""
        return hashlib.sha256(json.dumps([SUBJECT, self.key], separators=(",", ":")).encode()).hexdigest()


@dataclass(slots=True)
class Traffic:
    """Clients of one server.

    Attributes:
        attack: what is done to the server meanwhile, if anything.
        hot: so many models get more requests than the others.
        accepted: jobs that were answered 202 or 200, in order.
        sent: the requests with a key.
        sources: the loads that answers named.
        counts: answers by kind and status.
        may_close: whether the server may close connections and go on.
    """

    server: Server
    fleet: Fleet
    attack: Attack | None = None
    hot: int | None = None
    accepted: dict[str, None] = field(default_factory=dict)
    sent: list[KeyedRequest] = field(default_factory=list)
    sources: set[Source] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)
    may_close: bool = False
    goes_on: bool = True

    async def run(self, dice: random.Random) -> None:
        """Send requests until the traffic ends, or the server."""
        while self.goes_on:
            try:
                await repeated(lambda: self.act(dice), lambda: self.goes_on)
            except aiohttp.ClientError:
                self.counts["closed"] += 1
                is_disturbed = self.attack is not None and self.attack.is_disturbing
                assert self.may_close or is_disturbed, "the server closed a connection"
                if not self.may_close:
                    return

    async def act(self, dice: random.Random) -> None:
        """Send one random request, and check the answer."""
        model_id = dice.choice(self.fleet.ids[: dice.choice((self.hot, None))])
        actions = (self._infer, self._load, self._unload, self._cancel, self._read)
        await dice.choices(actions, (60, 20, 9, 5, 6))[0](dice, model_id)

    async def _infer(self, dice: random.Random, model_id: str) -> None:
        asked, version = question(dice), dice.choice((None, None, *self.fleet.versions))
        answer = await self.server.api.infer(model_id, asked, version=version)
        self._check("infer", answer)
        if answer.status == 200:
            source = check_inference(model_id, asked, answer)
            assert version in (None, source.version)
            self.sources.add(source)

    async def _load(self, dice: random.Random, model_id: str) -> None:
        body = {
            "version": dice.choice(self.fleet.versions),
            "strategy": dice.choice(("beside", "in_place", "auto")),
            "priority": dice.choice(PRIORITIES),
            "timeout_s": LOAD_TIMEOUT_S,
        }
        path = f"/api/v1/models/{model_id}/load"
        await self._post(dice, "load", path, body)

    async def _unload(self, dice: random.Random, model_id: str) -> None:
        path = f"/api/v1/models/{model_id}/unload{dice.choice(('?force=true', ''))}"
        await self._post(dice, "unload", path, {})

    async def _cancel(self, dice: random.Random, _: str) -> None:
        if self.accepted:
            path = f"/api/v1/jobs/{dice.choice([*self.accepted][-10:])}/cancel"
            await self._post(dice, "cancel", path, {})

    async def _read(self, dice: random.Random, _: str) -> None:
        self._check("read", await self.server.api.get(dice.choice(READS)))

    async def _post(self, dice: random.Random, kind: str, path: str, body: Json) -> None:
        headers = dict[str, str]()
        if dice.random() < 0.6:
            self.sent.append(KeyedRequest(uuid4().hex, path, body))
            headers = self.sent[-1].headers
        answer = await self.server.api.post(path, json=body, headers=headers, wait=dice.choice((0, 0, 2)))
        self._check(kind, answer)
        if answer.status in (200, 202):
            self.accepted[answer.json["id"]] = None

    def _check(self, kind: str, answer: Answer) -> None:
        assert answer.status in FAIR, answer
        told = "" if answer.status in (200, 202) else f" {answer.refusal[1]}"
        if answer.status == 503:  # after `model_unloaded`, a person decides when to retry
            assert ("Retry-After" in answer.headers) is (told != " model_unloaded"), answer
        self.counts[f"{kind} {answer.status}{told}"] += 1


@asynccontextmanager
async def traffic(
    attack: Attack, fleet: Fleet, dice: random.Random, *, may_close: bool = False
) -> AsyncIterator[Traffic]:
    """Have clients send requests while the block runs."""
    ours = Traffic(attack.server, fleet, attack, may_close=may_close)
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
    attack.accepted |= ours.accepted.keys()
    attack.sources |= ours.sources
