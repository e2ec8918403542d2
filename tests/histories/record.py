"""Record a history: a real runtime with real workers runs a scenario, and what it wrote is kept.

    PYTHONPATH=.:tests python tests/histories/record.py NAME

writes the events to NAME.jsonl and the states that a fold makes of them to NAME.json. Record new scenarios
only: recorded ones stay as they are, since ledgers like them exist. `--refold` instead of a name makes all
states anew from the events; use it only together with a new `events.sqlite.storage.FOLDS`.
"""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from support import models
from support.running import Clock, job_of, running

from events.codec import decode_event, encode_event
from events.commands import FileIdentity, Record, RequestCancel, RequestLoad, RequestUnload
from events.errors import RequestRefused
from events.models import ModelState
from events.sqlite.listing import open_reader
from events.sqlite.queries import as_text
from events.sqlite.storage import FOLDS
from events.state import State
from events.types import AccessDenied, Draft, Idempotency, LoadParameters
from runtime.scheduler.view import Policy

HERE = Path(__file__).parent
BACK_OFF_S = 60
"""Longer than any back-off before a recovery, shorter than the time for which incidents count."""
SLOW = models.slow_model(side=800, depth=2_000).SerializeToString()
"""A model that takes half a minute to load."""

Scenario = Callable[[Path], Awaitable[None]]


def changes(bodies: Iterable[str]) -> list[dict[str, Any]]:
    """Return the stored forms of the models and jobs that each event changed."""
    state, found = State(), []
    for body in bodies:
        changed = state.apply(decode_event(body))
        found.append(
            {
                "models": {key: json.loads(as_text(model)) for key, model in changed.models.items()},
                "jobs": {key: json.loads(as_text(job)) for key, job in changed.jobs.items()},
            }
        )
    return found


def write_states(name: str) -> None:
    """Fold a recorded history, and write the states to its file."""
    bodies = (HERE / f"{name}.jsonl").read_text().splitlines()
    told = {"folds": FOLDS, "changes": changes(bodies)}
    (HERE / f"{name}.json").write_text(json.dumps(told, indent=1) + "\n")


async def loads_and_swaps(folder: Path) -> None:
    """Loads, repeated loads, swaps beside and in place, failed loads, unloads, and a denied request."""
    async with running(folder, stops_cleanly=True) as engine:
        await engine.load("adder", 1)
        await engine.load("adder", 1)
        await engine.load("other", parameters=LoadParameters(pinned=True, keep_alive_s=600))
        await engine.load("adder", 2)
        await engine.ended(await engine.ask_unload("adder"))
        await engine.load("adder", 1, LoadParameters(strategy="in_place"))
        await engine.load("adder", 2, LoadParameters(strategy="in_place"))
        await engine.load("broken")
        await engine.load("adder", 3)
        await engine.load("adder", 4, LoadParameters(strategy="in_place"))
        await engine.becomes("adder", ModelState.LOADED)
        denied = Draft("denied-1", AccessDenied("POST /api/v1/models/{id}/load", 3), "mallory", None, "other")
        await engine.log.submit(Record((denied,)))
        await engine.ended(await engine.ask_unload(None))
        await engine.unload("other")


async def deaths(folder: Path) -> None:
    """Workers die: one of one, one of two, repeatedly until recovery gives up; a later load tries again."""
    async with running(folder, clock=Clock(), stops_cleanly=True) as engine:
        await engine.load("adder", 1)
        await engine.load("other", parameters=LoadParameters(instances=2))
        os.kill(engine.workers("other")[0].pid, signal.SIGKILL)
        await engine.recorded(lambda: engine.model("other").degraded)
        engine.pass_time(BACK_OFF_S)
        await engine.recorded(lambda: not engine.model("other").degraded)
        ends = (ModelState.LOADED, ModelState.FAILED)
        for _ in range(5):
            await engine.die("adder")
            engine.pass_time(BACK_OFF_S)
            await engine.recorded(lambda: engine.model("adder").state in ends)
            if engine.model("adder").state is ModelState.FAILED:
                break
        await engine.becomes("adder", ModelState.FAILED)
        await engine.load("adder", 2)
        await engine.die("adder")
        await engine.unload("adder")


async def restarts(folder: Path) -> None:
    """The server ends during loads, a swap and with a queue, cleanly or not; models are reloaded."""
    async with running(folder, loads_at_once=1) as engine:
        await engine.load("adder", 1)
        await engine.load("other")
        await engine.ask_load("slow", parameters=LoadParameters(timeout_s=3_600))
        await engine.loading("slow")
        await engine.ask_load("adder", 2)
    async with running(folder, stops_cleanly=True) as engine:
        await engine.loading("slow")
        await engine.becomes("adder", ModelState.LOADED)
        await engine.unload("other")
    async with running(folder) as engine:
        await engine.loading("slow")
        await engine.unload("slow", force=True)
        await engine.recorded(lambda: not engine.log.state.jobs)
    async with running(folder, policy=Policy(2, restores=False)) as engine:
        await engine.recorded(lambda: not engine.log.state.jobs)
        await engine.ask_load("slow")
        await engine.loading("slow")
    for _ in range(2):
        async with running(folder) as engine:
            await engine.loading("slow")
    async with running(folder) as engine:
        await engine.recorded(lambda: not engine.log.state.jobs)


async def cancels_and_force(folder: Path) -> None:
    """Cancels in time and too late, forced unloads of loading models, and jobs that time out."""
    async with running(folder, loads_at_once=1, clock=Clock(), drain_timeout_s=1) as engine:
        slow = await engine.ask_load("slow")
        waits = await engine.ask_load("other", parameters=LoadParameters(timeout_s=5))
        await engine.loading("slow")
        await engine.log.submit(RequestCancel(waits, "bob"))
        await engine.ended(waits)
        late = await engine.ask_load("other", parameters=LoadParameters(timeout_s=5))
        engine.pass_time(6)
        await engine.ended(late)
        await engine.log.submit(RequestCancel(slow, "bob"))
        await engine.ended(slow)
        await expect_refusal(engine.log.submit(RequestCancel(slow, "bob")))
        again = await engine.ask_load("slow")
        await engine.loading("slow")
        await engine.unload("slow", force=True)
        await engine.ended(again)
        await engine.load("adder", 1)
        swap = await engine.ask_load("slow", 1)
        unload = await engine.ask_unload("adder")
        await engine.log.submit(RequestCancel(swap, "bob"))
        await engine.ended(swap)
        await engine.ended(unload)


async def evictions_and_memory(folder: Path) -> None:
    """With room for one model, others are evicted; then there is memory for none."""
    one = Policy(2, max_loaded=1, evicts=True, min_residency_s=0)
    async with running(folder, policy=one, stops_cleanly=True) as engine:
        await engine.load("adder", 1)
        await engine.load("other")
        await engine.load("adder", 2, LoadParameters(pinned=True))
        waits = await engine.ask_load("other")
        await engine.unload("adder")
        await engine.ended(waits)
    async with running(folder, policy=Policy(2, budget_bytes=2**20)) as engine:
        await engine.load("adder", 1)
        await engine.recorded(lambda: not engine.log.state.jobs)


async def keys(folder: Path) -> None:
    """Requests with idempotency keys: repeated, reused for another request, and expired after a day."""
    async with running(folder, clock=Clock(), stops_cleanly=True) as engine:
        found = engine.repository.resolve("adder", 1)
        files = tuple(FileIdentity(file.path, file.bytes, file.mtime_ns) for file in found.files)
        key = Idempotency("11" * 32, "22" * 32)
        load = RequestLoad("adder", 1, files, "alice", LoadParameters(), idempotency=key)
        job = job_of(await engine.log.submit(load))
        await engine.ended(job)
        assert job_of(await engine.log.submit(load)) == job
        await expect_refusal(
            engine.log.submit(RequestUnload("adder", "alice", idempotency=Idempotency("11" * 32, "33" * 32)))
        )
        unload = RequestUnload("adder", "alice", idempotency=Idempotency("44" * 32, "55" * 32))
        await engine.ended(job_of(await engine.log.submit(unload)))
        engine.pass_time(25 * 3_600)
        await engine.ended(job_of(await engine.log.submit(load)))
        slow = await engine.ask_load("slow")
        cancel = RequestCancel(slow, "alice", Idempotency("66" * 32, "77" * 32))
        await engine.log.submit(cancel)
        await engine.ended(slow)
        await engine.log.submit(cancel)


async def expect_refusal(asked: Awaitable[object]) -> None:
    """Await a request that has to be refused."""
    try:
        await asked
    except RequestRefused:
        return
    raise AssertionError("the request was accepted")


SCENARIOS: dict[str, Scenario] = {
    "cancels-and-force": cancels_and_force,
    "deaths": deaths,
    "evictions-and-memory": evictions_and_memory,
    "keys": keys,
    "loads-and-swaps": loads_and_swaps,
    "restarts": restarts,
}


async def record(name: str) -> None:
    """Run a scenario, and write its events to its file."""
    with TemporaryDirectory() as place:
        folder = Path(place)
        root = folder / "models"
        for version in (1, 2):
            models.save(models.add(version), root, "adder", version)
        models.save(models.crash_on_load(), root, "adder", 3)
        models.save_bytes(b"no model", root, "adder", 4)
        models.save(models.add(100), root, "other")
        models.save_bytes(b"no model either", root, "broken")
        models.save_bytes(SLOW, root, "slow")
        await SCENARIOS[name](folder)
        async with open_reader(folder / "ledger.db") as reader:
            events = await reader.events(0, 10_000)
    (HERE / f"{name}.jsonl").write_text(
        "".join(f"{without_paths(encode_event(event))}\n" for event in events)
    )


def without_paths(body: str) -> str:
    """Replace the paths of this machine in a body; a worker's stderr names them."""
    return body.replace(str(HERE.parents[1]), "/srv/loadledger").replace(sys.prefix, "/srv/environment")


if __name__ == "__main__":
    for asked in sys.argv[1:]:
        if asked != "--refold":
            asyncio.run(record(asked))
        for each in SCENARIOS if asked == "--refold" else [asked]:
            write_states(each)
