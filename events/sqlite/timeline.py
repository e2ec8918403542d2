"""The timeline: lanes of models over a range of time, from the rows of their history.

A lane with few rows in the range has all of them. Of a busy one, which no screen shows apart, the rows at the
ends of some buckets are read; what changed within one of them is a summary. So an answer reads a limited
number of rows, however long the log is.
"""

from __future__ import annotations

import json
import sqlite3
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from msgspec import Struct
from msgspec.structs import replace

from events.clock import Timestamp, add_seconds, seconds_between
from events.codec import decode_event
from events.errors import LogUnavailable
from events.history import ModelRow, decode_row
from events.jobs import Job
from events.models import ModelState, Serving
from events.presence import SERVER
from events.sqlite import history
from events.sqlite.history import HistoryRow, latest_row
from events.sqlite.lanes import (
    Lane,
    Mark,
    MarkKind,
    NodeLane,
    Segment,
    ServerSegment,
    continues_segment,
    copy_lanes,
    failure_mark,
    lane_load,
    lost_mark,
    make_mark,
    make_segment,
    merge_marks,
    merge_segments,
    node_lanes,
    server_segments,
)
from events.sqlite.queries import read_head, read_job, recorded_at
from events.sqlite.timetravel import InvalidMoment, liveness_at, read_load
from events.types import SYSTEM, Event, LoadFailed, ModelLoaded, WorkerExited

ROWS = 2_500
"""Rows of history that the lanes of one answer have at most, in equal shares: 0.03 s.

Each of the 25 lanes that the console shows at once has 100.
"""

MARKS = 2_000
"""Failures and ends of workers in one answer at most, the newest: 0.02 s."""


@dataclass(frozen=True, slots=True)
class TimelineQuery:
    """A query for a page of lanes.

    Attributes:
        now: the present time.
        begin: of the range, a position or a timestamp; None for the first event.
        end: of the range; None for the present.
        find: only models whose id contains this text, in capitals or not.
        cursor: only models after this id.
        limit: lanes at most.
        is_active: only models that had events in the range, or were loaded or to be loaded where it begins.
        resolution: buckets of the range; what is shorter than one is merged.
    """

    now: Timestamp
    begin: int | str | None = None
    end: int | str | None = None
    find: str = ""
    cursor: str = ""
    limit: int = 50
    is_active: bool = False
    resolution: int = 600


class Timeline(Struct, frozen=True, omit_defaults=True, rename={"begin": "from", "end": "to"}):
    """A page of lanes, by model id.

    Attributes:
        begin: of the range.
        end: of the range.
        as_of: the position that the answer reflects.
        known_from: when the first event was recorded; None if there is none.
        lanes: of the models that the ledger knew by the end of the range.
        server: the states of the server in the range; with nodes, it runs while any is there.
        marks_from: since when failures are complete; None if they are all there.
        next_cursor: the `cursor` of the next page; None on the last one.
        models: how many models the query matches, on all pages.
        nodes: that were there in the range, by name; left out without any.
    """

    begin: Timestamp
    end: Timestamp
    as_of: int
    known_from: Timestamp | None
    lanes: list[Lane]
    server: list[ServerSegment]
    marks_from: Timestamp | None
    next_cursor: str | None
    models: int
    nodes: tuple[NodeLane, ...] = ()


@dataclass(frozen=True, slots=True)
class _Range:
    """The range of an answer, as each lane needs it.

    Attributes:
        first: the last position before the beginning.
        last: the last position of the range.
        begin: from when on something is shown: not before the first event.
        end: of the range.
        width_s: of a bucket; what is shorter is merged.
        share: rows that each lane has at most.
        buckets: of busy lanes: the last position and the time of the ends of each, from the beginning.
    """

    first: int
    last: int
    begin: Timestamp
    end: Timestamp
    width_s: float
    share: int
    buckets: list[tuple[int, Timestamp]]


def read_timeline(connection: sqlite3.Connection, query: TimelineQuery) -> Timeline:
    """Return a page of lanes.

    Raises:
        InvalidMoment: `invalid_parameter`, the range ends before it begins.
        LogUnavailable: `log_unavailable`, what is stored is damaged.
    """
    try:
        return _read_timeline(connection, query)
    except ValueError as error:  # stored content may be damaged
        raise LogUnavailable(f"the ledger cannot be read: {error}; run `loadledger verify`") from error


def _read_timeline(connection: sqlite3.Connection, query: TimelineQuery) -> Timeline:
    head = read_head(connection)
    row = connection.execute("SELECT recorded_at FROM events ORDER BY position LIMIT 1").fetchone()
    known_from = row[0] if row is not None else None
    begin = _time_of(connection, query.begin) or known_from or query.now
    end = _time_of(connection, query.end) or max(query.now, head.recorded_at)
    if query.begin is None or query.end is None:
        end = max(end, add_seconds(begin, 1))  # a ledger of one moment
    if end <= begin:
        raise InvalidMoment(f"the range ends at {end}, before it begins, at {begin}")
    first, last = _last_position(connection, "<", begin), _last_position(connection, "<=", end)
    ids, has_more, models = _read_ids(connection, query, first, last)
    shown_from, share = min(end, max(begin, known_from or begin)), max(1, ROWS // max(1, len(ids)))
    buckets = _divide(connection, first, shown_from, end, min(share, query.resolution))
    width_s = seconds_between(begin, end) / query.resolution
    shown = _Range(first, last, shown_from, end, width_s, share, buckets)
    failures, marks_from = _read_failures(connection, shown)
    server, nodes = _read_presence(connection, shown, begin)
    return Timeline(
        begin=begin,
        end=end,
        as_of=head.position,
        known_from=known_from,
        lanes=[_LaneReader(connection, shown, model_id).read(failures[model_id]) for model_id in ids],
        server=server,
        marks_from=marks_from,
        next_cursor=ids[-1] if has_more else None,
        models=models,
        nodes=nodes,
    )


def _divide(
    connection: sqlite3.Connection, first: int, begin: Timestamp, end: Timestamp, parts: int
) -> list[tuple[int, Timestamp]]:
    """Return the last position and the time of each end of equal parts of a range, from its beginning."""
    part_s = seconds_between(begin, end) / parts
    times = [*(add_seconds(begin, part_s * number) for number in range(1, parts)), end]
    return [(first, begin), *((_last_position(connection, "<=", time), time) for time in times)]


def _read_presence(
    connection: sqlite3.Connection, shown: _Range, begin: Timestamp
) -> tuple[list[ServerSegment], tuple[NodeLane, ...]]:
    """Return the states of the server and of the nodes in the range; an end may be discovered after it."""
    first = _last_position(connection, "<=", begin)
    before = liveness_at(connection, first, begin)
    _, following = history.presence_around(connection, shown.last)
    transitions = [
        *history.transitions_between(connection, first, shown.last),
        *(each for each in following.values() if each.seen_at is not None and each.seen_at < shown.end),
    ]
    of_server = [each for each in transitions if each.node_id == SERVER]
    known = {node.id: node.state for node in before.nodes}
    width = shown.begin, shown.end, shown.width_s
    return server_segments(of_server, before.state, *width), node_lanes(transitions, known, *width)


def _time_of(connection: sqlite3.Connection, moment: int | str | None) -> Timestamp | None:
    """Return the timestamp of a moment; None for position 0."""
    return recorded_at(connection, moment) or None if isinstance(moment, int) else moment


def _last_position(connection: sqlite3.Connection, sign: str, time: Timestamp) -> int:
    """Return the last position before a time (`<`), or until it (`<=`); 0 without one."""
    row = connection.execute(
        f"SELECT position FROM events WHERE recorded_at {sign} ?"  # noqa: S608 - a literal
        " ORDER BY recorded_at DESC, position DESC LIMIT 1",
        (time,),
    ).fetchone()
    return 0 if row is None else int(row[0])


def _read_ids(
    connection: sqlite3.Connection, query: TimelineQuery, first: int, last: int
) -> tuple[list[str], bool, int]:
    """Return the ids of a page, whether there is another page, and the number of models on all of them."""
    where = "instr(lower(id), lower(:find)) > 0" + (f" AND ({_IS_ACTIVE})" if query.is_active else "")
    given = {"find": query.find, "first": first, "last": last}
    found = connection.execute(
        f"SELECT id FROM models WHERE {where} AND id > :cursor ORDER BY id LIMIT :limit",  # noqa: S608 - literals
        {**given, "cursor": query.cursor, "limit": query.limit + 1},
    ).fetchall()
    (models,) = connection.execute(
        f"SELECT count(*) FROM models WHERE {where}",  # noqa: S608 - literals
        given,
    ).fetchone()
    return [model_id for (model_id,) in found[: query.limit]], len(found) > query.limit, int(models)


_IS_ACTIVE = (
    "EXISTS (SELECT 1 FROM events INDEXED BY events_by_model WHERE model_id = models.id"  # noqa: S608 - literals
    "  AND position > :first AND position <= :last)"
    " OR (SELECT coalesce(json_extract(body, '$.workers'), json_extract(body, '$.job')) FROM model_history"
    f"  WHERE position = {latest_row('models.id', ':first')} AND model_id = models.id) IS NOT NULL"
)
"""Whether a model had events in the range, or was loaded or to be loaded where it begins."""


def _decode(body: bytes) -> Event:
    try:
        return decode_event(body)
    except Exception as error:  # a forged body may raise anything
        raise LogUnavailable(f"the ledger is damaged: {error!r}; run `loadledger verify`") from error


def _read_failures(
    connection: sqlite3.Connection, shown: _Range
) -> tuple[defaultdict[str, list[Mark]], Timestamp | None]:
    """Return the newest failures in the range, by model, and since when they are all that there were."""
    rows = connection.execute(
        "SELECT position, CAST(body AS BLOB) FROM events WHERE type IN (?, ?)"
        " AND position > ? AND position <= ? ORDER BY position DESC LIMIT ?",
        (LoadFailed.TYPE, WorkerExited.TYPE, shown.first, shown.last, MARKS + 1),
    ).fetchall()
    events = [_decode(body) for _, body in rows]
    marks = defaultdict[str, list[Mark]](list)
    for event in events[:MARKS]:
        if event.model_id is not None and (mark := failure_mark(event)) is not None:
            marks[event.model_id].append(mark)
    return marks, events[MARKS - 1].recorded_at if len(events) > MARKS else None


_Start = tuple[int, Segment]
"""A segment whose end is not known yet, and the position after which its events are counted."""


@dataclass(slots=True)
class _LaneReader:
    """Reads one lane in one transaction."""

    connection: sqlite3.Connection
    shown: _Range
    model_id: str
    _loads: dict[int, Serving] = field(default_factory=dict)
    _jobs: dict[str, Job | None] = field(default_factory=dict)
    _steps: list[tuple[Segment, ModelRow]] = field(default_factory=list)

    def read(self, failures: Sequence[Mark]) -> Lane:
        shown = self.shown
        rows = history.rows_between(
            self.connection, self.model_id, shown.first, shown.last, limit=shown.share
        )
        starts, marks = self._list_starts(rows) if rows is not None else (self._sample_starts(), [])
        found = self._close(starts)
        segments = [
            *merge_segments(found[:-1], shown.width_s),
            *found[-1:],
        ]  # the last is what is so at the end
        copies = copy_lanes(self._steps, self._find_job_of_load, shown.end, shown.width_s)
        drawn = [*segments, *(segment for lane in copies for segment in lane.segments)]
        named = {segment.load_job_id for segment in drawn if not segment.is_summary}
        return Lane(
            self.model_id,
            tuple(segments),
            tuple(merge_marks([*marks, *failures], shown.width_s)),
            tuple([lane_load(load) for load in self._loads.values() if load.load_job_id in named]),
            copies,
        )

    def _list_starts(self, rows: Sequence[HistoryRow]) -> tuple[list[_Start], list[Mark]]:
        """Return the beginnings of a lane's segments, and the marks of its changes."""
        starts, marks, before = list[_Start](), list[Mark](), None
        [found] = history.rows_at(self.connection, self.model_id, [self.shown.first])
        if found is not None:
            before = decode_row(found.body)
            starts.append((self.shown.first, self._known_segment(before, self.shown.begin)))
            self._steps.append((starts[-1][1], before))
        for each in rows:
            row, event = decode_row(each.body), _decode(each.event or b"")
            segment = self._begun_segment(row, event)
            self._steps.append((segment, row))
            if row.state is ModelState.LOST and (before is None or before.state is not ModelState.LOST):
                marks.append(lost_mark(event, segment))
            if isinstance(event.data, ModelLoaded) and self._serves_another(before, row):
                marks.append(make_mark(MarkKind.SWAPPED, event, segment))
            if not starts or not continues_segment(starts[-1][1], segment):
                starts.append((each.position - 1, segment))
            before = row
        return starts, marks

    def _sample_starts(self) -> list[_Start]:
        """Return the beginnings of a busy lane's segments: a summary for each bucket in which it changed."""
        shown, starts, was_summary = self.shown, list[_Start](), True
        rows = history.rows_at(self.connection, self.model_id, [position for position, _ in shown.buckets])
        for (bucket, before), (_, after) in pairwise(zip(shown.buckets, rows, strict=True)):
            low, begin = bucket
            if after is None:
                continue
            row = decode_row(after.body)
            is_summary = before is None or before.position != after.position
            if is_summary:
                self._steps.append((replace(make_segment(row, begin), is_summary=True), row))
            elif was_summary:
                position = after.position if after.position > shown.first else None
                self._steps.append((self._known_segment(row, begin, position), row))
            if is_summary or was_summary:
                starts.append((low, self._steps[-1][0]))
            was_summary = is_summary
        if was_summary and (last := rows[-1]) is not None:
            row, event = decode_row(last.body), self._read_event(last.position)
            starts.append((last.position - 1, self._begun_segment(row, event)))
            self._steps.append((starts[-1][1], row))
        return starts

    def _close(self, starts: Sequence[_Start]) -> list[Segment]:
        """Return segments that follow one another to the end of the range, but those that last no time."""
        if not starts:
            return []  # the ledger did not know the model by the end of the range
        lows = [*(low for low, _ in starts), self.shown.last]
        ends = [*(segment.begin for _, segment in starts[1:]), self.shown.end]
        counts = _count_events(self.connection, self.model_id, list(pairwise(lows)))
        return [
            replace(segment, end=end, events=count)
            for (_, segment), end, count in zip(starts, ends, counts, strict=True)
            if segment.begin < end
        ]

    def _begun_segment(self, row: ModelRow, event: Event) -> Segment:
        """Return the segment that an event begins."""
        job = self._find_job(event.job_id)
        is_own = job is not None and not (job.ended and job.position < event.position)
        return make_segment(
            row,
            event.recorded_at,
            position=event.position,
            load=self._read_load(row),
            by=job.requested_by if job is not None and is_own else event.actor,
            cause=job.cause if job is not None and is_own else None,
        )

    def _known_segment(self, row: ModelRow, begin: Timestamp, position: int | None = None) -> Segment:
        """Return a segment of which the event that began it is not read: `by` as far as the row tells it."""
        load = self._read_load(row)
        job = self._find_job(row.job)
        by, cause = None, None
        if job is not None:
            by, cause = job.requested_by, job.cause
        elif row.state is ModelState.LOST or row.degraded:
            by = SYSTEM
        elif row.state is ModelState.LOADED and load is not None:
            by = load.loaded_by
        return make_segment(row, begin, position=position, load=load, by=by, cause=cause)

    def _serves_another(self, before: ModelRow | None, row: ModelRow) -> bool:
        """Whether another version served before."""
        if before is None or before.load is None:
            return False
        return self._find_load(before.load).version != row.version

    def _read_load(self, row: ModelRow) -> Serving | None:
        """Return the load that serves."""
        return None if row.serving_load is None else self._find_load(row.serving_load)

    def _find_load(self, position: int) -> Serving:
        if position not in self._loads:
            self._loads[position] = read_load(self.connection, self.model_id, position)
        return self._loads[position]

    def _find_job_of_load(self, position: int) -> str:
        return self._find_load(position).load_job_id

    def _find_job(self, job_id: str | None) -> Job | None:
        if job_id is None:
            return None
        if job_id not in self._jobs:
            self._jobs[job_id] = read_job(self.connection, job_id)
        return self._jobs[job_id]

    def _read_event(self, position: int) -> Event:
        (body,) = self.connection.execute(
            "SELECT CAST(body AS BLOB) FROM events WHERE position = ?", (position,)
        ).fetchone()
        return _decode(body)


def _count_events(
    connection: sqlite3.Connection, model_id: str, spans: Sequence[tuple[int, int]]
) -> list[int]:
    """Return how many events of a model there are in each span of positions, from the index alone."""
    found = connection.execute(
        "SELECT (SELECT count(*) FROM events INDEXED BY events_by_model WHERE model_id = :model_id"
        "  AND position > json_extract(span.value, '$[0]') AND position <= json_extract(span.value, '$[1]'))"
        " FROM json_each(:spans) AS span ORDER BY span.key",
        {"model_id": model_id, "spans": json.dumps(spans)},
    ).fetchall()
    return [count for (count,) in found]
