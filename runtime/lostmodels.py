"""How an inference loses its model: words, and an error code, for each way.

The codes say what a client can do: `tools.errors` has the advice for each.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping

from events.jobs import FORK_SERVER_DIED, Job
from events.types import Cause
from runtime.errors import OUT_OF_MEMORY, RuntimeProblem, WorkerDied

UNLOADED, REPLACED, EVICTED, MOVED = "model_unloaded", "model_replaced", "model_evicted", "model_moved"

STOPPED = "shutting_down"

CRASHES = frozenset({WorkerDied.code, OUT_OF_MEMORY, FORK_SERVER_DIED})
"""Codes of inferences that may be what ended their worker."""

_WAYS: Mapping[Cause, tuple[str, str]] = {
    Cause.SWAP: (REPLACED, "to be replaced by another version"),
    Cause.EVICTION: (EVICTED, "by the server, to free memory"),
    Cause.IDLE: (EVICTED, "by the server, since nobody used it"),
    Cause.DRAIN: (MOVED, "because its node drains"),
    Cause.COPY: (MOVED, "at this node, since others have it"),
}
"""Error codes and words of unloads by the system."""


class ModelLost(RuntimeProblem):
    """The worker of an inference ended before its answer."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message, code=code)
        if code == UNLOADED:
            self.retry_after_s = None  # a person decides when it is back


def describe_unload(unload: Job | None) -> str:
    """Return who unloads a model and why, as the end of a sentence; empty if that is not known."""
    if unload is None:
        return ""
    if unload.cause in _WAYS:
        return f" {_WAYS[unload.cause][1]}"
    return f" by {unload.requested_by}{', by force' if unload.forced else ''}"


def explain_loss(model_id: str, death: WorkerDied, unload: Job | None, *, is_expected: bool) -> ModelLost:
    """Return the error of an inference whose worker has ended.

    Args:
        model_id: the model.
        death: how the worker ended.
        unload: the job that ended its load, if any.
        is_expected: whether the server ended the worker: for an unload, or since the model is elsewhere.
    """
    if not is_expected:
        return _explain_crash(model_id, death)
    if unload is None:
        return ModelLost(f"this server may not serve model '{model_id}' any more", MOVED)
    code, _ = _WAYS.get(unload.cause, (UNLOADED, ""))
    what = f"model '{model_id}' was unloaded{describe_unload(unload)}"
    return ModelLost(f"{what}, before the inference had ended", code)


def stopped_server(model_id: str) -> ModelLost:
    """Return the error of an inference that the server has no more time for, since it stops."""
    return ModelLost(f"the server stopped before the inference of model '{model_id}' had ended", STOPPED)


def _explain_crash(model_id: str, death: WorkerDied) -> ModelLost:
    code, end = WorkerDied.code, death.end
    if death.kill is not None:
        code, why = death.kill.code, f"the server killed it: {death.kill.reason}"
    elif end.signal is None and end.exit_code is None:
        code, why = FORK_SERVER_DIED, "the fork server ended, too"
    elif end.signal == signal.SIGKILL:
        why = "signal 9 killed it, probably the kernel's for lack of memory: the machine's log says so"
    else:
        why = f"it {end}, maybe because of this inference"
    return ModelLost(f"the worker of model '{model_id}' ended: {why}", code)
