"""Schemas of the management API: what requests may hold, what answers look like; views of jobs and models."""

from __future__ import annotations

from typing import Any

import msgspec
from marshmallow import INCLUDE, Schema, fields, validate

from events.jobs import Failure, Job, JobKind, JobStatus
from events.models import RELOADS, Model, ModelState
from events.sqlite.liveness import NodeState, ServerState
from events.state import State
from events.types import Cause
from runtime.consumer.consumer import Consumer
from runtime.repository import MAX_VERSION, MODEL_ID
from server.config import MAX_KEEP_ALIVE_S, MAX_THREADS, MAX_TIMEOUT_S
from server.http.validation import ParameterBoolean, ParameterInteger, StrictBoolean, StrictInteger
from server.settingvalues import LABEL, LABEL_RULE, MAX_LABELS

MAX_PAGE = 1000
MAX_INSTANCES = 64
"""Each instance is a process with a copy of the model; more is a mistake on one machine."""
MAX_BATCH_SIZE = 65_536
MAX_QUEUE_DELAY_US = 1_000_000
"""A second: a longer wait for a batch costs more than it saves."""
_AS_OF_IN_THE_PAST = "With `at`: the position that the answer reflects."
_AS_OF_TIME = "With `at`: when the event at `as_of` was recorded; null if the log does not have it."
_SERVER = (
    "With `at`: the state of the server then. While it is not `running`, nothing is loaded. With nodes, "
    "it runs while any is there."
)
_NODES = "With `at`: the nodes that had joined by then, by name; missing if there were none."
_NO_NODE = "missing while there is none, and if the server is alone."
_ID_RULE = "Must be 1 to 128 letters, digits, dots, underscores or hyphens, beginning with a letter or digit."


def about(text: str, **more: str) -> dict[str, Any]:
    """Return the argument of a field that describes it in the OpenAPI document."""
    return {"metadata": {"description": text, **more}}


def _values(kind: type[JobKind | JobStatus | ModelState | Cause | ServerState | NodeState]) -> Any:
    return validate.OneOf([member.value for member in kind])


class ModelPathSchema(Schema):
    """The model named by the path."""

    id = fields.String(
        required=True,
        validate=validate.Regexp(rf"(?:{MODEL_ID.pattern})\Z", error=_ID_RULE),
        **about("A model's folder in the repository.", example="digits"),
    )


class ModelVersionPathSchema(ModelPathSchema):
    """The model and the version named by the path."""

    version = ParameterInteger(required=True, validate=validate.Range(1, MAX_VERSION))


class JobPathSchema(Schema):
    """The job named by the path."""

    job_id = fields.String(required=True, validate=validate.Length(1, 64))


class LoadBodySchema(Schema):
    """Parameters of a load. Defaults: the model's loadledger.toml, then the server's settings."""

    version = StrictInteger(
        validate=validate.Range(1, MAX_VERSION), **about("Default: the highest version at acceptance.")
    )
    timeout_s = StrictInteger(
        validate=validate.Range(1, MAX_TIMEOUT_S),
        **about("Seconds from acceptance, waiting included, after which the load fails. Default: 300."),
    )
    progress_timeout_s = StrictInteger(
        validate=validate.Range(1, MAX_TIMEOUT_S),
        **about(
            "Seconds that the load, once it has started, may make no progress; then it fails with "
            "`no_progress`. Progress is a further stage, or a piece of a file that is copied or hashed. "
            "Default: 300."
        ),
    )
    memory_limit_bytes = StrictInteger(
        validate=validate.Range(min=2**20),
        allow_none=True,
        **about(
            "Memory of each instance; a load that needs more fails with `out_of_memory`. Null is no limit."
        ),
    )
    priority = fields.String(
        validate=validate.OneOf(["high", "normal", "low"]),
        **about(
            "Waiting loads start by priority, then by age. Default: `normal`. A `low` one "
            "waits, up to a limit, while the machine is under pressure."
        ),
    )
    keep_alive_s = StrictInteger(
        validate=validate.Range(-1, MAX_KEEP_ALIVE_S),
        allow_none=True,
        **about(
            "Idle timeout: seconds after the end of the last request until the model is "
            "unloaded. -1 is never, 0 is at once. Default, also for null: the server's --keep-alive-s. A job "
            "shows null for never if neither request nor server set it."
        ),
    )
    strategy = fields.String(
        validate=validate.OneOf(["beside", "in_place", "auto"]),
        **about(
            "How a loaded model is replaced. `beside`: the old version serves until the new "
            "one is loaded; both use memory. `in_place`: the old version is unloaded first; requests get 503 "
            "until the new one is loaded. `auto`: beside if both fit into the memory budget, else in place. "
            "Default: `beside`."
        ),
    )
    pinned = StrictBoolean(
        **about("A pinned model is never evicted and has no idle timeout. Default: `false`.")
    )
    instances = StrictInteger(
        validate=validate.Range(1, MAX_INSTANCES),
        **about("Workers that serve the model in parallel. Default: 1."),
    )
    threads = StrictInteger(
        validate=validate.Range(1, MAX_THREADS),
        allow_none=True,
        **about("Threads that each worker computes with. Default, also for null: the server's --threads."),
    )
    max_batch_size = StrictInteger(
        validate=validate.Range(0, MAX_BATCH_SIZE),
        **about(
            "Queued requests are run together up to this size of the first dimension. "
            "Default: 0, no batching."
        ),
    )
    max_queue_delay_us = StrictInteger(
        validate=validate.Range(0, MAX_QUEUE_DELAY_US),
        **about("Microseconds that a request may wait for its batch to fill; needs a `max_batch_size`."),
    )
    node_labels = fields.List(
        fields.String(validate=validate.Regexp(rf"(?:{LABEL.pattern})\Z", error=LABEL_RULE)),
        validate=validate.Length(max=MAX_LABELS),
        allow_none=True,
        **about(
            "Labels that its node must have, `name=value` each; a server alone ignores them. Default: none."
        ),
    )


class UnloadBodySchema(Schema):
    """An unload takes no body or an empty object."""


class CancelBodySchema(Schema):
    """A cancel takes no body or an empty object."""


class UnloadQuerySchema(Schema):
    """Query of an unload."""

    force = ParameterBoolean(
        load_default=False, **about("Do not wait for running requests; end a load and a stuck worker, too.")
    )


class PageQuerySchema(Schema):
    """Page of a list."""

    limit = ParameterInteger(load_default=100, validate=validate.Range(1, MAX_PAGE))


class AtQuerySchema(Schema):
    """Time travel."""

    at = fields.String(
        load_default=None,
        **about(
            "Answer as of this moment; for the roles `audit` and `admin`. A position of the "
            "log (digits), or a time with its offset (RFC 3339), which means the last position recorded by "
            "then. 0 is before the first event.",
            example="2026-01-31T14:02:00Z",
        ),
    )


class ModelsQuerySchema(AtQuerySchema, PageQuerySchema):
    """Page of the models."""

    cursor = fields.String(load_default="", **about("The `next_cursor` of the last page."))


class JobsQuerySchema(AtQuerySchema, PageQuerySchema):
    """Page of the jobs, and filters."""

    cursor = ParameterInteger(
        load_default=None, validate=validate.Range(min=1), **about("The `next_cursor` of the last page.")
    )
    model = fields.String(load_default=None, **about("Only jobs of this model."))
    status = fields.String(load_default=None, validate=_values(JobStatus))


class AnswerSchema(Schema):
    """An answer; clients must ignore unknown members, since later releases add some."""

    class Meta:
        """Makes the document say so, too."""

        unknown = INCLUDE


class FailureSchema(AnswerSchema):
    """Why a job or a model failed."""

    code = fields.String(required=True)
    message = fields.String(required=True)


class ServerSchema(AnswerSchema):
    """The state of the server at a moment of the past."""

    state = fields.String(
        required=True,
        validate=_values(ServerState),
        **about("`unknown`: after it was last seen, and before its unclean end was discovered."),
    )
    since = fields.String(required=True, allow_none=True, **about("Null if the log does not say."))


class NodePresenceSchema(AnswerSchema):
    """The state of a node at a moment of the past."""

    id = fields.String(required=True)
    state = fields.String(
        required=True,
        validate=_values(NodeState),
        **about("`unknown`: after it renewed its lease last, and before it was declared lost."),
    )
    since = fields.String(required=True, allow_none=True, **about("Null if the log does not say."))


class JobSchema(AnswerSchema):
    """A job: one accepted load or unload."""

    id = fields.String(required=True)
    kind = fields.String(required=True, validate=_values(JobKind))
    model_id = fields.String(required=True)
    version = fields.Integer(required=True, allow_none=True)
    status = fields.String(required=True, validate=_values(JobStatus))
    stage = fields.String(
        required=True,
        allow_none=True,
        **about("Live: copying, starting, loading, warming_up, measuring; draining, stopping."),
    )
    waiting_for = fields.String(required=True, allow_none=True)
    created_at = fields.String(required=True)
    started_at = fields.String(required=True, allow_none=True)
    finished_at = fields.String(required=True, allow_none=True)
    requested_by = fields.String(required=True)
    cause = fields.String(required=True, validate=_values(Cause))
    cancel_requested = fields.Boolean(
        required=True, **about("Whether a cancel was requested; see `status` for its outcome.")
    )
    superseded_by = fields.String(
        required=True,
        allow_none=True,
        **about("The job of a person's load that took the place of this one by the system."),
    )
    attempt = fields.Integer(required=True)
    node = fields.String(**about(f"Name of the node where it is placed; {_NO_NODE}"))
    position = fields.Integer(required=True, **about("Position of its latest event."))
    parameters = fields.Dict(required=True, **about("Parameters of its request."))
    error = fields.Nested(FailureSchema, required=True, allow_none=True)
    as_of = fields.Integer(**about(_AS_OF_IN_THE_PAST))
    as_of_time = fields.String(allow_none=True, **about(_AS_OF_TIME))
    server = fields.Nested(ServerSchema, **about(_SERVER))
    nodes = fields.List(fields.Nested(NodePresenceSchema), **about(_NODES))


class FileSchema(AnswerSchema):
    """A file of a loaded version, as it was read."""

    path = fields.String(required=True)
    bytes = fields.Integer(required=True)
    mtime_ns = fields.Integer(required=True)
    sha256 = fields.String(required=True)


class PreparedSchema(AnswerSchema):
    """A prepared form of a version's files."""

    form = fields.String(required=True, **about("`prepacked` or `optimised`."))
    sha256 = fields.String(required=True)


class TensorSchema(AnswerSchema):
    """A tensor, or the specification of one."""

    name = fields.String(required=True)
    datatype = fields.String(required=True)
    shape = fields.List(fields.Integer(), required=True)


class ModelTensorSchema(TensorSchema):
    """An input or output of a model; -1 in its shape is any length."""

    optional = fields.Boolean(required=True, **about("Whether an input may be left out."))


_SIGNATURE = (
    "In the answer of one model: those of the version that serves, else of the highest one, as its file"
)
_SIGNATURE += " declares them; null if the file cannot be read as ONNX."


class ModelSchema(AnswerSchema):
    """A model of the repository, or one that is loaded."""

    id = fields.String(required=True)
    versions = fields.List(
        fields.Integer(),
        required=True,
        allow_none=True,
        **about("In the repository; null with `at`: its past is not recorded."),
    )
    state = fields.String(required=True, validate=_values(ModelState))
    version = fields.Integer(required=True, allow_none=True)
    next_version = fields.Integer(required=True, allow_none=True)
    active = fields.Boolean(required=True)
    loaded_at = fields.String(required=True, allow_none=True)
    loaded_by = fields.String(
        required=True,
        allow_none=True,
        **about("Who asked for it, also of a model that the system brought back since."),
    )
    brought_back = fields.String(
        required=True,
        allow_none=True,
        validate=validate.OneOf([cause.value for cause in RELOADS]),
        **about(
            "Why the system loaded it again, if it did: `restart` of the server, `recovery`, `swap`, `drain`."
        ),
    )
    job_id = fields.String(required=True, allow_none=True)
    node = fields.String(**about(f"Name of the node where it is loaded; {_NO_NODE}"))
    position = fields.Integer(required=True, allow_none=True, **about("Position of its `ModelLoaded`."))
    files = fields.List(fields.Nested(FileSchema), required=True)
    repository_changed = fields.Boolean(
        required=True,
        allow_none=True,
        **about(
            "Whether the repository has newer files than those that are loaded; null if nothing is loaded,"
            " and with `at`."
        ),
    )
    prepared = fields.Nested(
        PreparedSchema,
        required=True,
        allow_none=True,
        **about("The prepared form that its workers loaded; null if they loaded the files."),
    )
    memory_bytes = fields.Integer(
        required=True,
        allow_none=True,
        **about(
            "Memory of its workers now, measured every few seconds, as in the resources; null with `at`."
        ),
    )
    memory_at_load_bytes = fields.Integer(
        required=True, allow_none=True, **about("What they took when the model was loaded.")
    )
    error = fields.Nested(FailureSchema, required=True, allow_none=True)
    instances = fields.Integer(
        required=True, allow_none=True, **about("Running workers; may be fewer than were loaded.")
    )
    threads = fields.Integer(
        required=True,
        allow_none=True,
        **about("Threads that each of its workers computes with."),
    )
    inputs = fields.List(fields.Nested(ModelTensorSchema), allow_none=True, **about(_SIGNATURE))
    outputs = fields.List(fields.Nested(ModelTensorSchema), allow_none=True, **about(_SIGNATURE))
    parameters = fields.Dict(
        allow_none=True, **about("In the answer of one model: of the load that serves; null without one.")
    )
    signature_version = fields.Integer(
        allow_none=True, **about("The version that `inputs` and `outputs` are of.")
    )
    as_of = fields.Integer(**about(_AS_OF_IN_THE_PAST))
    as_of_time = fields.String(allow_none=True, **about(_AS_OF_TIME))
    server = fields.Nested(ServerSchema, **about(_SERVER))
    nodes = fields.List(fields.Nested(NodePresenceSchema), **about(_NODES))


class ModelListSchema(AnswerSchema):
    """One page of the models, by id."""

    models = fields.List(fields.Nested(ModelSchema), required=True)
    as_of = fields.Integer(required=True, **about("The position that the answer reflects."))
    as_of_time = fields.String(allow_none=True, **about(_AS_OF_TIME))
    server = fields.Nested(ServerSchema, **about(_SERVER))
    nodes = fields.List(fields.Nested(NodePresenceSchema), **about(_NODES))
    next_cursor = fields.String(required=True, allow_none=True)


class JobListSchema(AnswerSchema):
    """One page of the jobs, newest first."""

    jobs = fields.List(fields.Nested(JobSchema), required=True)
    as_of = fields.Integer(required=True, **about("The position that the answer reflects."))
    as_of_time = fields.String(allow_none=True, **about(_AS_OF_TIME))
    server = fields.Nested(ServerSchema, **about(_SERVER))
    nodes = fields.List(fields.Nested(NodePresenceSchema), **about(_NODES))
    next_cursor = fields.Integer(required=True, allow_none=True)


class HealthSchema(AnswerSchema):
    """The checks, all passed."""

    status = fields.String(required=True)
    checks = fields.Dict(required=True, keys=fields.String(), values=fields.Boolean())


_HAS_WORKERS = (ModelState.LOADED, ModelState.UNLOADING)


def job_view(job: Job, consumer: Consumer | None) -> dict[str, Any]:
    """Return a job; `stage` and `waiting_for` come from the consumer and are null without one."""
    runs, waits = job.status is JobStatus.IN_PROGRESS, job.status is JobStatus.PENDING
    parameters = msgspec.to_builtins(job.load if job.load is not None else job.unload)
    return {
        "id": job.id,
        "kind": job.kind.value,
        "model_id": job.model_id,
        "version": job.version,
        "status": job.status.value,
        "stage": consumer.stage(job) if consumer and runs else None,
        "waiting_for": consumer.waiting_for(job) if consumer and waits else None,
        "created_at": job.created_at,
        "started_at": job.started_at,
        "finished_at": job.finished_at,
        "requested_by": job.requested_by,
        "cause": job.cause.value,
        "cancel_requested": job.cancel_requested,
        "superseded_by": job.superseded_by,
        "attempt": job.attempt,
        **_at_node(job.node_id),
        "position": job.position,
        "parameters": parameters,
        "error": _failure(job.error),
    }


def model_view(
    model_id: str,
    state: State,
    versions: list[int] | None,
    active: Model | None,
    *,
    repository_changed: bool | None = None,
    memory_bytes: int | None = None,
) -> dict[str, Any]:
    """Return a model of the state, or one of the repository only; None for what is unknown of the past."""
    model = state.models.get(model_id) or Model(model_id)
    serving = model.serving
    return {
        "id": model.id,
        "versions": versions,
        "state": model.state.value,
        "version": model.version,
        "next_version": model.next_version,
        "active": active is not None and active.id == model.id,
        "loaded_at": serving.loaded_at if serving else None,
        "loaded_by": (serving.asked_by or serving.loaded_by) if serving else None,
        "brought_back": serving.brought_back if serving else None,
        "job_id": serving.load_job_id if serving else None,
        **_at_node(serving.node_id if serving else None),
        "position": serving.position if serving else None,
        "files": msgspec.to_builtins(serving.files) if serving else [],
        "repository_changed": repository_changed if serving else None,
        "prepared": msgspec.to_builtins(serving.prepared) if serving else None,
        "memory_bytes": memory_bytes,
        "memory_at_load_bytes": serving.memory_bytes if serving else None,
        "error": _failure(model.error),
        "instances": len(serving.worker_ids) if serving and model.phase in _HAS_WORKERS else None,
        "threads": serving.threads if serving else None,
    }


def _at_node(node_id: str | None) -> dict[str, str]:
    """Return the member of a node; without one there is none, so that a server alone never shows it."""
    return {} if node_id is None else {"node": node_id}


def _failure(error: Failure | None) -> dict[str, str] | None:
    return {"code": error.code, "message": error.message} if error is not None else None
