"""Jobs: list, show and cancel them; responses with a job (`Prefer: wait=N`, `Idempotency-Key`).

This module reads and hashes an idempotency key; `events.accept` decides whether it was used. Routes of /v2
ignore both fields, which their protocol does not have.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
from aiohttp import hdrs, web
from marshmallow import Schema, fields, validate
from msgspec import UNSET

from answers.errors import ErrorInfo
from answers.jobs import JobInfo, JobList
from events.commands import Command, Receipt
from events.jobcommands import RequestCancel, RequestLoad
from events.jobs import Job, JobStatus
from events.log import Log
from events.sqlite.queries import JobQuery
from events.sqlite.timetravel import job_at, jobs_at
from events.types import Idempotency
from features.server import OF_JOBS, collect
from server.api.livejobs import NOT_LIVE, LiveMembers, describe_live
from server.api.schemas import PageQuerySchema, about, one_of
from server.api.timetravel import PAST_ERRORS, AtQuerySchema, at_moment, read_past
from server.appkeys import CONSUMER, LOG, READER, STOPPING
from server.auth.access import Access
from server.auth.gate import PRINCIPAL
from server.errors import ServerProblem
from server.http.answers import respond, show_optional
from server.http.validation import (
    NothingSchema,
    ParameterInteger,
    header_fields,
    json_body,
    path_parameters,
    query_parameters,
)
from server.observability.output import CONTEXT, RequestContext
from server.routing import ROUTES, Routes

routes = Routes(tag="jobs")

MAX_WAIT_S = 60
"""Most proxies and clients give up on an answer after 60 s."""

_PREFERENCE = re.compile(r'(?:[^",]|"(?:[^"\\]|\\.)*"?)+')  # a comma in a quoted string separates nothing
_WAIT = re.compile(r'wait\s*=\s*(?:"(\d+)"|(\d+))\s*(?:;.*)?', re.ASCII | re.IGNORECASE)


def wait_s(fields: list[str]) -> int:
    """Return the seconds to wait by all `Prefer` fields, 0 without one; the first `wait` counts."""
    for preference in _PREFERENCE.findall(",".join(fields)):
        match = _WAIT.fullmatch(preference.strip())
        if match is not None:
            digits = (match[1] or match[2]).lstrip("0")
            return min(MAX_WAIT_S, int(digits[:3] or 0))  # more digits exceed the limit anyway
    return 0


MAX_KEY_CHARACTERS = 255
"""Longer than any UUID, ULID or hash."""

_TIMES = f"{{1,{MAX_KEY_CHARACTERS}}}"
_QUOTED = rf'"(?:[ !#-\[\]-~]|\\["\\]){_TIMES}"'  # RFC 9651, section 3.3.3
# Without quotes, no character that could join a second field, or a parameter, to the first on its way.
_BARE = rf"[!#-+\--:<-\[\]-~]{_TIMES}"
_RULE = (
    f"Must be given once: 1 to {MAX_KEY_CHARACTERS} printable ASCII characters in double quotes, where "
    '" and \\ are preceded by \\.'
)


class JobPathSchema(Schema):
    """The job named by the path."""

    job_id = fields.String(required=True, validate=validate.Length(1, 64))


class CancelBodySchema(Schema):
    """A cancel takes no body or an empty object."""


class JobsQuerySchema(AtQuerySchema, PageQuerySchema):
    """Page of the jobs, and filters."""

    cursor = ParameterInteger(
        load_default=None, validate=validate.Range(min=1), **about("The `next_cursor` of the last page.")
    )
    model = fields.String(load_default=None, **about("Only jobs of this model."))
    status = fields.String(load_default=None, validate=one_of(JobStatus))


IS_KEY = validate.Regexp(rf"(?:{_QUOTED}|{_BARE})\Z", error=_RULE)
"""Validates an idempotency key in a header field."""


class IdempotencySchema(Schema):
    """The header field that makes a request repeatable."""

    idempotency_key = fields.String(
        data_key="Idempotency-Key",
        validate=IS_KEY,
        **about(
            "Any string in double quotes, for example a UUID: new for each request, the same "
            "when you repeat it. For 24 hours, the same request of the same subject with the same key is "
            "answered with the job of the first, ended or not, whatever has changed since (but 404 if the "
            "model, version or job is gone). Another request with the key is 422 `idempotency_mismatch`. A "
            "refused request does not use its key. The ledger keeps a hash of the key, never the key.",
            example='"8e03978e-40d5-43dd-bc93-6894a57f9324"',
        ),
    )


def hash_idempotency_key(request: web.Request) -> Idempotency | None:
    """Return the hashed key of a validated request and its fingerprint; keys belong to one subject."""
    field = header_fields(request).get("idempotency_key")
    if field is None:
        return None
    return Idempotency(_hash([request[PRINCIPAL].subject, unquote_key(field)]), _fingerprint(request))


def unquote_key(field: str) -> str:
    """Return the key of a valid field, without quotes and escapes."""
    return re.sub(r"\\(.)", r"\1", field[1:-1]) if field.startswith('"') else field


def _fingerprint(request: web.Request) -> str:
    """Hash the validated request: order of members and white space do not matter."""
    route, path = request.app[ROUTES][request.match_info.route], dict(request.match_info)
    return _hash([route.method, route.path, path, query_parameters(request), json_body(request)])


def _hash(parts: list[object]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


MAX_JOBS = 10_000
"""Unended jobs whose request is remembered; the earliest are forgotten first."""


class JobRequests:
    """Submits commands, and remembers the request behind each unended job, for log lines and traces.

    `started_at` is the position of this server's `ServerStarted`. `EventLogger` removes ended jobs from
    `behind`.
    """

    def __init__(self, log: Log, started_at: int) -> None:
        self._log = log
        self.started_at = started_at
        self.behind: OrderedDict[str, RequestContext] = OrderedDict()

    async def submit(self, command: Command) -> Receipt:
        """Submit a command for the request that the running task serves; for errors see `Log.submit`."""
        receipt, context = await self._log.submit(command), CONTEXT.get()
        if context is not None and receipt.job_id is not None:
            context.job_id, context.position = receipt.job_id, receipt.position
            if receipt.job_id in self._log.state.jobs or not receipt.existing:
                self.behind.setdefault(receipt.job_id, context)
            if len(self.behind) > MAX_JOBS:
                self.behind.popitem(last=False)
        return receipt


JOB_REQUESTS = web.AppKey("job_requests", JobRequests)

POLL_AFTER_S = 1
"""Retry-After for clients that poll: most loads take less time."""

PREFER = {
    "in": "header",
    "name": "Prefer",
    "schema": {"type": "string"},
    "description": "`wait=N`: answer when the job has ended, or after N seconds (at most 60).",
}
"""OpenAPI parameter of routes that answer with `answer_with_job`."""

AS_JOB: Mapping[str, Any] = {
    "access": Access.ADMIN,
    "parameters": [PREFER],
    "headers": IdempotencySchema(),
    "answers": {
        202: (JobInfo, "Accepted; follow the job at `Location`."),
        200: (JobInfo, "Nothing to do, or the job has ended within `Prefer: wait=N`, with any outcome."),
    },
}
"""Declaration shared by all routes with `answer_with_job`, beside the codes in `JOB_ERRORS`."""

JOB_ERRORS = ("idempotency_mismatch", "log_unavailable", "shutting_down")


@routes.get(
    "/api/v1/jobs",
    access=Access.ANY,
    summary="List the jobs, newest first",
    query=JobsQuerySchema(),
    answers={200: (JobList, "One page.")},
    errors=PAST_ERRORS,
)
async def list_jobs(request: web.Request) -> web.Response:
    query = query_parameters(request)
    status = JobStatus(query["status"]) if query["status"] is not None else None
    wanted = JobQuery(before=query["cursor"], model_id=query["model"], status=status, limit=query["limit"])
    if query["at"] is not None:
        return respond(await _list_past_jobs(request, query["at"], wanted))
    page = await request.app[READER].jobs(wanted)
    jobs = [present_job(request.app, job) for job in page.items]
    return respond(JobList(jobs=jobs, as_of=page.as_of, next_cursor=page.next_cursor))


async def _list_past_jobs(request: web.Request, at: str, wanted: JobQuery) -> JobList:
    limit, more = wanted.limit, replace(wanted, limit=wanted.limit + 1)
    moment, found = await read_past(request, at, partial(jobs_at, query=more))
    page = JobList(
        jobs=[make_job_info(job) for job in found[:limit]],
        as_of=moment.position,
        next_cursor=found[limit - 1].created_position if len(found) > limit else None,
    )
    return at_moment(page, moment)


@routes.get(
    "/api/v1/jobs/{job_id}",
    access=Access.ANY,
    summary="Show a job",
    path=JobPathSchema(),
    query=AtQuerySchema(),
    answers={200: (JobInfo, "The job.")},
    errors=("unknown_job", *PAST_ERRORS),
)
async def show_job(request: web.Request) -> web.Response:
    """Answer with one job; a failed job is not an error of this request."""
    job_id, at = path_parameters(request)["job_id"], query_parameters(request)["at"]
    if at is not None:
        moment, past = await read_past(request, at, partial(job_at, job_id=job_id))
        if past is None:
            raise ServerProblem(f"there was no job {job_id!r} at that time", code="unknown_job")
        return respond(at_moment(make_job_info(past), moment))
    return respond(present_job(request.app, await find_job(request.app, job_id)))


@routes.post(
    "/api/v1/jobs/{job_id}/cancel",
    **AS_JOB,
    summary="Cancel a job",
    description="Ends a load that has not completed, or an unload that has not begun. The job may "
    "still complete after this answer, so check its `status`. A job that is already being cancelled is "
    "returned as it is.",
    path=JobPathSchema(),
    query=NothingSchema(),
    body=CancelBodySchema(),
    errors=("unknown_job", "already_finished", "already_started", *JOB_ERRORS),
)
async def cancel_job(request: web.Request) -> web.Response:
    job = await find_job(request.app, path_parameters(request)["job_id"])
    return await answer_with_job(
        request, RequestCancel(job.id, request[PRINCIPAL].subject, hash_idempotency_key(request))
    )


def present_job(app: web.Application, job: Job) -> JobInfo:
    """Return a job with its live values."""
    return make_job_info(job, describe_live(app[CONSUMER], job))


def make_job_info(job: Job, live: LiveMembers = NOT_LIVE) -> JobInfo:
    """Return a job as the API shows it."""
    said = None if job.policy is UNSET else job.policy.justification
    return JobInfo(
        id=job.id,
        kind=job.kind,
        model_id=job.model_id,
        version=job.version,
        status=job.status,
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
        requested_by=job.requested_by,
        cause=job.cause,
        cancel_requested=job.cancel_requested,
        superseded_by=job.superseded_by,
        attempt=job.attempt,
        position=job.position,
        parameters=msgspec.to_builtins(job.load if job.load is not None else job.unload),
        label=job.version_name or None,
        passed_over=job.passed_over or None,
        reason=None if said is None else said.reason,
        emergency=None if said is None else said.emergency,
        unreturned_bytes=None if job.unreturned_bytes is UNSET else job.unreturned_bytes,
        error=show_optional(job.error, ErrorInfo),
        **collect(OF_JOBS, job),
        **live,
    )


async def answer_with_job(request: web.Request, command: Command) -> web.Response:
    """Submit a command and answer with its job: 200 if it has ended, else 202 with its `Location`."""
    job = await _submit(request.app, command, wait_s(request.headers.getall("Prefer", [])))
    headers = {hdrs.LOCATION: job_path(job.id), hdrs.VARY: "Prefer"}
    if not job.ended:
        headers[hdrs.RETRY_AFTER] = str(POLL_AFTER_S)
    shown = present_job(request.app, job)
    if isinstance(command, RequestLoad) and command.passed_over is not UNSET:
        # This also concerns a job from before.
        shown = msgspec.structs.replace(shown, passed_over=command.passed_over)
    return respond(shown, status=200 if job.ended else 202, headers=headers)


async def run_job(app: web.Application, command: Command) -> Job:
    """Submit a command and return its job when it has ended; the job's own timeout applies.

    Raises:
        ServerProblem: `shutting_down`, the server stops before the job has ended.
        LedgerProblem: `log_unavailable`, or the refusal of the command.
    """
    job = await _submit(app, command, None)
    if job.ended:
        return job
    where = job_path(job.id)
    reason = f"the server stops; the {job.kind} continues at its next start, see {where}"
    raise ServerProblem(reason, code="shutting_down", http_headers={hdrs.LOCATION: where})


def job_path(job_id: str) -> str:
    return f"/api/v1/jobs/{job_id}"


async def _submit(app: web.Application, command: Command, seconds: float | None) -> Job:
    """Submit a command and return its job when it has ended, the time is up, or the server stops."""
    job_id = (await app[JOB_REQUESTS].submit(command)).job_id
    assert job_id is not None, "only facts have no job"
    return await find_job(app, job_id) if seconds == 0 else await _await_end(app, job_id, seconds)


async def _await_end(app: web.Application, job_id: str, seconds: float | None) -> Job:
    """Return a job when it has ended, the time is up, or the server stops."""
    log, stopping = app[LOG], app[STOPPING]
    await log.wait_until(lambda: job_id not in log.state.jobs or stopping.is_set(), seconds)
    return await find_job(app, job_id)


async def find_job(app: web.Application, job_id: str) -> Job:
    """Return a job; another server may have accepted it a moment ago."""
    log, reader = app[LOG], app[READER]
    job = log.state.jobs.get(job_id) or await reader.job(job_id)
    if job is None:
        await log.catch_up()
        job = log.state.jobs.get(job_id) or await reader.job(job_id)
    if job is None:
        reason = f"there is no job {job_id!r}; GET /api/v1/jobs lists them"
        raise ServerProblem(reason, code="unknown_job")
    return job
