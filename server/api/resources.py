"""`GET /api/v1/resources`: the memory budget, its users, and the jobs that wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from aiohttp import web

from answers.resources import ConfinementInfo, MemoryParts, OperatorNotice, PressureInfo, Resources
from events.jobs import BYTES_GONE
from events.models import Model, ModelState
from events.types import contents_of, digest_of
from features.server import NOTICES, RESOURCES
from runtime.memory import read_pressure
from runtime.memoryplan import describe_plan
from server.api.health import list_not_ready
from server.api.models import find_bytes
from server.appkeys import CONFIG, CONSUMER, LIMIT, LOG, MEMORY_PLAN, POOL, VERSIONS
from server.auth.access import Access
from server.config import OFF
from server.http.answers import respond, show, show_optional
from server.http.validation import NothingSchema
from server.observability.reloads import LAST_HOUR, describe_reloads, read_counts
from server.observability.timeseries import measure
from server.routing import Routes

routes = Routes(tag="resources")

CACHED_S = 0.1
"""Seconds for which an answer is reused: any role may poll, and often."""


MAX_NAMED = 3
"""Models that a notice of several names: more are a list, which `loadledger show` has one by one."""


class ResourcesCache:
    """Cache of the last answer until the next event, at most for CACHED_S: with 1,000 loads it takes 18 ms.

    Requests that arrive while drivers are queried share the next answer.
    """

    def __init__(self) -> None:
        self._seen: tuple[int, float] | None = None
        self._answer: asyncio.Task[Resources] | None = None

    async def read(self, app: web.Application) -> Resources:
        position, now_s = app[LOG].state.position, asyncio.get_running_loop().time()
        is_outdated = self._seen is None or self._seen[0] != position or now_s - self._seen[1] > CACHED_S
        if self._answer is None or (self._answer.done() and is_outdated):
            self._answer = asyncio.create_task(self._read(app))
        return await asyncio.shield(self._answer)  # a client that leaves does not cancel it for others

    async def _read(self, app: web.Application) -> Resources:
        members = [await read(app) for read in RESOURCES]
        found = _resources(app, {name: value for each in members for name, value in each.items()})
        self._seen = app[LOG].state.position, asyncio.get_running_loop().time()
        return found


@routes.get(
    "/api/v1/resources",
    access=Access.ANY,
    summary="Show the memory budget and its use",
    query=NothingSchema(),
    answers={200: (Resources, "The current use, at most a tenth of a second old.")},
)
async def show_resources(request: web.Request) -> web.Response:
    return respond(await request.app[RESOURCES_CACHE].read(request.app))


RESOURCES_CACHE = web.AppKey("resources_cache", ResourcesCache)


def _resources(app: web.Application, of_features: Mapping[str, Any]) -> Resources:
    consumer, limit, config, plan = app[CONSUMER], app[LIMIT], app[CONFIG], app[MEMORY_PLAN]
    taken, uses = measure(consumer, limit), consumer.uses()
    free_bytes = taken.budget_bytes - taken.reserved_bytes - taken.used_bytes
    hour, models = app[LAST_HOUR].since(read_counts(app)), app[LOG].state.models.values()
    return Resources(
        not_ready=list_not_ready(app),
        limit_bytes=limit.bytes,
        limit_source=limit.source,
        memory=MemoryParts(
            excess_bytes=plan.excess_bytes,
            kills_together=limit.kills_together,
            summary=describe_plan(plan),
        ),
        budget_bytes=taken.budget_bytes,
        reserved_bytes=taken.reserved_bytes,
        used_bytes=taken.used_bytes,
        free_bytes=free_bytes,
        max_loaded=consumer.policy.max_loaded,
        drain_timeout_s=config.drain_timeout_s,
        threads=app[POOL].threads,
        models=uses,
        waiting=consumer.waits(),
        reloads=describe_reloads(hour, uses, free_bytes, consumer.policy.max_loaded),
        pressure=show_optional(read_pressure(), PressureInfo),
        confinement=show(app[POOL].applied.confinement, ConfinementInfo),
        **of_features,
        notices=[
            *(notice for read in NOTICES for notice in read(app)),
            *describe_missed(models),
            *describe_changed(_find_changed(app)),
            *describe_unjoined(models),
        ],
        repository_writable=config.repository_writable != OFF and config.has_store,
        as_of=app[LOG].state.position,
    )


def _find_changed(app: web.Application) -> dict[str, str]:
    """Return the models whose files in the repository were seen to differ from those that stay."""
    found, state, on_demand = dict[str, str](), app[LOG].state, app[CONFIG].loads_for_inferences
    for (model_id, version), digest in dict(app[VERSIONS].changed).items():
        kept = find_bytes(state, model_id, [version], on_demand=on_demand)
        if kept is not None and (version, digest) == (kept[0], digest_of(contents_of(kept[1]))):
            found[model_id] = f"version {version} of {model_id}"
    return found


def describe_changed(found: Mapping[str, str]) -> Iterator[OperatorNotice]:
    """Yield a notice of the models whose files in the repository wait for a person's load.

    `found` has the version of each, in words.
    """
    if found:
        who, what = _join_models(found)
        _, commands = _join_models({name: f"`loadledger load {name}`" for name in found})
        yield OperatorNotice(
            title=f"{who}: the repository has newer files than those that were loaded",
            why=f"What was loaded stays until a person loads again: {what}.",
            todo=f"To use the newer files: {commands}.",
            level="note",
        )


def describe_missed(models: Iterable[Model]) -> Iterator[OperatorNotice]:
    """Yield a notice of the models that served from bytes which are nowhere any more."""
    errors = {model.id: model.error for model in models if model.phase is ModelState.FAILED}
    gone = {name: error.message for name, error in errors.items() if error and error.code == BYTES_GONE}
    if gone:
        who, why = _join_models(gone)
        name = who if len(gone) == 1 else "MODEL"
        yield OperatorNotice(
            title=f"{who}: the bytes that served are gone",
            why=f"{why}.",
            todo="Look whether the repository or the store is mounted."
            f" `loadledger load {name}` takes what the repository has;"
            f" `loadledger unload {name}` says that the model is to be gone.",
        )


def describe_unjoined(models: Iterable[Model]) -> Iterator[OperatorNotice]:
    """Yield a notice of the loaded models with batching whose requests of several clients are not joined."""
    reasons = {
        model.id: f"{model.id}: {model.serving.rows_depend or ''}"
        for model in models
        if model.phase is ModelState.LOADED
        and model.serving is not None
        and model.serving.parameters.max_batch_size > 1
        and not model.serving.joins_requests
    }
    if not reasons:
        return
    who, why = _join_models(reasons)
    yield OperatorNotice(
        title=f"{who}: requests of several clients are not joined in batches",
        why=f"{why.removeprefix(f'{who}: ')}.",
        todo="Nothing has to be done: answers are right, at the speed without batching. To join them all"
        ' the same, set dependent_rows = "allow" in the loadledger.toml of the model, unload and load it.',
        level="note",
    )


def _join_models(said: Mapping[str, str]) -> tuple[str, str]:
    """Return the name of a model, or the number of several, and what is said of the first of them."""
    names = sorted(said)
    left = len(names) - MAX_NAMED
    parts = [*(said[name] for name in names[:MAX_NAMED]), *([f"and {left} more"] if left > 0 else [])]
    return names[0] if len(names) == 1 else f"{len(names)} models", "; ".join(parts)
