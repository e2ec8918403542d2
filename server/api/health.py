"""Liveness, readiness and the OpenAPI document.

Loads and failed models do not change health, but the protocol's readiness has Triton's meaning: it waits for
the models that are reloaded after a start.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import cache

from aiohttp import hdrs, web

from answers.health import Health, NotReady, ServerLive, ServerReady
from server.appkeys import CONSUMER_TASK, LOG, POOL, STOPPING, STREAMS
from server.auth.access import Access
from server.cluster import CLUSTER
from server.errors import ServerProblem
from server.http.answers import respond
from server.openapi.document import openapi_yaml
from server.routing import ROUTES, Route, Routes

routes = Routes(tag="health")


@routes.get(
    "/health/live",
    access=Access.PUBLIC,
    summary="Liveness: whether to keep the process",
    answers={200: (Health, "The process is alive.")},
    errors=("unhealthy",),
)
async def live(request: web.Request) -> web.Response:
    """Answer 200 while all vital tasks run; when one ends, the process ends, too."""
    return _answer(live_checks(request.app), list_not_live(request.app))


@routes.get(
    "/health/ready",
    access=Access.PUBLIC,
    summary="Readiness: whether to send requests",
    answers={200: (Health, "The server is ready.")},
    errors=("unhealthy",),
)
async def ready(request: web.Request) -> web.Response:
    """Answer 200 when the log can be written, the consumer works and workers can be started."""
    return _answer(ready_checks(request.app), list_not_ready(request.app))


@routes.get(
    "/v2/health/live",
    access=Access.PUBLIC,
    summary="Liveness, in the form of the protocol",
    answers={200: (ServerLive, "The process is alive.")},
    errors=("unhealthy",),
)
async def v2_live(request: web.Request) -> web.Response:
    """Answer as `live` does; KServe's client looks for the member `live`, Triton's only at the status."""
    _refuse(list_not_live(request.app))
    return respond(ServerLive(live=True))


@routes.get(
    "/v2/health/ready",
    access=Access.PUBLIC,
    summary="Readiness, in the form of the protocol, with Triton's strict meaning",
    answers={200: (ServerReady, "The server is ready, and the models are back from before its start.")},
    errors=("unhealthy",),
)
async def v2_ready(request: web.Request) -> web.Response:
    """Answer as `ready` does, but only after the models loaded before the server's start are loaded again.

    One of several servers does not wait for them: any answers for any model, wherever it is reloaded, and
    without the others it would answer for none. KServe's client looks for the member `ready`, Triton's only
    at the status.
    """
    app, cluster = request.app, request.app[CLUSTER]
    missing = cluster.count_missing(app[LOG].state.models.values())
    _refuse([*list_not_ready(app), *([_missing_models(missing)] if missing else [])])
    return respond(ServerReady(ready=True))


@routes.get(
    "/openapi.yaml",
    access=Access.PUBLIC,
    tag="documentation",
    summary="This document",
    produces=["application/yaml"],
    answers={200: {"description": "OpenAPI 3.0.3."}},
)
async def show_openapi(request: web.Request) -> web.Response:
    offered = tuple(dict.fromkeys(request.app[ROUTES].values()))
    text = await asyncio.to_thread(_write_document, offered)
    return web.Response(text=text, content_type="application/yaml")


@cache
def _write_document(offered: tuple[Route, ...]) -> str:
    """Return the OpenAPI document; the first call takes 0.15 s."""
    return openapi_yaml(offered)


_PROBED = frozenset({*(route.path for route in routes if "/health/" in route.path), "/metrics"})


def is_probe(request: web.BaseRequest) -> bool:
    """Whether a request is a health check or a scrape, which have reserved connections."""
    return request.method in (hdrs.METH_GET, hdrs.METH_HEAD) and request.path in _PROBED


def vital_tasks(app: web.Application) -> dict[str, asyncio.Task[None]]:
    """Return the vital tasks: without any of them the server would accept requests without effect."""
    return {
        "consumer": app[CONSUMER_TASK],
        "writer": app[LOG].writer,
        "keeper": app[POOL].keeper,
        **app[STREAMS].tasks,
        **app[CLUSTER].tasks(),
    }


def failed_tasks(app: web.Application) -> dict[str, BaseException]:
    ended = {name: task for name, task in vital_tasks(app).items() if task.done() and not task.cancelled()}
    return {name: error for name, task in ended.items() if (error := task.exception()) is not None}


def live_checks(app: web.Application) -> dict[str, bool]:
    return {name: not task.done() for name, task in vital_tasks(app).items()}


def ready_checks(app: web.Application) -> dict[str, bool]:
    return {
        **live_checks(app),
        "log": app[LOG].healthy,
        "fork_server": app[POOL].healthy,
        "serving": not app[STOPPING].is_set(),
        **app[CLUSTER].checks(),
    }


def list_not_live(app: web.Application) -> list[NotReady]:
    """Return the vital tasks that have ended."""
    cure = "the server ends by itself: see its log, and start it again"
    return [
        NotReady(check=name, cause=f"the task {name} has ended", cure=cure)
        for name, well in live_checks(app).items()
        if not well
    ]


def list_not_ready(app: web.Application) -> list[NotReady]:
    """Return the failed checks of readiness, with cause and cure."""
    checks, log = ready_checks(app), app[LOG]
    why = "" if log.problem is None else f": {log.problem}"
    known = (
        NotReady(
            check="log",
            cause=f"the ledger cannot be written{why}",
            cure="see the server's log" if log.problem is None else log.problem.cure,
        ),
        NotReady(
            check="fork_server",
            cause="the fork server is down, so no model can be loaded",
            cure="the server starts another one: if it stays away, see the server's log",
        ),
        NotReady(check="serving", cause="the server is stopping", cure="start it again, or ask another one"),
    )
    of_cluster = filter(None, [app[CLUSTER].problem()])
    found = {each.check: each for each in (*list_not_live(app), *known, *of_cluster)}
    return [found[name] for name, well in checks.items() if not well]


def _missing_models(count: int) -> NotReady:
    return NotReady(
        check="models",
        cause=f"models from before the start that are not back yet: {count}",
        cure="their jobs say what they wait for",
    )


def _answer(checks: dict[str, bool], failed: Sequence[NotReady]) -> web.Response:
    _refuse(failed)
    return respond(Health(status="ok", checks=checks))


def _refuse(failed: Sequence[NotReady]) -> None:
    if failed:
        reasons = "; ".join(f"{each.check}: {each.cause}: {each.cure}" for each in failed)
        raise ServerProblem(f"not ready: {reasons}", code="unhealthy")
