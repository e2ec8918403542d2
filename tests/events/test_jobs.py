"""The fold of jobs: after these facts, a job reads so. `support.history.STEPS` explains the words."""

import pytest
from hypothesis import given as given_any
from hypothesis import strategies as st
from support.history import FEWER, MODEL, History, as_event, at, drafts, given, load_requested, model_loaded

from events.jobs import Failure, Job, JobKind, JobStatus, UnloadParameters, evolve_job
from events.types import (
    SYSTEM,
    AccessDenied,
    CancelRequested,
    Cause,
    Data,
    Draft,
    JobCancelled,
    LoadFailed,
    LoadParameters,
    LoadRequested,
    LoadStarted,
    ServerStopped,
    Unknown,
    UnloadRequested,
    UnloadStarted,
    WorkerExited,
)

PENDING, IN_PROGRESS, COMPLETED = JobStatus.PENDING, JobStatus.IN_PROGRESS, JobStatus.COMPLETED
FAILED, CANCELLED = JobStatus.FAILED, JobStatus.CANCELLED
BROKEN, STUCK = Failure("broken", "because"), Failure("stuck", "x")


def test_requested_load_is_pending_job_with_deadline() -> None:
    history = History()
    parameters = LoadParameters("high", 60, 5, 6, "auto", True, 3, 8, 90)
    history.add(LoadRequested.of(parameters, Cause.DEMAND), "L", version=4, by="alice")
    assert history.job("L") == Job(
        id="L",
        kind=JobKind.LOAD,
        model_id=MODEL,
        version=4,
        status=PENDING,
        created_at=at(1),
        created_position=1,
        position=1,
        requested_by="alice",
        cause=Cause.DEMAND,
        load=parameters,
        deadline_at=at(61),
    )


def test_requested_unload_is_pending_job_without_deadline() -> None:
    history = History()
    history.add(UnloadRequested(force=True, load_job_id="L", cause=Cause.IDLE), "U", by="bob")
    assert history.job("U") == Job(
        id="U",
        kind=JobKind.UNLOAD,
        model_id=MODEL,
        version=1,
        status=PENDING,
        created_at=at(1),
        created_position=1,
        position=1,
        requested_by="bob",
        cause=Cause.IDLE,
        unload=UnloadParameters(force=True, load_job_id="L"),
    )
    assert history.job("U").forced


STATUSES: list[tuple[str, str, JobStatus, Failure | None]] = [
    # facts, job, then: status, error
    ("request", "L", PENDING, None),
    ("request start", "L", IN_PROGRESS, None),
    ("load", "L", COMPLETED, None),
    ("request fail", "L", FAILED, BROKEN),
    ("request start fail", "L", FAILED, BROKEN),
    ("request cancel_L", "L", CANCELLED, None),
    ("request start cancel_L", "L", CANCELLED, None),
    ("request request_cancel_L", "L", PENDING, None),
    ("request start request_force", "L", IN_PROGRESS, None),
    ("request start restart", "L", PENDING, None),
    ("request restart", "L", PENDING, None),
    ("load restart", "L", COMPLETED, None),
    ("load request_unload", "U", PENDING, None),
    ("load request_unload start_unload", "U", IN_PROGRESS, None),
    ("load request_unload start_unload finish_unload", "U", COMPLETED, None),
    ("load request_unload finish_unload", "U", COMPLETED, None),
    ("load request_unload start_unload fail_unload", "U", FAILED, STUCK),
    ("load request_unload cancel_U", "U", CANCELLED, None),
    ("load request_unload start_unload restart", "U", PENDING, None),
]


@pytest.mark.parametrize(("facts", "job", "status", "error"), STATUSES)
def test_job_status(facts: str, job: str, status: JobStatus, error: Failure | None) -> None:
    found = given(facts).job(job)
    assert (found.status, found.error) == (status, error)
    assert found.ended == (status in {COMPLETED, FAILED, CANCELLED})
    assert (found.finished_at is not None) == found.ended


def test_job_keeps_times_and_latest_position() -> None:
    job = given("load").job("L")
    assert (job.created_at, job.started_at, job.finished_at) == (at(1), at(2), at(3))
    assert (job.created_position, job.position) == (1, 3)


@pytest.mark.parametrize("data", [CancelRequested(), WorkerExited(1, None, ())])
def test_event_of_job_moves_its_position(data: Data) -> None:
    history = given("request start")
    history.add(data, "L")
    assert (history.job("L").position, history.job("L").status) == (3, IN_PROGRESS)


ENDS: list[Data] = [JobCancelled(), LoadFailed("first", "first"), model_loaded()]
LATE: list[Data] = [
    *(LoadStarted(9), model_loaded(), LoadFailed("late", "late"), JobCancelled()),
    *(CancelRequested(), load_requested(), WorkerExited(1, None, ())),
]


@pytest.mark.parametrize("end", ENDS, ids=lambda data: data.TYPE)
def test_ended_job_never_changes(end: Data) -> None:
    history = given("request start")
    history.add(end, "L")
    ended = history.job("L")
    for data in LATE:
        late = as_event(Draft("x", data, SYSTEM, "L", MODEL, 1), 9, 9)
        assert evolve_job(ended, late) is ended


CANCELS: list[tuple[str, str, bool, bool]] = [
    # facts, job, then: whether a cancellation was requested, and whether it is in time
    ("request", "L", False, False),
    ("request request_cancel_L", "L", True, True),
    ("request start request_cancel_L", "L", True, True),
    ("request request_cancel_L start", "L", True, True),
    ("request request_cancel_L start finish", "L", True, False),
    ("load request_cancel_L", "L", False, False),
    ("request start request_cancel_L restart", "L", True, True),
    ("request request_cancel_L cancel_L", "L", True, False),
    ("load request_unload request_cancel_U", "U", True, True),
    ("load request_unload request_cancel_U start_unload", "U", True, False),
    ("load request_unload request_cancel_U start_unload restart", "U", True, False),
    ("load request_unload request_cancel_U restart", "U", True, True),
]


@pytest.mark.parametrize(("facts", "job", "requested", "in_time"), CANCELS)
def test_job_cancellation(facts: str, job: str, requested: bool, in_time: bool) -> None:  # noqa: FBT001
    found = given(facts).job(job)
    assert (found.cancel_requested, found.cancelling) == (requested, in_time)


@pytest.mark.parametrize("data", [ServerStopped(), AccessDenied("load", 1), Unknown("Later", 1, {})])
def test_unrelated_event_leaves_job_alone(data: Data | Unknown) -> None:
    history = given("request")
    before = history.job("L")
    history.add(data, "L")
    history.load("M")
    assert history.job("L") is before


@pytest.mark.parametrize("data", [load_requested(), UnloadRequested(False, "L", Cause.REQUEST)])
def test_request_with_other_id_or_without_model_makes_no_job(data: Data) -> None:
    history = History()
    history.add(data, "L", event_id="other")
    history.add(data, "L", of=None)
    assert not history.state.jobs


@pytest.mark.parametrize("data", [LoadStarted(1), model_loaded(), JobCancelled(), UnloadStarted()])
def test_outcome_without_request_makes_no_job(data: Data) -> None:
    history = History()
    history.add(data, "L")
    assert not history.state.jobs


def test_attempts_count_starts() -> None:
    history = given("request start restart")
    assert history.job("L").attempt == 1
    history.start_load("L", attempt=2)
    assert (history.job("L").attempt, history.job("L").status) == (2, IN_PROGRESS)
    assert given("load request_unload start_unload restart start_unload").job("U").attempt == 2


@pytest.mark.parametrize(
    ("facts", "deaths"),
    [
        ("request start restart", 1),
        ("request restart", 0),
        ("request start restart_cleanly", 0),
        ("request start restart start restart start restart", 3),
        ("request start restart restart", 1),
        ("request start restart start restart_cleanly", 1),
    ],
)
def test_server_deaths_charged_to_job(facts: str, deaths: int) -> None:
    assert given(facts).job("L").server_deaths == deaths


@pytest.mark.parametrize(
    ("timeout_s", "pauses_s", "deadline_at"),
    [
        (100, [], at(101)),  # requested at 1
        (100, [1_000], at(1_101)),
        (100, [50, 70], at(101 + 50 + 70)),
        (100, [0], at(101)),  # the clock says nothing about the pause
        (2**63 - 1, [50], "9999-12-31T23:59:59.999999Z"),
    ],
)
def test_deadline_moves_by_time_server_was_down(
    timeout_s: int, pauses_s: list[int], deadline_at: str
) -> None:
    history = History()
    history.ask_load("L", timeout_s=timeout_s)
    for pause_s in pauses_s:
        history.restart(down_s=pause_s)
    assert history.job("L").deadline_at == deadline_at


def test_restart_leaves_ended_jobs_and_unloads_without_deadline() -> None:
    history = given("load request_unload")
    ended = history.job("L")
    history.restart(down_s=50)
    assert history.job("L") is ended
    assert history.job("U").deadline_at is None


@FEWER
@given_any(st.lists(drafts(), max_size=25))
def test_job_keeps_its_request_and_its_end(events: list[Draft]) -> None:
    history = History()
    for number, draft in enumerate(events, 1):
        before = dict(history.state.jobs)
        history.state.apply(as_event(draft, number, number))
        for key, job in before.items():
            after = history.state.jobs[key]
            if after.created_position == job.created_position:
                asked = (job.load, job.unload, job.kind, job.cause)
                assert (after.load, after.unload, after.kind, after.cause) == asked
                assert after is job or not job.ended
