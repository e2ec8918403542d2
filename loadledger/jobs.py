"""Waiting for a job: polling, with intervals that grow with the time waited.

Polling needs no role, takes none of the subject's streams, and survives a restart of the server. An interval
in proportion to the time waited bounds the relative delay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf

from answers.jobs import JobInfo
from loadledger.address import path
from loadledger.errors import ClientProblem, JobFailed, JobUnfinished
from loadledger.requests import CallContext, Request, back_off_s, fetch, get_request, is_transient

PREFERRED_S = 20
"""Seconds for `Prefer: wait`: less than the usual timeout of a proxy."""
SHORTEST_POLL_S, LONGEST_POLL_S = 0.02, 0.5
POLL_FRACTION = 0.125
SHORTEST_ANSWER_S = 1.0
"""Least time for an answer, however little of the limit remains."""

JobCallback = Callable[[JobInfo], None]
AwayCallback = Callable[[ClientProblem], None]


@dataclass(frozen=True, slots=True)
class WaitOptions:
    """How to wait for a job.

    Attributes:
        limit_s: limit of the wait; None waits for the end, which each load reaches within its `timeout_s`.
        on_change: called with the job after each change.
        on_away: called once each time the server becomes unreachable.
    """

    limit_s: float | None = None
    on_change: JobCallback | None = None
    on_away: AwayCallback | None = None


def job_request(job_id: str, at: int | str | None = None) -> Request:
    """Return the request for a job, with `at` as of a position or time."""
    return get_request(f"/api/v1{path('jobs', job_id)}", [] if at is None else [("at", str(at))])


async def submit_job(context: CallContext, request: Request, options: WaitOptions | None) -> JobInfo:
    """Send the request for a job and return the job; with `options`, wait until it has completed.

    Raises:
        JobFailed: the job ended without completing.
        JobUnfinished: the limit of the wait is over.
    """
    if options is None:
        return await fetch(context, request, JobInfo)
    began = context.now()
    job = await fetch(context, _prefer_wait(context, request, options), JobInfo)
    job = await _wait_until_ended(context, job, options, began)
    if job.status != "completed":
        raise JobFailed(job, context.address.hide)
    return job


async def wait_for_job(context: CallContext, job_id: str, options: WaitOptions) -> JobInfo:
    """Wait until a job has ended, and return it whatever its outcome; or the job that superseded it.

    Raises:
        JobUnfinished: the limit of the wait is over.
    """
    began = context.now()
    job = await fetch(context, job_request(job_id), JobInfo)
    return await _wait_until_ended(context, job, options, began)


def poll_interval_s(waited_s: float) -> float:
    return min(max(SHORTEST_POLL_S, POLL_FRACTION * waited_s), LONGEST_POLL_S)


def _prefer_wait(context: CallContext, request: Request, options: WaitOptions) -> Request:
    """Ask the server to hold its answer until the job ends, unless the caller wants each change."""
    limit_s = inf if options.limit_s is None else options.limit_s
    request = replace(request, timeout_s=min(context.timeout_s, max(limit_s, SHORTEST_ANSWER_S)))
    seconds = int(min(PREFERRED_S, limit_s))
    if options.on_change is not None or seconds < 1:
        return request
    headers = {**request.headers, "Prefer": f"wait={seconds}"}
    return replace(request, headers=headers, patience_s=float(seconds))


async def _wait_until_ended(
    context: CallContext, job: JobInfo, options: WaitOptions, began: float
) -> JobInfo:
    failures, trouble = 0, ""
    _report(options.on_change, job)
    wait_s = poll_interval_s(context.now() - began)
    while not job.ended or job.superseded_by is not None:
        left_s = inf if options.limit_s is None else began + options.limit_s - context.now()
        if left_s <= 0:
            raise JobUnfinished(job, options.limit_s or 0.0, trouble, context.address.hide)
        await context.transport.pause(min(wait_s, left_s))
        try:
            timeout_s = min(context.timeout_s, max(left_s, SHORTEST_ANSWER_S))
            poll = replace(job_request(job.superseded_by or job.id), repeatable=False, timeout_s=timeout_s)
            seen = await fetch(context, poll, JobInfo)
        except ClientProblem as problem:
            if not is_transient(problem, reached=True):
                raise
            failures, trouble = failures + 1, str(problem)
            if failures == 1 and options.on_away is not None:
                options.on_away(problem)
            wait_s = back_off_s(problem, failures, context.chance())
            continue
        if seen != job:
            _report(options.on_change, seen)
        job, failures, trouble = seen, 0, ""
        wait_s = poll_interval_s(context.now() - began)
    return job


def _report(on_change: JobCallback | None, job: JobInfo) -> None:
    if on_change is not None:
        on_change(job)
