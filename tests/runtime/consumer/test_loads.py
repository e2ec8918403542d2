"""How far a load is, and what memory counts for it, by its workers and tasks."""

from typing import Any

import pytest

from runtime.consumer.loads import LoadRun
from runtime.scheduler.view import Phase

BOTH = ("w0", "w1")


def run(started: tuple[str, ...] = BOTH, exited: tuple[str, ...] = (), **more: Any) -> LoadRun:
    return LoadRun(started, exited, **more)


UNENDED = [
    ("no worker yet", run((), has_tasks=True), Phase.LOADING),
    ("loading", run(has_tasks=True), Phase.LOADING),
    ("died while its task has to say why", run(exited=("w1",), has_tasks=True), Phase.LOADING),
    ("died, and its task has ended", run(exited=("w1",)), Phase.FAILED),
    ("died after it had loaded", run(exited=("w0",), loaded=("w0",), has_tasks=True), Phase.FAILED),
    ("all loaded", run(loaded=BOTH, is_loaded=True), Phase.LOADED),
    ("all loaded, one died", run(exited=("w1",), loaded=BOTH, is_loaded=True), Phase.FAILED),
    ("refused", run(has_failed=True, has_tasks=True), Phase.FAILED),
    ("its form failed, a worker is left", run(exited=("w0",), is_form_failed=True), Phase.LOADING),
    ("its form failed", run(exited=BOTH, is_form_failed=True), Phase.FORM_FAILED),
    ("its form failed, and it", run(exited=BOTH, is_form_failed=True, has_failed=True), Phase.FAILED),
    ("its files changed", run((), is_outdated=True), Phase.OUTDATED),
]
ENDED = [
    ("serves", run(is_loaded=True), Phase.SERVING),
    ("unloads", run(is_loaded=True, unloading=True), Phase.DRAINING),
    ("killed", run(is_loaded=True, killed=True), Phase.DRAINING),
    ("killed before a worker started", run((), killed=True), Phase.DRAINING),
    ("gone", run(exited=BOTH, is_loaded=True, killed=True), Phase.GONE),
]


@pytest.mark.parametrize(
    ("load", "is_job_unended", "phase"),
    [
        *(pytest.param(load, True, phase, id=f"job unended: {name}") for name, load, phase in UNENDED),
        *(pytest.param(load, False, phase, id=f"job ended: {name}") for name, load, phase in ENDED),
    ],
)
def test_phase_of_load(load: LoadRun, phase: Phase, *, is_job_unended: bool) -> None:
    assert load.find_phase(is_job_unended=is_job_unended) is phase


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        (run((), reserved_bytes=9), 9),
        (run(reserved_bytes=9, measured_bytes=12), 12),
        (run(reserved_bytes=9, measured_bytes=3), 9),
        (run(is_loaded=True, reserved_bytes=9, measured_bytes=3), 3),
        (run((), has_failed=True, reserved_bytes=9), 0),
        (run(exited=BOTH, reserved_bytes=9), 0),
    ],
)
def test_memory_of_load(load: LoadRun, expected: int) -> None:
    assert load.memory_bytes == expected


def test_exits_that_the_server_expects_are_no_deaths() -> None:
    load = run(exited=BOTH, expected_exits=("w1",))
    assert (load.unexpected_exits, load.alive, load.is_finished) == (("w0",), [], True)
