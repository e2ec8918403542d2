"""The timeline: lanes of models over a range of time, within half a second, however long the log is.

Snapshots are the anchors. Between two of them a lane's events are counted in an index; they are read and
folded if they are few, and summarised if they are many or if no bucket would show them apart. Only the ends
of the range, where no snapshot is, are always folded: at most as many events as are between two snapshots.

Each statement's rows are fetched at once, and lanes are read in several short transactions: events never
change, and all that is read is up to one position.
"""

from __future__ import annotations

import json
import sqlite3
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from heapq import merge
from itertools import pairwise
from operator import attrgetter

from msgspec import Struct
from msgspec.structs import replace

from events.clock import Timestamp, add_seconds, seconds_between
from events.codec import decode_event
from events.errors import LogUnavailable
from events.jobs import Job
from events.models import Model
from events.sqlite import snapshots
from events.sqlite.lanes import (
    Lane,
    LaneFold,
    Mark,
    NodeLane,
    ServerSegment,
    failure_mark,
    is_of_server,
    merge_marks,
    node_lanes,
    server_segments,
)
from events.sqlite.liveness import (
    Liveness,
    Transition,
    find_server_event,
    list_transitions,
    liveness_at,
    read_base_nodes,
    read_node_events,
)
from events.sqlite.queries import as_job, as_model, read_base, read_head
from events.sqlite.readonly import ReaderThread
from events.sqlite.timetravel import InvalidMoment, state_at
from events.types import ENDS_OF_PROCESSES, Event, LoadFailed, WorkerExited

FOLDED = 4_000
"""Events that the lanes of one answer may fold beside those at the ends of the range: 0.15 s."""

ANCHORED = 4_000
"""Snapshots of models that one answer may read: 0.1 s; more snapshots in the range are skipped over."""

MARKED = 3_000
"""Failures and ends of workers that one answer may read, the newest: 0.05 s."""

LANES_AT_ONCE = 10
"""Lanes of one transaction, so that others come between, and a client that leaves ends the work."""


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
        is_active: only models that were loaded, or had events, in the range or shortly before it.
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
        oldest: the position of the oldest event that is not archived.
        known_from: when the first event was recorded that is not archived; None if there is none.
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
    oldest: int
    known_from: Timestamp | None
    lanes: list[Lane]
    server: list[ServerSegment]
    marks_from: Timestamp | None
    next_cursor: str | None
    models: int
    nodes: tuple[NodeLane, ...] = ()


@dataclass(frozen=True, slots=True)
class _Frame:
    """What all lanes have in common.

    Attributes:
        anchors: positions and times of the snapshots that are used, the first at or before `first`, and at
            last the last event of the range.
        first: the last position at or before the beginning.
        server: the starts and ends of servers and nodes from the first anchor on.
        transitions: that concern the range, of the server and of nodes.
        liveness: at the beginning.
    """

    begin: Timestamp
    end: Timestamp
    width_s: float
    as_of: int
    base: int
    known_from: Timestamp | None
    first: int
    anchors: list[tuple[int, Timestamp]]
    server: list[Event]
    transitions: list[Transition]
    liveness: Liveness
    ids: list[str]
    has_more: bool
    models: int

    def server_between(self, low: int, high: int) -> list[Event]:
        """Return the starts and ends of servers and nodes after a position, up to another."""
        position = attrgetter("position")
        begin, end = (bisect_right(self.server, each, key=position) for each in (low, high))
        return self.server[begin:end]


class TimelineReader:
    """Reads pages of lanes in a reader's thread; raises LogUnavailable where the file cannot be read."""

    def __init__(self, thread: ReaderThread) -> None:
        self._thread = thread

    async def page(self, query: TimelineQuery) -> Timeline:
        """Return a page of lanes.

        Raises:
            InvalidMoment: `invalid_parameter`, the range ends before it begins.
            LogUnavailable: `log_unavailable`.
        """
        frame = await self._thread.run(lambda connection: _read_frame(connection, query))
        marks, marks_from = await self._thread.run(lambda connection: _read_failures(connection, frame))
        budget = FOLDED
        lanes = list[Lane]()
        known = max(frame.begin, frame.known_from or frame.begin), frame.end, frame.width_s
        for start in range(0, len(frame.ids), LANES_AT_ONCE):
            share = budget // (len(frame.ids) - start)
            ids = frame.ids[start : start + LANES_AT_ONCE]
            read, spent = await self._thread.run(partial(_read_lanes, frame=frame, ids=ids, share=share))
            budget = max(0, budget - spent)
            lanes.extend(_with_marks(lane, marks[lane.model_id], frame.width_s) for lane in read)
        return Timeline(
            begin=frame.begin,
            end=frame.end,
            as_of=frame.as_of,
            oldest=frame.base + 1,
            known_from=frame.known_from,
            lanes=lanes,
            server=server_segments(
                [each for each in frame.transitions if not each.node_id], frame.liveness.state, *known
            ),
            marks_from=marks_from,
            next_cursor=frame.ids[-1] if frame.has_more else None,
            models=frame.models,
            nodes=node_lanes(
                frame.transitions, {node.id: node.state for node in frame.liveness.nodes}, *known
            ),
        )


def _with_marks(lane: Lane, marks: list[Mark], width_s: float) -> Lane:
    return replace(lane, marks=tuple(merge_marks([*lane.marks, *marks], width_s))) if marks else lane


def _read_frame(connection: sqlite3.Connection, query: TimelineQuery) -> _Frame:
    base, head = read_base(connection).position, read_head(connection)
    row = connection.execute("SELECT recorded_at FROM events ORDER BY position LIMIT 1").fetchone()
    known_from = row[0] if row is not None else None
    begin = _time_of(connection, query.begin) or known_from or query.now
    end = _time_of(connection, query.end) or max(query.now, head.recorded_at)
    if query.begin is None or query.end is None:
        end = max(end, add_seconds(begin, 1))  # a ledger of one moment
    if end <= begin:
        raise InvalidMoment(f"the range ends at {end}, before it begins, at {begin}")
    first = _last_position_by(connection, begin, base)
    last = _last_position_by(connection, end, base)
    low = snapshots.latest(connection, first) or base
    ids, has_more, models = _read_ids(connection, query, low, last)
    between = [
        position
        for (position,) in connection.execute(
            "SELECT position FROM snapshots WHERE position > ? AND position < ? ORDER BY position",
            (low, last),
        ).fetchall()
    ]
    positions = [low, *_thin(between, ANCHORED // max(1, len(ids))), last]
    server = _read_server_events(connection, low, last)
    events = [*read_node_events(connection), *(each for each in server if is_of_server(each))]
    if found := find_server_event(connection, last, after=True):
        events.append(found)
    transitions = list_transitions(read_base_nodes(connection), sorted(events, key=attrgetter("position")))
    return _Frame(
        begin=begin,
        end=end,
        width_s=seconds_between(begin, end) / query.resolution,
        as_of=head.position,
        base=base,
        known_from=known_from,
        first=first,
        anchors=[(each, _recorded_at(connection, each) or known_from or begin) for each in positions],
        server=server,
        transitions=[each for each in transitions if first < each.position and _concerns(each, last, end)],
        liveness=liveness_at(connection, first, begin, is_live=True),
        ids=ids,
        has_more=has_more,
        models=models,
    )


def _concerns(transition: Transition, last: int, end: Timestamp) -> bool:
    """Whether a transition is by the last position, or says that before the end nobody was seen any more."""
    return transition.position <= last or (transition.seen_at is not None and transition.seen_at < end)


def _time_of(connection: sqlite3.Connection, moment: int | str | None) -> Timestamp | None:
    """Return the timestamp of a moment; None for the first position of the log, or what is archived."""
    return _recorded_at(connection, moment) if isinstance(moment, int) else moment


def _recorded_at(connection: sqlite3.Connection, position: int) -> Timestamp | None:
    row = connection.execute("SELECT recorded_at FROM events WHERE position = ?", (position,)).fetchone()
    return None if row is None else str(row[0])


def _last_position_by(connection: sqlite3.Connection, time: Timestamp, base: int) -> int:
    row = connection.execute(
        "SELECT position FROM events WHERE recorded_at <= ? ORDER BY recorded_at DESC, position DESC LIMIT 1",
        (time,),
    ).fetchone()
    return base if row is None else int(row[0])


def _thin(positions: list[int], limit: int) -> list[int]:
    """Return at most so many of the positions, evenly, the first and the last of them included."""
    if len(positions) <= limit:
        return positions
    step = (len(positions) - 1) / max(1, limit - 1)
    return sorted({positions[round(number * step)] for number in range(limit)})


def _read_ids(
    connection: sqlite3.Connection, query: TimelineQuery, low: int, last: int
) -> tuple[list[str], bool, int]:
    """Return the ids of a page, whether there is another page, and the number of models on all of them."""
    where = "instr(lower(id), lower(:find)) > 0" + (f" AND ({_IS_ACTIVE})" if query.is_active else "")
    given = {"find": query.find, "low": low, "last": last}
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
    "EXISTS (SELECT 1 FROM events INDEXED BY events_by_model WHERE model_id = models.id"
    "  AND position > :low AND position <= :last)"
    " OR (SELECT json_extract(copy.body, '$.serving') FROM model_snapshots AS copy"
    "  WHERE copy.model_id = models.id AND copy.position <= :low ORDER BY copy.position DESC LIMIT 1)"
    "  IS NOT NULL"
)
"""Whether a model had events since the snapshot before the range, or a load in that snapshot."""


def _read_server_events(connection: sqlite3.Connection, low: int, last: int) -> list[Event]:
    kinds = ", ".join(f"'{kind.TYPE}'" for kind in ENDS_OF_PROCESSES)
    found = connection.execute(
        "SELECT CAST(body AS BLOB) FROM events"  # noqa: S608 - literals
        f" WHERE type IN ({kinds}) AND position > ? AND position <= ?",
        (low, last),
    ).fetchall()
    return sorted(_decoded(found), key=attrgetter("position"))


def _decoded(rows: Sequence[tuple[bytes]]) -> list[Event]:
    try:
        return [decode_event(body) for (body,) in rows]
    except Exception as error:  # a forged body may raise anything
        raise LogUnavailable(f"the ledger is damaged: {error!r}; run `loadledger verify`") from error


def _read_failures(
    connection: sqlite3.Connection, frame: _Frame
) -> tuple[defaultdict[str, list[Mark]], Timestamp | None]:
    """Return the newest failures in the range, by model, and since when they are all that there were."""
    rows = connection.execute(
        "SELECT position, CAST(body AS BLOB) FROM events WHERE type IN (?, ?)"
        " AND position > ? AND position <= ? ORDER BY position DESC LIMIT ?",
        (LoadFailed.TYPE, WorkerExited.TYPE, frame.first, frame.anchors[-1][0], MARKED + 1),
    ).fetchall()
    events = _decoded([(body,) for _, body in rows])
    marks = defaultdict[str, list[Mark]](list)
    for event in events[:MARKED]:
        if event.model_id is not None and (mark := failure_mark(event)) is not None:
            marks[event.model_id].append(mark)
    return marks, events[MARKED - 1].recorded_at if len(events) > MARKED else None


def _read_lanes(
    connection: sqlite3.Connection, *, frame: _Frame, ids: Sequence[str], share: int
) -> tuple[list[Lane], int]:
    """Return the lanes of some models, and how many events they folded beyond the ends of the range."""
    reader = _LaneReader(connection, frame)
    return [reader.read(model_id, share) for model_id in ids], reader.spent


@dataclass(frozen=True, slots=True)
class _Gap:
    """The events of a lane between two anchors."""

    low: tuple[int, Timestamp]
    high: tuple[int, Timestamp]
    events: int
    server: list[Event]


@dataclass(slots=True)
class _LaneReader:
    """Reads lanes in one transaction.

    Attributes:
        spent: events that were folded within a share.
    """

    connection: sqlite3.Connection
    frame: _Frame
    spent: int = 0
    _jobs: dict[int, dict[str, list[Job]]] = field(default_factory=dict)

    def read(self, model_id: str, share: int) -> Lane:
        """Return a lane that folds so many events at most, beside those at the ends of the range."""
        frame = self.frame
        gaps = self._gaps(model_id)
        exact = self._choose(gaps, share)
        low, since = frame.anchors[0]
        fold = LaneFold(model_id, *self._at(model_id, low), since)
        for number, gap in enumerate(gaps):
            if number in exact:
                for event in self._events(model_id, gap):
                    fold.apply(event)
                continue
            model, jobs = self._at(model_id, gap.high[0], with_jobs=number + 1 in exact)
            if model is not None:
                fold.skip(gap.events, gap.low[1], gap.high[1], model, jobs)
        return fold.lane(frame.begin, frame.end, frame.width_s)

    def _gaps(self, model_id: str) -> list[_Gap]:
        """Return the gaps between anchors, with the number of the lane's events in each."""
        frame = self.frame
        spans = list(pairwise(frame.anchors))
        counts = _count_events(self.connection, model_id, [(low[0], high[0]) for low, high in spans])
        return [
            _Gap(low, high, count, frame.server_between(low[0], high[0]))
            for (low, high), count in zip(spans, counts, strict=True)
        ]

    def _choose(self, gaps: Sequence[_Gap], share: int) -> set[int]:
        """Return which gaps are folded: those at the ends, those without events, then the smallest."""
        frame = self.frame
        exact = {len(gaps) - 1, *(number for number, gap in enumerate(gaps) if gap.events == 0)}
        if frame.first > frame.anchors[0][0]:
            exact.add(0)
        for number, gap in sorted(enumerate(gaps), key=lambda each: each[1].events):
            is_seen = seconds_between(gap.low[1], gap.high[1]) >= frame.width_s
            if number not in exact and is_seen:
                if gap.events > share:
                    break
                share -= gap.events
                self.spent += gap.events
                exact.add(number)
        return exact

    def _events(self, model_id: str, gap: _Gap) -> Iterator[Event]:
        """Yield the events of a lane in a gap, with those of the server, in order."""
        if gap.events == 0:
            return iter(gap.server)
        rows = self.connection.execute(
            "SELECT CAST(body AS BLOB) FROM events WHERE model_id = ? AND position > ? AND position <= ?"
            " ORDER BY position",
            (model_id, gap.low[0], gap.high[0]),
        ).fetchall()
        return merge(_decoded(rows), gap.server, key=attrgetter("position"))

    def _at(self, model_id: str, position: int, *, with_jobs: bool = True) -> tuple[Model | None, list[Job]]:
        """Return the model at a snapshot, and its unended jobs there, which a fold from there needs."""
        row = self.connection.execute(
            "SELECT body FROM model_snapshots WHERE model_id = ? AND position <= ?"
            " ORDER BY position DESC LIMIT 1",
            (model_id, position),
        ).fetchone()
        try:
            jobs = self._jobs_at(model_id, position) if with_jobs else []
            return (as_model(row[0]) if row is not None else None), jobs
        except (TypeError, ValueError):  # damaged; the log has all that it has
            state = state_at(self.connection, position)
            return state.models.get(model_id), state.unended(model_id)

    def _jobs_at(self, model_id: str, position: int) -> list[Job]:
        """Return the unended jobs of a model at a snapshot, whose jobs are read once."""
        if position not in self._jobs:
            by_model = defaultdict[str, list[Job]](list)
            for (body,) in list(snapshots.jobs_of(self.connection, position)):
                by_model[(job := as_job(body)).model_id].append(job)
            self._jobs[position] = by_model
        return self._jobs[position].get(model_id, [])


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
