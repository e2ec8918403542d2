"""Models, and the last lines that their workers printed."""

from __future__ import annotations

from typing import Annotated, Any

from answers.answer import AS_OF, AnswerBody, about, one_of
from answers.approvals import ApprovalInfo, LoadApprovalInfo, UnapprovedVersion
from answers.errors import ErrorInfo
from answers.jobs import JobInfo
from answers.past import PastAnswer
from answers.signatures import LoadSignatureInfo
from answers.tensors import ModelTensor

_Tensors = Annotated[
    list[ModelTensor] | None,
    about(
        "In the answer of one model: those of the version that serves, else of the highest one, as its file "
        "declares them; missing if the file cannot be read as ONNX."
    ),
]
State = Annotated[str, one_of("unloaded", "loading", "loaded", "unloading", "failed", "lost")]


class LoadedFileInfo(AnswerBody, frozen=True, kw_only=True):
    """A file of a loaded version, as it was read."""

    path: str
    bytes: int
    mtime_ns: int
    sha256: str


class ModelCopy(AnswerBody, frozen=True, kw_only=True):
    """A copy of a model: its load at one node."""

    node: str | None
    version: Annotated[int, about("During a swap, some copies have the version before.")]
    position: Annotated[int, about("Position of its `ModelLoaded`.")]
    job_id: Annotated[str, about("Job of its load.")]
    loaded_at: str
    workers: Annotated[int, about("Running workers; may be fewer than were loaded.")]
    memory_bytes: Annotated[int, about("What they took when it was loaded.")]


class DeviceUseInfo(AnswerBody, frozen=True, kw_only=True):
    """The part of a loaded model that runs on one device."""

    provider: Annotated[str, about("The execution provider; `cpu` is ONNX Runtime's own.")]
    version: Annotated[str, about("Of the provider.")]
    device: str
    nodes: Annotated[int, about("Nodes of the model's graph that run there.")]
    memory_bytes: Annotated[
        int | None, about("Of the device's own memory when it was loaded; null if it has none.")
    ]


class BatchRowsInfo(AnswerBody, frozen=True, kw_only=True):
    """Whether rows of a batch change each other's answers, as the operators of the model say."""

    verdict: Annotated[
        str,
        about("`independent`: they do not. `dependent`: they do. `unknown`: the operators do not say."),
        one_of("independent", "unknown", "dependent"),
    ]
    reason: Annotated[str, about("The operator, the output and the axis; missing if independent.")] = ""
    joined: Annotated[
        bool,
        about(
            "Whether requests of several clients run together in batches: if rows are independent, or "
            "the load allows dependent ones."
        ),
    ]


class ModelRulesInfo(AnswerBody, frozen=True, kw_only=True):
    """The rules for a model: what its loads need."""

    digest: str
    trust: Annotated[
        str | None,
        about("What follows without a trusted signature; null without rules for signatures."),
        one_of("enforce", "warn"),
    ]
    approvals: Annotated[int, about("How many other persons must approve.")]


class VersionOrigin(AnswerBody, frozen=True, kw_only=True):
    """Where a version comes from, as who added it said; the server has not looked."""

    version: int
    source: Annotated[str, about("Its name, as it was given.")]
    resolved: Annotated[str, about("A name of what it meant then, which does not move.")]
    added_by: str
    added_at: str
    position: Annotated[int, about("Of its `VersionAdded`, which has the SHA-256 of each file.")]


class ModelChoice(AnswerBody, frozen=True, kw_only=True):
    """A load or an unload by a person."""

    version: Annotated[
        int | None,
        about("The version that an inference loads; null if it loads none: the person unloaded the model."),
    ]
    parameters: Annotated[dict[str, Any] | None, about("Of the load; null with `version`.")]
    digest: Annotated[
        str | None,
        about("Of the files that were loaded, which an inference loads again; null with `version`."),
    ]
    by: str
    at: str
    job_id: str


class ModelInfo(PastAnswer, frozen=True, kw_only=True):
    """A model of the repository, or one that is loaded."""

    id: str
    versions: Annotated[
        list[int] | None, about("In the repository; null with `at`: its past is not recorded.")
    ]
    state: State
    version: int | None
    next_version: int | None
    active: bool
    labels: Annotated[dict[str, int], about("The version that each label names; missing without any.")] = {}
    loaded_at: str | None
    loaded_by: Annotated[
        str | None, about("Who asked for it, also of a model that the system brought back since.")
    ]
    brought_back: Annotated[
        str | None,
        about(
            "Why the system loaded it again, if it did: `restart` of the server, `recovery`, "
            "`swap`, `drain`, `copy`."
        ),
        one_of("recovery", "restart", "swap", "drain", "copy"),
    ]
    job_id: str | None
    open_load: Annotated[
        JobInfo | None,
        about(
            "Its load that has not ended, with what it waits for or its stage; missing without one, and "
            "with `at`."
        ),
    ] = None
    node: Annotated[
        str | None,
        about(
            "Name of the node where it is loaded; missing while there is none, and if the server is alone."
        ),
    ] = None
    copies: Annotated[
        int | None, about("At how many nodes it is to be loaded; missing, as the next three, if at one.")
    ] = None
    copies_ready: Annotated[
        int | None, about("How many of them serve the version and files of the first, with all workers.")
    ] = None
    copies_at: Annotated[
        list[ModelCopy], about("Its copies. The first is what the other members are of.")
    ] = []
    copies_waiting_for: Annotated[
        str | None, about("Why fewer are ready; missing if all are, and with `at`.")
    ] = None
    position: Annotated[int | None, about("Position of its `ModelLoaded`.")]
    files: list[LoadedFileInfo]
    not_served: Annotated[
        str | None,
        about(
            "Why the highest version in the repository cannot be served, such as one that is not "
            "complete or cannot be read: a load without a number passes it over. Null if it can "
            "be, and with `at`."
        ),
    ]
    repository_changed: Annotated[
        bool | None,
        about(
            "Whether the repository has newer files than those that are loaded, or that an inference "
            "would load; null without any, and with `at`."
        ),
    ]
    memory_bytes: Annotated[
        int | None,
        about(
            "Memory of its workers here now, measured every few seconds, as in the resources; "
            "null with `at`, and if it is loaded at other nodes only."
        ),
    ]
    memory_at_load_bytes: Annotated[int | None, about("What they took when the model was loaded.")]
    devices: Annotated[
        list[DeviceUseInfo],
        about(
            "First the device that it was loaded on, then `cpu` if nodes of its graph run there; "
            "missing if all is on the CPU."
        ),
    ] = []
    rows: Annotated[
        BatchRowsInfo | None,
        about(
            "Of a batch of the load that serves; missing without a `max_batch_size` above 1, and for loads "
            "of releases that did not read the graph."
        ),
    ] = None
    signature: Annotated[
        LoadSignatureInfo | None, about("Of what it serves; null without rules for signatures.")
    ]
    approval: Annotated[LoadApprovalInfo | None, about("Of what it serves; null without rules for approval.")]
    added_by: Annotated[
        list[str] | None,
        about("All who added what it serves; null if the ledger has nobody, and if it serves nothing."),
    ]
    approvals: Annotated[
        list[ApprovalInfo], about("The approvals of bytes that stand; missing without any.")
    ] = []
    unapproved: Annotated[
        list[UnapprovedVersion],
        about(
            "Versions whose load was refused, or that were added since the last approval, newest "
            "first; missing without any, and with `at`."
        ),
    ] = []
    policy: Annotated[
        ModelRulesInfo | None,
        about("The rules for it that are in force here; missing without, and with `at`."),
    ] = None
    chosen: Annotated[
        ModelChoice | None,
        about(
            "The last load or unload by a person, which on-demand loads follow; missing without "
            "one, and with `at`."
        ),
    ] = None
    error: ErrorInfo | None
    instances: Annotated[int | None, about("Running workers; may be fewer than were loaded.")]
    threads: Annotated[int | None, about("Threads that each of its workers computes with.")]
    inputs: _Tensors = None
    outputs: _Tensors = None
    parameters: Annotated[
        dict[str, Any] | None,
        about("In the answer of one model: of the load that serves; missing without one."),
    ] = None
    inputs_of_version: Annotated[int | None, about("The version that `inputs` and `outputs` are of.")] = None
    sources: Annotated[
        list[VersionOrigin], about("In the answer of one model: its versions that have a name elsewhere.")
    ] = []


class ModelList(PastAnswer, frozen=True, kw_only=True):
    """One page of the models, by id."""

    as_of: Annotated[int, AS_OF]
    models: list[ModelInfo]
    next_cursor: str | None

    @property
    def values(self) -> list[ModelInfo]:
        return self.models


class WorkerStderr(AnswerBody, frozen=True, kw_only=True):
    """The last lines of one worker on its stderr."""

    worker_id: str | None
    version: int | None
    job_id: Annotated[str | None, about("The job of its load.")]
    lines: Annotated[
        list[str], about("Oldest first, at most 64 lines and 16 KiB; last, why the server killed the worker.")
    ]


class ExitedWorkerStderr(WorkerStderr, frozen=True, kw_only=True):
    """The last lines of a worker that ended unexpectedly, as the ledger has them."""

    exited_at: str
    position: Annotated[int, about("Of its `WorkerExited`.")]
    exit_code: int | None
    signal: int | None


class ModelStderr(AnswerBody, frozen=True, kw_only=True):
    """The last lines that a model's workers printed."""

    recorded: Annotated[
        bool, about("False with `--ledger-stderr off`: the ledger keeps only why the server killed a worker.")
    ]
    workers: Annotated[list[WorkerStderr], about("Those that run.")]
    last_exited: ExitedWorkerStderr | None
