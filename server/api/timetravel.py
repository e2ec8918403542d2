"""`?at=`: models and jobs of the past, for auditors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler

from events.sqlite.queries import JobQuery
from events.sqlite.timetravel import (
    Moment,
    TimeTravelReader,
    job_at,
    jobs_at,
    open_time_travel_reader,
    state_at,
)
from runtime.errors import UnknownModel
from server.api.schemas import job_view, model_view
from server.appkeys import LOG
from server.auth.gate import PRINCIPAL, check_role
from server.routing import Access

TIME_TRAVEL = web.AppKey("time_travel", TimeTravelReader)
"""The time travel reader."""


async def open_time_travel(app: web.Application) -> AsyncIterator[None]:
    async with open_time_travel_reader(app[LOG].path) as reader:
        app[TIME_TRAVEL] = reader
        yield


@web.middleware
async def time_travel_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Check the role for `?at=` before the rest of the request, and catch up; between auth and validation."""
    if "at" in request.query and _takes_at(request.match_info.handler):
        check_role(request[PRINCIPAL], Access.AUDIT)
        at = request.query["at"]
        if at.isdecimal() and len(at) < 20:  # noqa: PLR2004 - a position is a 64-bit integer
            await request.app[LOG].reach(int(at))
    return await handler(request)


async def past_models(request: web.Request, at: str, cursor: str, limit: int) -> dict[str, Any]:
    """Return a page of the models that the ledger knew at a moment, by id; raises as the reader does."""
    moment, state = await request.app[TIME_TRAVEL].read(at, state_at)
    ids = sorted(model_id for model_id in state.models if model_id > cursor)
    active = state.active()
    models = [model_view(model_id, state, None, active) for model_id in ids[:limit]]
    return {
        "models": models,
        "next_cursor": ids[limit - 1] if len(ids) > limit else None,
        **as_of(moment),
    }


async def past_model(request: web.Request, at: str, model_id: str) -> dict[str, Any]:
    """Return a model as it was at a moment.

    Raises:
        UnknownModel: `unknown_model`, there was no load of it by then; and what the reader raises.
    """
    moment, state = await request.app[TIME_TRAVEL].read(at, state_at)
    if model_id not in state.models:
        raise UnknownModel(model_id)
    return {**model_view(model_id, state, None, state.active()), **as_of(moment)}


async def past_jobs(request: web.Request, at: str, query: JobQuery) -> dict[str, Any]:
    """Return a page of the jobs as they were at a moment, newest first; raises as the reader does."""
    limit, more = query.limit, replace(query, limit=query.limit + 1)
    moment, found = await request.app[TIME_TRAVEL].read(at, partial(jobs_at, query=more))
    return {
        "jobs": [job_view(job, None) for job in found[:limit]],
        "next_cursor": found[limit - 1].created_position if len(found) > limit else None,
        **as_of(moment),
    }


async def past_job(request: web.Request, at: str, job_id: str) -> dict[str, Any] | None:
    """Return a job as it was at a moment, None if there was none; raises as the reader does."""
    moment, job = await request.app[TIME_TRAVEL].read(at, partial(job_at, job_id=job_id))
    return {**job_view(job, None), **as_of(moment)} if job is not None else None


def as_of(moment: Moment) -> dict[str, Any]:
    """Return the members that say which moment an answer is about."""
    server = moment.server
    nodes = [asdict(node) for node in server.nodes] if server is not None else []
    return {
        "as_of": moment.position,
        "as_of_time": moment.recorded_at,
        "server": {"state": server.state.value, "since": server.since} if server is not None else None,
        **({"nodes": nodes} if nodes else {}),
    }


def _takes_at(handler: Handler) -> bool:
    declared = getattr(handler, "__schemas__", ())
    return any(each["location"] == "querystring" and "at" in each["schema"].fields for each in declared)
