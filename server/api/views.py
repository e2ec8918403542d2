"""Jobs and models as the management API shows them: plain values, ready for JSON."""

from __future__ import annotations

from typing import Any

import msgspec

from events.jobs import Failure, Job, JobStatus
from events.models import Model, ModelState
from events.state import State
from runtime.consumer import Consumer

_HAS_WORKERS = (ModelState.LOADED, ModelState.UNLOADING)


def job_view(job: Job, consumer: Consumer | None) -> dict[str, Any]:
    """Return a job with the live values of the consumer, which the past has none of, laid over it."""
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
        "attempt": job.attempt,
        "position": job.position,
        "parameters": parameters,
        "error": _failure(job.error),
    }


def model_view(
    model_id: str, state: State, versions: list[int] | None, active: Model | None
) -> dict[str, Any]:
    """Return a model of the state, or one that is only in the repository, with its `versions` there.

    What the repository had in the past is not known: `versions` is null then.
    """
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
        "loaded_by": serving.loaded_by if serving else None,
        "job_id": serving.load_job_id if serving else None,
        "position": serving.position if serving else None,
        "files": msgspec.to_builtins(serving.files) if serving else [],
        "prepared": msgspec.to_builtins(serving.prepared) if serving else None,
        "memory_bytes": serving.memory_bytes if serving else None,
        "error": _failure(model.error),
        "instances": len(serving.worker_ids) if serving and model.phase in _HAS_WORKERS else None,
    }


def _failure(error: Failure | None) -> dict[str, str] | None:
    return {"code": error.code, "message": error.message} if error is not None else None
