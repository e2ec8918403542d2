"""How far a load is, and what memory counts for it, by its workers and tasks."""

from typing import Any

import pytest
from support.decisions import SimulatedWorker, live_load
from support.history import History

from runtime.consumer.running import RunningLoad
from runtime.rooms import Allocation
from runtime.scheduler.view import Phase

BOTH = ("w0", "w1")


class Held(Allocation):
    """What is not back."""

    is_held = True


def run(
    started: tuple[str, ...] = BOTH, exited: tuple[str, ...] = (), *, measured: int = 0, **given: Any
) -> RunningLoad:
    sizes = dict.fromkeys(started[:1], measured)
    workers = (SimulatedWorker(each, each in exited, sizes.get(each, 0)) for each in started)
    return live_load(*workers, **given)


ENDED = [
    ("serves", run(loaded=True), Phase.SERVING),
    ("unloads", run(loaded=True, unloading=True), Phase.DRAINING),
    ("killed", run(loaded=True, killed=True), Phase.DRAINING),
    ("killed before a worker started", run((), killed=True), Phase.DRAINING),
    ("gone", run(exited=BOTH, loaded=True, killed=True), Phase.GONE),
    ("died, and its device's memory is not back", run(exited=BOTH, allocation=Held()), Phase.DRAINING),
]


@pytest.mark.parametrize(
    ("load", "phase"), [pytest.param(load, phase, id=name) for name, load, phase in ENDED]
)
def test_phase_of_load(load: RunningLoad, phase: Phase) -> None:
    history = History()
    history.ask_load("L")
    assert load.to_view(None).phase is phase
    assert load.to_view(history.job("L")).phase is Phase.LOADING


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        (run((), reserved_bytes=9), 9),
        (run(reserved_bytes=9, measured=12), 12),
        (run(reserved_bytes=9, measured=3), 9),
        (run(loaded=True, reserved_bytes=9, measured=3), 3),
        (run((), killed=True, tasks=True, reserved_bytes=9), 9),
        (run((), killed=True, reserved_bytes=9), 0),
        (run(exited=BOTH, reserved_bytes=9), 0),
    ],
)
def test_memory_of_load(load: RunningLoad, expected: int) -> None:
    assert load.to_view(None).memory_bytes == load.memory_bytes == expected


def test_exits_that_the_server_expects_are_no_deaths() -> None:
    load = run(exited=BOTH, expected_exits={"w1"})
    assert (load.to_view(None).exited, load.alive_workers, load.is_finished) == (("w0",), [], True)


def test_load_is_finished_when_its_device_has_the_memory_back() -> None:
    assert not run(exited=BOTH, allocation=Held()).is_finished
    assert run(exited=BOTH).is_finished
    assert run((), allocation=Held()).is_finished  # no worker took anything


def test_stage_is_progress_once_for_each_worker() -> None:
    load, seen = run(), list[tuple[int, int, int]]()
    for worker_id in ("w0", "w0", "w1"):
        load.reach_stage("loading", worker_id)
        seen.append(load.progress)
    assert seen[0] == seen[1] < seen[2]
