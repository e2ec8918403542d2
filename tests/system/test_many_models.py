"""Random requests: more models than memory, with workers killed; and swaps under load. No answer is wrong.

`make soak` runs them for minutes. They print what they did.
"""

import asyncio
import os
import random
import signal
from collections import Counter
from contextlib import suppress

import pytest
from support import models
from support.fleet import (
    UNLIMITED,
    Fleet,
    Memory,
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
from support.http import ONE, when
from support.models import save
from support.servers import events, limited, serving
from support.traffic import Traffic

from events.clock import seconds_between
from events.types import ModelLoaded
from runtime.scheduler.eviction import TURN_S
from server.config import Config

BUDGET_BYTES = 80_000_000
"""Room for six or seven of twenty: one takes 10.5 MB, and its first load reserves 20.4 MB."""
TOLERANCE = 1.05
HOT = 5
"""This many models get more requests than the others."""
CLIENTS = 5
ROUNDS = of_both(short=1, long=10)
ROUND_S = of_both(short=1.5, long=12.0)
"""After each round, ledger, resources and processes have to agree."""
KILLS_PER_S = of_both(short=1.0, long=0.7)
SAMPLE_S = 0.02
FAILURES = {"worker_died", "crash_loop", "timeout"}
"""Codes that loads of good models may fail with while workers are killed and memory is short."""


async def kill(storm: Traffic, dice: random.Random) -> None:
    """Kill a random worker after a random time."""
    await asyncio.sleep(dice.expovariate(KILLS_PER_S))
    workers = storm.server.children()[1:]
    if workers and storm.goes_on:
        with suppress(ProcessLookupError):
            os.kill(dice.choice(workers), signal.SIGKILL)
            storm.counts["killed"] += 1


async def run_round(storm: Traffic, memory: Memory, dice: random.Random) -> None:
    """Send random requests for a round; every sample of the workers' memory is within the budget."""

    async def sample() -> None:
        memory.sample(storm.server)
        assert memory.most_bytes <= BUDGET_BYTES * TOLERANCE
        await asyncio.sleep(SAMPLE_S)

    storm.goes_on = True
    async with asyncio.TaskGroup() as group:
        for _ in range(CLIENTS):
            own = random.Random(dice.random())
            group.create_task(repeated(lambda own=own: storm.act(own), lambda: storm.goes_on))  # type: ignore[misc]
        killer = random.Random(dice.random())
        group.create_task(repeated(lambda: kill(storm, killer), lambda: storm.goes_on))
        group.create_task(repeated(sample, lambda: storm.goes_on))
        await asyncio.sleep(ROUND_S)
        storm.goes_on = False


async def check_quiet_server(storm: Traffic, dice: random.Random) -> None:
    """Check that ledger and processes agree once all jobs have ended, and that loaded models answer."""
    await settled(storm.server)
    loaded = await agreed(storm.server)
    seen = (await storm.server.api.get("/api/v1/resources")).json
    assert seen["waiting"] == []
    assert seen["reserved_bytes"] == 0
    assert seen["used_bytes"] <= BUDGET_BYTES * TOLERANCE
    storm.counts["most loaded"] = max(storm.counts["most loaded"], len(loaded))
    for model_id, model in loaded.items():
        asked = question(dice)
        answer = await storm.server.api.infer(model_id, asked)
        assert answer.status == 200, answer
        source = check_inference(model_id, asked, answer)
        assert (source.version, source.position) == (model["version"], model["position"])


@pytest.mark.parametrize("on_demand", of_both(short=["on"], long=["off", "on"]))
async def test_twenty_models_in_memory_for_six_answer_right(config: Config, on_demand: str) -> None:
    fleet = Fleet(config.repository, 20)
    dice, memory = new_dice(), Memory()
    residency_s = of_both(short="0", long=dice.choice(("0", "0.3", "1")))
    settings = (
        f"--memory-budget={BUDGET_BYTES}", "--threads=1", "--evict=idle", f"--min-residency-s={residency_s}",
        f"--on-demand={on_demand}", "--inference-timeout-s=20", "--drain-timeout-s=5", *UNLIMITED,
    )  # fmt: skip
    async with serving(config, *settings, command=limited()) as server:
        storm = Traffic(server, fleet, hot=HOT)
        for _ in range(ROUNDS):
            await run_round(storm, memory, dice)
            await check_quiet_server(storm, dice)
        assert await server.stop() == 0
        assert server.warnings() == []  # only events are logged
    _, ends = await check_ledger(config, storm.sources, FAILURES)
    tell(summary(storm, memory, ends))
    assert storm.counts["infer 200"] > 0


def summary(storm: Traffic, memory: Memory, ends: Counter[str]) -> str:
    share = 100 * memory.most_bytes / BUDGET_BYTES
    return (
        f"{as_text(storm.counts | ends)}; workers took at most {memory.most_bytes / 1e6:.1f} MB, {share:.0f}"
        f" % of the budget, in {memory.samples} samples, {memory.workers} at once"
    )


SWAPS = of_both(short=6, long=1000)
SWAP_CLIENTS = 8


async def test_swaps_under_load_fail_no_request(config: Config) -> None:
    fleet, dice, sources = Fleet(config.repository, 1), new_dice(), list[Source]()
    [model_id] = fleet.ids
    swapping = True

    async def ask(own: random.Random) -> None:
        """Ask, and check that the answer is that of the version which it names."""
        while swapping:
            asked = question(own)
            answer = await server.api.infer(model_id, asked)
            assert answer.status == 200, answer
            sources.append(check_inference(model_id, asked, answer))

    async with serving(config, *UNLIMITED) as server:
        await server.api.load(model_id, version=2)
        async with asyncio.TaskGroup() as group:
            for _ in range(SWAP_CLIENTS):
                group.create_task(ask(random.Random(dice.random())))
            for number in range(SWAPS):
                job = await server.api.load(model_id, version=1 + number % 2)
                assert job["parameters"]["strategy"] == "beside"
            swapping = False
        await settled(server)
        assert [model["version"] for model in (await agreed(server)).values()] == [2 - SWAPS % 2]
        assert await server.stop() == 0
        assert server.warnings() == []  # only events are logged
    _, ends = await check_ledger(config, set(sources))
    assert ends["ModelUnloaded"] == SWAPS
    assert {source.version for source in sources} == {1, 2}
    versions = len({source.position for source in sources})
    tell(f"{SWAPS} swaps, {len(sources)} answers of {versions} loads, none failed")


TRIPS = {"name": "trips", "shape": [], "datatype": "INT64", "data": [400_000]}
"""The input of an inference that runs for some tenths of a second."""

LIMIT_S = 120
"""More than both turns take."""

IMPATIENT = {"timeout": 1_000_000}
"""The parameters of an inference that gives up after a second."""


async def test_busy_model_gives_way_to_a_client_that_repeats(config: Config) -> None:
    """There is room for one model, which eight clients ask without a pause."""
    save(models.counting_loop(), config.repository, "busy")
    save(models.add(), config.repository, "other")
    options = ("--max-loaded=1", "--min-residency-s=0", "--evict=idle", "--on-demand=on", "--threads=1")
    asking = True

    async def ask() -> None:
        while asking:
            assert (await server.api.infer("busy", TRIPS)).status == 200

    async with (
        serving(config, *options, *UNLIMITED) as server,
        asyncio.timeout(LIMIT_S),
        asyncio.TaskGroup() as clients,
    ):
        for _ in range(8):
            clients.create_task(ask())
        await when(lambda: server.api.get("/v2/models/busy/ready"), lambda answer: answer.status == 200)
        refused = 0
        while (answer := await server.api.infer("other", ONE, parameters=IMPATIENT)).status != 200:
            assert answer.refusal == (504, "inference_timeout")
            refused += 1
        assert refused
        assert answer.json["outputs"][0]["data"] == [2]
        await when(lambda: server.api.get("/v2/models/busy/ready"), lambda answer: answer.status == 200)
        asking = False
    loads = [event for event in await events(config) if isinstance(event.data, ModelLoaded)]
    assert [load.model_id for load in loads] == ["busy", "other", "busy"]
    assert seconds_between(loads[0].recorded_at, loads[1].recorded_at) >= TURN_S
