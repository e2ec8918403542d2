"""What a model's workers printed last: those that run, and the last one that ended unexpectedly.

ONNX Runtime quotes inputs of clients in its messages, so only admins may read them.
"""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web
from marshmallow import fields

from events.sqlite.listing import EventFilter, EventQuery
from events.types import WorkerExited
from runtime.consumer.running import RunningLoad
from runtime.process.worker import Worker
from server.api.models import look_at_model
from server.api.schemas import AnswerSchema, ModelPathSchema, about
from server.appkeys import CONSUMER, POOL, READER
from server.http.validation import NothingSchema, path_parameters
from server.routing import Access, Routes

routes = Routes(tag="models")


class PrintedSchema(AnswerSchema):
    """The last lines of one worker on its stderr."""

    worker_id = fields.String(required=True, allow_none=True)
    version = fields.Integer(required=True, allow_none=True)
    job_id = fields.String(required=True, allow_none=True, **about("The job of its load."))
    lines = fields.List(
        fields.String(),
        required=True,
        **about("Oldest first, at most 64 lines and 16 KiB; last, why the server killed the worker."),
    )


class ExitedSchema(PrintedSchema):
    """The last lines of a worker that ended unexpectedly, as the ledger has them."""

    exited_at = fields.String(required=True)
    position = fields.Integer(required=True, **about("Of its `WorkerExited`."))
    exit_code = fields.Integer(required=True, allow_none=True)
    signal = fields.Integer(required=True, allow_none=True)


class StderrSchema(AnswerSchema):
    """What a model's workers printed last."""

    recorded = fields.Boolean(
        required=True,
        **about("False with `--ledger-stderr off`: the ledger keeps only why the server killed a worker."),
    )
    workers = fields.List(fields.Nested(PrintedSchema), required=True, **about("Those that run."))
    last_exited = fields.Nested(ExitedSchema, required=True, allow_none=True)


@routes.get(
    "/api/v1/models/{id}/stderr",
    access=Access.ADMIN,
    summary="Show the last lines that a model's workers printed",
    description="They may hold inputs of clients: ONNX Runtime quotes them in messages.",
    path=ModelPathSchema(),
    query=NothingSchema(),
    answers={200: (StderrSchema(), "Of the running workers, and of the last one that ended unexpectedly.")},
    errors=("unknown_model", "repository_busy", "log_unavailable"),
)
async def show_stderr(request: web.Request) -> web.Response:
    model_id = path_parameters(request)["id"]
    running = [
        _printed(load, worker)
        for load in request.app[CONSUMER].loads.values()
        if load.model_id == model_id
        for worker in load.alive_workers
    ]
    exited = await _last_exited(request.app, model_id)
    if not running and exited is None:
        await look_at_model(request, model_id)
    answer = {"recorded": request.app[POOL].records_stderr, "workers": running, "last_exited": exited}
    return web.Response(body=msgspec.json.encode(answer), content_type="application/json")


def _printed(load: RunningLoad, worker: Worker) -> dict[str, Any]:
    return {
        "worker_id": worker.worker_id,
        "version": load.version,
        "job_id": load.job_id,
        "lines": worker.stderr_tail(),
    }


async def _last_exited(app: web.Application, model_id: str) -> dict[str, Any] | None:
    wanted = EventFilter(types=(WorkerExited.TYPE,), models=(model_id,))
    page = await app[READER].event_page(EventQuery(wanted, newest_first=True, limit=1))
    for stored in page.items:
        event = msgspec.json.decode(stored.line)
        data = event["data"]
        return {
            **{name: event[name] for name in ("worker_id", "version", "job_id", "position")},
            "lines": data["stderr"],
            "exited_at": event["recorded_at"],
            "exit_code": data["exit_code"],
            "signal": data["signal"],
        }
    return None
