"""Lanes of the timeline: one model over a range of time, as segments and marks. Pure: it reads no ledger.

A lane is a fold of the model's events (`events.models`). What is shorter than a bucket of the timeline is
merged into summaries: a lane has at most two segments for each bucket, however many events there were.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum

from msgspec import Struct
from msgspec.structs import replace

from events.clock import Timestamp, seconds_between
from events.jobs import Job
from events.models import Model, ModelState, Serving
from events.sqlite.liveness import NodeState, ServerState, Transition
from events.state import Entities
from events.types import (
    ENDS_OF_PROCESSES,
    OF_SERVER,
    Cause,
    Event,
    FileHash,
    LoadFailed,
    ModelLoaded,
    WorkerExited,
)

_NOT_LOADED = (ModelState.UNLOADED, ModelState.FAILED)

_RENAMED = {"begin": "from", "end": "to", "is_summary": "summary", "is_waiting": "waiting"}
"""As the API has them."""

FILES_SHOWN = 3
"""Of one load: the model's file and what it refers to; the model at its position has all."""

SERVER_ENDED = "server_ended"
"""The code of the loss of a model whose server ended."""


class Segment(Struct, frozen=True, gc=False, rename=_RENAMED):
    """A time in which a model's state stayed the same, or a summary of several such times.

    Attributes:
        begin: included.
        end: not included.
        position: of the event that began it; None if that was before the events that were read.
        next_version: the version that is loading beside the one that serves, or waits to be loaded.
        load_job_id: of the load that serves, served, or is under way.
        by: who asked for what began it: the actor of its job, else of its event.
        cause: of its job.
        is_waiting: whether the model is not loaded, and a load of it waits to start.
        degraded: whether some of the load's workers are gone.
        error: the code of the failure, in the state `failed` or `lost`.
        events: of the model in this time.
        is_summary: whether other states were in between, or may have been; `state` is then that of the end.
    """

    state: ModelState
    begin: Timestamp
    end: Timestamp
    version: int | None = None
    next_version: int | None = None
    load_job_id: str | None = None
    position: int | None = None
    by: str | None = None
    cause: Cause | None = None
    is_waiting: bool = False
    degraded: bool = False
    error: str | None = None
    events: int = 0
    is_summary: bool = False


class MarkKind(StrEnum):
    """What a mark stands for."""

    SWAPPED = "swapped"
    FAILED = "failed"
    LOST = "lost"
    EXITED = "exited"


class Mark(Struct, frozen=True, gc=False):
    """A moment that stands out: another version serves, a load failed, the model was lost, a worker ended.

    Attributes:
        code: of the failure, or how the worker ended.
        count: of marks of its kind that are merged into it; the other members are those of the last.
    """

    kind: MarkKind
    at: Timestamp
    position: int
    version: int | None = None
    job_id: str | None = None
    by: str | None = None
    code: str | None = None
    count: int = 1


class ServerSegment(Struct, frozen=True, gc=False, rename=_RENAMED):
    """A time in which the server or a node ran, had ended, or may have been either.

    Attributes:
        position: of the event that began it, or, of an unknown end, of the event that found it.
        restarts: starts that are merged into it.
    """

    state: ServerState | NodeState
    begin: Timestamp
    end: Timestamp
    position: int | None = None
    restarts: int = 0


class NodeLane(Struct, frozen=True, gc=False):
    """One node over a range of time; its first segment begins where it joined, if that was not earlier."""

    node_id: str
    segments: tuple[ServerSegment, ...]


class LaneLoad(Struct, frozen=True, gc=False):
    """A load that took effect.

    Attributes:
        position: of its `ModelLoaded`.
        files: the first of its files, FILES_SHOWN at most.
    """

    job_id: str
    version: int
    loaded_at: Timestamp
    loaded_by: str
    position: int
    files: tuple[FileHash, ...]
    file_count: int


class Lane(Struct, frozen=True, gc=False):
    """One model over a range of time.

    Attributes:
        loads: the loads that its segments name, as far as they took effect.
    """

    model_id: str
    segments: tuple[Segment, ...]
    marks: tuple[Mark, ...]
    loads: tuple[LaneLoad, ...]


class LaneFold:
    """The fold of one model's events, and of those of the server, into a lane.

    Args:
        model_id: of the model.
        model: as it was where the fold begins; None if the ledger did not know it.
        jobs: its unended jobs there.
        begin: of the range of time.
    """

    def __init__(self, model_id: str, model: Model | None, jobs: Iterable[Job], begin: Timestamp) -> None:
        self._model_id = model_id
        self._segments = list[Segment]()
        self._marks = list[Mark]()
        self._loads = dict[str, Serving]()
        self._loaded_version: int | None = None
        self._is_after_server = False
        self._begin_at(model, jobs, begin)

    def _begin_at(self, model: Model | None, jobs: Iterable[Job], begin: Timestamp) -> None:
        self._entities = Entities([model] if model is not None else [], jobs)
        self._segment = self._segment_of(model, begin)
        self._note_load(model)

    def apply(self, event: Event) -> None:
        if is_of_server(event) and self._is_after_server:
            return  # nothing was loaded in between: a server that restarts in a loop costs one fold
        self._is_after_server = is_of_server(event)
        job = self._entities.jobs.get(event.job_id) if event.job_id is not None else None
        self._entities.apply(event)
        model = self._entities.models.get(self._model_id)
        job = job or (self._entities.jobs.get(event.job_id) if event.job_id is not None else None)
        after = self._segment_of(model, event.recorded_at, event, job)
        if not _is_same(self._segment, after):
            self._mark(after, event)
            self._close(event.recorded_at)
            self._segment = after
        if self._segment is not None and not _ends_processes(event):
            self._segment = replace(self._segment, events=self._segment.events + 1)
        self._note_load(model)

    def skip(self, events: int, begin: Timestamp, end: Timestamp, model: Model, jobs: Iterable[Job]) -> None:
        """Summarise events that were counted and not read, and go on from the model after them.

        Args:
            events: of the model in that time.
            begin: when the last event that was folded, or skipped, was recorded.
            end: when the last skipped event was recorded.
            model: after them.
            jobs: its unended jobs then.
        """
        self._close(begin)
        self._is_after_server = False
        self._begin_at(model, jobs, end)
        if self._segment is not None:
            summary = replace(self._segment, begin=begin, events=events, is_summary=True)
            self._segments.append(summary)

    def lane(self, begin: Timestamp, end: Timestamp, width_s: float) -> Lane:
        """Return the lane from `begin` to `end`, where nothing else happened; buckets are `width_s` wide."""
        self._close(end)
        inside = [
            replace(each, begin=max(each.begin, begin), end=min(each.end, end))
            for each in self._segments
            if each.end > begin and each.begin < end
        ]
        segments = [*merge_segments(inside[:-1], width_s), *inside[-1:]]  # the last is what is so at the end
        named = {each.load_job_id for each in segments if not each.is_summary}
        loads = [_lane_load(load) for job_id, load in self._loads.items() if job_id in named]
        marks = merge_marks([mark for mark in self._marks if begin <= mark.at <= end], width_s)
        return Lane(self._model_id, tuple(segments), tuple(marks), tuple(loads))

    def _segment_of(
        self, model: Model | None, at: Timestamp, event: Event | None = None, job: Job | None = None
    ) -> Segment | None:
        if model is None:
            return None
        serving, started = model.serving, model.started_load
        state = model.state
        waiting = model.loads[0] if model.loads and state in _NOT_LOADED else None
        is_loading = state is ModelState.LOADING and started is not None
        load_job_id = started.job_id if is_loading and started else serving.load_job_id if serving else None
        load_job_id = waiting.job_id if waiting is not None else load_job_id
        if job is None and event is None:
            job = self._entities.jobs.get(load_job_id or "")
        by = job.requested_by if job is not None else event.actor if event is not None else None
        has_error = model.error is not None and state in (ModelState.FAILED, ModelState.LOST)
        return Segment(
            state,
            at,
            at,
            version=started.version if is_loading and started else model.version,
            next_version=waiting.version if waiting is not None else model.next_version,
            load_job_id=load_job_id,
            position=event.position if event is not None else None,
            by=by if event is not None or serving is None else serving.loaded_by,
            cause=job.cause if job is not None else None,
            is_waiting=waiting is not None,
            degraded=model.degraded,
            error=model.error.code if has_error and model.error is not None else None,
        )

    def _close(self, end: Timestamp) -> None:
        """End the present segment; one that lasted no time is dropped."""
        if self._segment is not None and self._segment.begin < end:
            self._segments.append(replace(self._segment, end=end))

    def _mark(self, after: Segment | None, event: Event) -> None:
        """Mark the change to a segment where another version serves, or where the model is lost."""
        if after is None:
            return
        mark = Mark(
            MarkKind.LOST,
            event.recorded_at,
            event.position,
            after.version,
            event.job_id,
            after.by,
            after.error,
        )
        was_lost = self._segment is not None and self._segment.state is ModelState.LOST
        if after.state is ModelState.LOST and not was_lost:
            self._marks.append(replace(mark, code=SERVER_ENDED) if _ends_processes(event) else mark)
        if isinstance(event.data, ModelLoaded) and self._loaded_version not in (None, after.version):
            self._marks.append(replace(mark, kind=MarkKind.SWAPPED))

    def _note_load(self, model: Model | None) -> None:
        if model is None:
            return
        serving = model.serving or model.previous
        self._loaded_version = serving.version if serving is not None else None
        if serving is not None:
            self._loads[serving.load_job_id] = serving


def _lane_load(load: Serving) -> LaneLoad:
    files = tuple([FileHash(file.path, file.sha256) for file in load.files[:FILES_SHOWN]])
    return LaneLoad(
        load.load_job_id,
        load.version,
        load.loaded_at,
        load.loaded_by,
        load.position,
        files,
        len(load.files),
    )


def is_of_server(event: Event) -> bool:
    return type(event.data) in OF_SERVER


def _ends_processes(event: Event) -> bool:
    return type(event.data) in ENDS_OF_PROCESSES


def _is_same(one: Segment | None, other: Segment | None) -> bool:
    if one is None or other is None:
        return one is other
    return (
        one.state is other.state
        and one.version == other.version
        and one.next_version == other.next_version
        and one.load_job_id == other.load_job_id
        and one.is_waiting == other.is_waiting
        and one.degraded == other.degraded
    )


def merge_segments(segments: Sequence[Segment], width_s: float) -> list[Segment]:
    """Return adjoining segments with those shorter than `width_s` merged into summaries.

    A summary grows until it is that wide, or until a segment follows that is: so there are at most two
    segments for each bucket.
    """
    merged = list[Segment]()
    is_open = False  # whether the last one is short, and takes in what follows
    for segment in segments:
        is_short = seconds_between(segment.begin, segment.end) < width_s
        if is_short and is_open:
            last = merged[-1]
            events = last.events + segment.events
            merged[-1] = replace(
                segment, begin=last.begin, position=last.position, events=events, is_summary=True
            )
        else:
            merged.append(segment)
        is_open = is_short and seconds_between(merged[-1].begin, merged[-1].end) < width_s
    return merged


def merge_marks(marks: Iterable[Mark], width_s: float) -> list[Mark]:
    """Return marks with those of a kind that are nearer to one another than `width_s` merged, by position."""
    merged = list[Mark]()
    latest = dict[MarkKind, tuple[int, Timestamp]]()  # the index of the last of each kind, and when it began
    for mark in sorted(marks, key=lambda each: each.position):
        index, begin = latest.get(mark.kind, (-1, mark.at))
        if index >= 0 and seconds_between(begin, mark.at) < width_s:
            merged[index] = replace(mark, count=merged[index].count + 1)
        else:
            latest[mark.kind] = len(merged), mark.at
            merged.append(mark)
    return merged


def failure_mark(event: Event) -> Mark | None:
    """Return the mark of a failed load or of a worker's end; None for any other event."""
    match event.data:
        case LoadFailed(code=code):
            kind = MarkKind.FAILED
        case WorkerExited(signal=int(number)):
            kind, code = MarkKind.EXITED, f"signal {number}"
        case WorkerExited(exit_code=int(number)):
            kind, code = MarkKind.EXITED, f"exit code {number}"
        case WorkerExited():
            kind, code = MarkKind.EXITED, "fork server"
        case _:
            return None
    return Mark(kind, event.recorded_at, event.position, event.version, event.job_id, event.actor, code)


def server_segments(
    transitions: Iterable[Transition],
    before: ServerState | NodeState | None,
    begin: Timestamp,
    end: Timestamp,
    width_s: float,
) -> list[ServerSegment]:
    """Return the states of the server, or of a node, from `begin` to `end`.

    Args:
        transitions: its own in that time, in order.
        before: the state at `begin`; None of a node that had not joined yet.
        begin: of the range of time.
        end: of the range of time.
        width_s: of a bucket; shorter segments are merged.
    """
    found = list[ServerSegment]()
    now = ServerSegment(before, begin, begin) if before is not None else None
    for each in transitions:
        if now is not None and each.seen_at is not None:
            seen_at = min(max(each.seen_at, now.begin), each.at)
            found.append(replace(now, end=seen_at))
            now = ServerSegment(ServerState.UNKNOWN, seen_at, each.at, each.position)
        if now is not None:
            found.append(replace(now, end=each.at))
        is_start = each.state in (ServerState.RUNNING, NodeState.JOINED)
        now = ServerSegment(each.state, each.at, each.at, each.position, int(is_start))
    if now is not None:
        found.append(replace(now, end=max(end, now.begin)))
    clipped = (replace(each, begin=max(each.begin, begin), end=min(each.end, end)) for each in found)
    return _merge_server([each for each in clipped if each.begin < each.end], width_s)


def node_lanes(
    transitions: Sequence[Transition],
    before: Mapping[str, NodeState],
    begin: Timestamp,
    end: Timestamp,
    width_s: float,
) -> tuple[NodeLane, ...]:
    """Return the lanes of the nodes that were there, or may have been, at any time from `begin` to `end`.

    Args:
        transitions: in that time, in order.
        before: the nodes that had joined by `begin`, and their states.
        begin: of the range of time.
        end: of the range of time.
        width_s: of a bucket; shorter segments are merged.
    """
    ids = {each.node_id for each in transitions if each.node_id}
    ids |= {node_id for node_id, state in before.items() if state not in (NodeState.LEFT, NodeState.LOST)}
    lanes = []
    for node_id in sorted(ids):
        own = [each for each in transitions if each.node_id == node_id]
        segments = server_segments(own, before.get(node_id), begin, end, width_s)
        lanes.append(NodeLane(node_id, tuple(segments)))
    return tuple(lanes)


def _merge_server(segments: Iterable[ServerSegment], width_s: float) -> list[ServerSegment]:
    merged = list[ServerSegment]()
    for segment in segments:
        last = merged[-1] if merged else None
        if last is not None and (
            last.state is segment.state or seconds_between(last.begin, segment.end) < width_s
        ):
            worst = max(last.state, segment.state, key=_CONCERN.index)
            restarts = last.restarts + segment.restarts
            merged[-1] = replace(last, state=worst, end=segment.end, restarts=restarts)
        else:
            merged.append(segment)
    return merged


_CONCERN: tuple[str, ...] = (
    ServerState.RUNNING,
    NodeState.JOINED,
    NodeState.DRAINING,
    ServerState.STOPPED,
    NodeState.LEFT,
    NodeState.LOST,
    ServerState.UNKNOWN,
)
"""Of merged states the one that needs to be seen is shown."""
