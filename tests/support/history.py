"""Shared parts of the ledger's tests: histories in few words, and a log in a file."""

import sys
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from msgspec import UNSET, UnsetType
from msgspec.structs import replace

import events.log
from events.clock import format_timestamp
from events.commands import Command, Receipt, Record
from events.jobs import INCIDENT_WINDOW_S, Job
from events.log import Log
from events.models import Model
from events.serving import Serving
from events.state import State
from events.types import (
    SYSTEM,
    AddedFile,
    CancelRequested,
    Cause,
    Data,
    Draft,
    Durations,
    Event,
    JobCancelled,
    LoadedFile,
    LoadFailed,
    LoadJoined,
    LoadParameters,
    LoadRequested,
    LoadStarted,
    ModelLoaded,
    ModelSettingsChanged,
    ModelUnloaded,
    PolicyInForce,
    ServerStarted,
    ServerStopped,
    Unknown,
    UnloadJoined,
    UnloadRequested,
    UnloadStarted,
    VersionAdded,
    VersionRemoved,
    WorkerExited,
    digest_of,
    record_draft,
)
from events.values import Credential, FileHash
from events.versions import ModelVersions
from features.approvals.facts import ApprovalWithdrawn, VersionApproved
from features.approvals.rules import ApprovalRule
from features.devices.facts import DeviceUse
from features.labels.facts import LabelRemoved, LabelSet
from features.nodes.facts import LoadPlaced, NodeData, NodeDraining, NodeJoined, NodeLeft, NodeLost
from features.rules import LoadPolicy
from support.fleet import SOAK, of_both

START = datetime(2026, 1, 1, tzinfo=UTC)
"""When each history begins."""

MODEL = "digits"
"""The model of a history that names none."""

PLAIN = settings(
    deadline=None,
    max_examples=of_both(short=30, long=200),
    database=None,
    derandomize=not SOAK,
    suppress_health_check=[HealthCheck.too_slow],
)
"""For every property: no duration is asserted, and no examples are left behind.

The examples are the same in each run, so that nothing fails by chance; with `SOAK=all` they are new ones.
"""
FEWER = settings(PLAIN, max_examples=of_both(short=15, long=500))
"""For a property each of whose examples takes milliseconds: it folds a history, or writes a file."""

E = TypeVar("E", Event, Draft)


def at(seconds: float) -> str:
    return format_timestamp(START + timedelta(seconds=seconds))


CONTENTS = (("model.onnx", "ab" * 32),)
"""Of the version that was loaded: path and SHA-256 of its file."""


DIGEST = digest_of(CONTENTS)


OTHER_BYTES = "cd" * 32
"""SHA-256 of the file of a version that was overwritten."""


def file(mtime_ns: int = 1, sha256: str = "ab" * 32) -> LoadedFile:
    return LoadedFile("model.onnx", 4_096, mtime_ns, sha256)


def load_requested(
    cause: Cause = Cause.REQUEST, *, timeout_s: int = 300, instances: int = 1
) -> LoadRequested:
    return LoadRequested.of(LoadParameters(timeout_s=timeout_s, instances=instances), cause)


def model_loaded(*worker_ids: str, mtime_ns: int = 1, sha256: str = "ab" * 32) -> ModelLoaded:
    durations = Durations(1, 2, 3, 4, None, 5, 15)
    return ModelLoaded((file(mtime_ns, sha256),), worker_ids or ("w",), 1_000, 2_000, durations)


class History:
    """The live state after a sequence of facts, a second before each; `about` is as for `add`."""

    def __init__(self) -> None:
        self.state = State()
        self.seconds = 0.0
        self.facts: list[Event] = []

    def add(
        self,
        data: Data | Unknown,
        job: str | None = None,
        *,
        of: str | None = MODEL,
        version: int | None = 1,
        worker: str | None = None,
        by: str = SYSTEM,
        after_s: float = 1,
        event_id: str | None = None,
    ) -> Event:
        """Append a fact about the job `job` of the model `of`; a request's id is its job's."""
        self.seconds += after_s
        position = self.state.position + 1
        if event_id is None:
            requests = isinstance(data, LoadRequested | UnloadRequested)
            event_id = job if requests and job is not None else f"e{position}"
        event = Event(position, event_id, data, by, at(self.seconds), job, of, version, worker)
        self.facts.append(event)
        self.state.apply(event)
        return event

    def approve(self, version: int = 1, *, by: str = "carol", digest: str = DIGEST, of: str = MODEL) -> Event:
        """A person approves the bytes with a digest, which are those of each version that is loaded here."""
        serving = self.model(of).serving
        served = (None, None) if serving is None else (serving.version, serving.digest)
        approved = VersionApproved(digest, (FileHash(*CONTENTS[0]),), "reviewed", Credential(), *served)
        return self.add(approved, version=version, by=by, of=of)

    def withdraw(self, version: int = 1, *, by: str = "dave", digest: str = DIGEST, of: str = MODEL) -> Event:
        return self.add(ApprovalWithdrawn(digest, "it drifts", Credential()), version=version, by=by, of=of)

    def ask_load(
        self,
        job: str,
        *,
        of: str = MODEL,
        version: int = 1,
        cause: Cause = Cause.REQUEST,
        timeout_s: int = 300,
        instances: int = 1,
        **given: Any,
    ) -> None:
        """A load is requested; `given` are other fields of its request."""
        data = replace(load_requested(cause, timeout_s=timeout_s, instances=instances), **given)
        is_asked = cause in (Cause.REQUEST, Cause.DEMAND)
        self.add(data, job, of=of, version=version, by="alice" if is_asked else SYSTEM)

    def start_load(self, job: str, *, attempt: int = 1, **about: Any) -> None:
        self.add(LoadStarted(attempt), job, **about)

    def end_load(self, job: str, *, mtime_ns: int = 1, sha256: str = "ab" * 32, **about: Any) -> None:
        self.add(model_loaded(f"w-{job}", mtime_ns=mtime_ns, sha256=sha256), job, **about)

    def load_on(self, job: str, *devices: DeviceUse, peak_memory_bytes: int = 2_000, **given: Any) -> None:
        """A load ends well on a device; what is not supported there runs on the CPU."""
        self.load_at(None, job, targets=devices, peak_memory_bytes=peak_memory_bytes, **given)

    def load_pair(self, job: str, *, cause: Cause = Cause.REQUEST) -> None:
        """A load of two instances ends well, in the workers `<job>1` and `<job>2`."""
        self.ask_load(job, cause=cause, instances=2)
        self.start_load(job)
        self.add(model_loaded(f"{job}1", f"{job}2"), job)

    def change_settings(
        self, job: str, load: str, *, keep_alive_s: int | None = 60, pinned: bool = True, **about: Any
    ) -> None:
        self.add(ModelSettingsChanged(load, keep_alive_s, pinned), job, **about)

    def fail_load(self, job: str, code: str = "broken", **about: Any) -> None:
        self.add(LoadFailed(code, "because"), job, **about)

    def break_recovery(self, code: str = "broken") -> None:
        """A recovery, a job of its own, is requested and fails."""
        job = f"R{self.seconds}"
        self.ask_load(job, cause=Cause.RECOVERY)
        self.fail_load(job, code)

    def load(
        self,
        job: str,
        *,
        of: str = MODEL,
        version: int = 1,
        mtime_ns: int = 1,
        sha256: str = "ab" * 32,
        **given: Any,
    ) -> None:
        self.ask_load(job, of=of, version=version, **given)
        self.start_load(job, of=of, version=version)
        self.end_load(job, of=of, version=version, mtime_ns=mtime_ns, sha256=sha256)

    def ask_unload(
        self,
        job: str,
        load: str,
        *,
        force: bool = False,
        cause: Cause = Cause.REQUEST,
        node_id: str | UnsetType = UNSET,
        until_asked: bool | UnsetType = UNSET,
        **about: Any,
    ) -> None:
        by = "alice" if cause is Cause.REQUEST else SYSTEM
        data = UnloadRequested(force, load, cause, server=node_id, until_asked=until_asked)
        self.add(data, job, by=by, **about)

    def start_unload(self, job: str, **about: Any) -> None:
        self.add(UnloadStarted(), job, **about)

    def end_unload(self, job: str, **about: Any) -> None:
        self.add(ModelUnloaded(1_000, 0, 0), job, **about)

    def unload(self, job: str, load: str, *, of: str = MODEL, version: int = 1, **given: Any) -> None:
        self.ask_unload(job, load, of=of, version=version, **given)
        self.start_unload(job, of=of, version=version)
        self.end_unload(job, of=of, version=version)

    def ask_cancel(self, job: str, **about: Any) -> None:
        self.add(CancelRequested(), job, by="alice", **about)

    def end_cancelled(self, job: str, **about: Any) -> None:
        self.add(JobCancelled(), job, **about)

    def supersede(self, job: str, by: str, *, version: int = 1) -> None:
        """A person's load takes the place of one by the system."""
        self.ask_load(by, version=version)
        self.add(JobCancelled("superseded", by), job)

    def kill_worker(self, worker: str, *, signal: int | None = 9, **about: Any) -> None:
        self.add(WorkerExited(None, signal, ()), None, worker=worker, **about)

    def stop(self) -> None:
        self.add(ServerStopped(), of=None, version=None)

    def restart(self, *, unclean: bool = True, down_s: float = 1) -> None:
        if not unclean:
            self.stop()
        last_at = self.facts[-1].recorded_at if self.facts else None
        data = ServerStarted(unclean, last_event_at=last_at, last_seen_at=last_at)
        self.add(data, None, of=None, version=None, after_s=down_s)

    def about_node(self, data: NodeData, **about: Any) -> Event:
        return self.add(data, None, of=None, version=None, **about)

    def join(
        self, node: str, *, epoch: int | None = None, unclean: bool = False, after_s: float = 1, **given: Any
    ) -> None:
        before = self.state.registers.nodes.get(node)
        epoch = epoch or (before.epoch + 1 if before is not None else 1)
        about = {
            "address": f"http://{node}",
            "attributes": (),
            "budget_bytes": None,
            "release": "1",
            "public_key": None,
        }
        self.about_node(NodeJoined(node, epoch, unclean=unclean, **{**about, **given}), after_s=after_s)

    def drain(self, node: str) -> None:
        self.about_node(NodeDraining(node, self.state.registers.nodes[node].epoch), by="alice")

    def leave(self, node: str) -> None:
        self.about_node(NodeLeft(node, self.state.registers.nodes[node].epoch))

    def lose(self, node: str) -> None:
        self.about_node(NodeLost(node, self.state.registers.nodes[node].epoch, at(self.seconds)))

    def place(self, job: str, node: str, **about: Any) -> None:
        self.add(LoadPlaced(node, self.state.registers.nodes[node].epoch, "room"), job, **about)

    def load_at(
        self,
        node: str | None,
        job: str,
        *,
        of: str = MODEL,
        version: int = 1,
        instances: int = 1,
        targets: tuple[DeviceUse, ...] | UnsetType = UNSET,
        peak_memory_bytes: int = 2_000,
        **given: Any,
    ) -> None:
        """A load of a worker `w-<job>`, or of several, `w-<job>-2` and so on, ends well, at a node or not."""
        self.ask_load(job, of=of, version=version, instances=instances, **given)
        if node is None:
            self.start_load(job, of=of, version=version)
        else:
            self.start_at(node, job, of=of, version=version)
        workers = (f"w-{job}", *(f"w-{job}-{number}" for number in range(2, instances + 1)))
        loaded = replace(model_loaded(*workers), targets=targets, peak_memory_bytes=peak_memory_bytes)
        self.add(replace(loaded, server=UNSET if node is None else node), job, of=of, version=version)

    def start_at(self, node: str, job: str, *, of: str = MODEL, version: int = 1) -> None:
        self.place(job, node, of=of, version=version)
        self.add(LoadStarted(self.job(job).attempt + 1, server=node), job, of=of, version=version)

    def add_version(
        self, node: str | UnsetType = UNSET, *, sha256: str = "ab" * 32, of: str = MODEL, version: int = 1
    ) -> None:
        """A version is added to a node's own repository, or to the one that all share."""
        added = VersionAdded((AddedFile("model.onnx", 4_096, sha256),), server=node)
        self.add(added, of=of, version=version, by="alice")

    def remove_version(
        self, node: str | UnsetType = UNSET, reason: str | None = None, *, of: str = MODEL, version: int = 1
    ) -> None:
        self.add(VersionRemoved(reason, server=node), of=of, version=version, by="alice")

    def set_label(self, label: str = "champion", *, version: int = 1, of: str = MODEL) -> None:
        self.add(LabelSet(label), of=of, version=version, by="alice")

    def job(self, job: str) -> Job:
        return self.state.jobs[job]

    def model(self, model: str = MODEL) -> Model:
        return self.state.models.get(model) or Model(model)

    def serving(self, model: str = MODEL) -> Serving:
        """The load that a model serves from, or would return to; it has to have one."""
        found = self.model(model).serving
        assert found is not None
        return found

    def versions(self, model: str = MODEL) -> ModelVersions:
        return self.state.registers.find_versions(model)


TUNED: dict[str, Any] = {
    "pinned": True,
    "keep_alive_s": 60,
    "memory_limit_bytes": 9,
    "max_batch_size": 8,
    "max_queue_delay_us": 500,
    "threads": 2,
    "node_attributes": ("zone=a",),
}
NEEDS_APPROVAL = LoadPolicy(approval=(ApprovalRule(("*",)),))
ON_CUDA = DeviceUse("cuda", "0.9.0", "cuda:0", 60, 600_000_000)
ON_CPU = DeviceUse("cpu", "1.30.0", "cpu", 9)
JOBS = ("A", "L", "L2", "L3", "R", "U", "F", "S")
LOADS = ("L", "L2", "L3", "R", "D")
STEPS: dict[str, Callable[..., object]] = {
    "request": lambda h: h.ask_load("L"),
    "request_10s": lambda h: h.ask_load("L", timeout_s=10),
    "start": lambda h: h.start_load("L"),
    "finish": lambda h: h.end_load("L"),
    "fail": lambda h, *code: h.fail_load("L", *code),
    "load": lambda h: h.load("L"),
    # The same version again, asked for by a person.
    "request_again": lambda h: h.ask_load("L3"),
    "request_again_pinned": lambda h: h.ask_load("L3", pinned=True),
    "start_again": lambda h: h.start_load("L3"),
    "fail_again": lambda h, *code: h.fail_load("L3", *code),
    "load_again": lambda h: h.load("L3"),
    "load_other_bytes": lambda h: h.load("L3", sha256=OTHER_BYTES),
    "change_settings": lambda h: h.change_settings("L3", "L"),
    # Another version, beside or in place; the old one drains.
    "request_v2": lambda h: h.ask_load("L2", version=2),
    "request_in_place": lambda h: h.ask_load("L2", version=2, strategy="in_place"),
    "start_v2": lambda h: h.start_load("L2", version=2),
    "finish_v2": lambda h: h.end_load("L2", version=2),
    "fail_v2": lambda h, *code: h.fail_load("L2", *code, version=2),
    "load_v2": lambda h: h.load("L2", version=2),
    "request_drain": lambda h: h.ask_unload("S", "L", cause=Cause.SWAP),
    "start_drain": lambda h: h.start_unload("S"),
    "finish_drain": lambda h: h.end_unload("S"),
    "drain": lambda h: h.unload("S", "L", cause=Cause.SWAP),
    "drain_again": lambda h: h.unload("S2", "L", cause=Cause.SWAP),
    # Unloads, gentle and forced.
    "request_unload": lambda h: h.ask_unload("U", "L"),
    "request_unload_until_asked": lambda h: h.ask_unload("U", "L", until_asked=True),
    "request_unload_v2": lambda h: h.ask_unload("U", "L2"),
    "request_unload_pair": lambda h: h.ask_unload("U", "P"),
    "request_unload_D": lambda h: h.ask_unload("U", "D", version=2),
    "request_unload_unknown": lambda h: h.ask_unload("U", "unknown"),
    "request_eviction": lambda h: h.ask_unload("U", "L", cause=Cause.EVICTION),
    **{f"evict_{job}": partial(History.unload, job="E", load=job, cause=Cause.EVICTION) for job in LOADS},
    "add_at_a": lambda h: h.add_version("a"),
    "add_at_b": lambda h: h.add_version("b"),
    "add": lambda h: h.add_version(),
    "add_other_bytes": lambda h: h.add_version(sha256=OTHER_BYTES),
    "remove": lambda h: h.remove_version(),
    "start_unload": lambda h: h.start_unload("U"),
    "finish_unload": lambda h: h.end_unload("U"),
    "request_force": lambda h: h.ask_unload("F", "L", force=True),
    "request_force_v2": lambda h: h.ask_unload("F", "L2", force=True),
    "request_force_again": lambda h: h.ask_unload("F2", "L", force=True),
    "start_force": lambda h: h.start_unload("F"),
    "finish_force": lambda h: h.end_unload("F"),
    **{f"request_cancel_{job}": partial(History.ask_cancel, job=job) for job in JOBS},
    **{f"cancel_{job}": partial(History.end_cancelled, job=job) for job in JOBS},
    # Deaths of workers and of the server, and what the system does about them.
    "crash": lambda h: h.kill_worker("w-L"),
    "crash_again": lambda h: h.kill_worker("w-R"),
    "crash_unknown": lambda h: h.kill_worker("unknown"),
    "forkserver_exit": lambda h: h.kill_worker("w-L", signal=None),
    "restart": lambda h: h.restart(),
    "restart_cleanly": lambda h: h.restart(unclean=False),
    "stop_server": lambda h: h.stop(),
    "request_recovery": lambda h: h.ask_load("R", cause=Cause.RECOVERY),
    "request_restore": lambda h: h.ask_load("R", cause=Cause.RESTART),
    "request_return": lambda h: h.ask_load("R", cause=Cause.SWAP),
    "start_recovery": lambda h: h.start_load("R"),
    "finish_recovery": lambda h: h.end_load("R"),
    "fail_recovery": lambda h, *code: h.fail_load("R", *code),
    "break_recovery": lambda h, *code: h.break_recovery(*code),
    "restore": lambda h: h.load("R", cause=Cause.RESTART),
    "request_demand": lambda h: h.ask_load("D", cause=Cause.DEMAND),
    "start_demand": lambda h: h.start_load("D"),
    "finish_demand": lambda h: h.end_load("D"),
    "demand": lambda h: h.load("D", cause=Cause.DEMAND),
    # What an inference loaded under an earlier release, or before a person chose.
    "demand_v2": lambda h: h.load("D", version=2, cause=Cause.DEMAND),
    "demand_other_bytes": lambda h: h.load("D", cause=Cause.DEMAND, sha256=OTHER_BYTES),
    "request_choice": lambda h: h.ask_load("D2", cause=Cause.DEMAND),
    "fail_choice": lambda h, *code: h.fail_load("D2", *code),
    # Approval of the bytes of all versions.
    "approve": lambda h: h.approve(),
    "approve_again": lambda h: h.approve(by="dave"),
    "approve_other": lambda h: h.approve(2, digest="ef" * 32),
    "withdraw": lambda h: h.withdraw(),
    "rules_in_force": lambda h: h.add(PolicyInForce(NEEDS_APPROVAL), of=None, version=None),
    "join_L": lambda h: h.add(LoadJoined(), "L", by="bob"),
    "join_D": lambda h: h.add(LoadJoined(), "D", by="bob"),
    "join_U": lambda h: h.add(UnloadJoined(), "U", by="bob"),
    "supersede_recovery": lambda h: h.supersede("R", "L3"),
    "supersede_recovery_v2": lambda h: h.supersede("R", "L2", version=2),
    # A load that names all parameters of a loaded model.
    "request_tuned": lambda h: h.ask_load("L", **TUNED),
    "load_tuned": lambda h: h.load("L", **TUNED),
    # A load on a device, which not all nodes of the graph support.
    "load_on_device": lambda h: h.load_on("L", ON_CUDA, ON_CPU, devices=("cuda:*", "cpu"), fallback="cpu"),
    "leak_on_unload": lambda h: h.add(ModelUnloaded(1_000, 0, 0, unreturned_bytes=300_000_000), "U"),
    # A model of two instances.
    "load_pair": lambda h: h.load_pair("P"),
    "crash_1": lambda h: h.kill_worker("P1"),
    "crash_2": lambda h: h.kill_worker("P2"),
    "crash_2_later": lambda h: h.kill_worker("P2", after_s=INCIDENT_WINDOW_S + 1),
    "forkserver_exit_1": lambda h: h.kill_worker("P1", signal=None),
    "forkserver_exit_2": lambda h: h.kill_worker("P2", signal=None),
    "recover_pair": lambda h: h.load_pair("R", cause=Cause.RECOVERY),
    "crash_1_again": lambda h: h.kill_worker("R1"),
    # The label `champion`.
    "label": lambda h: h.set_label(),
    "label_v2": lambda h: h.set_label(version=2),
    "unlabel": lambda h: h.add(LabelRemoved("champion"), by="alice"),
    "request_labelled": lambda h: h.ask_load("L", version_name="champion"),
    "request_labelled_v2": lambda h: h.ask_load("L2", version=2, version_name="champion"),
    # Another model.
    "request_other": lambda h: h.ask_load("O", of="other"),
    "start_other": lambda h: h.start_load("O", of="other"),
    "load_other": lambda h: h.load("O", of="other"),
    "unload_other": lambda h: h.ask_unload("P", "O", of="other"),
}
"""The words in which tables tell a history of the model `digits`.

Jobs: `L`, `L2` (version 2), `L3` and `P` (two instances) are loads, `R` a load by the system, `D` one that an
inference caused; `U` is an unload, `F` a forced one, `S` that of the replaced version; `O` loads the model
`other`. The worker of the load `L` is `w-L`, those of `P` are `P1` and
`P2`. A failure may have a code, as in `fail_recovery:timeout`.
"""


def given(words: str) -> History:
    history = History()
    for word in words.split():
        step, *code = word.split(":")
        STEPS[step](history, *code)
    return history


def as_event(draft: Draft, position: int, after_s: float) -> Event:
    return record_draft(draft, position, at(after_s))


def with_own_ids(events: Iterable[E], known: set[str] | None = None) -> Iterator[E]:
    """Yield events or drafts, each with an id that no one before has; `known` are those of earlier ones."""
    known = set() if known is None else known
    for event in events:
        event_id = event.id if event.id not in known else f"{event.id}{len(known)}"
        known.add(event_id)
        yield replace(event, id=event_id)


def fold(drafts: Iterable[Draft]) -> History:
    """Fold drafts, as far as they have ids of their own."""
    history = History()
    for number, draft in enumerate(with_own_ids(drafts), 1):
        history.facts.append(as_event(draft, number, number))
        history.state.apply(history.facts[-1])
    return history


def ids(prefix: str = "id") -> Callable[[], str]:
    numbers = count(1)
    return lambda: f"{prefix}{next(numbers)}"


@asynccontextmanager
async def opened(path: Path, **options: Any) -> AsyncIterator[Log]:
    log = Log(path, **options)
    await log.open()
    try:
        yield log
    finally:
        await log.close()


def steady(now: Callable[[], datetime]) -> dict[str, Any]:
    """Return the clocks of a log on a machine whose wall clock shows this, and is never set."""
    shown = [START]

    def wall() -> datetime:
        shown[0] = now()
        return shown[0]

    def boottime() -> float:
        return (shown[0] - START).total_seconds()

    return {"now": wall, "boottime": boottime}


def facts(number: int, *, first: int = 1) -> Iterator[Command]:
    return (
        Record((Draft(f"f{n}", LoadStarted(n), SYSTEM, "job", MODEL, 1),))
        for n in range(first, first + number)
    )


async def write(log: Log, number: int, *, first: int = 1) -> list[Receipt]:
    return [await log.submit(command) for command in facts(number, first=first)]


def child(script: str, *arguments: object, first: Path | None = None) -> list[str]:
    """Return the command line of a Python that runs `script` with these packages, and `first` before."""
    own = [Path(events.log.__file__).parents[1], Path(__file__).parents[1]]
    search = [str(each) for each in ([first, *own] if first is not None else own)]
    return [sys.executable, "-c", f"import sys; sys.path[:0] = {search!r}\n{script}", *map(str, arguments)]
