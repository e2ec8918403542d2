"""Jobs."""

from __future__ import annotations

from typing import Annotated, Any

from answers.answer import AS_OF, about, one_of
from answers.errors import ErrorInfo
from answers.past import PastAnswer

ENDED = frozenset({"completed", "failed", "cancelled"})


Kind = Annotated[str, one_of("load", "unload")]
Status = Annotated[str, one_of("pending", "in_progress", "completed", "failed", "cancelled")]


class JobInfo(PastAnswer, frozen=True, kw_only=True):
    """A job: one accepted load or unload."""

    id: str
    kind: Kind
    model_id: str
    version: int | None
    status: Status
    stage: Annotated[
        str | None,
        about("Live: the first five are those of a load, the others those of an unload."),
        one_of("copying", "starting", "loading", "warming_up", "measuring", "draining", "stopping"),
    ]
    waiting_for: str | None
    created_at: str
    started_at: str | None
    finished_at: str | None
    requested_by: str
    cause: Annotated[
        str, one_of("request", "demand", "swap", "eviction", "idle", "recovery", "restart", "drain", "copy")
    ]
    cancel_requested: Annotated[bool, about("Whether a cancel was requested; see `status` for its outcome.")]
    superseded_by: Annotated[
        str | None, about("The job of a person's load that took the place of this one by the system.")
    ]
    attempt: int
    node: Annotated[
        str | None,
        about(
            "Name of the node where it is placed; missing while there is none, and if the server is alone."
        ),
    ] = None
    position: Annotated[int, about("Position of its latest event.")]
    parameters: Annotated[dict[str, Any], about("Parameters of its request.")]
    label: Annotated[
        str | None, about("Of a load: names the version from when that is loaded; missing without one.")
    ] = None
    passed_over: Annotated[
        str | None,
        about(
            "Of a load whose request named no version: why the highest one could not be served; "
            "missing if it could."
        ),
    ] = None
    reason: Annotated[str | None, about("Of a load: why, as who asked says.")]
    emergency: Annotated[str | None, about("Of a load: why it must not wait for others, as who asked says.")]
    unreturned_bytes: Annotated[
        int | None,
        about("Of an unload: memory that its device had not returned when it completed; missing if all was."),
    ] = None
    error: ErrorInfo | None

    @property
    def ended(self) -> bool:
        """Whether the status is final."""
        return self.status in ENDED


class JobList(PastAnswer, frozen=True, kw_only=True):
    """One page of the jobs, newest first."""

    as_of: Annotated[int, AS_OF]
    jobs: list[JobInfo]
    next_cursor: int | None

    @property
    def values(self) -> list[JobInfo]:
        return self.jobs
