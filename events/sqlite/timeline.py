"""The timeline: lanes of models over a range of time, from the rows of their history.

A lane has all rows of its model in the range, as segments of one state and as marks. For a range with more
rows than one answer holds, the answer has only their number.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from answers.timeline import CopyLane, Lane, Mark, MarkKind, Segment, ServerSegment, Timeline
from events.clock import Timestamp, add_seconds
from events.codec import decode_event
from events.errors import LogUnavailable
from events.history import ModelRow, decode_row
from events.jobs import Job
from events.models import ModelState
from events.presence import PRESENT, SERVER, ServerState, Transition
from events.serving import Serving
from events.sqlite import history
from events.sqlite.queries import read_head, read_job, recorded_at
from events.sqlite.timetravel import InvalidMoment, liveness_at, read_load
from events.types import ENDS_OF_PROCESSES, SYSTEM, Cause, Event, LoadFailed, ModelLoaded, WorkerExited
from features.facts import SharingState

MAX_ROWS = 2_500
"""Rows of one answer, which the console draws at once: 100 for each of its 25 lanes, 0.05 s to read.

A lane of 1,000 pixels cannot show more of them apart.
"""

SERVER_ENDED = "server_ended"
"""The code for the loss of a model whose server ended."""


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
    """

    now: Timestamp
    begin: int | str | None = None
    end: int | str | None = None
    find: str = ""
    cursor: str = ""
    limit: int = 50


@dataclass(frozen=True, slots=True)
class _Range:
    """The range of an answer, as used for each lane.

    Attributes:
        first: the last position before the beginning.
        last: the last position of the range.
        begin: the first time that is shown: not before the first event.
        end: of the range.
    """

    first: int
    last: int
    begin: Timestamp
    end: Timestamp


def read_timeline(connection: sqlite3.Connection, query: TimelineQuery) -> Timeline:
    """Return a page of lanes.

    Raises:
        InvalidMoment: `invalid_parameter`, the range ends before it begins.
        LogUnavailable: `log_unavailable`, the stored data is damaged.
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
        end = max(end, add_seconds(begin, 1))  # for a ledger of one moment
    if end <= begin:
        raise InvalidMoment(f"the range ends at {end}, before it begins, at {begin}")
    first, last = _last_position(connection, "<", begin), _last_position(connection, "<=", end)
    shown = _Range(first, last, min(end, max(begin, known_from or begin)), end)
    ids, has_more = _read_ids(connection, query, shown)
    rows = history.count_rows(connection, ids, first, last)
    page = Timeline(
        begin=begin,
        end=end,
        as_of=head.position,
        known_from=known_from,
        rows=rows,
        max_rows=MAX_ROWS,
        lanes=[],
        server=(),
        next_cursor=ids[-1] if has_more else None,
    )
    if rows > MAX_ROWS:
        return page
    server, servers = _read_presence(connection, shown)
    lanes = [_LaneReader(connection, shown, model_id).read() for model_id in ids]
    return page.with_lanes(lanes, server, servers)


def _time_of(connection: sqlite3.Connection, moment: int | str | None) -> Timestamp | None:
    """Return the timestamp of a moment; None for the first position of the log."""
    return recorded_at(connection, moment) or None if isinstance(moment, int) else moment


def _last_position(connection: sqlite3.Connection, sign: str, time: Timestamp) -> int:
    """Return the last position before a time (`<`), or up to it (`<=`)."""
    row = connection.execute(
        f"SELECT position FROM events WHERE recorded_at {sign} ?"  # noqa: S608 - a literal
        " ORDER BY recorded_at DESC, position DESC LIMIT 1",
        (time,),
    ).fetchone()
    return 0 if row is None else int(row[0])


def _read_ids(connection: sqlite3.Connection, query: TimelineQuery, shown: _Range) -> tuple[list[str], bool]:
    """Return the ids of a page, and whether there is another page."""
    found = connection.execute(
        "SELECT id FROM models WHERE instr(lower(id), lower(:find)) > 0 AND id > :cursor"  # noqa: S608 - literals
        f" AND ({_IS_ACTIVE}) ORDER BY id LIMIT :limit",
        {
            "find": query.find,
            "cursor": query.cursor,
            "first": shown.first,
            "last": shown.last,
            "limit": query.limit + 1,
        },
    ).fetchall()
    return [model_id for (model_id,) in found[: query.limit]], len(found) > query.limit


_IS_ACTIVE = (
    "EXISTS (SELECT 1 FROM events INDEXED BY events_by_model WHERE model_id = models.id"  # noqa: S608 - literals
    "  AND position > :first AND position <= :last)"
    " OR (SELECT coalesce(json_extract(body, '$.workers'), json_extract(body, '$.job')) FROM model_history"
    f"  WHERE position = {history.latest_row('models.id', ':first')} AND model_id = models.id) IS NOT NULL"
)
"""Whether a model had events in the range, or was loaded or loading at its beginning."""


def _read_presence(
    connection: sqlite3.Connection, shown: _Range
) -> tuple[tuple[ServerSegment, ...], dict[str, tuple[ServerSegment, ...]]]:
    """Return the states of the server and of several in the range; an end may be discovered after it.

    One of several is listed if it was there, or may have been, at any time of the range.
    """
    before = liveness_at(connection, shown.first, shown.begin)
    _, following = history.presence_around(connection, shown.last)
    transitions = [
        *history.transitions_between(connection, shown.first, shown.last),
        *(each for each in following.values() if each.seen_at is not None and each.seen_at < shown.end),
    ]
    known = {each.id: each.state for each in before.servers}
    ids = {each.server for each in transitions if each.server != SERVER and each.state is not None}
    ids |= {name for name, state in known.items() if state in (*PRESENT, SharingState.UNKNOWN)}

    def segments(name: str, state: ServerState | SharingState | None) -> tuple[ServerSegment, ...]:
        own = (each for each in transitions if each.server == name)
        return server_segments(own, state, shown.begin, shown.end)

    return segments(SERVER, before.state), {name: segments(name, known.get(name)) for name in sorted(ids)}


def server_segments(
    transitions: Iterable[Transition],
    before: ServerState | SharingState | None,
    begin: Timestamp,
    end: Timestamp,
) -> tuple[ServerSegment, ...]:
    """Return the states of a server from `begin` to `end`.

    Args:
        transitions: its own after `begin`, in order, and the next one, which may say that nobody was seen.
        before: the state at `begin`; None of one that had not joined yet.
        begin: of the range of time.
        end: of the range of time.
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
        now = ServerSegment(each.state, at, at, each.position) if each.state else None
    if now is not None:
        found.append(replace(now, end=max(end, now.begin)))
    clipped = [replace(each, begin=max(each.begin, begin), end=min(each.end, end)) for each in found]
    return tuple([each for each in clipped if each.begin < each.end])


@dataclass(slots=True)
class _LaneReader:
    """Reads one lane in one transaction."""

    connection: sqlite3.Connection
    shown: _Range
    model_id: str
    _loads: dict[int, Serving] = field(default_factory=dict)
    _jobs: dict[str, Job | None] = field(default_factory=dict)

    def read(self) -> Lane:
        steps, marks = list[tuple[Segment, ModelRow]](), list[Mark]()
        row = history.row_at(self.connection, self.model_id, self.shown.first)
        if row is not None:
            steps.append((self._first_segment(row), row))
        for body, event_body in history.rows_between(
            self.connection, self.model_id, self.shown.first, self.shown.last
        ):
            before, event = row, _decode(event_body)
            if body is not None:
                row = decode_row(body)
                segment = self._begun_segment(row, event)
                steps.append((segment, row))
                marks += self._mark_change(before, row, event, segment)
            if event.model_id == self.model_id:
                marks += _mark_failure(event)
        segments = _close([segment for segment, _ in steps], self.shown.end)
        return Lane(self.model_id, segments, tuple(marks), self._read_copies(steps))

    def _begun_segment(self, row: ModelRow, event: Event) -> Segment:
        """Return the segment that an event begins."""
        job = self._find_job(event.job_id)
        if job is None or (job.ended and job.position < event.position):
            return self._make_segment(row, event.recorded_at, event.position, event.actor, None)
        return self._make_segment(row, event.recorded_at, event.position, job.requested_by, job.cause)

    def _first_segment(self, row: ModelRow) -> Segment:
        """Return the segment begun by an event before the range, with `by` as far as the row tells it."""
        by, cause = None, None
        if (job := self._find_job(row.job)) is not None:
            by, cause = job.requested_by, job.cause
        elif row.state is ModelState.LOST or row.degraded:
            by = SYSTEM
        elif row.state is ModelState.LOADED and row.serving_load is not None:
            by = self._find_load(row.serving_load).loaded_by
        return self._make_segment(row, self.shown.begin, None, by, cause)

    def _make_segment(
        self, row: ModelRow, begin: Timestamp, position: int | None, by: str | None, cause: Cause | None
    ) -> Segment:
        """Return the segment that begins with a row; its end is still open."""
        is_loading = row.state is ModelState.LOADING and row.job is not None
        job_id = row.job if is_loading or row.is_waiting else None
        if job_id is None and row.serving_load is not None:
            job_id = self._find_load(row.serving_load).load_job_id
        error = row.error if row.state in (ModelState.FAILED, ModelState.LOST) else None
        return Segment(
            row.state,
            begin,
            begin,
            version=row.next if is_loading else row.version,
            next_version=row.next if row.is_waiting else row.next_version,
            load_job_id=job_id,
            position=position,
            by=by,
            cause=cause,
            is_waiting=row.is_waiting,
            degraded=row.degraded,
            error=error.code if error is not None else None,
        )

    def _mark_change(
        self, before: ModelRow | None, row: ModelRow, event: Event, segment: Segment
    ) -> Iterable[Mark]:
        """Yield the mark of a loss or a swap."""
        is_lost = row.state is ModelState.LOST and (before is None or before.state is not ModelState.LOST)
        if is_lost:
            code = SERVER_ENDED if type(event.data) in ENDS_OF_PROCESSES else segment.error
            yield _make_mark(MarkKind.LOST, event, segment.version, segment.by, code)
        if not isinstance(event.data, ModelLoaded) or before is None or before.load is None:
            return
        if self._find_load(before.load).version != row.version:
            yield _make_mark(MarkKind.SWAPPED, event, segment.version, segment.by, None)

    def _read_copies(self, steps: Sequence[tuple[Segment, ModelRow]]) -> tuple[CopyLane, ...]:
        """Return the lanes of the servers at which a model served; none if it was never at several."""
        if not any(len(row.servings) > 1 for _, row in steps):
            return ()
        names = sorted({each.server for _, row in steps for each in row.servings if each.server is not None})
        parts = ([self._copy_segment(name, *step) for step in steps] for name in names)
        lanes = zip(names, parts, strict=True)
        return tuple([CopyLane(name, _close(segments, self.shown.end)) for name, segments in lanes])

    def _copy_segment(self, server: str, step: Segment, row: ModelRow) -> Segment:
        """Return the segment of a server that begins with one of the model."""
        own = next((each for each in row.servings if each.server == server), None)
        begun = Segment(ModelState.UNLOADED, step.begin, step.begin, position=step.position)
        if step.position is not None:
            begun = replace(begun, by=step.by, cause=step.cause)
        if own is None:
            return begun
        job_id = self._find_load(own.load).load_job_id
        return replace(begun, state=row.state, version=own.version, load_job_id=job_id, degraded=own.degraded)

    def _find_load(self, position: int) -> Serving:
        if position not in self._loads:
            self._loads[position] = read_load(self.connection, self.model_id, position)
        return self._loads[position]

    def _find_job(self, job_id: str | None) -> Job | None:
        if job_id is None:
            return None
        if job_id not in self._jobs:
            self._jobs[job_id] = read_job(self.connection, job_id)
        return self._jobs[job_id]


def _close(starts: Iterable[Segment], end: Timestamp) -> tuple[Segment, ...]:
    """Return consecutive segments with their ends, without those of no duration."""
    found = list[Segment]()
    for segment in starts:
        if not found or found[-1].drawn != segment.drawn:
            found.append(segment)
    times = [*(each.begin for each in found), end]
    pairs = zip(found, times[1:], strict=True)
    return tuple([replace(segment, end=until) for segment, until in pairs if segment.begin < until])


def _make_mark(kind: MarkKind, event: Event, version: int | None, by: str | None, code: str | None) -> Mark:
    return Mark(kind, event.recorded_at, event.position, version, event.job_id, by, code)


def _mark_failure(event: Event) -> Iterable[Mark]:
    """Yield the mark of a failed load or of a worker's end; no mark for other events."""
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
            return
    yield _make_mark(kind, event, event.version, event.actor, code)


def _decode(body: bytes) -> Event:
    try:
        return decode_event(body)
    except Exception as error:  # a forged body may raise anything
        raise LogUnavailable(f"the ledger is damaged: {error!r}; run `loadledger verify`") from error
