"""Makes the recorded histories: real runtimes with real workers live through a story each.

What they wrote and what a fold made of each event is kept, as NAME.jsonl and NAME.json. To record a story:
`PYTHONPATH=.:tests python tests/histories/record.py NAME`. That is for new ones: those that are there stay as
they are, since ledgers like them exist. With `--refold` instead of a name, all states are made anew from the
events; that is right only together with a new `events.rebuild.FOLDS`.
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

from events.bodies import from_body, to_body
from events.commands import FileStat, Record, RequestCancel, RequestLoad, RequestUnload
from events.errors import RequestRefused
from events.jobs import LoadParameters
from events.models import ModelState
from events.reader import open_reader
from events.rebuild import FOLDS
from events.state import State
from events.store import as_text
from events.types import AccessDenied, Draft, Idempotency
from runtime.scheduling.sight import Policy

HERE = Path(__file__).parent
BACK_OFF_S = 60
"""More than any pause before a recovery, less than what incidents are remembered."""
SLOW = models.slow_model(side=800, depth=2_000).SerializeToString()
"""Loads for half a minute, if it is let."""

Story = Callable[[Path], Awaitable[None]]


def changes(bodies: Iterable[str]) -> list[dict[str, Any]]:
    """Return the stored form of what each event changed, by kind and id."""
    state, found = State(), []
    for body in bodies:
        changed = state.apply(from_body(body))
        found.append(
            {
                "models": {key: json.loads(as_text(model)) for key, model in changed.models.items()},
                "jobs": {key: json.loads(as_text(job)) for key, job in changed.jobs.items()},
            }
        )
    return found


def write_states(name: str) -> None:
    """Fold a recorded history and keep what came of it."""
    bodies = (HERE / f"{name}.jsonl").read_text().splitlines()
    told = {"folds": FOLDS, "changes": changes(bodies)}
    (HERE / f"{name}.json").write_text(json.dumps(told, indent=1) + "\n")


async def loads_and_swaps(folder: Path) -> None:
    """Loads, loads of what is there, swaps beside and in place, failures, unloads; somebody is refused."""
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
    """Workers die: of one, of two, again and again until it is given up, and a later load tries again."""
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
    """The server ends amid loads, a swap and a queue, cleanly and not; what was there comes back."""
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
    """Cancels in time and too late, forced unloads of what loads or is stuck, and jobs whose time is up."""
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
        await refused(engine.log.submit(RequestCancel(slow, "bob")))
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
    """One model may be loaded: others make room. Then there is memory for none."""
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
    """Requests with idempotency keys: repeated, repeated as something else, and forgotten after a day."""
    async with running(folder, clock=Clock(), stops_cleanly=True) as engine:
        found = engine.repository.resolve("adder", 1)
        files = tuple(FileStat(file.path, file.bytes, file.mtime_ns) for file in found.files)
        key = Idempotency("11" * 32, "22" * 32)
        load = RequestLoad("adder", 1, files, "alice", LoadParameters(), idempotency=key)
        job = job_of(await engine.log.submit(load))
        await engine.ended(job)
        assert job_of(await engine.log.submit(load)) == job
        await refused(
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


async def refused(asked: Awaitable[object]) -> None:
    """Ask for what is not to be had."""
    try:
        await asked
    except RequestRefused:
        return
    raise AssertionError("this is refused")


STORIES: dict[str, Story] = {
    "cancels-and-force": cancels_and_force,
    "deaths": deaths,
    "evictions-and-memory": evictions_and_memory,
    "keys": keys,
    "loads-and-swaps": loads_and_swaps,
    "restarts": restarts,
}


async def record(name: str) -> None:
    """Live through a story, and keep what was written of it."""
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
        await STORIES[name](folder)
        async with open_reader(folder / "ledger.db") as reader:
            events = await reader.events(0, 10_000)
    (HERE / f"{name}.jsonl").write_text("".join(f"{placeless(to_body(event))}\n" for event in events))


def placeless(body: str) -> str:
    """Take out of a body where it was recorded, which a worker's last words name."""
    return body.replace(str(HERE.parents[1]), "/srv/loadledger").replace(sys.prefix, "/srv/environment")


if __name__ == "__main__":
    for asked in sys.argv[1:]:
        if asked != "--refold":
            asyncio.run(record(asked))
        for each in STORIES if asked == "--refold" else [asked]:
            write_states(each)
