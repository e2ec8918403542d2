"""What the metrics are made of, copied on the event loop a little at a time: nothing is answered meanwhile.

What is immutable, such as recorded models, is not looked into here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from aiohttp import web

from events.accept import MAX_QUEUE
from events.jobs import Job
from events.models import Model, ModelState
from events.series import Observed
from events.tally import BARE, ENDS, EVICTIONS, Tally
from events.types import TYPES, Cause
from runtime.live import LiveLoad
from runtime.prepared.counts import KEPT, LEFT_OUT, STOPPED
from runtime.prepared.preparation import FORMS
from runtime.prepared.preparing import Preparer
from runtime.statistics import Statistics
from server.appkeys import CONFIG, CONSUMER, LIMIT, LOG, STREAMS
from server.errors import ERRORS
from server.health import ready_checks
from server.metrics.requests import HttpCounts

K = TypeVar("K")

Labels = tuple[str, ...]
Samples = dict[str, list[tuple[Labels, float | Observed]]]
"""By the family's name without `loadledger_`: the values of its labels, and what is so."""

LOADS_AT_ONCE = 100
"""Looked at before others have their turn: about a millisecond."""

_WANTED = (ModelState.LOADED, ModelState.LOST, ModelState.FAILED)

HTTP_COUNTS = web.AppKey("http_counts", HttpCounts)


@dataclass(frozen=True, slots=True)
class LoadLook:
    """What one load takes and does. `name` is its model's label; `last_used_ns` is 0 for never."""

    name: str
    model_id: str
    workers: int
    memory_bytes: int
    is_loaded: bool
    is_serving: bool
    in_flight: int
    last_used_ns: int


@dataclass(frozen=True, slots=True)
class Look:
    """Everything at one moment.

    Attributes:
        samples: what is already as it will be shown.
        statistics: of inferences, by the models' labels.
        loads: those that have processes.
        models: all that were ever asked for.
        names: the labels of models that are wanted, by id.
        preparing_bytes: what is reserved for preparing.
        jobs: that have not ended.
        now: the ledger's time.
        now_ns: on the clock of `last_used_ns`.
    """

    samples: Samples
    statistics: Mapping[str, Statistics]
    loads: Sequence[LoadLook]
    models: Sequence[Model]
    names: Mapping[str, str]
    jobs: Sequence[Job]
    preparing_bytes: int
    now: str
    now_ns: int


async def look(app: web.Application) -> Look:
    """Look at all that is counted or measured; with 1,000 loaded models the loop is held for some 3 ms."""
    log, consumer = app[LOG], app[CONSUMER]
    live = list({id(load): load for load in consumer.live.values()}.values())
    wanted = [model.id for model in log.state.models.values() if _is_wanted(model)]
    preparation = consumer.preparation()
    statistics = consumer.totals.with_live(live)  # at once: a load that ended meanwhile would count twice
    loads = []
    for number, load in enumerate(live, 1):
        if not load.gone:
            loads.append(_load(log.tally.names.of(load.model_id), load))
        if number % LOADS_AT_ONCE == 0:
            await asyncio.sleep(0)
    return Look(
        samples={
            **_health(app),
            **_http(app[HTTP_COUNTS]),
            **_ledger(app),
            **_recorded(log.tally, statistics.keys()),
            **_preparing(consumer.preparer),
        },
        statistics=statistics,
        loads=loads,
        models=list(log.state.models.values()),
        names={model_id: log.tally.names.of(model_id) for model_id in wanted},
        jobs=log.state.unended(),
        preparing_bytes=preparation.reserved_bytes if preparation is not None else 0,
        now=log.now(),
        now_ns=time.monotonic_ns(),
    )


def _is_wanted(model: Model) -> bool:
    """Tell whether somebody wants the model to serve, and nobody wants it to go."""
    return model.phase in _WANTED or model.previous is not None


def _load(name: str, load: LiveLoad) -> LoadLook:
    return LoadLook(
        name,
        load.model_id,
        len(load.left),
        load.memory_bytes,
        load.report is not None,
        bool(load.serving),
        load.in_flight,
        load.last_used_ns,
    )


def _health(app: web.Application) -> Samples:
    config, limit, consumer = app[CONFIG], app[LIMIT], app[CONSUMER]
    return {
        "healthy": [((name,), float(well)) for name, well in ready_checks(app).items()],
        "inference_queue_limit": [((), config.inference_queue)],
        "jobs_limit": [((), MAX_QUEUE)],
        "memory_limit_bytes": [((), limit.bytes)],
        "memory_budget_bytes": [((), consumer.policy.budget_bytes or limit.bytes)],
    }


def _http(counts: HttpCounts) -> Samples:
    return {
        "http_requests_total": list(counts.requests.items()),
        "http_request_duration_seconds": [(key, each.observed()) for key, each in counts.durations.items()],
        "http_errors_total": _by(ERRORS, counts.errors),
    }


def _ledger(app: web.Application) -> Samples:
    log, tails = app[LOG], app[STREAMS].tails
    tally, head = log.tally, log.head.position
    return {
        "ledger_position": [((), head)],
        "ledger_waiting_commands": [((), log.waiting)],
        "ledger_append_duration_seconds": [((), tally.append_s.observed())],
        "ledger_commit_duration_seconds": [((), tally.commit_s.observed())],
        "ledger_write_failures_total": [((), tally.write_failures)],
        "access_denied_total": [((), tally.denied)],
        "streams": [((), len(app[STREAMS]))],
        "tail_lag_events": [((), max((head - tail.position for tail in tails), default=0))],
    }


def _recorded(tally: Tally, names: Iterable[str]) -> Samples:
    ends = [(cause.value, status.value) for cause in Cause for status in ENDS]
    return {
        "ledger_events_total": _by(TYPES, tally.events),
        "loads_total": list(_with_zeros(ends, tally.loads).items()),
        "unloads_total": list(_with_zeros(ends, tally.unloads).items()),
        "load_duration_seconds": [((status,), each.observed()) for status, each in tally.load_s.items()],
        "unload_duration_seconds": [((status,), each.observed()) for status, each in tally.unload_s.items()],
        "load_stage_seconds_total": _by((), tally.stage_s),
        "load_failures_total": _by((), tally.failures),
        "loads_by_form_total": _by((BARE, *FORMS), tally.forms),
        "evictions_total": [((cause,), tally.unloads[cause, "completed"]) for cause in EVICTIONS],
        "worker_exits_total": _by(names, tally.exits),
        "worker_restarts_total": _by(names, tally.restarts),
    }


def _preparing(preparer: Preparer) -> Samples:
    outcomes = [(form, outcome) for form in FORMS for outcome in (KEPT, LEFT_OUT, STOPPED)]
    samples: Samples = {
        "preparing": [((), float(preparer.preparation is not None))],
        "preparing_forms_total": list(_with_zeros(outcomes, preparer.counts.tried).items()),
        "preparing_duration_seconds": [((), preparer.counts.took_s.observed())],
        "prepared_dropped_total": [((), preparer.counts.dropped)],
    }
    if preparer.store is not None:
        forms, size = preparer.store.kept
        samples["prepared_forms"] = [((), forms)]
        samples["prepared_bytes"] = [((), size)]
        samples["prepared_limit_bytes"] = [((), preparer.store.limit_bytes)]
    return samples


def _by(known: Iterable[str], counts: Mapping[str, float]) -> list[tuple[Labels, float | Observed]]:
    return [((name,), count) for name, count in _with_zeros(known, counts).items()]


def _with_zeros(known: Iterable[K], counts: Mapping[K, float]) -> Mapping[K, float]:
    """Return counts, and zeros for what can be known before it happens.

    A counter that begins with its first event has not increased by it, as Prometheus sees it.
    """
    return {**dict.fromkeys(known, 0.0), **counts}
