"""The `Models` projection: what is loaded, by whom, from which bytes; `events.modelfold` makes it."""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct

from events.jobs import Failure, LoadParameters
from events.types import (
    Cause,
    LoadedFile,
    Prepared,
)

CRASH_LOOP = "crash_loop"
"""The code of a load that is not tried any more, because it kept dying."""

FORK_SERVER_DIED = "fork_server_died"
"""The code of a load whose worker ended with the fork server, which says nothing against the model."""

INSUFFICIENT_MEMORY = "insufficient_memory"
"""The code of a load for which the memory budget has no room, and will have none."""

TOO_MANY_LOADED = "too_many_loaded"
"""The code of a load of more models than may be loaded, after a start of the server."""

TIMEOUT = "timeout"
"""The code of a load that had not ended by its deadline."""

RELOADS = (Cause.RECOVERY, Cause.RESTART, Cause.SWAP)
"""Why the system loads a model again of its own accord."""


class ModelState(StrEnum):
    """What a model is; `lost` is: was loaded when its worker or the server died, and is wanted back."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    LOADED = "loaded"
    UNLOADING = "unloading"
    FAILED = "failed"
    LOST = "lost"


class Serving(Struct, frozen=True, gc=False):
    """The load that a model serves from, is being unloaded from, or lost.

    `worker_ids` are those left. `degraded_at` is when the incident began in which some died; null as long as
    all are left. `kept_as_is` says that the load which was to make it whole was cancelled, or has no room.
    """

    load_job_id: str
    version: int
    position: int
    loaded_at: str
    loaded_by: str
    worker_ids: tuple[str, ...]
    files: tuple[LoadedFile, ...]
    memory_bytes: int
    peak_memory_bytes: int
    parameters: LoadParameters
    degraded_at: str | None = None
    kept_as_is: bool = False
    prepared: Prepared | None = None


class Footprint(Struct, frozen=True, gc=False):
    """What one worker took at most while it loaded these files, since they are what they are.

    `form` is the prepared form that it loaded instead; null is none.
    """

    version: int
    files: tuple[LoadedFile, ...]
    peak_memory_bytes: int
    form: str | None = None


class PendingLoad(Struct, frozen=True, gc=False):
    """A load of this model that has not ended."""

    job_id: str
    version: int
    started: bool = False


class Model(Struct, frozen=True, gc=False):
    """One model. `phase` is its state as far as what serves goes: never `loading`, see `state`.

    `previous` is the load that was ended so that another version can come in its place, until that one is
    there; should it not come, the model is `lost` and `previous` wanted back. `footprints` are of the
    versions loaded last, the latest at the end.
    """

    id: str
    phase: ModelState = ModelState.UNLOADED
    serving: Serving | None = None
    rank: int | None = None
    loads: tuple[PendingLoad, ...] = ()
    unloads: tuple[str, ...] = ()
    error: Failure | None = None
    last_version: int | None = None
    lost_by: Cause | None = None
    lost_at: str | None = None
    incidents: tuple[str, ...] = ()
    previous: Serving | None = None
    footprints: tuple[Footprint, ...] = ()

    @property
    def state(self) -> ModelState:
        """The model's state: a model that serves stays `loaded` while another version of it is loading."""
        if self.previous is not None:
            return ModelState.LOADING
        if self.phase in (ModelState.LOADED, ModelState.UNLOADING) or self.under_way is None:
            return self.phase
        return ModelState.LOADING

    @property
    def under_way(self) -> PendingLoad | None:
        """The load that has begun and not ended."""
        return next((load for load in self.loads if load.started), None)

    @property
    def degraded(self) -> bool:
        """Whether the model serves with fewer workers than it was loaded in."""
        serving = self.serving
        return self.phase is ModelState.LOADED and serving is not None and serving.degraded_at is not None

    @property
    def version(self) -> int | None:
        """The version that serves, else the one that is loading, else the last that was tried."""
        if self.serving is not None:
            return self.serving.version
        return self.under_way.version if self.under_way is not None else self.last_version

    @property
    def next_version(self) -> int | None:
        """The version that will take the place of the one that serves."""
        return self.under_way.version if self.phase is ModelState.LOADED and self.under_way else None
