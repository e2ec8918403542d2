"""The fold of models: after these facts, a model reads so. `support.history.STEPS` explains the words."""

import pytest
from hypothesis import given as given_any
from hypothesis import strategies as st
from msgspec.structs import replace
from support.history import (
    FEWER,
    MODEL,
    STEPS,
    History,
    as_event,
    at,
    drafts,
    file,
    given,
    load_requested,
    model_loaded,
)

from events.jobs import Failure, JobKind
from events.models import (
    INCIDENT_WINDOW_S,
    MAX_FOOTPRINTS,
    Footprint,
    Model,
    ModelState,
    PendingLoad,
    Serving,
)
from events.types import (
    AccessDenied,
    CancelRequested,
    Cause,
    Data,
    Draft,
    JobCancelled,
    LoadFailed,
    LoadParameters,
    LoadStarted,
    ModelUnloaded,
    Prepared,
    ServerStopped,
    Unknown,
    UnloadFailed,
    UnloadStarted,
)

UNLOADED, LOADING, LOADED = ModelState.UNLOADED, ModelState.LOADING, ModelState.LOADED
UNLOADING, FAILED, LOST = ModelState.UNLOADING, ModelState.FAILED, ModelState.LOST

STATES: list[tuple[str, ModelState, int | None]] = [
    # facts, then: state, version
    ("request", UNLOADED, None),
    ("request start", LOADING, 1),
    ("load", LOADED, 1),
    ("request start fail", FAILED, 1),
    ("request fail", FAILED, 1),
    ("request cancel_L", UNLOADED, None),
    ("request start cancel_L", UNLOADED, 1),
    ("request start fail request_again start_again", LOADING, 1),
    ("request start fail load_again", LOADED, 1),
    ("request start fail request_again cancel_L3", FAILED, 1),
    ("load request_unload", LOADED, 1),
    ("load request_unload start_unload", UNLOADING, 1),
    ("load request_unload start_unload finish_unload", UNLOADED, 1),
    ("load request_unload finish_unload", UNLOADED, 1),
    ("load request_unload start_unload fail_unload", LOADED, 1),
    ("load request_unload cancel_U", LOADED, 1),
    ("load request_unload start_unload cancel_U", LOADED, 1),
    ("load request_v2", LOADED, 1),
    ("load request_v2 start_v2", LOADED, 1),
    ("load load_v2", LOADED, 2),
    ("load request_v2 start_v2 fail_v2", LOADED, 1),
    ("load request_v2 start_v2 cancel_L2", LOADED, 1),
    ("load load_v2 request_drain start_drain", LOADED, 2),
    ("load load_v2 drain", LOADED, 2),
    ("load load_v2 request_drain start_drain fail_drain", LOADED, 2),
    ("load request_v2 start_v2 request_unload_v2", LOADED, 1),
    ("load request_v2 start_v2 request_unload_v2 finish_v2 start_unload", UNLOADING, 2),
    ("load request_v2 start_v2 request_unload_v2 finish_v2 start_unload finish_unload", UNLOADED, 2),
    ("load request_v2 start_v2 request_unload_v2 fail_v2 start_unload finish_unload", UNLOADED, 2),
    ("load request_unload start_unload request_force", UNLOADING, 1),
    ("load request_unload start_unload request_force start_force", UNLOADING, 1),
    ("load request_unload start_unload request_force cancel_F", UNLOADING, 1),
    ("load request_unload start_unload request_force finish_unload finish_force", UNLOADED, 1),
    ("request start request_force cancel_L finish_force", UNLOADED, 1),
    ("load request_v2 start_v2 request_force cancel_L2 finish_force", UNLOADED, 2),
    ("load request_unload start_unload request_again", UNLOADING, 1),
    ("load request_unload start_unload request_again finish_unload start_again", LOADING, 1),
    ("load crash", LOST, 1),
    ("load forkserver_exit", LOST, 1),
    ("load crash request_recovery start_recovery", LOADING, 1),
    ("load crash request_recovery start_recovery finish_recovery", LOADED, 1),
    ("load crash request_recovery start_recovery fail_recovery", LOST, 1),
    ("load crash request_recovery start_recovery forkserver_fails_recovery", LOST, 1),
    ("load crash request_recovery start_recovery cancel_R", LOST, 1),
    ("load crash request_recovery crash_loop_recovery", FAILED, 1),
    ("load crash request_v2 start_v2 fail_v2", LOST, 1),
    ("load crash request_v2 start_v2 crash_loop_v2", LOST, 1),
    ("load crash request_again fail_again", FAILED, 1),
    ("load crash load_v2", LOADED, 2),
    ("load request_v2 start_v2 crash", LOADING, 1),
    ("load request_v2 start_v2 crash fail_v2", LOST, 1),
    ("load request_unload start_unload crash", UNLOADING, 1),
    ("load crash request_unload finish_unload", UNLOADED, 1),
    ("load stop_server", LOADED, 1),
    ("load restart", LOST, 1),
    ("load_pair crash_1", LOADED, 1),
    ("load_pair crash_1 restart", LOST, 1),
    ("load_pair crash_1 request_unload_pair finish_unload", UNLOADED, 1),
    ("load restart restart", LOST, 1),
    ("load request_unload start_unload restart", LOST, 1),
    ("load request_unload start_unload restart finish_unload", UNLOADED, 1),
    ("request start restart", UNLOADED, 1),
    ("request start fail request_again start_again restart", FAILED, 1),
    ("load request_v2 start_v2 restart", LOST, 1),
    ("load request_v2 start_v2 restart start_v2 finish_v2", LOADED, 2),
    ("load load_v2 request_drain start_drain restart finish_drain", LOST, 2),
    ("load request_unload finish_unload restart", UNLOADED, 1),
    ("request fail restart", FAILED, 1),
    ("load crash restart", LOST, 1),
    ("load request_in_place request_drain", LOADED, 1),
    ("load request_in_place request_drain start_drain", UNLOADING, 1),
    ("load request_in_place drain", LOADING, 1),
    ("load request_in_place drain start_v2", LOADING, 2),
    ("load request_in_place drain start_v2 finish_v2", LOADED, 2),
    ("load request_in_place drain start_v2 fail_v2", LOST, 1),
    ("load request_in_place drain fail_v2", LOST, 1),
    ("load request_in_place drain forkserver_fails_v2", LOST, 1),
    ("load request_in_place drain start_v2 cancel_L2", LOST, 1),
    ("load request_in_place drain request_again fail_v2", LOADING, 2),
    ("load request_in_place drain fail_v2 load_again", LOADED, 1),
    ("load request_in_place drain request_again fail_v2 fail_again", LOST, 1),
    ("load request_in_place drain start_v2 restart", LOADING, 2),
    ("load request_in_place drain restart fail_v2", LOST, 1),
    ("load request_in_place drain request_unload_v2 finish_v2 finish_unload", UNLOADED, 2),
    ("load request_in_place drain request_unload_v2 fail_v2", LOST, 1),
    ("load request_in_place drain request_unload_v2 fail_v2 start_unload finish_unload", UNLOADED, 2),
    ("load request_in_place drain request_force_v2 cancel_L2 finish_force", UNLOADED, 1),
    ("load request_in_place drain fail_v2 request_return start_recovery", LOADING, 1),
    ("load request_in_place drain fail_v2 request_return start_recovery finish_recovery", LOADED, 1),
    ("load request_in_place drain fail_v2 request_return fail_recovery", LOST, 1),
    ("load request_in_place drain fail_v2 request_return crash_loop_recovery", FAILED, 1),
    ("load request_in_place drain drain_again", LOADING, 1),
    ("load request_in_place request_drain start_drain cancel_L2 finish_drain", LOST, 1),
    ("load request_in_place request_drain start_drain fail_v2", UNLOADING, 1),
    ("load request_in_place request_drain crash", LOST, 1),
    ("load request_in_place request_drain crash finish_drain", LOADING, 1),
    ("load request_in_place request_drain start_drain restart", LOST, 1),
    ("load request_in_place request_drain start_drain restart finish_drain", LOADING, 1),
    ("load request_in_place request_drain start_drain request_force cancel_L2 finish_force", UNLOADED, 1),
    (
        "load request_in_place request_drain start_drain request_force cancel_L2 finish_force finish_drain",
        UNLOADED,
        1,
    ),
    ("load crash request_recovery request_cancel_R cancel_R", UNLOADED, 1),
    ("load restart request_restore request_cancel_R cancel_R", UNLOADED, 1),
    (
        "load request_in_place drain fail_v2 request_return start_recovery request_cancel_R cancel_R",
        UNLOADED,
        1,
    ),
    ("load crash request_again request_cancel_L3 cancel_L3", LOST, 1),
    ("load crash request_unload request_cancel_U cancel_U", LOST, 1),
    ("load crash request_recovery timeout_recovery", LOST, 1),
    ("load crash request_recovery no_memory_recovery", FAILED, 1),
    ("load restart request_restore too_many_recovery", FAILED, 1),
    ("load crash request_again timeout_again", LOST, 1),
    ("load crash request_again no_memory_again", LOST, 1),
    ("load crash request_again start_again timeout_again", FAILED, 1),
]
NEXT_VERSIONS = {"load request_v2 start_v2": 2, "load request_v2 start_v2 request_unload_v2": 2}
"""All others have none."""


@pytest.mark.parametrize(("facts", "state", "version"), STATES)
def test_model_state(facts: str, state: ModelState, version: int | None) -> None:
    history = given(facts)
    model = history.model()
    assert (model.state, model.version, model.next_version) == (state, version, NEXT_VERSIONS.get(facts))
    assert_coherent(history)
    assert {load.job_id for load in model.loads} == {
        job.id for job in history.state.unended(MODEL) if job.kind is JobKind.LOAD
    }


def assert_coherent(history: History) -> None:
    for model in history.state.models.values():
        if model.previous is not None:
            assert (model.phase, model.serving, model.lost_by) == (UNLOADED, None, None)
            assert model.loads  # one of which replaces it, or the model is lost
        kept = model.phase in {LOADED, UNLOADING, LOST}
        assert (model.serving is not None) == kept
        assert (model.rank is not None) == (kept or model.previous is not None)
        assert model.phase is not LOADING
        assert model.phase is LOADED or not model.degraded
        assert (model.lost_by is not None) == (model.lost_at is not None) == (model.phase is LOST)


def serving(model: Model) -> Serving:
    assert model.serving is not None
    return model.serving


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
        footprints=(Footprint(3, (file(),), 1_000),),
    )


def test_loads_wait_in_request_order() -> None:
    history = given("request request_v2 start")
    assert history.model().loads == (PendingLoad("L", 1, started=True), PendingLoad("L2", 2))


BROKEN = Failure("broken", "because")


@pytest.mark.parametrize(
    ("facts", "error"),
    [
        ("request start fail", BROKEN),
        ("load request_v2 start_v2 fail_v2", BROKEN),
        ("load request_in_place drain fail_v2", BROKEN),
        ("load crash", Failure("worker_died", "its worker was killed by signal 9")),
        ("load crash request_recovery fail_recovery", BROKEN),
        ("request start fail load_again", None),
        ("load request_v2 start_v2 fail_v2 request_unload finish_unload", None),
        ("load", None),
    ],
)
def test_error_stays_until_load_or_unload(facts: str, error: Failure | None) -> None:
    assert given(facts).model().error == error


# An unload belongs to the model only if it ends its present load.


@pytest.mark.parametrize(
    ("facts", "own"),
    [
        ("load request_unload", ("U",)),
        ("load request_v2 request_unload_v2", ("U",)),
        ("load request_unload request_force", ("U", "F")),
        ("load load_v2 request_drain", ()),
        ("load request_unload_unknown", ()),
        ("load request_unload finish_unload", ()),
        ("load request_unload cancel_U", ()),
        ("request_unload", ()),
    ],
)
def test_unloads_of_present_load(facts: str, own: tuple[str, ...]) -> None:
    assert given(facts).model().unloads == own


@pytest.mark.parametrize("end", ["start_drain", "finish_drain", "fail_drain", "cancel_S"])
def test_drain_of_old_version_leaves_new_one(end: str) -> None:
    history = given("load load_v2 request_drain")
    before = history.model()
    STEPS[end](history)
    assert history.model() == before


# Incidents: deaths and failed recoveries within ten minutes.


@pytest.mark.parametrize(
    ("facts", "incidents"),
    [
        ("load crash", 1),
        ("load forkserver_exit", 0),
        ("load restart", 0),
        ("load crash request_recovery start_recovery fail_recovery", 2),
        ("load crash request_recovery start_recovery forkserver_fails_recovery", 1),
        ("load crash request_recovery start_recovery finish_recovery", 1),
        ("load crash request_recovery start_recovery finish_recovery crash_again", 2),
        ("load crash load_again", 0),
        ("load crash request_unload finish_unload", 0),
        ("load crash_unknown", 0),
        ("load request_unload start_unload crash", 0),
        ("load restart restore", 0),
        ("load restart request_restore fail_recovery", 1),
        ("load_pair crash_1", 1),
        ("load_pair crash_1 crash_2", 1),
        ("load_pair crash_1 crash_2_later", 1),  # the first is forgotten; this is an incident of its own
        ("load_pair forkserver_exit_1 forkserver_exit_2", 0),
        ("load_pair crash_1 forkserver_exit_2", 1),
        ("load_pair forkserver_exit_1 crash_2", 0),
        ("load_pair crash_1 request_recovery start_recovery fail_recovery", 2),
        ("load_pair crash_1 request_recovery start_recovery forkserver_fails_recovery", 1),
        ("load_pair crash_1 request_recovery start_recovery fail_recovery crash_2", 2),
        ("load_pair crash_1 request_v2 start_v2 fail_v2", 1),
        ("load_pair crash_1 recover_pair", 1),
        ("load_pair crash_1 recover_pair crash_1_again", 2),
        ("load_pair crash_1 load_again", 0),
        ("load_pair request_unload_pair start_unload crash_1", 0),
    ],
)
def test_incidents_charged_to_model(facts: str, incidents: int) -> None:
    assert len(given(facts).model().incidents) == incidents


@pytest.mark.parametrize(("pause_s", "incidents"), [(INCIDENT_WINDOW_S, 2), (INCIDENT_WINDOW_S + 1, 1)])
def test_incidents_expire_after_ten_minutes(pause_s: int, incidents: int) -> None:
    history = given("load crash request_recovery start_recovery finish_recovery")
    history.kill_worker("w-R", after_s=pause_s - 3)  # three facts came after the first death
    assert len(history.model().incidents) == incidents


def test_model_with_one_instance_left_is_degraded() -> None:
    history = given("load_pair")
    assert not history.model().degraded
    history.kill_worker("P1")
    model = history.model()
    assert (model.state, model.degraded, model.lost_at) == (LOADED, True, None)
    assert model.error == Failure("worker_died", "its worker was killed by signal 9; 1 of 2 are left")
    assert (serving(model).worker_ids, serving(model).degraded_at) == (("P2",), at(4))
    assert (serving(model).memory_bytes, model.incidents) == (1_000, (at(4),))
    history.kill_worker("P1")
    assert history.model() == model
    history.kill_worker("P2")
    model = history.model()
    assert (model.state, model.degraded, model.lost_at) == (LOST, False, at(6))
    assert model.error == Failure("worker_died", "its worker was killed by signal 9")


def test_recovery_makes_degraded_model_whole() -> None:
    model = given("load_pair crash_1 recover_pair").model()
    assert (model.state, model.degraded, model.error) == (LOADED, False, None)
    assert serving(model).worker_ids == ("R1", "R2")


@pytest.mark.parametrize(
    ("facts", "kept_as_is"),
    [
        ("cancel_R", False),  # by the system
        ("request_cancel_R cancel_R", True),
        ("request_cancel_R cancel_R load_again", False),
        ("no_memory_recovery", True),
    ],
)
def test_degraded_model_is_kept_after_cancelled_repair(facts: str, kept_as_is: bool) -> None:  # noqa: FBT001
    model = given(f"load_pair crash_1 request_recovery {facts}").model()
    assert serving(model).kept_as_is is kept_as_is
    if "load_again" not in facts:
        assert len(model.incidents) == 1


@pytest.mark.parametrize(
    ("facts", "by", "when"),
    [
        ("load crash", Cause.RECOVERY, 4),
        ("load restart", Cause.RESTART, 4),
        ("load crash restart", Cause.RESTART, 4),
        ("load restart request_recovery fail_recovery", Cause.RECOVERY, 6),
        ("load crash request_recovery start_recovery finish_recovery", None, None),
        ("load crash request_unload finish_unload", None, None),
        ("load crash request_recovery crash_loop_recovery", None, None),
    ],
)
def test_lost_model_names_cause_and_time(facts: str, by: Cause | None, when: int | None) -> None:
    model = given(facts).model()
    assert (model.lost_by, model.lost_at) == (by, None if when is None else at(when))


# A swap in place ends the old version first.


def test_drained_version_is_remembered_until_new_one_loads() -> None:
    before = given("load").model()
    gap = given("load request_in_place drain").model()
    assert (gap.previous, gap.serving, gap.rank) == (before.serving, None, before.rank)
    assert given("load request_in_place drain start_v2 finish_v2").model().previous is None


@pytest.mark.parametrize("end", ["start_v2 fail_v2", "start_v2 cancel_L2", "restart fail_v2"])
def test_drained_version_is_lost_when_new_one_fails(end: str) -> None:
    before, model = given("load").model(), given(f"load request_in_place drain {end}").model()
    assert (model.serving, model.previous, model.rank) == (before.serving, None, before.rank)
    assert (model.lost_by, model.lost_at, model.incidents) == (Cause.SWAP, at(9), ())


# Footprints: what a version took.


def footprints(history: History) -> list[tuple[int, int, str | None]]:
    return [(each.version, each.peak_memory_bytes, each.form) for each in history.model().footprints]


def test_footprint_is_share_of_one_worker_rounded_up() -> None:
    history = History()
    history.ask_load("L", instances=3)
    history.start_load("L")
    history.add(model_loaded("w1", "w2", "w3"), "L")  # 2,000 bytes together
    assert footprints(history) == [(1, 667, None)]


def test_footprint_keeps_highest_peak_per_prepared_form() -> None:
    history = given("load")
    form = Prepared("optimised", "ab" * 32)
    peaks = [("L4", None, 9_000), ("L5", None, 500), ("L6", form, 300), ("L7", None, 500), ("L8", form, 200)]
    for load, prepared, peak in peaks:
        history.ask_load(load)
        history.start_load(load)
        history.add(replace(model_loaded(f"w-{load}"), prepared=prepared, peak_memory_bytes=peak), load)
    assert footprints(history) == [(1, 9_000, None), (1, 300, "optimised")]
    assert serving(history.model()).prepared == form
    history.load("L9", mtime_ns=2)  # other files: the footprints of those before are forgotten
    assert history.model().footprints == (Footprint(1, (file(2),), 2_000),)


def test_footprints_of_latest_versions_outlive_the_model() -> None:
    history = History()
    for version in (1, 2, 3, 4, 5, 6, 7, 8, 9, 2, 10):
        history.load(f"V{version}-{history.seconds}", version=version)
    kept = [4, 5, 6, 7, 8, 9, 2, 10]
    assert len(kept) == MAX_FOOTPRINTS
    assert [each.version for each in history.model().footprints] == kept
    history.restart()
    history.unload("U", serving(history.model()).load_job_id)
    history.ask_load("X", version=11)
    history.fail_load("X", version=11)
    assert [each.version for each in history.model().footprints] == kept


# What cannot concern a model changes nothing.

LATE: list[Data | Unknown] = [
    LoadStarted(1),
    model_loaded("late"),
    LoadFailed("late", "late"),
    UnloadStarted(),
    ModelUnloaded(1, 1, 1),
    UnloadFailed("late", "late"),
    JobCancelled(),
    CancelRequested(),
    AccessDenied("x", 1),
    ServerStopped(),
    Unknown("Later", 1, {}),
]


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


def test_request_that_is_repeated_or_names_another_job_waits_once() -> None:
    assert given("request request").model().loads == (PendingLoad("L", 1),)
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
