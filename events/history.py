"""The history of models and jobs in rows: a model after each change, and when a job was unended. Pure.

A row has what the API shows of a model. What its `ModelLoaded` said is not repeated in each row: a row names
the position of that event. What only the scheduler needs (footprints, incidents, back-off) is in no row; a
fold of the log has it. `events.sqlite.history` stores the rows.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec
from msgspec import Struct

from events.jobs import Failure, Job
from events.models import Model, ModelState
from events.serving import Serving
from events.state import State
from events.types import Cause, Event, UnloadRequested
from events.versions import ModelVersions

_NAMES = {"server": "node"}
"""What rows call the server; see `features.facts.STORED_NAMES`."""

NOT_LOADED = _UNLOADED, _FAILED = ModelState.UNLOADED, ModelState.FAILED


class CopyRow(Struct, frozen=True, gc=False, omit_defaults=True, rename=_NAMES):
    """A load that a model serves from at a server; the members are those of `ModelRow`."""

    load: int
    version: int
    server: str | None = None
    workers: int = 0
    degraded: bool = False


class ModelRow(Struct, frozen=True, gc=False, omit_defaults=True, rename=_NAMES):
    """A model after an event, as stored and shown, without the data of its load's event.

    Attributes:
        version: as `Model.version`.
        next: the version of the load that has started, or that waits while the model is not loaded.
        job: the id of that load's job.
        rank: as `Model.rank`.
        load: position of the `ModelLoaded` of the load that serves, or that was unloaded for replacement.
        workers: the number of workers left of the serving load; None without one.
        degraded: as `Model.degraded`.
        server: as `Serving.server`; `asked_by` and `brought_back` are there, too.
        error: the last failure.
        copies_wanted: the `LoadParameters.wanted_copies` of the serving load.
        copies: the further loads that serve, in the order of `Model.copies`.
    """

    state: ModelState
    version: int | None = None
    next: int | None = None
    job: str | None = None
    rank: int | None = None
    load: int | None = None
    workers: int | None = None
    degraded: bool = False
    server: str | None = None
    asked_by: str | None = None
    brought_back: Cause | None = None
    error: Failure | None = None
    copies_wanted: int = 1
    copies: tuple[CopyRow, ...] = ()

    @property
    def servings(self) -> tuple[CopyRow, ...]:
        """The load that serves or was lost, and its copies; as `Model.servings`."""
        if self.load is None or self.version is None or self.workers is None:
            return ()
        return CopyRow(self.load, self.version, self.server, self.workers, self.degraded), *self.copies

    @property
    def has_workers(self) -> bool:
        """Whether workers of the model answer inferences, or did until it began to be unloaded."""
        return self.state in (ModelState.LOADED, ModelState.UNLOADING)

    @property
    def is_waiting(self) -> bool:
        """Whether the model is not loaded, and a load of it waits to start."""
        return self.job is not None and self.state in NOT_LOADED

    @property
    def serving_load(self) -> int | None:
        """Position of the `ModelLoaded` of the serving load, or None."""
        return None if self.workers is None else self.load

    @property
    def next_version(self) -> int | None:
        """The version that is loading beside the serving one."""
        return self.next if self.state is ModelState.LOADED else None


class ShownModel(NamedTuple):
    """A model as the API shows it, now or at a moment of the past.

    `loads` are those of the row's `servings`: of what can change later (workers, server, who asked), the row
    counts. `versions` are as of the same moment.
    """

    id: str
    row: ModelRow
    versions: ModelVersions
    loads: tuple[Serving, ...] = ()

    @property
    def load(self) -> Serving | None:
        """The serving load, or None."""
        return self.loads[0] if self.loads else None

    def count_ready(self) -> int:
        """Return how many of its loads serve as `load` does, with all their workers."""
        if self.row.state is not ModelState.LOADED:
            return 0
        pairs = zip(self.row.servings, self.loads, strict=True)
        return sum(not row.degraded and load.is_copy_of(self.loads[0]) for row, load in pairs)


def has_row(event: Event, model: Model) -> bool:
    """Whether an event that changed a model may have changed its row.

    A requested unload does only if it takes a copy from the model, of which it is none of the unloads then.
    """
    return type(event.data) is not UnloadRequested or event.id not in model.unloads


def make_row(model: Model) -> ModelRow:
    state, serving, version, job = model.state, model.serving, None, None
    if model.loads:
        waits = state is _UNLOADED or state is _FAILED
        pending = model.loads[0] if waits else model.started_load
        if pending is not None:
            version, job = pending.version, pending.job_id
    if serving is None:
        load, error = None if model.previous is None else model.previous.position, model.error
        return ModelRow(state, model.version, version, job, model.rank, load, error=error)
    return ModelRow(
        state,
        serving.version,
        version,
        job,
        model.rank,
        serving.position,
        len(serving.worker_ids),
        serving.degraded_at is not None and model.degraded,
        serving.server,
        serving.asked_by,
        serving.brought_back,
        model.error,
        serving.parameters.wanted_copies,
        tuple([_make_copy_row(each) for each in model.others]),
    )


def _make_copy_row(copy: Serving) -> CopyRow:
    workers, is_degraded = len(copy.worker_ids), copy.degraded_at is not None
    return CopyRow(copy.position, copy.version, copy.server, workers, is_degraded)


def describe_model(state: State, model_id: str) -> ShownModel:
    """Return a model of the folds as the API shows it; it may have no event yet."""
    model, versions = state.models.get(model_id) or Model(model_id), state.registers.find_versions(model_id)
    servings = () if model.serving is None else model.servings
    return ShownModel(model_id, make_row(model), versions, servings)


def find_landmark(job: Job) -> int | None:
    """Return the landmark of an ended job: the roundest position after which it had not ended.

    That is the one which the highest power of two divides. Jobs that had not ended at a position are found by
    their landmarks (`landmarks_around`), with an index of one number for each job.
    """
    if not job.ended or job.position <= job.created_position:  # the latter is forged
        return None
    bits = ((job.created_position - 1) ^ (job.position - 1)).bit_length() - 1
    return (job.position - 1) >> bits << bits


def landmarks_around(position: int) -> list[int]:
    """Return the landmarks that ranges of positions around `position` can have: two for each power of two."""
    below = [position >> bits << bits for bits in range(_POSITION_BITS)]
    return sorted({*below, *(each + (1 << bits) for bits, each in enumerate(below))})


_POSITION_BITS = 62
"""Positions are 64-bit integers; sums of two stay below their limit."""


encode_row = msgspec.json.Encoder(order="sorted").encode
decode_row = msgspec.json.Decoder(ModelRow).decode
