"""The server's answers as structs, with the members of its OpenAPI document; unknown ones are ignored."""

from __future__ import annotations

from typing import Any

import msgspec

ENDED = frozenset({"completed", "failed", "cancelled"})

ROLES = ("admin", "infer", "audit", "approve", "emergency")
"""The roles of tokens."""


class ErrorInfo(msgspec.Struct, frozen=True):
    """Why a job or a model failed."""

    code: str
    message: str


class ServerPresence(msgspec.Struct, frozen=True):
    """The state of the server at a moment of the past: `running`, `stopped` or `unknown`, and since when."""

    state: str
    since: str | None = None


class LoadSignature(msgspec.Struct, frozen=True, kw_only=True):
    """The signature of a version's files, as it was checked by the rules with the digest `policy`.

    Attributes:
        method: `key` or `certificate`; None if no signature was accepted, as of the next two.
        signer: SHA-256 of the key's PEM in hexadecimal, or the certificate's subject.
        bundle: SHA-256 of the bundle in hexadecimal.
        problem: code of what the mode `warn` let pass.
        was_verified: whether the rules refused the signature at a reload of bytes that were verified before.
    """

    policy: str
    method: str | None = None
    signer: str | None = None
    bundle: str | None = None
    enforced: bool = False
    problem: str | None = None
    was_verified: bool = False


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One accepted load or unload.

    Attributes:
        kind: load or unload.
        status: pending, in_progress, completed, failed or cancelled.
        stage: while in progress: copying, starting, loading, warming_up, measuring; draining, stopping.
        waiting_for: while pending: the reason.
        node: where it is placed; None without one, and of a server alone.
        superseded_by: the person's load that took the place of this one by the system; waits go on with it.
        position: of its latest event in the ledger.
        label: that a load sets when its version is loaded; None without.
        passed_over: why a load without a number did not take the highest version; None if it did.
        reason: why a person asked for it; `emergency`: why it must not wait for others.
        unreturned_bytes: of an unload: memory that its device had not returned; None if all was.
    """

    id: str
    kind: str
    model_id: str
    status: str
    version: int | None = None
    stage: str | None = None
    waiting_for: str | None = None
    created_at: str | None = None
    started_at: str | None = None
    finished_at: str | None = None
    requested_by: str | None = None
    cause: str | None = None
    cancel_requested: bool = False
    superseded_by: str | None = None
    attempt: int = 0
    node: str | None = None
    position: int = 0
    parameters: dict[str, Any] = {}
    label: str | None = None
    passed_over: str | None = None
    reason: str | None = None
    emergency: str | None = None
    unreturned_bytes: int | None = None
    error: ErrorInfo | None = None
    as_of: int | None = None
    as_of_time: str | None = None
    server: ServerPresence | None = None

    @property
    def ended(self) -> bool:
        """Whether the status is final."""
        return self.status in ENDED


class File(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A file of a version; `mtime_ns` is that of a loaded one."""

    path: str
    bytes: int
    mtime_ns: int | None = None
    sha256: str


class AddedVersion(msgspec.Struct, frozen=True):
    """A version that was added to the server's repository."""

    model_id: str
    version: int
    bytes: int
    files: list[File]


class Upload(AddedVersion, frozen=True):
    """A version whose files are being sent, and those that the server has."""

    id: str


class VersionOrigin(msgspec.Struct, frozen=True, kw_only=True):
    """Where a version comes from, as who added it said; the server has not looked.

    Attributes:
        source: its name, as it was given.
        resolved: what it meant then.
        position: of its `VersionAdded`, which has the SHA-256 of each file.
    """

    version: int
    source: str
    resolved: str
    added_by: str
    added_at: str
    position: int


class TensorExample(msgspec.Struct, frozen=True, kw_only=True):
    """Zeros or ones that the model ran on when it was loaded; with `refusal`, a guess, and why it is one."""

    shape: list[int]
    values: str = "zeros"
    refusal: str | None = None


class ModelTensor(msgspec.Struct, frozen=True, kw_only=True):
    """An input or output of a model; -1 in its shape is any length, and an optional input may be left out.

    Attributes:
        dimensions: what the model calls each dimension; empty for one without a name.
        example: of an input of a loaded model; None if the server knows none.
    """

    name: str
    datatype: str
    shape: list[int]
    optional: bool = False
    dimensions: list[str] = []
    example: TensorExample | None = None

    def describe_shape(self) -> str:
        """Return the shape with the names of open dimensions: `[batch, 3, -1, 64]`."""
        names = self.dimensions or [""] * len(self.shape)
        words = [
            str(length) if length >= 0 else name or "-1"
            for length, name in zip(self.shape, names, strict=False)
        ]
        return f"[{', '.join(words)}]"


class LoadApproval(msgspec.Struct, frozen=True, kw_only=True):
    """Why a load went on whose rules ask for approval: `approved`, `reload` or `bypassed`.

    `positions` are those of the approvals that it rests on.
    """

    rule: str
    result: str
    by: list[str] = []
    positions: list[int] = []


class Approval(msgspec.Struct, frozen=True, kw_only=True):
    """One person's approval of the bytes with a digest; `version` is how they were named."""

    digest: str
    version: int
    by: str
    reason: str = ""
    at: str | None = None
    position: int = 0


class VersionApprovals(msgspec.Struct, frozen=True, kw_only=True):
    """The approvals of a version's bytes, and how many other persons the rules still ask for."""

    model_id: str
    version: int
    approvals: list[Approval] = []
    missing: int = 0


class UnapprovedVersion(msgspec.Struct, frozen=True, kw_only=True):
    """A version that waits for a person to approve it.

    `digest`, `added_by` and `position` are those of its add; None if the ledger has none.
    """

    version: int
    digest: str | None = None
    is_refused: bool = False
    added_by: str | None = None
    position: int | None = None


class ModelRules(msgspec.Struct, frozen=True, kw_only=True):
    """The rules of the policy for a model: `trust` is enforce, warn or None; and how many must approve."""

    digest: str
    trust: str | None = None
    approvals: int = 0


class FileDigest(msgspec.Struct, frozen=True):
    """A file of a version, and its SHA-256 in hexadecimal."""

    path: str
    sha256: str


class VerifiedVersion(msgspec.Struct, frozen=True, kw_only=True):
    """The checks that a load of a version would pass.

    Attributes:
        problem: why a load would be refused, whoever asks for it; None if it would not.
        added_by: all who added these files; None if the ledger has nobody.
    """

    model_id: str
    version: int
    digest: str
    files: list[FileDigest] = []
    signature: LoadSignature | None = None
    problem: ErrorInfo | None = None
    added_by: list[str] | None = None


class ModelCopy(msgspec.Struct, frozen=True, kw_only=True):
    """A copy of a model: its load at one node.

    Attributes:
        version: during a swap, some copies have the version before.
        workers: that run.
        memory_bytes: what they took when it was loaded.
    """

    node: str | None = None
    version: int
    position: int
    job_id: str
    loaded_at: str
    workers: int = 0
    memory_bytes: int = 0


class DeviceUse(msgspec.Struct, frozen=True, kw_only=True):
    """How many nodes of a loaded model's graph run on one device; its own memory that they took, if any."""

    provider: str
    version: str
    device: str
    nodes: int
    memory_bytes: int | None = None


class ModelChoice(msgspec.Struct, frozen=True, kw_only=True):
    """A load or an unload by a person; `version` and `parameters` are None of an unload."""

    job_id: str
    by: str
    at: str
    version: int | None = None
    parameters: dict[str, Any] | None = None


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """A model that is in the repository or loaded.

    Attributes:
        versions: in the repository; None with `at`, since the ledger does not record them.
        state: unloaded, loading, loaded, unloading, failed or lost.
        labels: the version that each label names.
        node: where it is loaded; None without one, and of a server alone.
        copies: at how many nodes it is to be loaded; None if at one, and of a server alone.
        copies_ready: how many of them serve the version and files of the first, with all workers.
        copies_at: its copies; the first is what the other attributes are of.
        copies_waiting_for: why fewer are ready.
        position: of its latest `ModelLoaded`.
        not_served: why the highest version in the repository cannot be served; None if it can.
        repository_changed: whether the repository has newer files than those that are loaded.
        instances: workers alive.
        threads: of each worker.
        loaded_by: who asked for it.
        brought_back: why the system loaded it again since: restart, recovery, swap, drain, copy; or None.
        memory_bytes: now; None with `at`. `memory_at_load_bytes` is what it took when it was loaded.
        devices: first that of its load, then the CPU if nodes of its graph run there; empty if all do.
        inputs: of the model alone, not in a list: of `inputs_of_version`; None if its file cannot be read.
        outputs: likewise.
        inputs_of_version: the version that serves, else the highest one.
        parameters: of the load that serves, likewise not in a list.
        sources: of its versions where who added them said where from, likewise not in a list.
        signature: of what it serves, and `approval`; None without rules.
        added_by: all who added what it serves; None if the ledger has nobody.
        approvals: of bytes, that stand.
        unapproved: versions that were refused, or were added since the last approval; none with `at`.
        policy: the rules of today; None with `at`, and without any.
        chosen: the last load or unload by a person, which on-demand loads follow; None likewise.
    """

    id: str
    state: str
    versions: list[int] | None = None
    not_served: str | None = None
    version: int | None = None
    next_version: int | None = None
    active: bool = False
    labels: dict[str, int] = {}
    loaded_at: str | None = None
    loaded_by: str | None = None
    brought_back: str | None = None
    job_id: str | None = None
    node: str | None = None
    copies: int | None = None
    copies_ready: int = 0
    copies_at: list[ModelCopy] = []
    copies_waiting_for: str | None = None
    position: int | None = None
    files: list[File] = []
    repository_changed: bool | None = None
    memory_bytes: int | None = None
    memory_at_load_bytes: int | None = None
    devices: list[DeviceUse] = []
    error: ErrorInfo | None = None
    instances: int | None = None
    threads: int | None = None
    inputs: list[ModelTensor] | None = None
    outputs: list[ModelTensor] | None = None
    inputs_of_version: int | None = None
    parameters: dict[str, Any] | None = None
    sources: list[VersionOrigin] = []
    signature: LoadSignature | None = None
    approval: LoadApproval | None = None
    added_by: list[str] | None = None
    approvals: list[Approval] = []
    unapproved: list[UnapprovedVersion] = []
    policy: ModelRules | None = None
    chosen: ModelChoice | None = None
    as_of: int | None = None
    as_of_time: str | None = None
    server: ServerPresence | None = None


class ModelMetadata(msgspec.Struct, frozen=True, kw_only=True):
    """What a model takes and gives.

    Attributes:
        versions: those that are loaded.
    """

    name: str = ""
    versions: list[str] = []
    platform: str = ""
    inputs: list[ModelTensor] = []
    outputs: list[ModelTensor] = []


class LoadUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Resources of one load until its processes have exited; `device` is None on the CPU."""

    model_id: str
    version: int
    job_id: str
    phase: str
    workers: int = 0
    reserved_bytes: int = 0
    memory_bytes: int = 0
    memory_at_load_bytes: int | None = None
    device: str | None = None
    device_bytes: int = 0
    in_flight: int = 0
    last_used_at: str | None = None
    pinned: bool = False
    keep_alive_s: int | None = None


class WaitingJob(msgspec.Struct, frozen=True, kw_only=True):
    """A job that waits."""

    job_id: str
    model_id: str
    waiting_for: str
    needs_bytes: int | None = None


class PressureInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Pressure stall information: share of the last ten seconds, in percent."""

    memory_some_percent: float | None = None
    cpu_some_percent: float | None = None


class WorkerConfinement(msgspec.Struct, frozen=True, kw_only=True):
    """Confinement of the workers; `not_prevented` are forbidden acts that a worker could do."""

    mode: str
    landlock_abi: int
    seccomp: bool
    not_prevented: list[str]


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """A device on which models are loaded, and its use.

    Attributes:
        total_bytes, free_bytes: of its own memory; None if it has none.
        reserved_bytes, used_bytes: of its own memory, or of the machine's if it has none.
    """

    device: str
    provider: str = ""
    version: str = ""
    hardware: str = ""
    total_bytes: int | None = None
    free_bytes: int | None = None
    budget_bytes: int | None = None
    reserved_bytes: int = 0
    used_bytes: int = 0
    models: int = 0


class Resources(msgspec.Struct, frozen=True, kw_only=True):
    """The memory budget of the workers, its use, and the jobs that wait for it.

    `devices` are first the CPU; `device_problems` say why others cannot be used.
    """

    budget_bytes: int
    reserved_bytes: int
    used_bytes: int
    free_bytes: int
    limit_bytes: int = 0
    limit_source: str = ""
    max_loaded: int | None = None
    threads: int | None = None
    models: list[LoadUsage] = []
    waiting: list[WaitingJob] = []
    pressure: PressureInfo | None = None
    confinement: WorkerConfinement | None = None
    devices: list[Device] = []
    device_problems: list[str] = []
    confinement_of_devices: WorkerConfinement | None = None
    as_of: int = 0


class NodeModel(msgspec.Struct, frozen=True):
    """A model at a node."""

    id: str
    version: int
    state: str


class NodeJob(msgspec.Struct, frozen=True, kw_only=True):
    """A job at a node that has not ended."""

    id: str
    kind: str
    model_id: str
    status: str
    version: int | None = None


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """A server among those that share a ledger.

    Attributes:
        phase: joined, draining, left or lost.
        epoch: how many times it has joined.
        attributes: `name=value` each.
        models: loaded there.
        jobs: placed there and not ended.
        renewed_at: when it last renewed its lease, if that is known.
        late: whether it did not renew it in time; None if it has ended, or that is not known.
        this: whether it is the node that answered.
        placer: whether it places loads.
        trusted: whether its join is signed with a key that the nodes share; None if it has ended.
    """

    id: str
    phase: str
    epoch: int = 1
    address: str = ""
    attributes: list[str] = []
    joined_at: str | None = None
    ended_at: str | None = None
    release: str = ""
    budget_bytes: int | None = None
    models: list[NodeModel] = []
    jobs: list[NodeJob] = []
    renewed_at: str | None = None
    late: bool | None = None
    this: bool = False
    placer: bool = False
    trusted: bool | None = None

    @property
    def ended(self) -> bool:
        """Whether it is gone, until it joins again."""
        return self.phase not in {"joined", "draining"}


class NodeList(msgspec.Struct, frozen=True):
    """All nodes of a ledger; none of a server alone."""

    nodes: list[Node]


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """The signed head of the ledger: keep it to prove later that no earlier event was changed."""

    position: int
    hash: str
    recorded_at: str | None = None
    algorithm: str = ""
    key_id: str = ""
    public_key: str = ""
    signature: str = ""


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """Readiness of the server, and its checks."""

    status: str
    checks: dict[str, bool] = {}


class Event(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """A fact of the ledger.

    Attributes:
        data: members of its type.
        hash: SHA-256 over the previous hash and this event's text, in hexadecimal.
    """

    position: int
    type: str
    id: str = ""
    schema: int = 1
    job_id: str | None = None
    model_id: str | None = None
    version: int | None = None
    worker_id: str | None = None
    actor: str = ""
    recorded_at: str = ""
    data: dict[str, Any] = {}
    hash: str = ""

    @classmethod
    def read(cls, line: bytes) -> Event:
        """Parse an event and keep its line.

        Raises:
            msgspec.MsgspecError: it is no event.
        """
        event = msgspec.json.decode(line, type=cls)
        event.__dict__["line"] = line  # beside the members, so that nothing that is sent can be taken for it
        return event

    def __reduce__(self) -> str | tuple[Any, ...]:
        return (Event.read, (self.line,)) if "line" in self.__dict__ else super().__reduce__()

    def __copy__(self) -> Event:
        return self

    @property
    def line(self) -> bytes:
        """The event's exact line, to be stored and hashed again."""
        line: bytes = self.__dict__["line"]
        return line
