"""How far a load is, and what memory counts for it, by its workers and tasks."""

from typing import Any

import pytest

from runtime.consumer.running import LoadRun
from runtime.scheduler.view import Phase

BOTH = ("w0", "w1")


def run(started: tuple[str, ...] = BOTH, exited: tuple[str, ...] = (), **more: Any) -> LoadRun:
    return LoadRun(started, exited, **more)


ENDED = [
    ("serves", run(is_loaded=True), Phase.SERVING),
    ("unloads", run(is_loaded=True, unloading=True), Phase.DRAINING),
    ("killed", run(is_loaded=True, killed=True), Phase.DRAINING),
    ("killed before a worker started", run((), killed=True), Phase.DRAINING),
    ("gone", run(exited=BOTH, is_loaded=True, killed=True), Phase.GONE),
    ("died, and its device's memory is not back", run(exited=BOTH, is_held=True), Phase.DRAINING),
]


@pytest.mark.parametrize(
    ("load", "phase"), [pytest.param(load, phase, id=name) for name, load, phase in ENDED]
)
def test_phase_of_load(load: LoadRun, phase: Phase) -> None:
    assert load.find_phase(is_job_unended=False) is phase
    assert load.find_phase(is_job_unended=True) is Phase.LOADING


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        (run((), reserved_bytes=9), 9),
        (run(reserved_bytes=9, measured_bytes=12), 12),
        (run(reserved_bytes=9, measured_bytes=3), 9),
        (run(is_loaded=True, reserved_bytes=9, measured_bytes=3), 3),
        (run((), killed=True, has_tasks=True, reserved_bytes=9), 9),
        (run((), killed=True, reserved_bytes=9), 0),
        (run(exited=BOTH, reserved_bytes=9), 0),
    ],
)
def test_memory_of_load(load: LoadRun, expected: int) -> None:
    assert load.memory_bytes == expected


def test_exits_that_the_server_expects_are_no_deaths() -> None:
    load = run(exited=BOTH, expected_exits=("w1",))
    assert (load.unexpected_exits, load.alive, load.is_finished) == (("w0",), [], True)


def test_load_is_finished_when_its_device_has_the_memory_back() -> None:
    assert not run(exited=BOTH, is_held=True).is_finished
    assert run(exited=BOTH).is_finished
    assert run((), is_held=True).is_finished  # no worker took anything
