"""The memory budget, devices, and their use."""

from __future__ import annotations

from typing import Annotated

from answers.answer import AS_OF, AnswerBody, about, one_of
from answers.health import NotReady


class LoadUsage(AnswerBody, frozen=True, kw_only=True):
    """Resources of one load until its processes have exited."""

    model_id: str
    version: int
    job_id: Annotated[str, about("Job of the load.")]
    phase: Annotated[str, one_of("loading", "failed", "serving", "draining")]
    workers: int
    reserved_bytes: Annotated[int, about("Memory reserved while it loads; 0 afterwards.")]
    memory_bytes: Annotated[int, about("Private bytes of its workers, measured every few seconds.")]
    memory_at_load_bytes: Annotated[int | None, about("What they took when the model was loaded.")]
    device: Annotated[str | None, about("On which its workers run; null is the CPU.")]
    device_bytes: Annotated[int, about("Memory of the device's own, reserved or measured; 0 if it has none.")]
    cpu_s: Annotated[float, about("Processor time of its workers, user and system; missing if 0.")] = 0.0
    in_flight: Annotated[int, about("Inferences queued or running.")]
    oldest_request_s: Annotated[float | None, about("Age of the oldest; missing without any.")] = None
    last_used_at: Annotated[str | None, about("The end of its last inference.")]
    pinned: bool
    keep_alive_s: int | None


class WaitingJob(AnswerBody, frozen=True, kw_only=True):
    """A job that waits."""

    job_id: str
    model_id: str
    needs_bytes: int | None
    waiting_for: str


class PressureInfo(AnswerBody, frozen=True, kw_only=True):
    """Percent of the last ten seconds in which a task waited for the resource (PSI)."""

    memory_some_percent: float | None
    cpu_some_percent: float | None


class ConfinementInfo(AnswerBody, frozen=True, kw_only=True):
    """Confinement of the workers, as tested when the server started."""

    mode: Annotated[str, one_of("auto", "require", "require-cpu", "off")]
    landlock_abi: Annotated[int, about("Version of Landlock that restricts files; 0 if nothing does.")]
    seccomp: Annotated[bool, about("Whether system calls are filtered.")]
    not_prevented: Annotated[list[str], about("Forbidden acts that a worker could do.")]


class Device(AnswerBody, frozen=True, kw_only=True):
    """A device on which models are loaded, and its use."""

    device: Annotated[str, about("As a load names it, such as `cuda:0`.")]
    provider: Annotated[str, about("Its execution provider; `cpu` is ONNX Runtime's own.")]
    version: Annotated[str, about("Of the provider.")]
    hardware: Annotated[str, about("What the provider calls it; empty if it has no name.")]
    total_bytes: Annotated[
        int | None, about("Of its own memory, of `cpu` the machine's; null if it has none.")
    ]
    free_bytes: Annotated[int | None, about("Of its own memory, as its driver says; null if it has none.")]
    budget_bytes: Annotated[int | None, about("For all workers there; null is no limit.")]
    reserved_bytes: Annotated[
        int, about("Of its own memory; if it has none, of the machine's. That of `cpu` is of all workers.")
    ]
    used_bytes: Annotated[int, about("Likewise.")]
    models: Annotated[int, about("That have a process there.")]


class Reloads(AnswerBody, frozen=True, kw_only=True):
    """Loads of models that had been evicted for others: many, if more models are in use than fit."""

    last_hour: Annotated[int, about("Completed ones, of the last hour or since the server's start.")]
    waited_s: Annotated[float, about("Seconds that inferences waited for loads then, answered or not.")]
    share: Annotated[float, about("Of the time of all inferences then, from 0 to 1.")]
    limits: Annotated[
        list[Annotated[str, one_of("memory", "max_loaded")]],
        about("Which leave no room for one more model now; empty if it is not known."),
    ]


class MemoryParts(AnswerBody, frozen=True, kw_only=True):
    """The sum of the parts of the memory; metrics and `ServerStarted` have each of them."""

    excess_bytes: Annotated[int, about("How much more than the limit all is together; 0 if it fits.")]
    kills_together: Annotated[
        bool, about("Whether the kernel kills the whole container when one process passes its limit.")
    ]
    summary: Annotated[str, about("The parts, and what follows from their sum, for people.")]


class OperatorNotice(AnswerBody, frozen=True, kw_only=True):
    """A fact that needs an operator, in words."""

    title: str
    why: str
    todo: Annotated[str, about("Which remedy there is.")]
    level: Annotated[
        str,
        about(
            "`note` is of what works, and stays as it is until somebody changes it; missing if `critical`."
        ),
        one_of("critical", "note"),
    ] = "critical"


class Resources(AnswerBody, frozen=True, kw_only=True):
    """The memory budget of workers and its use, and whether the server is ready."""

    not_ready: Annotated[
        list[NotReady], about("The failed checks of `/health/ready`; missing if it answers 200.")
    ] = []
    limit_bytes: Annotated[int, about("Of this container or machine.")]
    limit_source: Annotated[str, about("cgroup v2, cgroup v1 or machine.")]
    memory: Annotated[MemoryParts, about("Of the limit, for all but models.")]
    budget_bytes: int
    reserved_bytes: int
    used_bytes: int
    free_bytes: Annotated[int, about("Negative if models have grown beyond the budget.")]
    max_loaded: int | None
    drain_timeout_s: Annotated[
        float, about("How long an unload without force lets inferences run; missing if 0.")
    ] = 0.0
    threads: Annotated[int, about("Threads of each worker of a load that does not say otherwise.")]
    models: list[LoadUsage]
    waiting: list[WaitingJob]
    reloads: Annotated[Reloads | None, about("After evictions; missing without any in an hour.")] = None
    pressure: Annotated[PressureInfo | None, about("Null without PSI.")]
    confinement: ConfinementInfo
    devices: Annotated[list[Device], about("First the CPU.")]
    device_problems: Annotated[list[str], about("Why others cannot be used.")]
    confinement_of_devices: Annotated[
        ConfinementInfo | None, about("Of workers on devices but the CPU; null without any.")
    ]
    notices: Annotated[list[OperatorNotice], about("Missing if nothing needs an operator.")] = []
    repository_writable: Annotated[
        bool, about("Whether the settings let admins add and remove versions; the folder may still not.")
    ]
    as_of: Annotated[int, AS_OF]
