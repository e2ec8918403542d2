"""How is a job awaited? It is polled, with intervals that grow with the time waited.

Polling needs no role, takes none of the subject's streams, and survives a restart of the server. An interval
of a fixed part of the time waited bounds the delay to that part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf

from loadledger.address import path
from loadledger.problems import ClientProblem, JobFailed, JobUnfinished
from loadledger.records import Job
from loadledger.requests import ClientOptions, Request, asked, get, passes, pause_s

PREFERRED_S = 20
"""Seconds for `Prefer: wait`: less than the usual timeout of a proxy."""
SHORTEST_LOOK_S, LONGEST_LOOK_S = 0.02, 0.5
PART = 0.125
SHORTEST_ANSWER_S = 1.0
"""Least time for an answer, however little of the limit is left."""

Told = Callable[[Job], None]
Away = Callable[[ClientProblem], None]


@dataclass(frozen=True, slots=True)
class Patience:
    """How to wait for a job.

    Attributes:
        limit_s: limit of the wait; None: until it ends, which every load does within its `timeout_s`.
        on_change: called with the job after each change.
        on_away: called once each time the server becomes unreachable.
    """

    limit_s: float | None = None
    on_change: Told | None = None
    on_away: Away | None = None


def job_request(job_id: str, at: int | str | None = None) -> Request:
    """Return the request for a job, with `at` as of a position or time."""
    return get(f"/api/v1{path('jobs', job_id)}", [] if at is None else [("at", str(at))])


async def submitted(setting: ClientOptions, request: Request, patience: Patience | None) -> Job:
    """Send the request for a job and return the job, with `patience` once it has completed.

    Raises:
        JobFailed: the job ended without completing.
        JobUnfinished: the limit of the wait is over.
    """
    if patience is None:
        return await asked(setting, request, Job)
    began = setting.now()
    job = await asked(setting, _preferring(setting, request, patience), Job)
    job = await _until_ended(setting, job, patience, began)
    if job.status != "completed":
        raise JobFailed(job, setting.address.hide)
    return job


async def waited_for(setting: ClientOptions, job_id: str, patience: Patience) -> Job:
    """Wait until a job has ended, and return it whatever its outcome.

    Raises:
        JobUnfinished: the limit of the wait is over.
    """
    began = setting.now()
    job = await asked(setting, job_request(job_id), Job)
    return await _until_ended(setting, job, patience, began)


def look_again_s(waited_s: float) -> float:
    """Return the polling interval after so long a wait."""
    return min(max(SHORTEST_LOOK_S, PART * waited_s), LONGEST_LOOK_S)


def _preferring(setting: ClientOptions, request: Request, patience: Patience) -> Request:
    """Ask the server to hold its answer until the job ends, unless the caller wants each change."""
    limit_s = inf if patience.limit_s is None else patience.limit_s
    request = replace(request, timeout_s=min(setting.timeout_s, max(limit_s, SHORTEST_ANSWER_S)))
    seconds = int(min(PREFERRED_S, limit_s))
    if patience.on_change is not None or seconds < 1:
        return request
    headers = {**request.headers, "Prefer": f"wait={seconds}"}
    return replace(request, headers=headers, patience_s=float(seconds))


async def _until_ended(setting: ClientOptions, job: Job, patience: Patience, began: float) -> Job:
    failures, trouble = 0, ""
    _tell(patience.on_change, job)
    wait_s = look_again_s(setting.now() - began)
    while not job.ended:
        left_s = _left_s(setting, patience, began)
        if left_s <= 0:
            raise JobUnfinished(job, patience.limit_s or 0.0, trouble, setting.address.hide)
        await setting.transport.pause(min(wait_s, left_s))
        try:
            seen = await asked(setting, _look(setting, job, left_s), Job)
        except ClientProblem as problem:
            if not passes(problem, reached=True):
                raise
            failures, trouble = failures + 1, str(problem)
            if failures == 1 and patience.on_away is not None:
                patience.on_away(problem)
            wait_s = pause_s(problem, failures, setting.chance())
            continue
        if seen != job:
            _tell(patience.on_change, seen)
        job, failures, trouble = seen, 0, ""
        wait_s = look_again_s(setting.now() - began)
    return job


def _left_s(setting: ClientOptions, patience: Patience, began: float) -> float:
    return inf if patience.limit_s is None else began + patience.limit_s - setting.now()


def _look(setting: ClientOptions, job: Job, left_s: float) -> Request:
    """Return the request of one poll: not resent, and limited to the time left."""
    limit_s = min(setting.timeout_s, max(left_s, SHORTEST_ANSWER_S))
    return replace(job_request(job.id), repeatable=False, timeout_s=limit_s)


def _tell(on_change: Told | None, job: Job) -> None:
    if on_change is not None:
        on_change(job)
