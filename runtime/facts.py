"""The facts that the consumer records, made of jobs and of what runs for them."""

from __future__ import annotations

from events.clock import seconds_between, uuid7
from events.jobs import Job, load_requested
from events.models import CRASH_LOOP, Model, Serving
from events.types import (
    SYSTEM,
    Cause,
    Data,
    Draft,
    Durations,
    LoadedFile,
    LoadFailed,
    ModelLoaded,
    ModelUnloaded,
    Prepared,
    UnloadRequested,
    WorkerExited,
)
from runtime.errors import Exit
from runtime.live import LiveLoad
from runtime.processes.workers import Worker
from runtime.wire import plain_text


def about(job: Job, data: Data, worker_id: str | None = None) -> Draft:
    """Return a fact about a job."""
    return Draft(uuid7(), data, SYSTEM, job.id, job.model_id, job.version, worker_id)


def model_loaded(job: Job, load: LiveLoad, now: str) -> ModelLoaded:
    """Return what a load came to; its `report` is there."""
    assert job.started_at is not None
    assert load.report is not None
    reports = [load.reports[worker.worker_id] for worker in load.workers]
    form = load.prepared_form
    return ModelLoaded(
        files=tuple(LoadedFile(f.path, f.bytes, f.mtime_ns, f.sha256) for f in load.report.files),
        worker_ids=tuple(worker.worker_id for worker in load.workers),
        prepared=None if form is None else Prepared(form.form, form.sha256),
        memory_bytes=sum(report.memory_bytes for report in reports),
        peak_memory_bytes=sum(report.peak_memory_bytes for report in reports),
        durations=Durations(
            waiting_us=_us(seconds_between(job.created_at, job.started_at)),
            starting_us=load.starting_us,
            loading_us=max(report.loading_us for report in reports),
            hashing_us=max(report.hashing_us for report in reports),
            warming_up_us=max((us for r in reports if (us := r.warming_up_us) is not None), default=None),
            measuring_us=max(report.measuring_us for report in reports),
            total_us=_us(seconds_between(job.created_at, now)),
        ),
    )


def taken_over(serving: Serving) -> ModelLoaded:
    """Return that what serves goes on: the same bytes in the same workers, and nothing that took any time."""
    return ModelLoaded(
        files=serving.files,
        worker_ids=serving.worker_ids,
        prepared=serving.prepared,
        memory_bytes=serving.memory_bytes,
        peak_memory_bytes=serving.peak_memory_bytes,
        durations=Durations(0, 0, 0, 0, None, 0, 0),
    )


def model_unloaded(load: LiveLoad | None) -> ModelUnloaded:
    """Return what the end of a load's processes gave back, if there were any."""
    if load is None:
        return ModelUnloaded(0, 0, 0)
    return ModelUnloaded(load.freed_bytes, load.drained_requests, load.aborted_requests)


def swapped_out(
    load_job_id: str, model_id: str, version: int | None, worker_id: str | None, cause_event_id: str
) -> Draft:
    """Return the request that ends a load for the sake of another one of its model."""
    request = UnloadRequested(
        force=False, load_job_id=load_job_id, cause=Cause.SWAP, cause_event_id=cause_event_id
    )
    swap_id = uuid7()
    return Draft(swap_id, request, SYSTEM, swap_id, model_id, version, worker_id)


def given_up(model: Model, message: str) -> tuple[Draft, Draft]:
    """Return the load that is not tried any more, and that it failed."""
    assert model.serving is not None
    job_id, version = uuid7(), model.serving.version
    request = load_requested(model.serving.parameters, Cause.RECOVERY)
    failed = LoadFailed(CRASH_LOOP, plain_text(message))
    return (
        Draft(job_id, request, SYSTEM, job_id, model.id, version),
        Draft(uuid7(), failed, SYSTEM, job_id, model.id, version),
    )


def death(load: LiveLoad, worker: Worker) -> Draft:
    """Return that a worker ended and nobody had asked."""
    # Ended with the fork server, by no doing of its own: the signal says nothing of the model.
    end = Exit(None, None) if worker.orphaned else worker.ended.result()
    data = WorkerExited(end.exit_code, end.signal, tuple(worker.stderr_tail()))
    return Draft(uuid7(), data, SYSTEM, load.job_id, load.model_id, load.version, worker.worker_id)


def _us(seconds: float) -> int:
    return max(0, round(seconds * 1_000_000))
