"""The fold of jobs: after these facts, a job reads so. `support.history.STEPS` explains the words."""

import json
from pathlib import Path

import pytest
from hypothesis import given as given_any
from hypothesis import strategies as st
from msgspec import UNSET
from msgspec.structs import replace
from support.history import FEWER, MODEL, History, as_event, at, given, load_requested, model_loaded
from support.strategies import drafts

from events.codec import decode_event
from events.jobs import Job, JobKind, JobStatus, UnloadParameters, evolve_job
from events.types import (
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
    ServerStarted,
    ServerStopped,
    Unknown,
    UnloadRequested,
    UnloadStarted,
    WorkerExited,
)


def test_requested_load_is_pending_job_with_deadline() -> None:
    history = History()
    parameters = LoadParameters("high", 60, 5, 6, "auto", True, 3, 8, 90)
    history.add(LoadRequested.of(parameters, Cause.DEMAND), "L", version=4, by="alice")
    requested = Job(
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
        load=parameters,
        deadline_at=at(61),
    )
    assert history.job("L") == requested
    history.start_load("L", attempt=2)
    started = replace(requested, status=JobStatus.IN_PROGRESS, attempt=2, started_at=at(2), position=2)
    assert history.job("L") == started
    history.end_load("L")
    ended = replace(started, status=JobStatus.COMPLETED, finished_at=at(3), position=3)
    assert history.job("L") == ended


def test_requested_unload_is_pending_job_without_deadline() -> None:
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


JOBS = """
request -> L pending
request start -> L in_progress, attempt 1
load -> L completed, attempt 1
request fail -> L failed, broken: because
request start fail -> L failed, attempt 1, broken: because
request cancel_L -> L cancelled
request start cancel_L -> L cancelled, attempt 1
request request_cancel_L -> L pending, cancelling
request start request_force -> L in_progress, attempt 1
request start restart -> L pending, attempt 1, 1 deaths
request restart -> L pending
load restart -> L completed, attempt 1
request start request_cancel_L -> L in_progress, attempt 1, cancelling
request request_cancel_L start -> L in_progress, attempt 1, cancelling
request request_cancel_L start finish -> L completed, attempt 1, cancel requested
load request_cancel_L -> L completed, attempt 1
request start request_cancel_L restart -> L pending, attempt 1, 1 deaths, cancelling
request request_cancel_L request_cancel_L -> L pending, cancelling
request request_cancel_L cancel_L -> L cancelled, cancel requested
request start restart_cleanly -> L pending, attempt 1
request stop_server -> L pending
request start stop_server -> L pending, attempt 1
request start stop_server start -> L in_progress, attempt 1
load stop_server -> L completed, attempt 1
request start request_cancel_L stop_server -> L pending, attempt 1, cancelling
load request_unload start_unload stop_server -> U pending, attempt 1
load request_unload start_unload restart_cleanly start_unload finish_unload -> U completed, attempt 2
request start restart start restart start restart -> L pending, attempt 1, 3 deaths
request start restart restart -> L pending, attempt 1, 1 deaths
request start restart start restart_cleanly -> L pending, attempt 1, 1 deaths
load crash request_recovery supersede_recovery -> R cancelled, superseded by L3
load request_again change_settings -> L3 completed
load request_again start_again change_settings -> L3 completed, attempt 1
load request_unload -> U pending
load request_unload start_unload -> U in_progress, attempt 1
load request_unload start_unload finish_unload -> U completed, attempt 1
load request_unload start_unload leak_on_unload -> U completed, attempt 1, 300000000 bytes left
load request_unload finish_unload -> U completed
load request_unload cancel_U -> U cancelled
load request_unload start_unload restart -> U pending, attempt 1, 1 deaths
load request_unload request_cancel_U -> U pending, cancelling
load request_unload request_cancel_U start_unload -> U in_progress, attempt 1, cancel requested
load request_unload request_cancel_U start_unload restart -> U pending, attempt 1, 1 deaths, cancel requested
load request_unload request_cancel_U restart -> U pending, cancelling
load request_unload start_unload restart start_unload -> U in_progress, attempt 2, 1 deaths
"""
"""Facts -> a job after them: its status, its starts, its cancellation and its error."""


def describe(job: Job) -> str:
    words = [
        job.status.value,
        f"attempt {job.attempt}" if job.attempt else "",
        f"{job.server_deaths} deaths" if job.server_deaths else "",
        "cancelling" if job.cancelling else "cancel requested" if job.cancel_requested else "",
        f"superseded by {job.superseded_by}" if job.superseded_by is not None else "",
        f"{job.unreturned_bytes} bytes left" if job.unreturned_bytes is not UNSET else "",
        f"{job.error.code}: {job.error.message}" if job.error is not None else "",
    ]
    return ", ".join(filter(None, words))


@pytest.mark.parametrize(("facts", "job"), [row.split(" -> ") for row in JOBS.splitlines() if row])
def test_job_after_facts(facts: str, job: str) -> None:
    found = given(facts).job(job.split(maxsplit=1)[0])
    assert f"{found.id} {describe(found)}" == job
    assert found.ended == (found.status.value in {"completed", "failed", "cancelled"})
    assert (found.finished_at is not None) == found.ended


def test_event_of_job_moves_its_position() -> None:
    for data in (CancelRequested(), WorkerExited(1, None, ())):
        history = given("request start")
        history.add(data, "L")
        job = history.job("L")
        assert (job.position, job.status) == (3, JobStatus.IN_PROGRESS)
    history = given("request request_cancel_L")
    job = history.job("L")
    history.add(CancelRequested(), "L", by="bob")  # a second one
    assert history.job("L") is job


@pytest.mark.parametrize("end", [JobCancelled(), LoadFailed("first", "first"), model_loaded()])
def test_ended_job_never_changes(end: Data) -> None:
    history = given("request start")
    history.add(end, "L")
    ended = history.job("L")
    bodies = json.loads(Path(__file__).with_name("bodies.json").read_text(encoding="ascii"))
    for late in map(decode_event, bodies.values()):  # of every type
        assert evolve_job(ended, replace(late, job_id="L")) is ended


@pytest.mark.parametrize("data", [ServerStopped(), AccessDenied("load", 1), Unknown("Later", 1, {})])
def test_unrelated_event_leaves_job_alone(data: Data | Unknown) -> None:
    history = given("request")
    before = history.job("L")
    history.add(data, "L")
    history.load("M")
    assert history.job("L") is before


def test_request_alone_with_its_own_id_and_model_makes_job() -> None:
    history = History()
    for request in (load_requested(), UnloadRequested(False, "L", Cause.REQUEST)):
        for other in ("other", "A"):
            history.add(request, "L", event_id=other)
        history.add(request, "L", of=None)
    for outcome in (LoadStarted(1), model_loaded(), JobCancelled(), UnloadStarted()):
        history.add(outcome, "L")
    assert not history.state.jobs


START_SEEN = ServerStarted(True, last_event_at=at(1), last_seen_at=at(61))
CLEAN_START = ServerStarted(False, last_event_at=at(1), last_seen_at=at(1))
SEEN_LATER = ServerStarted(True, last_seen_at=at(2_000))
DEADLINES: list[tuple[int, list[int] | ServerStarted, str]] = [
    # of a load requested at 1 s: its timeout; for how long the server was down, or its start at 1,000 s
    (100, [], at(101)),
    (100, [1_000], at(1_101)),
    (100, [50, 70], at(101 + 50 + 70)),
    (100, [0], at(101)),  # the clock says nothing about the pause
    (2**63 - 1, [50], "9999-12-31T23:59:59.999999Z"),
    (100, START_SEEN, at(101 + 1_000 - 61)),
    (100, CLEAN_START, at(101 + 1_000 - 1)),
    (100, SEEN_LATER, at(101)),
]


@pytest.mark.parametrize(("timeout_s", "starts", "deadline_at"), DEADLINES)
def test_deadline_moves_by_time_server_was_down(
    timeout_s: int, starts: list[int] | ServerStarted, deadline_at: str
) -> None:
    history = History()
    history.ask_load("L", timeout_s=timeout_s)
    if isinstance(starts, ServerStarted):
        history.add(starts, None, of=None, after_s=999)
    else:
        for pause_s in starts:
            history.restart(down_s=pause_s)
    assert history.job("L").deadline_at == deadline_at


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
