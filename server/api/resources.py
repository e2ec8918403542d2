"""`GET /api/v1/resources`: the memory budget, its users, and the jobs that wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import msgspec
from aiohttp import web
from marshmallow import fields, validate

from runtime.devices import DeviceMemory
from runtime.memory import read_pressure
from server.api.schemas import AnswerSchema, about
from server.appkeys import CONFIG, CONSUMER, LIMIT, LOG, POOL
from server.auth.access import Access
from server.config import OFF
from server.devices import list_devices, read_device_memory
from server.http.validation import NothingSchema
from server.observability.timeseries import measure
from server.routing import Routes

routes = Routes(tag="resources")

CACHED_S = 0.1
"""Seconds for which an answer is reused: any role may poll, and often."""


class LoadUseSchema(AnswerSchema):
    """Resources of one load until its processes have exited."""

    model_id = fields.String()
    version = fields.Integer()
    job_id = fields.String(**about("Job of the load."))
    phase = fields.String(validate=validate.OneOf(["loading", "failed", "serving", "draining"]))
    workers = fields.Integer()
    reserved_bytes = fields.Integer(**about("Memory reserved while it loads; 0 afterwards."))
    memory_bytes = fields.Integer(**about("Private bytes of its workers, measured every few seconds."))
    memory_at_load_bytes = fields.Integer(
        allow_none=True, **about("What they took when the model was loaded.")
    )
    device = fields.String(allow_none=True, **about("On which its workers run; null is the CPU."))
    device_bytes = fields.Integer(
        **about("Memory of the device's own, reserved or measured; 0 if it has none.")
    )
    in_flight = fields.Integer(**about("Inferences queued or running."))
    last_used_at = fields.String(allow_none=True, **about("The end of its last inference."))
    pinned = fields.Boolean()
    keep_alive_s = fields.Integer(allow_none=True)


class WaitSchema(AnswerSchema):
    """A job that waits."""

    job_id = fields.String()
    model_id = fields.String()
    needs_bytes = fields.Integer(allow_none=True)
    waiting_for = fields.String()


class PressureSchema(AnswerSchema):
    """Percent of the last ten seconds in which a task waited for the resource (PSI)."""

    memory_some_percent = fields.Float(allow_none=True)
    cpu_some_percent = fields.Float(allow_none=True)


class ConfinementSchema(AnswerSchema):
    """Confinement of the workers, as tested when the server started."""

    mode = fields.String(validate=validate.OneOf(["auto", "require", "require-cpu", "off"]))
    landlock_abi = fields.Integer(**about("Version of Landlock that restricts files; 0 if nothing does."))
    seccomp = fields.Boolean(**about("Whether system calls are filtered."))
    not_prevented = fields.List(fields.String(), **about("Forbidden acts that a worker could do."))


class DeviceSchema(AnswerSchema):
    """A device on which models are loaded, and its use."""

    device = fields.String(**about("As a load names it.", example="cuda:0"))
    provider = fields.String(**about("Its execution provider; `cpu` is ONNX Runtime's own."))
    version = fields.String(**about("Of the provider."))
    hardware = fields.String(**about("What the provider calls it; empty if it has no name."))
    total_bytes = fields.Integer(
        allow_none=True, **about("Of its own memory, of `cpu` the machine's; null if it has none.")
    )
    free_bytes = fields.Integer(
        allow_none=True, **about("Of its own memory, as its driver says; null if it has none.")
    )
    budget_bytes = fields.Integer(allow_none=True, **about("For all workers there; null is no limit."))
    reserved_bytes = fields.Integer(
        **about("Of its own memory; if it has none, of the machine's. That of `cpu` is of all workers.")
    )
    used_bytes = fields.Integer(**about("Likewise."))
    models = fields.Integer(**about("That have a process there."))


class ResourcesSchema(AnswerSchema):
    """The memory budget of workers and its use."""

    limit_bytes = fields.Integer(**about("Of this container or machine."))
    limit_source = fields.String(**about("cgroup v2, cgroup v1 or machine."))
    budget_bytes = fields.Integer()
    reserved_bytes = fields.Integer()
    used_bytes = fields.Integer()
    free_bytes = fields.Integer(**about("Negative if models have grown beyond the budget."))
    max_loaded = fields.Integer(allow_none=True)
    threads = fields.Integer(**about("Threads of each worker of a load that does not say otherwise."))
    models = fields.List(fields.Nested(LoadUseSchema))
    waiting = fields.List(fields.Nested(WaitSchema))
    pressure = fields.Nested(PressureSchema, allow_none=True, **about("Null without PSI."))
    confinement = fields.Nested(ConfinementSchema)
    devices = fields.List(fields.Nested(DeviceSchema), **about("First the CPU."))
    device_problems = fields.List(fields.String(), **about("Why others cannot be used."))
    confinement_of_devices = fields.Nested(
        ConfinementSchema, allow_none=True, **about("Of workers on devices but the CPU; null without any.")
    )
    repository_writable = fields.Boolean(
        **about("Whether the settings let admins add and remove versions; the folder may still not.")
    )
    as_of = fields.Integer(**about("The position that the answer reflects."))


class ResourcesCache:
    """Cache of the last answer until the next event, at most for CACHED_S: 1,000 loads take 18 ms.

    Requests that come while drivers are asked share the answer, which is of the moment after that.
    """

    def __init__(self) -> None:
        self._seen: tuple[int, float] | None = None
        self._answer: asyncio.Task[bytes] | None = None

    async def body(self, app: web.Application) -> bytes:
        position, now_s = app[LOG].state.position, asyncio.get_running_loop().time()
        is_outdated = self._seen is None or self._seen[0] != position or now_s - self._seen[1] > CACHED_S
        if self._answer is None or (self._answer.done() and is_outdated):
            self._answer = asyncio.create_task(self._encode(app))
        return await asyncio.shield(self._answer)  # one who leaves does not cancel it for others

    async def _encode(self, app: web.Application) -> bytes:
        memory = await read_device_memory(app)
        body = msgspec.json.encode(_resources(app, memory))
        self._seen = app[LOG].state.position, asyncio.get_running_loop().time()
        return body


@routes.get(
    "/api/v1/resources",
    access=Access.ANY,
    summary="Show the memory budget and its use",
    query=NothingSchema(),
    answers={200: (ResourcesSchema(), "The current use, at most a tenth of a second old.")},
)
async def show_resources(request: web.Request) -> web.Response:
    body = await request.app[RESOURCES_CACHE].body(request.app)
    return web.Response(body=body, content_type="application/json")


RESOURCES_CACHE = web.AppKey("resources_cache", ResourcesCache)


def _resources(app: web.Application, memory: Mapping[str, DeviceMemory]) -> dict[str, object]:
    consumer, limit, config, devices = app[CONSUMER], app[LIMIT], app[CONFIG], app[POOL].devices
    taken = measure(consumer, limit)
    return {
        "limit_bytes": limit.bytes,
        "limit_source": limit.source,
        "budget_bytes": taken.budget_bytes,
        "reserved_bytes": taken.reserved_bytes,
        "used_bytes": taken.used_bytes,
        "free_bytes": taken.budget_bytes - taken.reserved_bytes - taken.used_bytes,
        "max_loaded": consumer.policy.max_loaded,
        "threads": app[POOL].threads,
        "models": consumer.uses(),
        "waiting": consumer.waits(),
        "pressure": read_pressure(),
        "confinement": app[POOL].applied.confinement,
        "devices": list_devices(app, memory),
        "device_problems": devices.problems,
        "confinement_of_devices": app[POOL].applied_to_devices.confinement if devices.found else None,
        "repository_writable": config.repository_writable != OFF and config.has_store,
        "as_of": app[LOG].state.position,
    }
