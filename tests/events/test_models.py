"""The fold of models: after these facts, a model reads so. `support.history.STEPS` explains the words."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given as given_any
from hypothesis import strategies as st
from msgspec import UNSET
from msgspec.structs import replace
from support.history import (
    FEWER,
    MODEL,
    ON_CPU,
    ON_CUDA,
    STEPS,
    History,
    as_event,
    at,
    file,
    given,
    load_requested,
    model_loaded,
)
from support.strategies import drafts

from events.clock import seconds_between
from events.codec import decode_event
from events.history import make_row
from events.jobs import INCIDENT_WINDOW_S, MAX_FOOTPRINTS, Failure, Footprint, JobKind, JobStatus, PendingLoad
from events.models import Choice, Model, ModelState
from events.serving import Serving
from events.types import SYSTEM, TYPES, Cause, Data, Draft, LoadParameters, ModelSettingsChanged, Unknown
from events.versioncommands import find_use

UNLOADED, LOADING, LOADED = ModelState.UNLOADED, ModelState.LOADING, ModelState.LOADED
UNLOADING, LOST = ModelState.UNLOADING, ModelState.LOST

MODELS = """
# Loads.
request -> unloaded
request start -> loading, v1
load -> loaded, v1
request start fail -> failed, v1, broken
request fail -> failed, v1, broken
request cancel_L -> unloaded
request start cancel_L -> unloaded, v1
request start fail request_again start_again -> loading, v1, broken
request start fail load_again -> loaded, v1
request start fail request_again cancel_L3 -> failed, v1, broken
request start request_force cancel_L finish_force -> unloaded, v1
request start restart -> unloaded, v1
request start fail request_again start_again restart -> failed, v1, broken
request fail restart -> failed, v1, broken
request_unload -> unloaded
load request_again change_settings -> loaded, v1
load request_again start_again change_settings -> loaded, v1
load request_unload start_unload finish_unload request_again change_settings -> unloaded, v1
load change_settings -> loaded, v1
# Unloads.
load request_unload -> loaded, v1, ends by U
load request_unload start_unload -> unloading, v1, ends by U
load request_unload start_unload finish_unload -> unloaded, v1
load request_unload finish_unload -> unloaded, v1
load request_unload cancel_U -> loaded, v1
load request_unload start_unload cancel_U -> loaded, v1
load request_unload start_unload request_force -> unloading, v1, ends by U F
load request_unload start_unload request_force start_force -> unloading, v1, ends by U F
load request_unload start_unload request_force cancel_F -> unloading, v1, ends by U
load request_unload start_unload request_force finish_unload finish_force -> unloaded, v1
load request_unload start_unload request_again -> unloading, v1, ends by U
load request_unload start_unload request_again finish_unload start_again -> loading, v1
load request_unload request_force -> loaded, v1, ends by U F
load request_unload_unknown -> loaded, v1
# Another version beside.
load request_v2 -> loaded, v1
load request_v2 start_v2 -> loaded, v1, then v2
load load_v2 -> loaded, v2
load request_v2 start_v2 fail_v2 -> loaded, v1, broken
load request_v2 start_v2 cancel_L2 -> loaded, v1
load load_v2 request_drain start_drain -> loaded, v2
load load_v2 drain -> loaded, v2
load request_v2 start_v2 request_unload_v2 -> loaded, v1, then v2, ends by U
load request_v2 start_v2 request_unload_v2 finish_v2 start_unload -> unloading, v2, ends by U
load request_v2 start_v2 request_unload_v2 finish_v2 start_unload finish_unload -> unloaded, v2
load request_v2 start_v2 request_unload_v2 fail_v2 start_unload finish_unload -> unloaded, v2
load request_v2 start_v2 request_force cancel_L2 finish_force -> unloaded, v2
load request_v2 start_v2 fail_v2 request_unload finish_unload -> unloaded, v2
load request_v2 request_unload_v2 -> loaded, v1, ends by U
load load_v2 request_drain -> loaded, v2
# In place: the old version is unloaded before the new one loads.
load request_in_place request_drain -> loaded, v1, ends by S
load request_in_place request_drain start_drain -> unloading, v1, ends by S
load request_in_place drain -> loading, v1, after v1
load request_in_place drain start_v2 -> loading, v2, after v1
load request_in_place drain start_v2 finish_v2 -> loaded, v2
load request_in_place drain start_v2 fail_v2 -> lost, v1, by swap at 9, broken
load request_in_place drain fail_v2 -> lost, v1, by swap at 8, broken
load request_in_place drain fail_v2:fork_server_died -> lost, v1, by swap at 8, fork_server_died
load request_in_place drain start_v2 cancel_L2 -> lost, v1, by swap at 9
load request_in_place drain request_again fail_v2 -> loading, v2, after v1, broken
load request_in_place drain fail_v2 load_again -> loaded, v1
load request_in_place drain request_again fail_v2 fail_again -> lost, v1, by swap at 10, broken
load request_in_place drain start_v2 restart -> lost, v1, by restart at 9, after v1
load request_in_place drain start_v2 stop_server -> lost, v1, by restart at 9, after v1
load request_in_place drain start_v2 stop_server restart -> lost, v1, by restart at 9, after v1
load request_in_place drain start_v2 restart start_v2 -> loading, v2, by restart at 9, after v1
load request_in_place drain start_v2 restart start_v2 finish_v2 -> loaded, v2
load request_in_place drain restart fail_v2 -> lost, v1, by swap at 9, broken
load request_in_place drain request_unload_v2 finish_v2 finish_unload -> unloaded, v2
load request_in_place drain request_unload_v2 fail_v2 -> lost, v1, by swap at 9, broken, ends by U
load request_in_place drain request_unload_v2 fail_v2 start_unload finish_unload -> unloaded, v2
load request_in_place drain request_force_v2 cancel_L2 finish_force -> unloaded, v1
load request_in_place drain fail_v2 request_return start_recovery -> loading, v1, by swap at 8, broken
load request_in_place drain fail_v2 request_return start_recovery finish_recovery -> loaded, v1
load request_in_place drain fail_v2 request_return fail_recovery \
    -> lost, v1, by recovery at 10, 1 incidents, broken
load request_in_place drain fail_v2 request_return fail_recovery:crash_loop -> failed, v1, crash_loop
load request_in_place drain drain_again -> loading, v1, after v1
load request_in_place request_drain start_drain cancel_L2 finish_drain -> lost, v1, by swap at 8
load request_in_place request_drain start_drain fail_v2 -> unloading, v1, broken, ends by S
load request_in_place request_drain crash -> lost, v1, by recovery at 6, 1 incidents, worker_died, ends by S
load request_in_place request_drain crash finish_drain -> loading, v1, after v1, 1 incidents, worker_died
load request_in_place request_drain start_drain restart -> lost, v1, by restart at 7, ends by S
load request_in_place request_drain start_drain restart finish_drain -> loading, v1, after v1
load request_in_place request_drain start_drain request_force cancel_L2 finish_force \
    -> unloaded, v1, ends by S
load request_in_place request_drain start_drain request_force cancel_L2 finish_force finish_drain \
    -> unloaded, v1
load request_in_place drain fail_v2 request_return start_recovery request_cancel_R cancel_R -> unloaded, v1
# Deaths of workers.
load crash -> lost, v1, by recovery at 4, 1 incidents, worker_died
load forkserver_exit -> lost, v1, by recovery at 4, worker_died
load crash request_recovery start_recovery -> loading, v1, by recovery at 4, 1 incidents, worker_died
load crash request_recovery start_recovery finish_recovery -> loaded, v1, 1 incidents
load crash request_recovery start_recovery fail_recovery -> lost, v1, by recovery at 7, 2 incidents, broken
load crash request_recovery start_recovery fail_recovery:fork_server_died \
    -> lost, v1, by recovery at 7, 1 incidents, 1 retries, fork_server_died
load crash request_recovery start_recovery cancel_R -> lost, v1, by recovery at 4, 1 incidents, worker_died
load crash request_recovery fail_recovery:crash_loop -> failed, v1, 1 incidents, crash_loop
load crash request_v2 start_v2 fail_v2 -> lost, v1, by recovery at 4, 1 incidents, broken
load crash request_v2 start_v2 fail_v2:crash_loop -> lost, v1, by recovery at 4, 1 incidents, crash_loop
load crash request_again fail_again -> failed, v1, 1 incidents, broken
load crash load_v2 -> loaded, v2
load request_v2 start_v2 crash -> loading, v1, by recovery at 6, 1 incidents, worker_died
load request_v2 start_v2 crash fail_v2 -> lost, v1, by recovery at 6, 1 incidents, broken
load request_unload start_unload crash -> unloading, v1, ends by U
load crash request_unload finish_unload -> unloaded, v1
load crash restart -> lost, v1, by restart at 4, 1 incidents, worker_died
load crash request_recovery request_cancel_R cancel_R -> unloaded, v1
load crash request_again request_cancel_L3 cancel_L3 -> lost, v1, by recovery at 4, 1 incidents, worker_died
load crash request_unload request_cancel_U cancel_U -> lost, v1, by recovery at 4, 1 incidents, worker_died
load crash request_recovery fail_recovery:timeout \
    -> lost, v1, by recovery at 6, 1 incidents, 1 retries, timeout
load crash request_recovery start_recovery fail_recovery:invalid_defaults \
    -> lost, v1, by recovery at 7, 1 incidents, 1 retries, invalid_defaults
load crash break_recovery:fork_server_unavailable break_recovery:fork_server_unavailable \
    -> lost, v1, by recovery at 8, 1 incidents, 2 retries, fork_server_unavailable
load crash break_recovery:fork_server_unavailable break_recovery break_recovery:fork_server_unavailable \
    -> lost, v1, by recovery at 10, 2 incidents, 2 retries, fork_server_unavailable
load crash break_recovery:fork_server_unavailable request_recovery start_recovery finish_recovery \
    -> loaded, v1, 1 incidents
load crash break_recovery:fork_server_unavailable load_again -> loaded, v1
load crash break_recovery:fork_server_unavailable request_unload finish_unload -> unloaded, v1
load crash request_recovery fail_recovery:bytes_gone -> failed, v1, 1 incidents, bytes_gone
load restart request_restore fail_recovery:invalid_defaults \
    -> lost, v1, by restart at 6, 1 retries, invalid_defaults
load crash break_recovery:fork_server_unavailable restart \
    -> lost, v1, by restart at 6, 1 incidents, fork_server_unavailable
load crash request_recovery fail_recovery:insufficient_memory -> failed, v1, 1 incidents, insufficient_memory
load crash request_again fail_again:timeout -> lost, v1, by recovery at 4, 1 incidents, timeout
load crash request_again fail_again:insufficient_memory \
    -> lost, v1, by recovery at 4, 1 incidents, insufficient_memory
load crash request_again start_again fail_again:timeout -> lost, v1, by recovery at 4, 1 incidents, timeout
load crash request_again start_again fail_again:invalid_defaults \
    -> lost, v1, by recovery at 4, 1 incidents, invalid_defaults
load crash request_recovery fail_recovery -> lost, v1, by recovery at 6, 2 incidents, broken
load crash request_recovery start_recovery finish_recovery crash_again \
    -> lost, v1, by recovery at 8, 2 incidents, worker_died
load crash load_again -> loaded, v1
load crash_unknown -> loaded, v1
# Several instances.
load_pair crash_1 -> loaded, v1, degraded, 1 incidents, worker_died
load_pair crash_1 restart -> lost, v1, by restart at 5, 1 incidents, worker_died
load_pair crash_1 request_unload_pair finish_unload -> unloaded, v1
load_pair crash_1 crash_2 -> lost, v1, by recovery at 5, 1 incidents, worker_died
load_pair crash_1 crash_2_later -> lost, v1, by recovery at 605, 1 incidents, worker_died
load_pair forkserver_exit_1 forkserver_exit_2 -> lost, v1, by recovery at 5, worker_died
load_pair crash_1 forkserver_exit_2 -> lost, v1, by recovery at 5, 1 incidents, worker_died
load_pair forkserver_exit_1 crash_2 -> lost, v1, by recovery at 5, worker_died
load_pair crash_1 request_recovery start_recovery fail_recovery -> loaded, v1, degraded, 2 incidents, broken
load_pair crash_1 request_recovery start_recovery fail_recovery:fork_server_died \
    -> loaded, v1, degraded, 1 incidents, 1 retries, fork_server_died
load_pair crash_1 break_recovery:fork_server_unavailable break_recovery:fork_server_unavailable \
    -> loaded, v1, degraded, 1 incidents, 2 retries, fork_server_unavailable
load_pair crash_1 request_recovery fail_recovery:bytes_gone \
    -> loaded, v1, degraded, kept as is, 1 incidents, bytes_gone
load_pair crash_1 request_recovery start_recovery fail_recovery crash_2 \
    -> lost, v1, by recovery at 8, 2 incidents, worker_died
load_pair crash_1 request_v2 start_v2 fail_v2 -> loaded, v1, degraded, 1 incidents, broken
load_pair crash_1 recover_pair -> loaded, v1, 1 incidents
load_pair crash_1 recover_pair crash_1_again -> loaded, v1, degraded, 2 incidents, worker_died
load_pair crash_1 load_again -> loaded, v1
load_pair request_unload_pair start_unload crash_1 -> unloading, v1, ends by U
load_pair crash_1 request_recovery cancel_R -> loaded, v1, degraded, 1 incidents, worker_died
# A person's load takes the place of a reload: without it the model is as before the reload was requested.
load crash request_recovery supersede_recovery -> lost, v1, by recovery at 4, 1 incidents, worker_died
load crash request_recovery supersede_recovery start_again \
    -> loading, v1, by recovery at 4, 1 incidents, worker_died
load crash request_recovery supersede_recovery start_again cancel_L3 \
    -> lost, v1, by recovery at 4, 1 incidents, worker_died
load crash request_recovery supersede_recovery request_cancel_L3 cancel_L3 \
    -> lost, v1, by recovery at 4, 1 incidents, worker_died
load crash request_recovery supersede_recovery start_again fail_again -> failed, v1, 1 incidents, broken
load crash request_recovery supersede_recovery fail_again:timeout \
    -> lost, v1, by recovery at 4, 1 incidents, timeout
load crash request_recovery supersede_recovery_v2 start_v2 fail_v2 \
    -> lost, v1, by recovery at 4, 1 incidents, broken
load crash request_recovery supersede_recovery_v2 cancel_L2 \
    -> lost, v1, by recovery at 4, 1 incidents, worker_died
load restart request_restore supersede_recovery_v2 start_v2 fail_v2 -> lost, v1, by restart at 4, broken
load_pair crash_1 request_recovery supersede_recovery start_again fail_again \
    -> loaded, v1, degraded, 1 incidents, broken
load_pair crash_1 request_recovery request_cancel_R cancel_R \
    -> loaded, v1, degraded, kept as is, 1 incidents, worker_died
load_pair crash_1 request_recovery request_cancel_R cancel_R load_again -> loaded, v1
load_pair crash_1 request_recovery fail_recovery:insufficient_memory \
    -> loaded, v1, degraded, kept as is, 1 incidents, insufficient_memory
# Starts of the server.
load restart -> lost, v1, by restart at 4
load restart restart -> lost, v1, by restart at 4
load stop_server -> lost, v1, by restart at 4
load restart_cleanly -> lost, v1, by restart at 4
load crash stop_server -> lost, v1, by restart at 4, 1 incidents, worker_died
load request_unload start_unload stop_server -> lost, v1, by restart at 6, ends by U
load request_v2 start_v2 stop_server -> lost, v1, by restart at 6
load restart_cleanly restore -> loaded, v1
request start stop_server -> unloaded, v1
request start fail request_again start_again stop_server -> failed, v1, broken
load request_unload finish_unload stop_server -> unloaded, v1
load request_unload start_unload restart -> lost, v1, by restart at 6, ends by U
load request_unload start_unload restart finish_unload -> unloaded, v1
load request_v2 start_v2 restart -> lost, v1, by restart at 6
load request_v2 start_v2 restart start_v2 finish_v2 -> loaded, v2
load load_v2 request_drain start_drain restart finish_drain -> lost, v2, by restart at 9
load request_unload finish_unload restart -> unloaded, v1
load restart request_restore request_cancel_R cancel_R -> unloaded, v1
load restart request_restore fail_recovery:too_many_loaded -> failed, v1, too_many_loaded
load restart restore -> loaded, v1
load restart request_restore fail_recovery -> lost, v1, by recovery at 6, 1 incidents, broken
load restart request_recovery fail_recovery -> lost, v1, by recovery at 6, 1 incidents, broken
"""
"""Facts -> the model after them: state and version; the version that loads beside; cause and second of the
loss; the version that was unloaded for replacement; incidents, retries, error and unloads."""


def describe(model: Model) -> str:
    is_kept = model.serving is not None and model.serving.kept_as_is
    next_version = make_row(model).next_version
    words = [
        model.state.value,
        f"v{model.version}" if model.version is not None else "",
        f"then v{next_version}" if next_version is not None else "",
        f"by {model.lost_by} at {seconds_between(at(0), model.lost_at):.0f}" if model.lost_at else "",
        f"after v{model.previous.version}" if model.previous is not None else "",
        "degraded" if model.degraded else "",
        "kept as is" if is_kept else "",
        f"{len(model.incidents)} incidents" if model.incidents else "",
        f"{model.retries.count} retries" if model.retries is not None else "",
        model.error.code if model.error is not None else "",
        f"ends by {' '.join(model.unloads)}" if model.unloads else "",
    ]
    return ", ".join(filter(None, words))


@pytest.mark.parametrize(
    ("facts", "model"), [row.split(" -> ") for row in MODELS.splitlines() if row and not row.startswith("# ")]
)
def test_model_after_facts(facts: str, model: str) -> None:
    history = given(facts)
    assert describe(history.model()) == model
    assert_coherent(history)
    assert {load.job_id for load in history.model().loads} == {
        job.id for job in history.state.unended(MODEL) if job.kind is JobKind.LOAD
    }


def assert_coherent(history: History) -> None:
    for model in history.state.models.values():
        if model.previous is not None:
            assert (model.phase, model.serving) == (UNLOADED, None)
            assert model.loads  # one of which replaces it, or the model is lost
        kept = model.phase in {LOADED, UNLOADING, LOST}
        assert (model.serving is not None) == kept
        assert (model.rank is not None) == (kept or model.previous is not None)
        assert model.phase is not LOADING
        assert model.phase is LOADED or not model.degraded
        assert (model.lost_by is not None) == (model.lost_at is not None)
        assert (model.phase is LOST) == (model.lost_by is not None and model.previous is None)


def test_loaded_model_names_files_actor_and_parameters() -> None:
    history = History()
    history.ask_load("L", version=3)
    history.start_load("L", version=3)
    history.add(model_loaded("w1", "w2"), "L", version=3)
    assert history.model() == Model(
        id=MODEL,
        phase=LOADED,
        serving=Serving(
            load_job_id="L",
            version=3,
            position=3,
            loaded_at=at(3),
            loaded_by="alice",
            worker_ids=("w1", "w2"),
            files=(file(),),
            memory_bytes=1_000,
            peak_memory_bytes=2_000,
            parameters=LoadParameters(),
        ),
        rank=3,
        last_version=3,
        footprints=(Footprint(3, (file(),), 1_000, position=3),),
        chosen=Choice("L", "alice", at(3), 3, 3, LoadParameters(), (file(),)),
    )


@pytest.mark.parametrize("load", ["L", "L-before"])
def test_change_of_settings_leaves_the_rest_of_the_model(load: str) -> None:
    history = given("load request_again")
    before = history.model()
    history.change_settings("L3", load, keep_alive_s=60, pinned=True)
    serving, chosen = history.serving(), before.chosen
    if load == "L":
        settings = replace(serving.parameters, keep_alive_s=60, pinned=True)
        assert serving.parameters == settings
        changed = history.facts[-1]
        chosen = Choice("L3", "alice", changed.recorded_at, changed.position, 1, settings, (file(),))
    assert history.model() == replace(before, serving=serving, loads=(), chosen=chosen)
    job = history.job("L3")
    assert (job.status, job.attempt, job.started_at) == (JobStatus.COMPLETED, 0, None)


def test_loads_wait_in_request_order() -> None:
    history = given("request request_v2 start request")  # a repeated request waits once
    assert history.model().loads == (PendingLoad("L", 1, started=True), PendingLoad("L2", 2))


@pytest.mark.parametrize("end", ["start_drain", "finish_drain", "cancel_S"])
def test_drain_of_old_version_leaves_new_one(end: str) -> None:
    history = given("load load_v2 request_drain")
    before = history.model()
    STEPS[end](history)
    assert history.model() == before


@pytest.mark.parametrize(("pause_s", "incidents"), [(INCIDENT_WINDOW_S, 2), (INCIDENT_WINDOW_S + 1, 1)])
def test_incidents_expire_after_ten_minutes(pause_s: int, incidents: int) -> None:
    history = given("load crash request_recovery start_recovery finish_recovery")
    history.kill_worker("w-R", after_s=pause_s - 3)  # three facts came after the first death
    assert len(history.model().incidents) == incidents


def test_model_with_one_instance_left_is_degraded() -> None:
    history = given("load_pair crash_1")
    model = history.model()
    assert model.error == Failure("worker_died", "its worker was killed by signal 9; 1 of 2 are left")
    assert model.incidents == (at(4),)
    left = history.serving()
    assert (left.worker_ids, left.degraded_at, left.memory_bytes) == (("P2",), at(4), 1_000)
    history.kill_worker("P1")
    assert history.model() == model
    history.kill_worker("P2")
    assert history.model().error == Failure("worker_died", "its worker was killed by signal 9")
    assert given("request fail").model().error == Failure("broken", "because")
    assert given("load_pair crash_1 recover_pair").serving().worker_ids == ("R1", "R2")


@pytest.mark.parametrize(
    "end", ["start_v2 fail_v2", "start_v2 cancel_L2", "restart fail_v2", "start_v2 finish_v2"]
)
def test_drained_version_is_remembered_until_new_one_loads(end: str) -> None:
    before, gap = given("load").model(), given("load request_in_place drain").model()
    assert (gap.previous, gap.serving, gap.rank) == (before.serving, None, before.rank)
    after = given(f"load request_in_place drain {end}").model()
    assert after.previous is None
    assert ((after.serving, after.rank) == (before.serving, before.rank)) == ("finish_v2" not in end)


# Footprints: what a version took.


FOOTPRINTS = [
    # loads of the same version, and its footprints, each of one worker: peak, instances, threads, device and
    # what the device measured; an exclamation mark for other files
    ("2000x3", "667"),  # rounded up
    ("2000 9000 500", "9000"),
    ("9000 2000!", "2000!"),
    ("2000 3000/t1 9000/t2 500/t2 4000/t1", "2000 9000/t2 4000/t1"),
    ("2000 9000x2@cuda:0=601 8000x2@cuda:0=401 9500x2@cuda:0=501", "2000 4750@cuda:0=251"),
    ("9000@cuda:0=600 8000@cuda:0=400", "9000@cuda:0=400"),
    ("9000@cuda:0 9000@cuda:0=600 9000@cuda:0=0 9000@cuda:0", "9000@cuda:0=600"),
    ("7000@npu:0 6000@cuda:1=600", "7000@npu:0 6000@cuda:1=600"),
]
LOAD = re.compile(r"(\d+)(?:x(\d))?(?:/t(\d))?(?:@(\w+:\d))?(?:=(\d+))?(!)?")


@pytest.mark.parametrize(("loads", "expected"), FOOTPRINTS)
def test_footprint_is_of_what_a_version_ran_on(loads: str, expected: str) -> None:
    history = History()
    for number, load in enumerate(loads.split()):
        peak, instances, threads, device, measured, other = LOAD.fullmatch(load).groups()  # type: ignore[union-attr]
        use = replace(ON_CUDA, device=device or "", memory_bytes=measured and int(measured))
        devices = (use, ON_CPU) if device else ()
        workers = [f"w{number}-{instance}" for instance in range(int(instances or 1))]
        loaded = replace(model_loaded(*workers, mtime_ns=2 if other else 1), targets=devices)
        history.ask_load(f"L{number}", instances=len(workers), devices=(device,) if device else UNSET)
        history.start_load(f"L{number}")
        loaded = replace(loaded, threads=threads and int(threads), peak_memory_bytes=int(peak))
        history.add(loaded, f"L{number}")
        assert (history.serving().threads, history.serving().targets) == (loaded.threads, devices)
    found = history.model().footprints
    shown = [
        f"{each.peak_memory_bytes}"
        + (f"/t{each.threads}" if each.threads is not None else "")
        + (f"@{each.target_name}" if each.target_name is not UNSET else "")
        + (f"={each.target_bytes}" if each.target_bytes is not UNSET else "")
        + ("!" if each.files == (file(2),) else "")
        for each in found
    ]
    assert " ".join(shown) == expected


def test_footprints_of_latest_versions_outlive_the_model() -> None:
    history = History()
    for version in (1, 2, 3, 4, 5, 2, 6):
        history.load(f"V{version}-{history.seconds}", version=version)
    kept = [4, 5, 2, 6]
    assert len(kept) == MAX_FOOTPRINTS
    assert [each.version for each in history.model().footprints] == kept
    history.restart()
    history.unload("U", history.serving().load_job_id)
    history.ask_load("X", version=11)
    history.fail_load("X", version=11)
    assert [each.version for each in history.model().footprints] == kept


# What cannot concern a model changes nothing.

BODIES = json.loads(Path(__file__).with_name("bodies.json").read_text(encoding="ascii"))
NEVER_LATE = {"LoadRequested", "UnloadRequested", "ServerStarted", "ServerStopped", "NodeJoined", "LabelSet"}
LATE = [
    Unknown("Later", 1, {}),
    *(decode_event(BODIES[name]).data for name in sorted(TYPES.keys() - NEVER_LATE)),
]
"""Data of every type that concerns a pending job or nothing."""


@pytest.mark.parametrize("data", LATE, ids=lambda data: type(data).__name__)
@pytest.mark.parametrize(
    "facts",
    ["request start cancel_L", "load", "load crash", "request fail", "load request_unload finish_unload"],
)
def test_late_event_changes_no_model(facts: str, data: Data | Unknown) -> None:
    for job in ("L", "unknown", None):
        history = given(facts)
        before = history.model()
        history.add(data, job)
        assert history.model() == before


def test_request_that_names_another_job_waits_for_nothing() -> None:
    history = given("load")
    before = history.model()
    history.add(load_requested(), "L9", event_id="other")
    assert history.model() == before


@FEWER
@given_any(st.lists(drafts(), max_size=30))
def test_fold_of_any_events_stays_coherent(events: list[Draft]) -> None:
    history = History()
    for number, draft in enumerate(events, 1):
        history.state.apply(as_event(draft, number, number))
        assert_coherent(history)
        assert all(model.id in {"m", "n"} for model in history.state.models.values())
        active = history.state.active()
        assert active is None or active.phase in {LOADED, UNLOADING}


ASKED = [
    ("load", ("alice", None, None)),
    ("load restart restore", (SYSTEM, "alice", Cause.RESTART)),
    ("load restart restore restart restore", (SYSTEM, "alice", Cause.RESTART)),
    ("load crash request_recovery start_recovery finish_recovery", (SYSTEM, "alice", Cause.RECOVERY)),
    ("load restart load_again", ("alice", None, None)),
]


@pytest.mark.parametrize(("facts", "asked"), ASKED)
def test_reloaded_model_says_who_asked_for_it(facts: str, asked: tuple[object, ...]) -> None:
    found = given(facts).serving()
    assert (found.loaded_by, found.asked_by, found.brought_back) == asked


# Copies at nodes.


COPY_WORDS: dict[str, Callable[..., object]] = {
    "copy": lambda h, node: h.load_at(node, node.upper(), copies=3, cause=Cause.COPY),
    "copy_pair": lambda h, node: h.load_at(node, node.upper(), instances=2, copies=3, cause=Cause.COPY),
    "copy_v2": lambda h, node: h.load_at(node, "V2", version=2, copies=3, cause=Cause.COPY),
    "load": lambda h, node: h.load_at(node, "N", copies=3),
    "load_alone": lambda h, node: h.load_at(node, "N", copies=1),
    "lose": History.lose,
    "leave": History.leave,
    "kill": History.kill_worker,
    "replace": lambda h, load: h.ask_unload("S", load, cause=Cause.SWAP, node_id="a"),
    "unload": lambda h, load: (h.ask_unload("U", load, node_id="a"), h.start_unload("U")),
}


def copied(words: str) -> History:
    """Return a model whose first load A is at `a`, and what happens then; a copy has the name of its node."""
    history = History()
    for node in "abc":
        history.join(node)
    history.load_at("a", "A", copies=3, keep_alive_s=60)
    for word in words.split():
        step, _, given = word.partition(":")
        COPY_WORDS[step](history, given)
    return history


def loads_of(history: History) -> str:
    model = history.model()
    loads = " ".join(f"{each.load_job_id}{'!' * bool(each.degraded_at)}" for each in model.servings)
    return loads if model.phase is LOADED else f"{model.phase}: {loads}"


COPIES = [
    # what happens; its loads then, the first one first; an exclamation mark for a degraded one
    ("copy:b copy:c", "A B C"),
    ("copy:b copy:c copy_v2:b load:a", "N C V2"),
    *(
        (f"copy:b copy:c copy_v2:b load:a {end}", "C V2")
        for end in ("lose:a", "leave:a", "kill:w-N", "replace:N")
    ),
    ("copy:b lose:b", "A"),
    ("copy:b lose:b lose:a", "lost: A"),
    ("copy_pair:b kill:w-B-2", "A B!"),
    ("copy_pair:b kill:w-B-2 kill:w-B", "A"),
    ("copy:b copy:c load_alone:c", "N"),
    ("unload:A copy:b", "unloading: A"),  # the copy of a model that unloads is not its own
]


@pytest.mark.parametrize(("words", "loads"), COPIES)
def test_copies_serve_beside_the_first_load_and_after_it(words: str, loads: str) -> None:
    history = copied(words)
    model = history.model()
    assert loads_of(history) == loads
    assert not model.degraded
    assert model.loads == ()
    assert (model.copies is UNSET) == (len(model.servings) == 1)
    assert history.serving().parameters.wanted_copies == (1 if "alone" in words else 3)
    assert {each.degraded_at for each in model.servings} - {None} <= {at(history.seconds)}


def test_copy_serves_its_node_first() -> None:
    history = copied("copy:b copy:c")
    assert history.model().rank == copied("").model().rank
    seen = history.model().view_at("b")
    assert [each.load_job_id for each in seen.servings] == ["B", "A", "C"]
    assert seen.serving is not None
    assert (seen.serving.kept_as_is, seen.serving.parameters.keep_alive_s) == (True, None)
    assert history.model().view_as(seen) == seen
    assert history.model().view_at("d") is history.model()


def test_settings_of_a_copied_model_outlive_its_first_load() -> None:
    history = copied("copy:b")
    history.ask_load("S", copies=2, keep_alive_s=5)
    history.add(ModelSettingsChanged("B", 5, pinned=True, copies=2), "S")
    history.lose("a")
    (left,) = history.model().servings
    assert (left.load_job_id, left.parameters.keep_alive_s, left.parameters.copies) == ("B", 5, 2)


def test_version_that_a_swap_goes_on_to_is_held() -> None:
    history = copied("copy:b")
    history.load_at("a", "A2", version=2, copies=3)
    history.lose("a")
    model = history.model()
    assert (loads_of(history), model.target and model.target.load_job_id) == ("B", "A2")
    assert {each.load_job_id for each in model.held} == {"B", "A2"}
    assert "will be reloaded" in (find_use(history.state, model.id, 2) or "")


# Rows of batches

VERDICT = {"rows": "dependent", "rows_depend": "ReduceMean mixes them"}
BATCHED: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    # the parameters of a load, what its `ModelLoaded` says, and whether a later load is excused
    "earlier release": ({"max_batch_size": 8}, {}, True),
    "earlier release, without batches": ({"max_batch_size": 1}, {}, False),
    "earlier release, reloaded": ({"max_batch_size": 8}, {"rows_depend": "by runs"}, True),
    "earlier release, allowed": ({"max_batch_size": 8, "dependent_rows": "allow"}, {}, False),
    "this release": ({"max_batch_size": 8}, VERDICT, False),
    "this release, allowed": ({"max_batch_size": 8, "dependent_rows": "allow"}, VERDICT, False),
}


@pytest.mark.parametrize(("parameters", "said", "is_excused"), BATCHED.values(), ids=BATCHED)
def test_version_that_an_earlier_release_batched_is_remembered(
    parameters: dict[str, Any], said: dict[str, Any], *, is_excused: bool
) -> None:
    history = History()
    history.ask_load("L", **parameters)
    history.add(replace(model_loaded("w"), **said), "L")
    history.load("N", version=2)
    history.unload("U", "N", version=2)
    model = history.model()
    assert [model.may_lose_batches(version) for version in (1, 2)] == [is_excused, False]
    assert (model.joined_before is UNSET) == (not is_excused)


@pytest.mark.parametrize(
    ("rows", "allowed", "joins"),
    [
        (UNSET, UNSET, True),
        ("independent", UNSET, True),
        ("unknown", UNSET, False),
        ("unknown", "allow", True),
        ("dependent", "allow", True),
    ],
)
def test_requests_are_joined_if_rows_are_independent_or_allowed(
    rows: Any, allowed: Any, *, joins: bool
) -> None:
    for size in (0, 1, 8):
        history = History()
        history.ask_load("L", max_batch_size=size, dependent_rows=allowed)
        history.add(replace(model_loaded("w"), rows=rows), "L")
        assert history.serving().joins_requests == (joins and size > 1)
