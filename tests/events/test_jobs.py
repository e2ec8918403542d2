"""The fold of jobs, as tables: given these facts, when one more comes, the job reads so."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.events import FEWER, MODEL, History, as_event, at, drafts, load_requested, model_loaded

from events.jobs import Failure, Job, JobKind, JobStatus, LoadParameters, UnloadParameters, evolve_job
from events.types import (
    SYSTEM,
    AccessDenied,
    CancelRequested,
    Cause,
    Data,
    Draft,
    JobCancelled,
    LoadFailed,
    LoadRequested,
    LoadStarted,
    ModelUnloaded,
    ServerStopped,
    Unknown,
    UnloadFailed,
    UnloadRequested,
    UnloadStarted,
    WorkerExited,
)

Told = Callable[[History], object]


def told(*facts: Told) -> History:
    history = History()
    for fact in facts:
        fact(history)
    return history


def add(data: Data, job: str) -> Told:
    return lambda history: history.add(data, job)


ASKED: Told = lambda history: history.ask_load("L")  # noqa: E731 - reads as a row of the tables
STARTED: Told = lambda history: history.start_load("L")  # noqa: E731
RESTARTED: Told = lambda history: history.restart()  # noqa: E731
STOPPED_AND_RESTARTED: Told = lambda history: history.restart(unclean=False)  # noqa: E731
CANCEL: Told = lambda history: history.ask_cancel("L")  # noqa: E731
CANCEL_UNLOAD: Told = lambda history: history.ask_cancel("U")  # noqa: E731
LOADED: Told = lambda history: history.load("L")  # noqa: E731
ASKED_TO_UNLOAD: Told = lambda history: history.ask_unload("U", "L")  # noqa: E731


def test_a_requested_load_is_a_pending_job_with_the_id_of_its_event() -> None:
    history = History()
    data = LoadRequested(
        "high", 60, 5, 6, "auto", pinned=True, instances=3, cause=Cause.DEMAND, max_batch_size=8,
        max_queue_delay_us=90,
    )  # fmt: skip
    history.add(data, "L", version=4, by="alice")
    assert history.job("L") == Job(
        id="L",
        kind=JobKind.LOAD,
        model_id=MODEL,
        version=4,
        status=JobStatus.PENDING,
        created_at=at(1),
        created_position=1,
        position=1,
        requested_by="alice",
        cause=Cause.DEMAND,
        load=LoadParameters("high", 60, 5, 6, "auto", True, 3, 8, 90),
        deadline_at=at(61),
    )


def test_a_requested_unload_is_a_pending_job_without_a_deadline() -> None:
    history = History()
    history.add(UnloadRequested(force=True, load_job_id="L", cause=Cause.IDLE), "U", by="bob")
    assert history.job("U") == Job(
        id="U",
        kind=JobKind.UNLOAD,
        model_id=MODEL,
        version=1,
        status=JobStatus.PENDING,
        created_at=at(1),
        created_position=1,
        position=1,
        requested_by="bob",
        cause=Cause.IDLE,
        unload=UnloadParameters(force=True, load_job_id="L"),
    )
    assert history.job("U").forced


STATUSES: list[tuple[str, list[Told], str, JobStatus, Failure | None]] = [
    ("requested", [ASKED], "L", JobStatus.PENDING, None),
    ("started", [ASKED, STARTED], "L", JobStatus.IN_PROGRESS, None),
    ("loaded", [LOADED], "L", JobStatus.COMPLETED, None),
    (
        "failed before it started",
        [ASKED, add(LoadFailed("timeout", "waited"), "L")],
        "L",
        JobStatus.FAILED,
        Failure("timeout", "waited"),
    ),
    (
        "failed",
        [ASKED, STARTED, add(LoadFailed("invalid_model", "no"), "L")],
        "L",
        JobStatus.FAILED,
        Failure("invalid_model", "no"),
    ),
    ("cancelled while pending", [ASKED, add(JobCancelled(), "L")], "L", JobStatus.CANCELLED, None),
    ("cancelled amid", [ASKED, STARTED, add(JobCancelled(), "L")], "L", JobStatus.CANCELLED, None),
    ("only asked to be cancelled", [ASKED, add(CancelRequested(), "L")], "L", JobStatus.PENDING, None),
    (
        "its worker died",
        [ASKED, STARTED, add(WorkerExited(1, None, ()), "L")],
        "L",
        JobStatus.IN_PROGRESS,
        None,
    ),
    ("interrupted by a start of the server", [ASKED, STARTED, RESTARTED], "L", JobStatus.PENDING, None),
    ("pending at a start of the server", [ASKED, RESTARTED], "L", JobStatus.PENDING, None),
    ("ended before a start of the server", [LOADED, RESTARTED], "L", JobStatus.COMPLETED, None),
    ("unload requested", [LOADED, ASKED_TO_UNLOAD], "U", JobStatus.PENDING, None),
    (
        "unload started",
        [LOADED, ASKED_TO_UNLOAD, add(UnloadStarted(), "U")],
        "U",
        JobStatus.IN_PROGRESS,
        None,
    ),
    ("unloaded", [LOADED, ASKED_TO_UNLOAD, add(ModelUnloaded(1, 2, 3), "U")], "U", JobStatus.COMPLETED, None),
    (
        "unload failed",
        [LOADED, ASKED_TO_UNLOAD, add(UnloadStarted(), "U"), add(UnloadFailed("stuck", "x"), "U")],
        "U",
        JobStatus.FAILED,
        Failure("stuck", "x"),
    ),
    (
        "unload interrupted by a start of the server",
        [LOADED, ASKED_TO_UNLOAD, add(UnloadStarted(), "U"), RESTARTED],
        "U",
        JobStatus.PENDING,
        None,
    ),
    ("a forced unload beside it", [ASKED, STARTED, ASKED_TO_UNLOAD], "L", JobStatus.IN_PROGRESS, None),
]


@pytest.mark.parametrize(
    ("facts", "job", "status", "error"), [row[1:] for row in STATUSES], ids=[r[0] for r in STATUSES]
)
def test_status_of_a_job_after(facts: list[Told], job: str, status: JobStatus, error: Failure | None) -> None:
    found = told(*facts).job(job)
    assert (found.status, found.error) == (status, error)
    assert found.ended == (status in {JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED})
    assert (found.finished_at is not None) == found.ended


def test_a_job_tells_when_it_began_and_ended_and_its_latest_position() -> None:
    history = told(LOADED)
    job = history.job("L")
    assert (job.created_at, job.started_at, job.finished_at) == (at(1), at(2), at(3))
    assert (job.created_position, job.position) == (1, 3)


@pytest.mark.parametrize("data", [CancelRequested(), WorkerExited(1, None, ())])
def test_a_fact_about_a_job_moves_its_position_even_if_its_status_stays(data: Data) -> None:
    assert told(ASKED, add(data, "L")).job("L").position == 2


@pytest.mark.parametrize(
    "data",
    [
        LoadStarted(9),
        model_loaded(),
        LoadFailed("late", "late"),
        JobCancelled(),
        CancelRequested(),
        load_requested(),
        WorkerExited(1, None, ()),
    ],
    ids=lambda data: data.TYPE,
)
@pytest.mark.parametrize(
    "end", [JobCancelled(), LoadFailed("first", "first"), model_loaded()], ids=lambda d: d.TYPE
)
def test_a_job_that_has_ended_never_changes(end: Data, data: Data) -> None:
    ended = told(ASKED, STARTED, add(end, "L")).job("L")
    late = as_event(Draft("x", data, SYSTEM, "L", MODEL, 1), 9, 9)
    assert evolve_job(ended, late) is ended


CANCELS: list[tuple[str, list[Told], str, bool, bool]] = [
    # facts, job, whether it was asked for, whether it is in time
    ("a load that nobody asked to cancel", [ASKED], "L", False, False),
    ("a pending load", [ASKED, CANCEL], "L", True, True),
    ("a load under way", [ASKED, STARTED, CANCEL], "L", True, True),
    ("a load that began meanwhile", [ASKED, CANCEL, STARTED], "L", True, True),
    ("a load that ended meanwhile", [ASKED, CANCEL, STARTED, add(model_loaded(), "L")], "L", True, False),
    ("a load that had ended", [LOADED, CANCEL], "L", False, False),
    ("a load, and the server died", [ASKED, STARTED, CANCEL, RESTARTED], "L", True, True),
    ("a load that was cancelled", [ASKED, CANCEL, add(JobCancelled(), "L")], "L", True, False),
    ("a pending unload", [LOADED, ASKED_TO_UNLOAD, CANCEL_UNLOAD], "U", True, True),
    (
        "an unload that began meanwhile",
        [LOADED, ASKED_TO_UNLOAD, CANCEL_UNLOAD, add(UnloadStarted(), "U")],
        "U",
        True,
        False,
    ),
    (
        "an unload that had begun when the server died",
        [LOADED, ASKED_TO_UNLOAD, CANCEL_UNLOAD, add(UnloadStarted(), "U"), RESTARTED],
        "U",
        True,
        False,
    ),
    ("an unload, and the server died", [LOADED, ASKED_TO_UNLOAD, CANCEL_UNLOAD, RESTARTED], "U", True, True),
]


@pytest.mark.parametrize(
    ("facts", "job", "cancel"), [(*row[1:3], row[3:]) for row in CANCELS], ids=[row[0] for row in CANCELS]
)
def test_cancel_of(facts: list[Told], job: str, cancel: tuple[bool, bool]) -> None:
    found = told(*facts).job(job)
    assert (found.cancel_requested, found.cancelling) == cancel


@pytest.mark.parametrize("data", [ServerStopped(), AccessDenied("load", 1), Unknown("Later", 1, {})])
def test_what_does_not_concern_a_job_leaves_it_alone(data: Data | Unknown) -> None:
    history = told(ASKED)
    before = history.job("L")
    history.add(data, "L")
    assert history.job("L") is before


def test_a_fact_about_another_job_leaves_this_one_alone() -> None:
    history = told(ASKED)
    before = history.job("L")
    history.load("M")
    assert history.job("L") is before


@pytest.mark.parametrize("data", [load_requested(), UnloadRequested(False, "L", Cause.REQUEST)])
def test_a_request_whose_id_is_not_its_jobs_makes_no_job(data: Data) -> None:
    history = History()
    history.add(data, "L", event_id="other")
    assert not history.state.jobs


@pytest.mark.parametrize("data", [load_requested(), UnloadRequested(False, "L", Cause.REQUEST)])
def test_a_request_without_a_model_makes_no_job(data: Data) -> None:
    history = History()
    history.add(data, "L", of=None)
    assert not history.state.jobs


@pytest.mark.parametrize("data", [LoadStarted(1), model_loaded(), JobCancelled(), UnloadStarted()])
def test_an_outcome_of_a_job_that_nobody_requested_makes_no_job(data: Data) -> None:
    history = History()
    history.add(data, "L")
    assert not history.state.jobs


def test_the_attempt_is_that_of_the_last_start() -> None:
    history = told(ASKED, STARTED, RESTARTED)
    assert history.job("L").attempt == 1
    history.start_load("L", attempt=2)
    assert (history.job("L").attempt, history.job("L").status) == (2, JobStatus.IN_PROGRESS)


def test_the_attempts_of_an_unload_are_counted() -> None:
    history = told(LOADED, ASKED_TO_UNLOAD, add(UnloadStarted(), "U"), RESTARTED, add(UnloadStarted(), "U"))
    assert history.job("U").attempt == 2


DEATHS: list[tuple[str, list[Told], int]] = [
    ("in progress at an unclean death", [ASKED, STARTED, RESTARTED], 1),
    ("pending at an unclean death", [ASKED, RESTARTED], 0),
    ("in progress at an orderly stop", [ASKED, STARTED, STOPPED_AND_RESTARTED], 0),
    ("at three unclean deaths", [ASKED, STARTED, RESTARTED, STARTED, RESTARTED, STARTED, RESTARTED], 3),
    ("not begun again before the second death", [ASKED, STARTED, RESTARTED, RESTARTED], 1),
    (
        "at an unclean death, then an orderly stop",
        [ASKED, STARTED, RESTARTED, STARTED, STOPPED_AND_RESTARTED],
        1,
    ),
]


@pytest.mark.parametrize(("facts", "deaths"), [row[1:] for row in DEATHS], ids=[row[0] for row in DEATHS])
def test_deaths_of_the_server_charged_to_a_job(facts: list[Told], deaths: int) -> None:
    assert told(*facts).job("L").server_deaths == deaths


def test_after_a_restart_a_load_has_the_time_that_was_left_at_the_last_event_before_it() -> None:
    history = History()
    history.ask_load("L", timeout_s=100)  # at 1, so until 101
    history.start_load("L")  # at 2
    history.restart(down_s=1_000)  # at 1002: 99 s were left
    assert history.job("L").deadline_at == at(1_002 + 99)


def test_each_restart_moves_the_deadline_by_its_own_pause() -> None:
    history = History()
    history.ask_load("L", timeout_s=100)
    history.restart(down_s=50)
    history.restart(down_s=70)
    assert history.job("L").deadline_at == at(101 + 50 + 70)


def test_a_restart_whose_clock_says_nothing_about_the_pause_leaves_the_deadline() -> None:
    history = History()
    history.ask_load("L", timeout_s=100)
    history.restart(down_s=0)
    assert history.job("L").deadline_at == at(101)


def test_a_restart_leaves_ended_jobs_and_the_lack_of_a_deadline_alone() -> None:
    history = told(LOADED, ASKED_TO_UNLOAD)
    ended = history.job("L")
    history.restart(down_s=50)
    assert history.job("L") is ended
    assert history.job("U").deadline_at is None


def test_a_deadline_beyond_the_calendar_is_its_last_moment() -> None:
    history = History()
    history.ask_load("L", timeout_s=2**63 - 1)
    history.restart(down_s=50)
    assert history.job("L").deadline_at == "9999-12-31T23:59:59.999999Z"


@FEWER
@given(st.lists(drafts(), max_size=25))
def test_a_job_never_leaves_its_end_and_keeps_what_it_was_asked_for(told_drafts: list[Draft]) -> None:
    history = History()
    for number, draft in enumerate(told_drafts, 1):
        before = dict(history.state.jobs)
        history.state.apply(as_event(draft, number, number))
        for key, job in before.items():
            after = history.state.jobs[key]
            if after.created_position == job.created_position:
                assert (after.load, after.unload, after.kind, after.cause) == (
                    job.load,
                    job.unload,
                    job.kind,
                    job.cause,
                )
                assert after is job or not job.ended
