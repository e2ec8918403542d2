"""Every metric there is: its name, what kind it is, its labels, and what it says.

Names and units follow Prometheus' conventions. The table in docs/metrics.md is generated from here, and the
dashboard and the alert rules in deploy/metrics name nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]

UNITS = ("seconds", "bytes", "ratio")
"""Of a name's last word, before `_total`."""


@dataclass(frozen=True, slots=True)
class Family:
    """One metric.

    Attributes:
        name: as queries have it; a counter's ends in `_total`.
        kind: what it can be used for.
        labels: their names; values come from fixed lists, from our own routes, or are models' ids.
        text: what it says, in a sentence.
    """

    name: str
    kind: Kind
    labels: tuple[str, ...]
    text: str

    @property
    def base(self) -> str:
        """The name without the suffix of a counter."""
        return self.name.removesuffix("_total") if self.kind == "counter" else self.name

    @property
    def unit(self) -> str:
        """The unit, or nothing."""
        last = self.base.rpartition("_")[2]
        return last if last in UNITS else ""

    @property
    def series(self) -> tuple[str, ...]:
        """The names under which a query finds it."""
        if self.kind != "histogram":
            return (self.name,)
        return tuple(f"{self.name}_{suffix}" for suffix in ("bucket", "sum", "count"))


def _families() -> Iterator[Family]:
    for section in (_HEALTH, _HTTP, _INFERENCE, _MODELS, _JOBS, _MEMORY, _LEDGER, _PREPARING):
        for name, kind, labels, text in section:
            yield Family(f"loadledger_{name}", kind, tuple(labels.split()), text)


_Rows = tuple[tuple[str, Kind, str, str], ...]

_HEALTH: _Rows = (
    ("healthy", "gauge", "check", "Whether what /health/ready looks at is well, 1, or not, 0."),
)
_HTTP: _Rows = (
    (
        "http_requests_total",
        "counter",
        "method route status",
        "Requests, by route as in /openapi.yaml and class of status: 2xx to 5xx, or aborted by the client.",
    ),
    (
        "http_request_duration_seconds",
        "histogram",
        "method route",
        "Time until there was an answer, without inferences, which have their own, and streams.",
    ),
    ("http_errors_total", "counter", "code", "Refused or failed requests, by the code in the answer."),
)
_INFERENCE: _Rows = (
    (
        "inference_duration_seconds",
        "histogram",
        "model",
        "Time from when an inference was understood until its model had answered, queueing included.",
    ),
    ("inference_failures_total", "counter", "model", "Inferences that the model did not answer."),
    ("inferences_total", "counter", "model", "Inferences answered, each counted with its batch size."),
    (
        "inference_executions_total",
        "counter",
        "model",
        "Executions of the model; fewer than requests where some ran together.",
    ),
    (
        "inference_stage_seconds_total",
        "counter",
        "model stage",
        "Time of answered inferences in the worker: queue, input, infer, output.",
    ),
    ("inference_in_flight", "gauge", "model", "Inferences that are queued or running."),
    ("inference_queue_limit", "gauge", "", "How many of one model may be in flight (--inference-queue)."),
)
_MODELS: _Rows = (
    ("models", "gauge", "state", "Models that were ever asked for, by state."),
    (
        "model_serving",
        "gauge",
        "model",
        "1 if it takes requests, 0 if it is wanted but failed, lost or on its way; of _others, if all do.",
    ),
    ("model_info", "gauge", "model version form", "1 for what serves: its version and its prepared form."),
    ("model_workers", "gauge", "model", "Processes of the model."),
    ("model_memory_bytes", "gauge", "model", "What the model's workers count for in the memory budget."),
    (
        "least_recently_used_age_seconds",
        "gauge",
        "",
        "How long the loaded model that was used the longest ago has been idle; 0 if all are busy.",
    ),
    ("worker_exits_total", "counter", "model", "Workers that ended and nobody had asked."),
    (
        "worker_restarts_total",
        "counter",
        "model",
        "Times that a model was loaded again, its worker having died.",
    ),
)
_JOBS: _Rows = (
    ("jobs", "gauge", "kind status", "Jobs that have not ended: the queue."),
    ("jobs_limit", "gauge", "", "How many jobs may be unended before requests are refused with queue_full."),
    ("oldest_job_age_seconds", "gauge", "", "How long ago the oldest job that has not ended was requested."),
    ("loads_total", "counter", "cause outcome", "Load jobs that ended."),
    ("load_failures_total", "counter", "code", "Load jobs that failed, by the code of the error."),
    (
        "load_duration_seconds",
        "histogram",
        "outcome",
        "Time from a load's request to its end, waiting included.",
    ),
    (
        "load_stage_seconds_total",
        "counter",
        "stage",
        "Where the time of completed loads went; hashing runs beside loading.",
    ),
    ("loads_by_form_total", "counter", "form", "Completed loads, by the prepared form that they used."),
    ("unloads_total", "counter", "cause outcome", "Unload jobs that ended."),
    (
        "unload_duration_seconds",
        "histogram",
        "outcome",
        "Time from an unload's request until the processes were gone.",
    ),
    (
        "evictions_total",
        "counter",
        "cause",
        "Models unloaded because another one needed the room (eviction), or because they were idle (idle).",
    ),
)
_MEMORY: _Rows = (
    ("memory_limit_bytes", "gauge", "", "Memory that may be used here at all."),
    ("memory_budget_bytes", "gauge", "", "Memory that workers may take together (--memory-budget)."),
    ("memory_reserved_bytes", "gauge", "", "What of the budget is reserved for loads and preparing."),
    ("memory_used_bytes", "gauge", "", "What of the budget loaded models take, as measured."),
    (
        "pressure_ratio",
        "gauge",
        "resource",
        "Part of the last 10 s in which something waited for memory or cpu, where the kernel says so (PSI).",
    ),
)
_LEDGER: _Rows = (
    ("ledger_position", "gauge", "", "The position of the last event."),
    ("ledger_size_bytes", "gauge", "", "The ledger's files, its write-ahead log included."),
    ("ledger_events_total", "counter", "type", "Events appended."),
    (
        "ledger_append_duration_seconds",
        "histogram",
        "",
        "Time from when a command was handed to the ledger until its outcome was durable.",
    ),
    (
        "ledger_commit_duration_seconds",
        "histogram",
        "",
        "Time of transactions, each with all that was waiting.",
    ),
    ("ledger_write_failures_total", "counter", "", "Transactions that failed."),
    ("ledger_waiting_commands", "gauge", "", "Commands that wait to be written."),
    ("access_denied_total", "counter", "", "Requests refused for lack of a role, as the ledger has them."),
    ("streams", "gauge", "", "Open streams of events."),
    ("tail_lag_events", "gauge", "", "How many events the slowest stream is behind the ledger."),
)
_PREPARING: _Rows = (
    ("prepared_forms", "gauge", "", "Prepared forms that are kept."),
    ("prepared_bytes", "gauge", "", "What they take on the disk."),
    ("prepared_limit_bytes", "gauge", "", "What they may take (--prepared-size)."),
    ("preparing", "gauge", "", "Whether a model is being prepared."),
    (
        "preparing_forms_total",
        "counter",
        "form outcome",
        "Forms tried: kept, left_out as of no use, or stopped before that was known.",
    ),
    (
        "preparing_duration_seconds",
        "histogram",
        "",
        "Time that preparing a model took, all forms tried.",
    ),
    ("prepared_dropped_total", "counter", "", "Forms dropped because a load could do nothing with them."),
)

FAMILIES = {family.name: family for family in _families()}
"""All of them, by name."""


def metrics_table() -> str:
    """Return the table of docs/metrics.md, in Markdown."""
    head = ["| metric | kind | labels | what |", "| --- | --- | --- | --- |"]
    return "\n".join([*head, *map(_row, FAMILIES.values())]) + "\n"


def _row(family: Family) -> str:
    labels = ", ".join(f"`{label}`" for label in family.labels)
    return f"| `{family.name}` | {family.kind} | {labels} | {family.text} |"
