"""Errors of this package: one root, stable codes, data as attributes.

HTTP status codes are not here; the server has one table from `code` to status.
"""

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

LoadCode = Literal[
    "invalid_model",
    "model_changed",
    "unsafe_file",
    "out_of_memory",
    "warm_up_failed",
    "rows_depend",
    "device_unavailable",
    "fallback_refused",
]
"""Codes with which a worker refuses to load a model."""


OUT_OF_MEMORY: Final = "out_of_memory"

CODE_FOLDERS = {str(Path(__file__).parents[1]), sys.prefix, sys.base_prefix}
"""Where the code lies: a worker that crashes prints where it was."""


def hide_folders(text: str, folders: Iterable[str]) -> str:
    """Return a text without the absolute paths of folders of this server: paths in them become relative.

    Those who may only infer or audit read what is recorded, and learn nothing of the machine from it.

    Args:
        text: an error message, or a line that a worker printed.
        folders: absolute, and none is the root of all.
    """
    longest_first = sorted({folder.rstrip("/") for folder in folders} - {""}, key=len, reverse=True)
    if not any(folder in text for folder in longest_first):
        return text
    names = "|".join(map(re.escape, longest_first))
    inside = re.sub(rf"(?<![\w./-])(?:{names})/(?=[^\s/'\":;,)\]])", "", text)
    return re.sub(rf"(?<![\w./-])(?:{names})(?![\w-])/?", "…", inside)


@dataclass(frozen=True, slots=True)
class Exit:
    """How a worker's process ended: an exit code, or the signal that killed it; both None when unknown."""

    exit_code: int | None
    signal: int | None

    def __str__(self) -> str:
        if self.signal is not None:
            return f"was killed by signal {self.signal}"
        how = "for an unknown reason" if self.exit_code is None else f"with exit code {self.exit_code}"
        return f"ended {how}"


@dataclass(frozen=True, slots=True)
class Kill:
    """Why the server killed a worker, and the error code of the inferences that it had."""

    reason: str
    code: str = "worker_died"


class RuntimeProblem(Exception):
    """Something in the model runtime went wrong."""

    code: str = "runtime_problem"

    def __init__(self, message: str | None = None, *, code: str | None = None) -> None:
        super().__init__(message or (type(self).__doc__ or "").strip())
        self.code = code or type(self).code


class InvalidModelId(RuntimeProblem):
    """A model id is 1 to 128 of A-Z a-z 0-9 . _ - and begins with a letter or a digit."""

    code = "invalid_model_id"


class UnknownModel(RuntimeProblem):
    """The repository has no such model."""

    code = "unknown_model"

    def __init__(self, model_id: str, reason: str | None = None) -> None:
        what = "is not in the repository" if reason is None else f"has no version to serve: {reason}"
        super().__init__(f"model {model_id!r} {what}")
        self.model_id = model_id


class UnknownVersion(RuntimeProblem):
    """The repository has the model, but no such complete version of it."""

    code = "unknown_version"

    def __init__(self, model_id: str, version: int, message: str | None = None) -> None:
        super().__init__(message or f"model {model_id!r} has no version {version}")
        self.model_id = model_id
        self.version = version


class RepositoryUnreadable(RuntimeProblem):
    """The repository cannot be read at the moment; the message has the system's reason."""

    code = "repository_unreadable"


class StoreUnavailable(RuntimeProblem):
    """The store cannot be used at the moment; the message has the system's reason."""

    code = "store_unavailable"


class DiskFull(RuntimeProblem):
    """The store's disk has no room for the version."""

    code = "disk_full"

    def __init__(self, needed_bytes: int, free_bytes: int) -> None:
        missing = max(1, needed_bytes - free_bytes)
        super().__init__(
            f"the version takes {needed_bytes} bytes on the disk of the store, and {max(0, free_bytes)} can"
            f" be spared there: {missing} bytes are missing; free as many, or move the data directory"
            if needed_bytes
            else "the disk of the store is full: free some space, or move the data directory"
        )
        self.needed_bytes = needed_bytes
        self.missing_bytes = missing


class CopyCancelled(RuntimeProblem):
    """The copying or hashing of a version was cancelled."""

    code = "copy_cancelled"


class ForkServerUnavailable(RuntimeProblem):
    """The fork server did not answer; a new one is being started."""

    code = "fork_server_unavailable"


class LoadRefused(RuntimeProblem):
    """A load failed for a stated reason; the message has ONNX Runtime's own words if there are any."""

    code: LoadCode = "invalid_model"

    def __init__(self, code: LoadCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class MissingData(LoadRefused):
    """A model names a file that its version does not have."""


class NoProgress(RuntimeProblem):
    """A load reached no further stage, and copied or hashed nothing, for its `progress_timeout_s`."""

    code = "no_progress"


class WorkerDied(RuntimeProblem):
    """The worker's process ended before it answered.

    Args:
        end: how.
        begun: whether it may have begun the request; otherwise the request was still queued.
        kill: why the server killed it; None if it did not, or for an unload.
        worker_id: the worker's.
    """

    code = "worker_died"

    def __init__(
        self,
        end: Exit,
        *,
        begun: bool = True,
        kill: Kill | None = None,
        worker_id: str = "",
    ) -> None:
        super().__init__(f"the worker {end}")
        self.end = end
        self.begun = begun
        self.kill = kill
        self.worker_id = worker_id


class InvalidInput(RuntimeProblem):
    """The model does not take these inputs, or does not have these outputs."""

    code = "invalid_input"


class NotRepresentable(InvalidInput):
    """JSON cannot carry what the model answered."""

    code = "not_representable"


class InferenceFailed(RuntimeProblem):
    """The model could not be run on these inputs; the message is the runtime's."""

    code = "inference_failed"


class InferenceCancelled(RuntimeProblem):
    """The inference was stopped before it had an answer."""

    code = "inference_cancelled"


class InferenceTimeout(RuntimeProblem):
    """The inference did not end in time and was stopped, or could not have and was not begun."""

    code = "inference_timeout"


class ModelNotLoaded(RuntimeProblem):
    """The model is not loaded."""

    code = "model_not_loaded"


class QueueFull(RuntimeProblem):
    """As many inferences as may be are queued or running for this model."""

    code = "inference_queue_full"
