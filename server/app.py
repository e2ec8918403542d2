"""The application: routes, middlewares, and resources, one async generator each.

`create_app` assembles and does no I/O. Resources open at start in the order of `cleanup_ctx` and close in the
reverse order.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from aiohttp import web
from msgspec import UNSET

from events.audit.kepthead import HeadKeeper, find_rollback
from events.clock import uuid7
from events.commands import Record
from events.errors import LedgerProblem, RolledBack
from events.log import Log
from events.sqlite.datalock import LEDGER, lock_data, lock_ledger, refuse_replica
from events.sqlite.listing import open_reader
from events.sqlite.readonly import open_past
from events.sqlite.timetravel import NOTE_EVERY_S
from events.types import SYSTEM, Draft, PolicyInForce, RollbackAccepted, contents_of, digest_of
from features.approvals import routes as approvals
from features.labels import routes as labels
from features.notify.app import announce_progress, open_senders
from features.ondemand.app import open_demand
from features.records import routes as records
from features.records.app import close_files, open_recording
from features.rules import LoadPolicy
from features.server import choose_targets, describe_setup, find_rooms
from features.signatures import routes as signatures
from nodes import routes as node_routes
from nodes.thisnode import ThisNode
from runtime.cgroups import count_usable_cpus
from runtime.consumer.consumer import Consumer
from runtime.lostmodels import stopped_server
from runtime.memory import find_memory_limit, is_under_pressure, read_pressure
from runtime.memoryplan import MemoryPlan, describe_plan
from runtime.process.confinement import describe
from runtime.process.pool import WorkerPool
from runtime.process.sharedmemory import SharedRoom
from runtime.repository import Repository
from runtime.router import Router
from runtime.scheduler.view import Policy
from runtime.store.folder import STORE
from runtime.store.store import Store
from runtime.store.versions import Versions
from runtime.uploads.changes import VersionChanges
from runtime.uploads.recovery import Recovery
from runtime.uploads.uploads import Uploads
from server.api import (
    events,
    health,
    jobs,
    loads,
    models,
    overview,
    pages,
    resources,
    samples,
    timeline,
    tokens,
    versions,
)
from server.api.events import HEAD_KEEPER, PROVER, Prover, open_streams
from server.api.health import failed_tasks
from server.api.jobs import JOB_REQUESTS, JobRequests
from server.api.resources import RESOURCES_CACHE, ResourcesCache
from server.api.timetravel import TIME_TRAVEL
from server.appkeys import (
    BODIES,
    CONFIG,
    CONSUMER,
    CONSUMER_TASK,
    GATE,
    LIMIT,
    LOG,
    MEMORY_PLAN,
    POLICY,
    POOL,
    READER,
    ROUTER,
    STOPPING,
    STREAMS,
    TIME_SERIES,
    UPLOADS,
    VERSIONS,
)
from server.auth.control import open_control
from server.auth.gate import Gate, auth_middleware, create_verifier
from server.auth.keys import ensure_data_dir, open_signer
from server.auth.ratelimit import RateLimits
from server.auth.tokens import TOKENS, TokenIssuer
from server.cluster import CLUSTER, Cluster
from server.config import Config, ConfigError
from server.errors import errors_middleware
from server.http.bodies import Bodies
from server.http.responses import response_completer
from server.http.validation import validation_middleware
from server.observability import metrics
from server.observability.metrics import SCRAPES, Scrapes
from server.observability.reloads import LAST_HOUR, LastHour, read_counts
from server.observability.requestlog import HTTP_COUNTS, HttpCounts, request_middleware
from server.observability.timeseries import SAMPLE_EVERY_S, TimeSeries, record
from server.routing import Route, add_routes
from server.v2 import inference, metadata
from server.v2 import repository as v2_repository

_log = logging.getLogger(__name__)


def all_routes(metrics_access: str = "token") -> list[Route]:
    """Return every route of the server, as a reader of the documentation meets them.

    `metrics_access` is the setting of who may read /metrics.
    """
    return [
        *models.routes,
        *loads.routes,
        *jobs.routes,
        *inference.routes,
        *metadata.routes,
        *v2_repository.routes,
        *versions.routes,
        *labels.routes,
        *approvals.routes,
        *signatures.routes,
        *events.routes,
        *records.routes,
        *timeline.routes,
        *resources.routes,
        *samples.routes,
        *overview.routes,
        *node_routes.routes,
        *tokens.routes,
        *health.routes,
        *metrics.metrics_routes(metrics_access),
        *pages.routes,
    ]


def create_app(config: Config, *, accepts_rollback: bool = False) -> web.Application:
    """Return the application; it does no I/O before it starts.

    With `accepts_rollback` it serves a ledger that does not contain the last signed head, and records that.
    """
    gate = Gate(create_verifier(config), RateLimits(config), proxies=config.proxies())
    counts = HttpCounts()
    app = web.Application(
        middlewares=[
            request_middleware(counts),
            errors_middleware,
            auth_middleware(gate),
            validation_middleware,
        ],
        client_max_size=config.max_request_bytes,
    )
    add_routes(app, all_routes(config.metrics))
    app[CONFIG] = config
    app[GATE] = gate
    app[STOPPING] = asyncio.Event()
    app[RESOURCES_CACHE] = ResourcesCache()
    app[HTTP_COUNTS] = counts
    app[SCRAPES] = Scrapes()
    app.on_response_prepare.append(response_completer(gate.proxies))
    app.on_shutdown.append(_begin_stop)
    ledger = partial(_ledger, accepts_rollback=accepts_rollback)
    app.cleanup_ctx.extend(
        [
            _data_directory,
            _workers,
            ledger,
            _readers,
            open_recording,
            open_senders,
            _uploads,
            _consumer,
            _forwarding,
            _time_series,
            open_streams,
            partial(open_control, others={"nodes": node_routes.routes}),
        ]
    )
    return app


async def _begin_stop(app: web.Application) -> None:
    """End long waits and streams, since clean-up waits for their handlers."""
    app[STOPPING].set()
    asyncio.get_running_loop().call_later(app[CONFIG].drain_timeout_s, _end_inferences, app)
    app[STREAMS].tails.close()
    app[LOG].notify()
    if not failed_tasks(app):
        await app[CLUSTER].leave(partial(_end_work, app))


def _end_inferences(app: web.Application) -> None:
    """Answer the inferences that have not ended within the drain timeout, before their connections close."""
    for load in app[CONSUMER].loads.values():
        for worker in load.alive_workers:
            worker.fail_inferences(partial(stopped_server, load.model_id))


async def _end_work(app: web.Application) -> None:
    await app[CONSUMER].stop()
    await asyncio.wait([app[CONSUMER_TASK]])
    await close_files(app)


async def _data_directory(app: web.Application) -> AsyncIterator[None]:
    data, address = app[CONFIG].data, app[CONFIG].ledger
    if address is not None:
        ThisNode.check_keys(data)
    if app[CONFIG].policy != LoadPolicy() and not app[CONFIG].has_store:
        raise ConfigError(
            "--store-size: a policy checks the private copies that models load from, and off makes none:"
            " give the store a size"
        )
    await asyncio.to_thread(ensure_data_dir, data)
    with lock_data(data), lock_ledger(data / LEDGER):
        if address is None:
            refuse_replica(data)
        yield


async def _workers(app: web.Application) -> AsyncIterator[None]:
    app[LIMIT] = find_memory_limit()
    app[MEMORY_PLAN] = plan = app[CONFIG].plan_memory(app[LIMIT])
    _log.log(logging.INFO if plan.fits else logging.WARNING, "%s", describe_plan(plan))
    app[BODIES] = Bodies(plan)
    app[POOL] = pool = WorkerPool(
        threads=app[CONFIG].model_threads(count_usable_cpus()),
        patience_s=app[CONFIG].inference_grace_s,
        records_stderr=app[CONFIG].ledger_stderr == "on",
        targets=choose_targets(app[CONFIG]),
        max_request_bytes=app[CONFIG].max_request_bytes,
        answer_room=app[BODIES].answer_room,
        shared_room=SharedRoom(plan.shared_bytes),
    )
    await pool.open()
    try:
        await _confine(pool, app[CONFIG])
        _log.info("threads of each model: %d, unless its load says otherwise", pool.threads)
        app[POLICY] = await _policy(app[CONFIG], plan, pool)
        for said in describe_setup(pool, app[POLICY].rooms):
            _log.info("%s", said)
        yield
    finally:
        await pool.close()


async def _confine(pool: WorkerPool, config: Config) -> None:
    started_s = time.perf_counter()
    await pool.confine(config.confine, config.data)
    said = describe(pool.applied.confinement)
    if pool.applied.confinement.not_prevented:
        _log.warning("%s%s", said, pool.applied.reasons)
    else:
        _log.info("%s; to test that took %.0f ms", said, (time.perf_counter() - started_s) * 1000)


async def _ledger(app: web.Application, *, accepts_rollback: bool) -> AsyncIterator[None]:
    config, gate, data = app[CONFIG], app[GATE], app[CONFIG].data
    alone = config.ledger is None
    cluster = Cluster(Log(data / LEDGER)) if alone else ThisNode(config, gate.verifier)
    app[CLUSTER], app[LOG] = cluster, cluster.log
    log, gate.verify_forwarded = cluster.log, cluster.verify_forwarded
    try:
        rollback = await cluster.open(
            lambda: _check_rollback(data, accepts_rollback=accepts_rollback),
            lambda: asyncio.to_thread(_open_files, app),
        )
        app[PROVER] = prover = Prover(await asyncio.to_thread(open_signer, data))
        app[HEAD_KEEPER] = keeper = HeadKeeper(data)
        await announce_progress(app)
        started = await cluster.begin(app)
        await _record_policy(app)
        if rollback is not None:
            await log.rollback_accepted(rollback[0])
        await keeper.keep(prover.head(log))
        app[JOB_REQUESTS] = JobRequests(log, started.position)
        app[TOKENS] = TokenIssuer(config, log)
        gate.verifier.is_revoked = app[TOKENS].is_revoked
        noting = asyncio.create_task(_note_presence(log, prover, keeper), name="presence")
        denials = gate.denials
        counting = asyncio.create_task(denials.run(log.submit), name="denials")
        yield
        noting.cancel()
        denials.close()
        await counting
        await asyncio.wait([noting])
        if not failed_tasks(app):  # after a failure the next start must see an unclean stop
            with suppress(LedgerProblem):  # the stop counts as unclean then
                await cluster.record_stop()
        await keeper.keep(prover.head(log))
    finally:
        await cluster.close()


async def _record_policy(app: web.Application) -> None:
    """Record the policy for loads if it is another one than at the last start."""
    log, policy, name = app[LOG], app[CONFIG].policy, app[CLUSTER].name
    if log.state.registers.find_policy(name) != policy:
        data = PolicyInForce(policy, server=UNSET if name is None else name)
        await log.submit(Record((Draft(uuid7(), data, SYSTEM),)))


async def _check_rollback(data: Path, *, accepts_rollback: bool) -> tuple[RollbackAccepted, str] | None:
    """Return what accepting the ledger records; None if it contains the last signed head.

    Raises:
        RolledBack: `rolled_back`, it does not, and that is not accepted.
    """
    own = open_signer(data).public_key
    rollback = await asyncio.to_thread(find_rollback, data, data / LEDGER, own)
    if rollback is not None and not accepts_rollback:
        raise RolledBack(
            f"{rollback[1]}: {data / LEDGER} was replaced by an older ledger, or by another one; if that is "
            "intended, as after a restore or for a new ledger, start once with --accept-rollback, which the "
            "ledger records"
        )
    return rollback


async def _note_presence(log: Log, prover: Prover, keeper: HeadKeeper) -> None:
    """Note each minute that the server is there, and keep the head: an unclean end is known to the minute."""
    while True:
        await asyncio.sleep(NOTE_EVERY_S)
        with suppress(LedgerProblem):  # next time, then; the writer has said what is wrong
            await log.note_last_use({})
            await keeper.keep(prover.head(log))


async def _readers(app: web.Application) -> AsyncIterator[None]:
    path = app[LOG].path
    async with open_reader(path) as app[READER], open_past(path) as app[TIME_TRAVEL]:
        yield


async def _uploads(app: web.Application) -> AsyncIterator[None]:
    """Finish what callers added or removed before the server ended, before any model is loaded."""
    repository, policy, owner = app[VERSIONS].repository, app[CONFIG].upload_policy(), app[PROVER].ledger_name
    changes = VersionChanges(repository, policy, owner, app[LOG], elsewhere=app[CLUSTER])
    recovery = Recovery(changes, app[READER].event)
    app[UPLOADS] = Uploads(changes, recovery)
    await recovery.open()
    yield
    await recovery.close()


async def _policy(config: Config, plan: MemoryPlan, pool: WorkerPool) -> Policy:
    return Policy(
        config.max_loads(count_usable_cpus()),
        budget_bytes=plan.budget_bytes,
        max_loaded=config.max_loaded or None,
        evicts=config.evict == "idle",
        takes_turns=config.loads_for_inferences,
        min_residency_s=config.min_residency_s,
        restores=config.restore == "all",
        loads=config.policy,
        rooms=await find_rooms(config, pool, plan.limit.bytes),
    )


def _open_files(app: web.Application) -> None:
    """Open the store of versions, beside the repository."""
    repository = Repository(app[CONFIG].repository, app[LOG].is_removed)
    app[VERSIONS] = Versions(repository, _open_store(app))


def _open_store(app: web.Application) -> Store | None:
    """Open the store of model versions; without one, workers load from the repository."""
    config = app[CONFIG]
    if not config.has_store:
        return None
    find_needed, find_kept = partial(_needed_digests, app), partial(_chosen_digests, app)
    store = Store(config.data / STORE, config.store_bytes(), find_needed, find_kept)
    store.open()
    return store


def _needed_digests(app: web.Application, store: Store) -> frozenset[str]:
    """Return the versions that must not be swept: of loads here that serve, were lost, or are pending."""
    state, here = app[LOG].state, {None, app[CLUSTER].name}
    held = [each for model in list(state.models.values()) for each in model.held]
    own = (each for each in held if each.server in here)
    needed = {digest_of(contents_of(each.files)) for each in own}
    for job in [job for queue in list(state.queues.values()) for job in queue]:
        source = None if job.version is None else store.read_source(job.model_id, job.version)
        if source is not None and job.server in here:
            needed.add(digest_of(source.contents))
    return frozenset(needed)


def _chosen_digests(app: web.Application) -> frozenset[str]:
    """Return the versions that inferences would load, since persons chose them."""
    if not app[CONFIG].loads_for_inferences:
        return frozenset()
    models = list(app[LOG].state.models.values())
    chosen = [model.chosen for model in models if model.chosen and model.chosen.version is not None]
    return frozenset(digest_of(contents_of(each.files)) for each in chosen)


async def _consumer(app: web.Application) -> AsyncIterator[None]:
    config, cluster = app[CONFIG], app[CLUSTER]
    app[CONSUMER] = consumer = Consumer(
        app[LOG],
        app[POOL],
        app[VERSIONS],
        policy=app[POLICY],
        drain_timeout_s=config.drain_timeout_s,
        turn_drain_s=max(config.drain_timeout_s, config.inference_timeout_s),
        progress_timeout_s=config.progress_timeout_s,
        under_pressure=lambda: is_under_pressure(read_pressure()),
        loads=cluster.loads,
        elsewhere=cluster,
        workers_bytes=app[MEMORY_PLAN].workers_bytes,
    )
    app[ROUTER] = Router(
        app[LOG],
        consumer.loads,
        app[VERSIONS].repository,
        max_queue=config.inference_queue,
        elsewhere=cluster,
    )
    demand = open_demand(app)
    app[CONSUMER_TASK] = task = asyncio.create_task(consumer.run(), name="consumer")
    try:
        yield
    finally:
        await demand.close()
        await consumer.stop()
        await asyncio.wait([task])
        await app[POOL].close()  # ServerStopped, which follows, says that no worker is left


async def _forwarding(app: web.Application) -> AsyncIterator[None]:
    async with app[CLUSTER].forwarding(app):
        yield


async def _time_series(app: web.Application) -> AsyncIterator[None]:
    app[TIME_SERIES] = series = TimeSeries()
    app[LAST_HOUR] = hour = LastHour(SAMPLE_EVERY_S)
    sampled = record(series, app[LOG], app[CONSUMER], app[LIMIT], lambda: hour.add(read_counts(app)))
    sampling = asyncio.create_task(sampled, name="time series")
    yield
    sampling.cancel()
    await asyncio.wait([sampling])
