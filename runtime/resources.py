"""What the workers take of the memory budget at this moment, load by load. Plain values for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from events.state import State
from runtime.live import LiveLoad
from runtime.scheduling.sight import Phase, Running


@dataclass(frozen=True, slots=True)
class LoadUse:
    """What one load takes: `reserved_bytes` until it is loaded, from then on `memory_bytes`, as measured.

    A model can have two for a moment: the version that serves, and the next one, or the one that drains.
    """

    model_id: str
    version: int
    job_id: str
    phase: str
    workers: int
    reserved_bytes: int
    memory_bytes: int
    in_flight: int
    last_used_at: str | None
    pinned: bool
    keep_alive_s: int | None


@dataclass(frozen=True, slots=True)
class Wait:
    """A job that waits: what it will need, in bytes, if that is known yet, and what for."""

    job_id: str
    model_id: str
    needs_bytes: int | None
    waiting_for: str


@dataclass(frozen=True, slots=True)
class PreparationUse:
    """What is being prepared for later loads, and may take `reserved_bytes`, until its processes exited."""

    model_id: str
    version: int
    reserved_bytes: int
    stopping: bool


def uses(live: Iterable[LiveLoad], state: State, now: str) -> list[LoadUse]:
    """Return what each load takes whose processes have not exited, by model, then oldest first."""
    loads = {id(load): load for load in live}  # one that is being taken over is there twice
    there = [load for load in loads.values() if not load.gone]
    found = (_use(load, load.view(state.unended_job(load.job_id), now)) for load in there)
    return sorted(found, key=lambda use: (use.model_id, use.job_id))


def waits(state: State, waiting_for: Mapping[str, str], needs: Mapping[str, int | None]) -> list[Wait]:
    """Return the jobs that wait, oldest first."""
    return [
        Wait(job.id, job.model_id, needs.get(job.id), waiting_for[job.id])
        for job in state.unended()
        if job.id in waiting_for
    ]


def _use(load: LiveLoad, run: Running) -> LoadUse:
    is_reserved = load.report is None
    return LoadUse(
        model_id=load.model_id,
        version=load.version,
        job_id=load.job_id,
        phase="loading" if run.phase in (Phase.LOADING, Phase.LOADED) else run.phase.value,
        workers=len(load.left),
        reserved_bytes=run.memory_bytes if is_reserved else 0,
        memory_bytes=0 if is_reserved else run.memory_bytes,
        in_flight=load.in_flight,
        last_used_at=run.last_used_at,
        pinned=load.parameters.pinned,
        keep_alive_s=load.parameters.keep_alive_s,
    )
