"""Lanes of the timeline: one model over a range of time, as segments and marks. Pure: it reads no ledger.

A lane is made of the rows of the model's history (`events.history`). What is shorter than a bucket of the
timeline is merged into summaries: a lane has at most two segments for each bucket.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum

from msgspec import Struct
from msgspec.structs import replace

from events.clock import Timestamp, seconds_between
from events.history import ModelRow
from events.models import ModelState, Serving
from events.presence import PRESENT, NodeState, ServerState, Transition
from events.types import (
    ENDS_OF_PROCESSES,
    Cause,
    Event,
    FileHash,
    LoadFailed,
    WorkerExited,
)

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
        by: who asked for what began it: the actor of its job, else of its event; None if that was not read.
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


class CopyLane(Struct, frozen=True, gc=False):
    """A model at one node over a range of time: `unloaded` while it has no copy there."""

    node_id: str
    segments: tuple[Segment, ...]


class Lane(Struct, frozen=True, gc=False, omit_defaults=True):
    """One model over a range of time.

    Attributes:
        loads: the loads that its segments name, as far as they took effect.
        copies: the nodes where it served, by name; left out if it had no copies.
    """

    model_id: str
    segments: tuple[Segment, ...]
    marks: tuple[Mark, ...]
    loads: tuple[LaneLoad, ...]
    copies: tuple[CopyLane, ...] = ()


def make_segment(
    row: ModelRow,
    begin: Timestamp,
    *,
    position: int | None = None,
    load: Serving | None = None,
    by: str | None = None,
    cause: Cause | None = None,
) -> Segment:
    """Return the segment that begins with a row; its end is not known yet.

    Args:
        row: of the model's history.
        begin: of the segment.
        position: of the event that begins it.
        load: the one that serves.
        by: who asked for what begins it.
        cause: of the job that begins it.
    """
    is_loading = row.state is ModelState.LOADING and row.job is not None
    pending = row.job if is_loading or row.is_waiting else None
    error = row.error if row.state in (ModelState.FAILED, ModelState.LOST) else None
    return Segment(
        row.state,
        begin,
        begin,
        version=row.next if is_loading else row.version,
        next_version=row.next if row.is_waiting else row.next_version,
        load_job_id=pending or (load.load_job_id if load is not None else None),
        position=position,
        by=by,
        cause=cause,
        is_waiting=row.is_waiting,
        degraded=row.degraded,
        error=error.code if error is not None else None,
    )


def continues_segment(segment: Segment, later: Segment) -> bool:
    """Whether a later segment would be drawn as the one before it: what else differs is not drawn."""
    return (
        segment.state is later.state
        and segment.version == later.version
        and segment.next_version == later.next_version
        and segment.load_job_id == later.load_job_id
        and segment.is_waiting == later.is_waiting
        and segment.degraded == later.degraded
    )


def copy_lanes(
    steps: Sequence[tuple[Segment, ModelRow]], find_job: Callable[[int], str], end: Timestamp, width_s: float
) -> tuple[CopyLane, ...]:
    """Return the lanes of the nodes at which a model served; none if it had no copies.

    Args:
        steps: rows of the model's history, with the segments that they begin.
        find_job: returns the id of the job of the load with a position.
        end: of the range of time.
        width_s: of a bucket; shorter segments are merged.
    """
    if not any(row.copies for _, row in steps):
        return ()
    ids = sorted({each.node for _, row in steps for each in row.servings if each.node is not None})
    found = ((node_id, _copy_segments(node_id, steps, find_job, end)) for node_id in ids)
    return tuple([CopyLane(node_id, tuple(merge_segments(each, width_s))) for node_id, each in found])


def _copy_segments(
    node_id: str, steps: Sequence[tuple[Segment, ModelRow]], find_job: Callable[[int], str], end: Timestamp
) -> list[Segment]:
    """Return the segments of a model at one node, but those that last no time."""
    found, before = list[Segment](), None
    ends = [*(step.begin for step, _ in steps[1:]), end]
    for (step, row), until in zip(steps, ends, strict=True):
        own = next((each for each in row.servings if each.node == node_id), None)
        state = ModelState.UNLOADED if own is None else row.state
        now = state, own and own.load, own and own.degraded, step.is_summary
        if now == before:
            found[-1] = replace(found[-1], end=until)
            continue
        is_read, before = step.position is not None, now
        segment = Segment(
            state,
            step.begin,
            until,
            version=own.version if own is not None else None,
            load_job_id=find_job(own.load) if own is not None and not step.is_summary else None,
            position=step.position,
            by=step.by if is_read else None,
            cause=step.cause if is_read else None,
            degraded=own is not None and own.degraded,
            is_summary=step.is_summary,
        )
        found.append(segment)
    return [each for each in found if each.begin < each.end]


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


def lost_mark(event: Event, segment: Segment) -> Mark:
    """Return the mark of a model that was lost with an event, which began a segment."""
    code = SERVER_ENDED if type(event.data) in ENDS_OF_PROCESSES else segment.error
    return make_mark(MarkKind.LOST, event, segment, code)


def make_mark(kind: MarkKind, event: Event, segment: Segment, code: str | None = None) -> Mark:
    return Mark(kind, event.recorded_at, event.position, segment.version, event.job_id, segment.by, code)


def lane_load(load: Serving) -> LaneLoad:
    files = tuple([FileHash(file.path, file.sha256) for file in load.files[:FILES_SHOWN]])
    return LaneLoad(
        load.load_job_id, load.version, load.loaded_at, load.loaded_by, load.position, files, len(load.files)
    )


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
    return sorted(merged, key=lambda each: each.position)


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
        transitions: its own after `begin`, in order, and the next one, which may say that nobody was seen.
        before: the state at `begin`; None of a node that had not joined yet.
        begin: of the range of time.
        end: of the range of time.
        width_s: of a bucket; shorter segments are merged.
    """
    found = list[ServerSegment]()
    now = ServerSegment(before, begin, begin) if before is not None else None
    for each in transitions:
        at = each.at or begin
        if now is not None and now.state in PRESENT and each.seen_at is not None:
            seen_at = min(max(each.seen_at, now.begin), at)
            found.append(replace(now, end=seen_at))
            now = ServerSegment(ServerState.UNKNOWN, seen_at, at, each.position)
        if now is not None:
            found.append(replace(now, end=at))
        is_start = each.state in (ServerState.RUNNING, NodeState.JOINED)
        now = ServerSegment(each.state, at, at, each.position, int(is_start)) if each.state else None
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

    `before` has the nodes that had joined by `begin`; the other arguments are those of `server_segments`.
    """
    ids = {each.node_id for each in transitions if each.node_id and each.state is not None}
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
