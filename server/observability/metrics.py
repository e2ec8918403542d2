"""The metrics for Prometheus: name, help text, values and labels of each, and the route `/metrics`.

Names and units follow Prometheus' conventions. docs/metrics.md lists the metrics; the dashboard and the alert
rules in deploy/metrics name nothing else. A response is in Prometheus' text format or in OpenMetrics, and
kept for a moment.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, TypeVar

from aiohttp import hdrs, web
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, Metric, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from events.clock import seconds_between
from events.commands import MAX_QUEUE
from events.counters import ENDS, EVICTIONS, OTHERS, HistogramSnapshot
from events.jobs import JobKind, JobStatus
from events.models import Model, ModelState
from events.types import TYPES, Cause
from features.ondemand.app import DEMAND
from features.server import GAUGES, Gauge
from runtime.memory import read_pressure
from runtime.process.confinement import ALL_ACTS
from runtime.statistics import TOOK_S
from server.api.health import ready_checks
from server.appkeys import CONFIG, CONSUMER, LIMIT, LOG, MEMORY_PLAN, POOL, STREAMS
from server.auth.access import Access
from server.cluster import CLUSTER
from server.errors import ERRORS
from server.http.compression import COMPRESSED_FROM_BYTES, chosen_encoding, compress
from server.observability.requestlog import HTTP_COUNTS
from server.observability.timeseries import measure
from server.routing import Route, Routes

K = TypeVar("K")
V = TypeVar("V")

SERIES_AT_ONCE = 64
"""Series that are added without a pause: about a millisecond for histograms."""

PAUSE_S = 0.0001
"""Hands the interpreter to the event loop, which would otherwise wait 5 ms for it."""

INFERENCE_STAGES = ("queue", "input", "infer", "output", "transport")

_UNITS = ("seconds", "bytes", "ratio")
_UNENDED = (JobStatus.PENDING, JobStatus.IN_PROGRESS)
_SHOULD_SERVE = (ModelState.LOADED, ModelState.LOST, ModelState.FAILED)
_PROCESS = ProcessCollector(registry=None)


class ServerCollector(Collector):
    """The metrics of one scrape.

    The constructor takes, on the event loop, all values that must be consistent. `collect` may run in a
    thread: it reads only single numbers and dictionaries of counts.
    """

    def __init__(self, app: web.Application, gauges: Sequence[Gauge]) -> None:
        self._app = app
        self._gauges = gauges
        log, consumer = app[LOG], app[CONSUMER]
        loads = list({id(load): load for load in consumer.loads.values()}.values())
        name_of = log.tally.names.of
        self._statistics = consumer.totals.with_live(loads)
        self._now = log.now()
        self._jobs = log.state.unended()
        self._of_servers = app[CLUSTER].list_gauges()
        own = app[CLUSTER].name
        self._models = [app[CLUSTER].view(model) for model in list(log.state.models.values())]
        here = (model for model in self._models if _should_serve(model) and not _is_elsewhere(model, own))
        self._names = {model.id: name_of(model.id) for model in here}
        self._tail_lag = max((log.head.position - tail.position for tail in app[STREAMS].tails), default=0)
        self._budget = measure(consumer, app[LIMIT])
        self._workers, self._memory, self._in_flight = Counter[str](), Counter[str](), Counter[str]()
        self._last_used_ns: dict[str, int | None] = {}
        for load in loads:
            if load.has_exited:
                continue
            name, in_flight = name_of(load.model_id), load.in_flight
            self._workers[name] += len(load.alive_workers)
            self._memory[name] += load.memory_bytes
            self._in_flight[name] += in_flight
            if load.serving:
                self._last_used_ns[load.model_id] = None if in_flight else load.last_used_ns

    def collect(self) -> Iterator[Metric]:
        return chain(
            self._http_families(),
            self._inference_families(),
            self._model_families(),
            self._job_families(),
            self._memory_families(),
            self._ledger_families(),
            (_gauge(*each) for each in self._of_servers),
            _PROCESS.collect(),
        )

    def _http_families(self) -> Iterator[Metric]:
        checks = {name: float(well) for name, well in ready_checks(self._app).items()}
        yield _gauge("healthy", "1 if the check of /health/ready passes, else 0.", checks, "check")
        counts = self._app[HTTP_COUNTS]
        yield _counter(
            "http_requests_total",
            "Requests, by route as in /openapi.yaml and class of status: 2xx to 5xx, or aborted.",
            dict(counts.requests),
            "method route status",
        )
        yield _histogram(
            "http_request_duration_seconds",
            "Time until the response, without inferences, which have their own, and streams.",
            {key: durations.snapshot() for key, durations in list(counts.durations.items())},
            "method route",
        )
        yield _counter(
            "http_errors_total",
            "Refused or failed requests, by the code in the response.",
            _with_zeros(ERRORS, counts.errors),
            "code",
        )

    def _inference_families(self) -> Iterator[Metric]:
        sums = self._statistics
        yield _histogram(
            "inference_duration_seconds",
            "Time from an inference's first byte until its answer is written, queueing included.",
            {
                name: HistogramSnapshot(TOOK_S, tuple(each.took), each.total_ns / 1e9)
                for name, each in sums.items()
            },
            "model",
        )
        yield _counter(
            "inference_failures_total",
            "Inferences that failed in the worker.",
            {name: each.failures for name, each in sums.items()},
            "model",
        )
        yield _counter(
            "inferences_total",
            "Inferences answered, each counted with its batch size.",
            {name: each.inferences for name, each in sums.items()},
            "model",
        )
        yield _counter(
            "inference_executions_total",
            "Executions of the model; fewer than requests if some ran in one batch.",
            {name: each.executions for name, each in sums.items()},
            "model",
        )
        yield _counter(
            "inference_stage_seconds_total",
            "Time of answered inferences by stage: queue, input, infer, output, transport.",
            {
                (name, stage): getattr(each, f"{stage}_ns") / 1e9
                for name, each in sums.items()
                for stage in INFERENCE_STAGES
            },
            "model stage",
        )
        yield _counter(
            "inference_load_wait_seconds_total",
            "Time that inferences waited for a load on demand, by its end: completed, forwarded or failed.",
            self._app[DEMAND].waited_s,
            "outcome",
        )
        yield _gauge(
            "inference_in_flight", "Inferences that are queued or running.", self._in_flight, "model"
        )
        yield _gauge(
            "inference_queue_limit",
            "Inferences of one model that may be in flight.",
            self._app[CONFIG].inference_queue,
        )

    def _model_families(self) -> Iterator[Metric]:
        states = Counter(model.state for model in self._models)
        yield _gauge(
            "models",
            "Models that were ever requested, by state.",
            {state.value: states[state] for state in ModelState},
            "state",
        )
        yield _gauge(
            "model_serving",
            "1 if the model serves, 0 if it should but failed, is lost or loading; of _others, if all serve.",
            self._serving(),
            "model",
        )
        yield _gauge(
            "model_info",
            "1 for each serving model: its version.",
            dict.fromkeys(self._infos(), 1),
            "model version",
        )
        yield _gauge("model_workers", "Processes of the model.", self._workers, "model")
        yield _gauge(
            "model_memory_bytes",
            "Memory of the model's workers that counts for the budget.",
            self._memory,
            "model",
        )
        yield _gauge(
            "least_recently_used_age_seconds",
            "Idle time of the loaded model that was used the longest ago; 0 if all are busy.",
            self._longest_idle_s(),
        )
        tally = self._app[LOG].tally
        for name, text, counts in (
            ("worker_exits_total", "Workers that ended unexpectedly.", tally.exits),
            ("worker_restarts_total", "Reloads of the model after a worker died.", tally.restarts),
            (
                "reloads_after_eviction_total",
                "Loads of the model that completed after it was evicted for another.",
                tally.reloads,
            ),
        ):
            yield _counter(name, text, _with_zeros(self._statistics, counts), "model")

    def _serving(self) -> dict[str, float]:
        """Return by label whether the models that should serve do; for a shared label, whether all do."""
        serving: dict[str, float] = {}
        for model_id, name in self._names.items():
            serving[name] = min(serving.get(name, 1.0), float(model_id in self._last_used_ns))
        return serving

    def _infos(self) -> Iterator[tuple[str, str]]:
        for model in self._models:
            serving = model.serving if model.id in self._last_used_ns else None
            if serving is not None and self._names.get(model.id, OTHERS) != OTHERS:
                yield model.id, str(serving.version)

    def _longest_idle_s(self) -> float:
        models, now_ns = self._app[LOG].state.models, time.monotonic_ns()
        longest_s = 0.0
        for model_id, last_used_ns in self._last_used_ns.items():
            model = models.get(model_id)
            if last_used_ns:
                longest_s = max(longest_s, (now_ns - last_used_ns) / 1e9)
            elif last_used_ns == 0 and model is not None and model.serving is not None:
                longest_s = max(longest_s, seconds_between(model.serving.loaded_at, self._now))
        return longest_s

    def _job_families(self) -> Iterator[Metric]:
        tally = self._app[LOG].tally
        counts = Counter((job.kind, job.status) for job in self._jobs)
        ends = [(cause.value, status.value) for cause in Cause for status in ENDS]
        yield _gauge(
            "jobs",
            "Jobs that have not ended: the queue.",
            {(kind.value, status.value): counts[kind, status] for kind in JobKind for status in _UNENDED},
            "kind status",
        )
        yield _gauge(
            "jobs_limit", "Unended jobs beyond which requests are refused with queue_full.", MAX_QUEUE
        )
        yield _gauge(
            "oldest_job_age_seconds",
            "Time since the oldest load or unload of the queue was requested.",
            max((seconds_between(job.created_at, self._now) for job in self._jobs), default=0.0),
        )
        yield _counter(
            "emergency_loads_total",
            "Loads that a person with the role emergency let pass without what the rules ask of others.",
            tally.bypasses,
        )
        yield _counter(
            "loads_total", "Load jobs that ended.", _with_zeros(ends, tally.loads), "cause outcome"
        )
        yield _counter(
            "load_failures_total", "Load jobs that failed, by error code.", dict(tally.failures), "code"
        )
        yield _histogram(
            "load_duration_seconds",
            "Time from a load's request to its end, waiting included.",
            {status: durations.snapshot() for status, durations in tally.load_s.items()},
            "outcome",
        )
        yield _counter(
            "load_stage_seconds_total",
            "Time of completed loads by stage; hashing runs beside loading.",
            tally.stage_s,
            "stage",
        )
        yield _counter(
            "unloads_total", "Unload jobs that ended.", _with_zeros(ends, tally.unloads), "cause outcome"
        )
        yield _histogram(
            "unload_duration_seconds",
            "Time from an unload's request until the processes ended.",
            {status: durations.snapshot() for status, durations in tally.unload_s.items()},
            "outcome",
        )
        yield _counter(
            "evictions_total",
            "Models unloaded to make room for another (eviction) or because they were idle (idle).",
            {cause.value: tally.unloads[cause, "completed"] for cause in EVICTIONS},
            "cause",
        )

    def _memory_families(self) -> Iterator[Metric]:
        yield _gauge(
            "memory_limit_bytes", "Memory limit of the container or machine.", self._app[LIMIT].bytes
        )
        yield _gauge(
            "memory_budget_bytes",
            "Memory that all workers may take together (--memory-budget).",
            self._budget.budget_bytes,
        )
        yield _gauge(
            "memory_reserved_bytes", "Memory of the budget reserved for loads.", self._budget.reserved_bytes
        )
        yield _gauge(
            "memory_used_bytes",
            "Memory of the budget that loaded models take, as measured.",
            self._budget.used_bytes,
        )
        plan = self._app[MEMORY_PLAN]
        yield _gauge(
            "memory_part_bytes",
            "Memory that each part of the server may take beside the budget.",
            {
                "growth": plan.growth_bytes,
                "bodies": plan.bodies_bytes,
                "shared": plan.shared_bytes,
                "server": plan.server_bytes,
            },
            "part",
        )
        yield _gauge(
            "memory_excess_bytes",
            "Bytes by which the budget and the parts together pass the limit.",
            plan.excess_bytes,
        )
        yield _gauge(
            "memory_kills_together",
            "1 if the kernel kills the whole container when one process passes its limit (memory.oom.group).",
            int(plan.limit.kills_together),
        )
        confinement = self._app[POOL].applied.confinement
        yield _gauge(
            "worker_forbidden_acts",
            "Whether a worker could do a forbidden act, as tested when the server started.",
            {act: int(act in confinement.not_prevented) for act in ALL_ACTS},
            "act",
        )
        for each in self._gauges:
            yield (_counter if each[0].endswith("_total") else _gauge)(*each)
        found = read_pressure()
        percents = {"memory": found.memory_some_percent, "cpu": found.cpu_some_percent} if found else {}
        yield _gauge(
            "pressure_ratio",
            "Share of the last 10 s in which a process waited for memory or cpu, if the kernel has PSI.",
            {name: percent / 100 for name, percent in percents.items() if percent is not None},
            "resource",
        )

    def _ledger_families(self) -> Iterator[Metric]:
        log = self._app[LOG]
        tally = log.tally
        yield _gauge("ledger_position", "The position of the last event.", log.head.position)
        wal = log.path.with_name(f"{log.path.name}-wal")
        yield _gauge(
            "ledger_size_bytes", "Size of the ledger's files, with its write-ahead log.", _size(log.path, wal)
        )
        yield _gauge(
            "ledger_wal_size_bytes",
            "Size of the ledger's write-ahead log; above 32 MiB, a long read holds it.",
            _size(wal),
        )
        yield _counter("ledger_events_total", "Events appended.", _with_zeros(TYPES, tally.events), "type")
        yield _histogram(
            "ledger_append_duration_seconds",
            "Time from a command's submission until its outcome was durable.",
            tally.append_s.snapshot(),
        )
        yield _histogram(
            "ledger_commit_duration_seconds",
            "Time of transactions; each writes all waiting commands.",
            tally.commit_s.snapshot(),
        )
        yield _counter("ledger_write_failures_total", "Transactions that failed.", tally.write_failures)
        yield _gauge("ledger_waiting_commands", "Commands that wait to be written.", log.waiting)
        yield _counter(
            "access_denied_total",
            "Requests denied for lack of a role, as recorded in the ledger.",
            tally.denied,
        )
        yield _gauge("streams", "Open event streams.", len(self._app[STREAMS]))
        yield _gauge(
            "tail_lag_events", "Events that the slowest stream is behind the ledger.", self._tail_lag
        )


def _family(
    kind: type[CounterMetricFamily | GaugeMetricFamily],
    name: str,
    text: str,
    values: Mapping[Any, float] | float,
    labels: str = "",
) -> Metric:
    """Return a family with one value, or with one per key: the value of the label, or of all labels."""
    family = kind(f"loadledger_{name}", text, labels=labels.split(), unit=_unit(name))
    for key, value in _series(values):
        family.add_metric(key, value)
    return family


_counter = partial(_family, CounterMetricFamily)
_gauge = partial(_family, GaugeMetricFamily)


def _histogram(
    name: str, text: str, values: Mapping[Any, HistogramSnapshot] | HistogramSnapshot, labels: str = ""
) -> HistogramMetricFamily:
    """Return a family of histograms; each bucket includes the ones before it."""
    family = HistogramMetricFamily(f"loadledger_{name}", text, labels=labels.split(), unit=_unit(name))
    for key, observed in _series(values):
        bounds = (*map(repr, observed.bounds), "+Inf")
        buckets = list(zip(bounds, accumulate(observed.counts), strict=True))
        family.add_metric(key, buckets, observed.total_s)
    return family


def _series(values: Mapping[Any, V] | V) -> Iterator[tuple[tuple[str, ...], V]]:
    if not isinstance(values, Mapping):
        yield (), values
        return
    for number, (key, value) in enumerate(values.items(), 1):
        yield key if isinstance(key, tuple) else (key,), value
        if number % SERIES_AT_ONCE == 0:
            time.sleep(PAUSE_S)


def _unit(name: str) -> str:
    last = name.removesuffix("_total").rpartition("_")[2]
    return last if last in _UNITS else ""


def _with_zeros(known: Iterable[K], counts: Mapping[K, float]) -> dict[K, float]:
    """Return counts, with zeros for known labels without a count.

    Prometheus sees no increase in a counter whose first value is 1.
    """
    return {**dict.fromkeys(known, 0.0), **counts}


def _should_serve(model: Model) -> bool:
    """Whether a model should serve: it is loaded, or is to be loaded again."""
    return model.phase in _SHOULD_SERVE or model.previous is not None


def _is_elsewhere(model: Model, own: str | None) -> bool:
    """Whether a model is at another server, which has its metrics."""
    return own is not None and model.serving is not None and model.serving.server not in (None, own)


def _size(*paths: Path) -> int:
    size_bytes = 0
    for path in paths:
        with suppress(OSError):
            size_bytes += path.stat().st_size
    return size_bytes


routes = Routes(tag="health")

OPEN = "open"
"""The value of --metrics that makes the route public."""

KEPT_RESPONSE_S = 0.1
"""How long a response is kept at least, to share it among simultaneous scrapes."""

KEPT_TIMES = 10
"""How long a response is kept, in multiples of its duration: scraping takes at most a tenth of a core."""


_PLAIN, _OPENMETRICS = "text/plain", "application/openmetrics-text"
_FORMATS: dict[str, tuple[str, Callable[[Collector], bytes]]] = {
    _PLAIN: (CONTENT_TYPE_PLAIN_0_0_4, generate_latest),
    _OPENMETRICS: (openmetrics.CONTENT_TYPE_LATEST, openmetrics.generate_latest),
}


class Scrapes:
    """The last response in each format, kept for a moment and shared by the scrapes of that time."""

    def __init__(self) -> None:
        self._answers: dict[str, asyncio.Task[bytes]] = {}
        self._kept_until_s: dict[str, float] = {}

    async def body(self, app: web.Application, media_type: str) -> bytes:
        answer = self._answers.get(media_type)
        if answer is None or (answer.done() and time.monotonic() >= self._kept_until_s.get(media_type, 0)):
            answer = self._answers[media_type] = asyncio.create_task(self._generate(app, media_type))
        return await asyncio.shield(answer)  # a scraper that leaves does not cancel it for others

    async def _generate(self, app: web.Application, media_type: str) -> bytes:
        began_s = time.monotonic()
        collector = ServerCollector(app, [each for read in GAUGES for each in await read(app)])
        body = await asyncio.to_thread(_FORMATS[media_type][1], collector)
        now_s = time.monotonic()
        self._kept_until_s[media_type] = now_s + max(KEPT_RESPONSE_S, KEPT_TIMES * (now_s - began_s))
        return body


SCRAPES = web.AppKey("scrapes", Scrapes)


@routes.get(
    "/metrics",
    access=Access.ANY,
    summary="Metrics for Prometheus",
    description="Prometheus' text format, or OpenMetrics' if `Accept` asks for it. docs/metrics.md lists "
    "them. With `--metrics=open` no token is needed.",
    answers={
        200: {
            "description": "As it is now, or was a moment ago.",
            "content": {
                media_type: {"schema": {"type": "string"}, "example": "loadledger_ledger_position 17\n"}
                for media_type in _FORMATS
            },
        }
    },
)
async def show_metrics(request: web.Request) -> web.Response:
    media_type = negotiate(",".join(request.headers.getall(hdrs.ACCEPT, ())))
    body = await request.app[SCRAPES].body(request.app, media_type)
    headers = {
        hdrs.CONTENT_TYPE: _FORMATS[media_type][0],
        hdrs.VARY: f"{hdrs.ACCEPT}, {hdrs.ACCEPT_ENCODING}",
    }
    encoding = chosen_encoding(request.headers.get(hdrs.ACCEPT_ENCODING))
    if encoding is not None and len(body) >= COMPRESSED_FROM_BYTES:
        headers[hdrs.CONTENT_ENCODING] = encoding
        body = await compress([body], encoding)
    return web.Response(body=body, headers=headers)


def metrics_routes(metrics: str) -> list[Route]:
    """Return the routes of this module; `metrics` is the setting of their access."""
    if metrics != OPEN:
        return routes
    return [replace(route, access=Access.PUBLIC) for route in routes]


def negotiate(accept: str) -> str:
    """Return the media type of the response: OpenMetrics if `accept` names it, in version 1.0.0 or none."""
    for accepted in accept.split(","):
        media_type, *parameters = (part.strip() for part in accepted.split(";"))
        versions = [value for value in parameters if value.startswith("version=")]
        if media_type == _OPENMETRICS and versions in ([], ["version=1.0.0"]):
            return _OPENMETRICS
    return _PLAIN
