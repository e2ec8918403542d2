"""Many models that tell which of them answered, and what soak tests share.

A soak test has a short form that always runs, and a long one with `SOAK=all`, as `make soak` runs it.
"""

import asyncio
import os
import random
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

from events.types import LoadFailed, LoadRequested, ModelLoaded, UnloadRequested
from runtime.memory import private_bytes
from server.config import Config
from server.observability.eventlog import ENDS
from support import models
from support.http import Answer, Json, when
from support.servers import Server, events, verified

TABLE_MB = 4
"""Of one model: enough to be told from what its process has besides, 6 MB."""
ENTRIES = TABLE_MB * 250_000
UNLIMITED = ("--limit-management=off", "--limit-inference=off")
SETTLE_S = 120.0
"""A lost model that was loaded with low priority comes back within a minute, however busy the machine is."""

_SOURCE = re.compile(r"(?P<model>[^/]+)/(?P<version>\d+);position=(?P<position>\d+)")


@dataclass(frozen=True, slots=True)
class Fleet:
    """Models `m00`, `m01`, … in versions 1 and 2 in a repository, each answering with a table of its own."""

    root: Path
    size: int
    versions: tuple[int, ...] = (1, 2)
    table_mb: int = TABLE_MB

    @property
    def ids(self) -> list[str]:
        """The models."""
        return [f"m{number:02}" for number in range(self.size)]

    def __post_init__(self) -> None:
        """Write the models."""
        for model_id in self.ids:
            for version in self.versions:
                table = models.table(self.table_mb, _key(model_id, version))
                models.save(table, self.root, model_id, version)


@dataclass(frozen=True, slots=True)
class Source:
    """Which load answered, as `Loadledger-Model` says."""

    model_id: str
    version: int
    position: int


def question(dice: random.Random) -> Json:
    """Return an input for any model of a fleet."""
    indices = [dice.randrange(ENTRIES) for _ in range(3)]
    return {"name": "x", "shape": [3], "datatype": "INT64", "data": indices}


def check_inference(model_id: str, asked: Json, answer: Answer) -> Source:
    """Check that an answer is what the version that it names has in its table; returns what it names."""
    named = _SOURCE.fullmatch(answer.headers["Loadledger-Model"])
    assert named is not None, answer.headers
    source = Source(named["model"], int(named["version"]), int(named["position"]))
    key = _key(model_id, source.version)
    assert source.model_id == answer.json["model_name"] == model_id, answer.body
    assert answer.json["model_version"] == named["version"], (named, answer.body)
    right = [models.entry(key, index) for index in asked["data"]]
    assert answer.json["outputs"][0]["data"] == right, (named, asked, answer.body)
    return source


async def check_ledger(
    config: Config, sources: Iterable[Source], failures: Collection[str] | None = ()
) -> tuple[dict[str, str], Counter[str]]:
    """Check a stopped server's ledger.

    It verifies, every job has ended once, and each load that an answer named is there at that position.

    Args:
        config: of the server.
        sources: named by answers.
        failures: codes that loads may have failed with; None means any.

    Returns:
        The type of each job's end by job, and the counts of types and codes.
    """
    verified(config)
    loaded, asked, ends, codes = set[Source](), set[str](), dict[str, str](), Counter[str]()
    for event in await events(config):
        if isinstance(event.data, ModelLoaded):
            loaded.add(Source(event.model_id or "", event.version or 0, event.position))
        if isinstance(event.data, LoadFailed):
            assert failures is None or event.data.code in failures
            codes[f"failed {event.data.code}"] += 1
        if isinstance(event.data, LoadRequested | UnloadRequested):
            asked.add(event.id)
        elif isinstance(event.data, ENDS):
            assert event.job_id in asked - ends.keys(), event
            ends[event.job_id] = event.type
    assert asked == ends.keys(), asked - ends.keys()
    assert set(sources) <= loaded
    return ends, Counter(ends.values()) | codes


def as_text(counts: Counter[str]) -> str:
    """Return counts in one line."""
    return ", ".join(f"{name}: {count}" for name, count in sorted(counts.items()))


@dataclass(slots=True)
class Memory:
    """What the workers took together: the most that was seen, and how often it was looked at."""

    most_bytes: int = 0
    samples: int = 0
    workers: int = 0

    def sample(self, server: Server) -> None:
        """Look once. Workers that come or go meanwhile make a sum that never was: it is looked at anew."""
        for _ in range(3):
            pids = server.children()[1:]
            sum_ = sum(own_bytes(pid) for pid in pids)
            if server.children()[1:] == pids:
                self.most_bytes = max(self.most_bytes, sum_)
                self.samples += 1
                self.workers = max(self.workers, len(pids))
                return


async def settled(server: Server) -> dict[str, Json]:
    """Wait until no job is under way, and no model on its way; return the jobs by id."""

    async def unsettled() -> list[tuple[str, str]]:
        jobs = [
            (job["id"], f"{job['status']} {job['stage']}, waits for {job['waiting_for']}")
            for status in ("pending", "in_progress")
            for job in await server.api.jobs(f"?status={status}&limit=1000")
        ]
        listed = (await server.api.get("/api/v1/models?limit=1000")).json["models"]
        moving = {"loading", "unloading", "lost"}
        return jobs + [(model["id"], model["state"]) for model in listed if model["state"] in moving]

    found = await unsettled()
    try:
        async with asyncio.timeout(SETTLE_S):
            while found:
                await asyncio.sleep(0.05)
                found = await unsettled()
    except TimeoutError:
        raise AssertionError(f"not settled within {SETTLE_S:g} s: {found}") from None
    return {job["id"]: job for job in await server.api.jobs("?limit=1000")}


async def agreed(server: Server) -> dict[str, Json]:
    """Wait until the models, their use of memory and the processes agree; returns the models loaded, by id.

    Ends are recorded when processes are gone, but that of a load that failed or was cancelled can be recorded
    a moment before: so this is waited for, as what is so in the end.
    """

    async def look() -> tuple[dict[str, Json], set[tuple[str, str]], set[tuple[str, str]], bool]:
        listed = (await server.api.get("/api/v1/models?limit=1000")).json["models"]
        loaded = {model["id"]: model for model in listed if model["state"] == "loaded"}
        resources = (await server.api.get("/api/v1/resources")).json
        recorded = {(model["id"], model["job_id"]) for model in loaded.values()}
        live = {(use["model_id"], use["job_id"]) for use in resources["models"]}
        others = len(server.children()) - 1 - sum(model["instances"] for model in loaded.values())
        return loaded, recorded, live, others == 0

    loaded, *_ = await when(look, lambda seen: seen[1] == seen[2] and seen[3])
    return loaded


async def repeated(action: Callable[[], Awaitable[object]], goes_on: Callable[[], bool]) -> None:
    """Do something again and again, for as long as this holds."""
    while goes_on():
        await action()


def _key(model_id: str, version: int) -> int:
    return 10 * int(model_id[1:]) + version


def own_bytes(pid: int) -> int:
    """Return the private bytes of a process; 0 if it is gone."""
    try:
        return private_bytes(pid)
    except ProcessLookupError:
        return 0


T = TypeVar("T")

SOAK = os.environ.get("SOAK") == "all"
"""Whether the long forms run."""
soak_only = pytest.mark.skipif(not SOAK, reason="takes long, and `make soak` runs it")
"""For a test that has no short form."""


def of_both(*, short: T, long: T) -> T:
    """Return what the form that runs has."""
    return long if SOAK else short


def new_dice() -> random.Random:
    """Return the source of a test's random decisions, and print the seed that repeats them.

    The short form always has the same, the long one a new one each time; `SOAK_SEED` goes before both.
    """
    seed = int(os.environ.get("SOAK_SEED") or of_both(short=20261120, long=random.randrange(2**32)))
    tell(f"SOAK_SEED={seed} repeats the random decisions of this test")
    return random.Random(seed)


def tell(text: str) -> None:
    """Print what happened: `make soak` shows it, otherwise it stands beside a failure."""
    print(text)  # noqa: T201 - see above
