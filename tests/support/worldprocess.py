"""What runs for a load in a simulated world, and what it takes."""

from dataclasses import dataclass, field

import pytest

from events.jobs import Job
from events.types import WorkerExited
from runtime.scheduling.sight import Phase, Running

NEEDS = {("a", 1): 20, ("a", 2): 60, ("b", 1): 45, ("b", 2): 70, ("c", 1): 55, ("c", 2): 120}
"""Bytes that one instance takes at most, by model and version; the last fits in no budget."""


def need_of(job: Job) -> int:
    """Return what is found out about a load's need."""
    assert job.version is not None
    assert job.load is not None
    return NEEDS[job.model_id, job.version] * job.load.instances


@dataclass
class Process:
    """What runs for one load, as the consumer knows it; `started` is whether there are processes yet.

    `dead` are the workers that ended and nobody had asked; `ended`, that all others did.
    """

    model_id: str
    version: int
    workers: tuple[str, ...]
    reserved_bytes: int = 0
    measured_bytes: int = 0
    started: bool = False
    loaded: bool = False
    failure: str | None = None
    dead: dict[str, WorkerExited] = field(default_factory=dict)
    recorded: set[str] = field(default_factory=set)
    ended: bool = False
    unloading: bool = False
    killed: bool = False
    busy: bool = False
    last_used_at: str | None = None

    def view(self, job: Job | None, load: str, *, leased: bool = False) -> Running:
        return Running(
            load,
            self.model_id,
            self._phase(job),
            self.killed,
            tuple(self.dead),
            self.memory_bytes,
            self.busy or leased,
            self.last_used_at,
        )

    def _phase(self, job: Job | None) -> Phase:
        if job is not None:
            if self.failure is not None or self.dead or self.ended:
                return Phase.FAILED
            return Phase.LOADED if self.loaded else Phase.LOADING
        if self.gone:
            return Phase.GONE
        return Phase.DRAINING if self.unloading or self.killed else Phase.SERVING

    @property
    def memory_bytes(self) -> int:
        if self.gone or (self.failure is not None and not self.left):
            return 0
        return self.measured_bytes if self.loaded else self.reserved_bytes

    @property
    def left(self) -> list[str]:
        there_are = self.started and not self.ended
        return [worker for worker in self.workers if worker not in self.dead] if there_are else []

    @property
    def gone(self) -> bool:
        return self.started and not self.left

    @property
    def over(self) -> bool:
        stillborn = not self.started and (self.killed or self.failure is not None)
        return self.gone or stillborn

    def die(self, end: WorkerExited, *workers: str) -> None:
        self.dead.update({worker: end for worker in workers if worker in self.left})

    def answer(self, now: str) -> None:
        """Its last request ends."""
        if self.busy:
            self.busy, self.last_used_at = False, now

    def finish(self, outcome: str, keeps_percent: int = 80) -> None:
        """End its load: it is loaded, and keeps so much of what was reserved; refused; or a worker dies."""
        self.started = True
        match outcome:
            case "loaded":
                self.loaded = True
                self.measured_bytes = self.reserved_bytes * keeps_percent // 100
            case "refused":
                self.failure, self.killed = "invalid_model", True
            case "dies":
                self.failure = "worker_died"
                self.die(WorkerExited(None, 9, ()), self.workers[-1])
            case _:
                pytest.fail(outcome)
