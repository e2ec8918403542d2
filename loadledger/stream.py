"""Lists page by page, and the event stream: JSON lines over one connection after another.

A followed stream has each event once and none missing, even across lost connections.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import msgspec

from answers.events import EventInfo
from answers.jobs import JobList
from answers.models import ModelList
from answers.records import RecordFileList, RecordList
from loadledger.address import query
from loadledger.errors import BadAnswer, ClientProblem
from loadledger.jobs import AwayCallback
from loadledger.requests import (
    CallContext,
    Request,
    back_off_s,
    decode_refusal,
    fetch_with_retries,
    foreign_answer,
    get_request,
    is_transient,
)

MAX_LINE_BYTES = 16 * 2**20
"""Longest line of an event; it bounds memory."""
_NOT_JSON = (msgspec.MsgspecError, ValueError, RecursionError)
EVENTS_PER_REQUEST = 500
Pairs = list[tuple[str, str]]
EVENTS = "/api/v1/events"
LINES = "application/x-ndjson"
LASTING_S = 5.0
"""A connection that lasted so long counts as a success, so the back-off starts again."""


class LineSplitter:
    """Splits chunks into lines.

    Args:
        most: limit of a line, in bytes.
    """

    def __init__(self, most: int = MAX_LINE_BYTES) -> None:
        self._most = most
        self._rest = bytearray()

    def feed(self, chunk: bytes) -> list[bytes]:
        """Return the lines that a chunk completes; the rest waits for the next chunk.

        Raises:
            BadAnswer: a line is too long.
        """
        end = chunk.rfind(b"\n")
        if end < 0:
            self._rest += chunk
            self._check(len(self._rest))
            return []
        lines = bytes(self._rest + chunk[:end]).split(b"\n")
        self._rest = bytearray(chunk[end + 1 :])
        self._check(max(map(len, lines)))
        return lines

    def _check(self, length: int) -> None:
        if length > self._most:
            raise BadAnswer(f"the server does not send a stream of events: a line has {length} bytes or more")


def parse_line(line: bytes) -> EventInfo | int | None:
    """Parse a line of a stream: an event, a bookmark's position, or None for other notices.

    A bookmark carries the position that a filtered stream has reached without an event.

    Raises:
        BadAnswer: the line is none of these.
    """
    if not line.strip():
        return None
    try:
        notice = msgspec.json.decode(line, type=_Notice)
    except _NOT_JSON:
        raise _no_event(line) from None
    if notice.stream is None:
        return parse_event(line)
    return notice.position if notice.stream == "bookmark" else None


def parse_event(line: bytes) -> EventInfo:
    """Parse an event.

    Raises:
        BadAnswer: the line is no event.
    """
    try:
        return EventInfo.read(line)
    except _NOT_JSON:
        raise _no_event(line) from None


class _Notice(msgspec.Struct):
    stream: str | None = None
    position: int | None = None


def _no_event(line: bytes) -> BadAnswer:
    return BadAnswer(f"the server sent a line of {len(line)} bytes that is no event: is this its URL?")


class EventPage(msgspec.Struct):
    """A page of events; each keeps its exact text."""

    events: list[msgspec.Raw]
    as_of: int
    next_cursor: int | None = None

    @property
    def values(self) -> list[EventInfo]:
        return [parse_event(bytes(text)) for text in self.events]


@dataclass(frozen=True, slots=True)
class Listing:
    """One list of the server.

    Attributes:
        target: its path.
        pairs: query parameters.
        cursor: name of the query parameter for the next page.
        most: limit of the number of items.
    """

    target: str
    page: type[JobList | ModelList | EventPage | RecordList | RecordFileList]
    pairs: Pairs
    cursor: str = "cursor"
    most: int | None = None


async def iterate_list(context: CallContext, listing: Listing) -> AsyncGenerator[Any, None]:
    async for values, _ in fetch_pages(context, listing):
        for value in values:
            yield value


async def fetch_pages(
    context: CallContext, listing: Listing
) -> AsyncGenerator[tuple[Sequence[Any], int], None]:
    """Yield the items of each page, and the position that the page reflects."""
    pairs, cursor, left, reached = listing.pairs, None, listing.most, False
    while True:
        size = EVENTS_PER_REQUEST if left is None else min(EVENTS_PER_REQUEST, left)
        cursor_pair: Pairs = [] if cursor is None else [(listing.cursor, str(cursor))]
        others = [pair for pair in pairs if not cursor_pair or pair[0] != listing.cursor]
        request = get_request(listing.target, [*others, *cursor_pair, ("limit", str(size))])
        page: Any = await fetch_with_retries(context, request, listing.page, reached=reached)
        values = page.values[:left]
        yield values, int(page.as_of)
        left = None if left is None else left - len(values)
        if page.next_cursor is None or left == 0:
            return
        if page.next_cursor == cursor:
            raise BadAnswer(
                f"{context.address.url} repeats the same page of {listing.target}: is this its URL?"
            )
        cursor, reached = page.next_cursor, True
        # A time is replaced by its position: later pages have to reflect the same moment.
        pairs = [(name, str(page.as_of) if name == "at" else text) for name, text in pairs]


def repeated_parameter(name: str, values: Iterable[str]) -> Pairs:
    """Return a repeated query parameter.

    Raises:
        TypeError: `values` is one string instead of several.
    """
    if isinstance(values, str):
        raise TypeError(f"{name} takes several strings, such as ({values[:40]!r},), not one")
    return [(name, value) for value in values]


def present_parameters(**values: object) -> Pairs:
    return [(name, str(value)) for name, value in values.items() if value is not None]


@dataclass(frozen=True, slots=True)
class EventSelection:
    """The events to list or follow.

    Attributes:
        filters: query parameters that filter; without any, positions have no gaps.
        after: only events above this position.
        moments: the query parameters `since` and `until`.
        on_away: called once each time the server becomes unreachable.
    """

    filters: Pairs
    after: int | None = None
    moments: Sequence[tuple[str, str]] = ()
    on_away: AwayCallback | None = None


def event_listing(selection: EventSelection) -> Listing:
    after = [] if selection.after is None else [("after", str(selection.after))]
    return Listing(EVENTS, EventPage, [*selection.filters, *selection.moments, *after], cursor="after")


async def follow_events(context: CallContext, selection: EventSelection) -> AsyncGenerator[EventInfo, None]:
    """Yield events as they are appended, without end: after a position, or from now on."""
    after = selection.after
    if selection.moments:
        async for events, as_of in fetch_pages(context, event_listing(selection)):
            for event in events:
                yield event
            after = as_of
    progress = StreamProgress(position=after, whole=not selection.filters)
    failures = 0
    while True:
        opened_at, position, problem = context.now(), progress.position, None
        try:
            async with aclosing(_stream(context, selection, progress)) as new_events:
                async for event in new_events:
                    yield event
        except ClientProblem as trouble:
            if not is_transient(trouble, reached=progress.reached):
                raise
            problem = trouble
        if problem is not None and selection.on_away is not None and not progress.reported:
            selection.on_away(problem)
            progress.reported = True
        lasted = context.now() - opened_at >= LASTING_S or progress.position != position
        failures = 1 if lasted else failures + 1
        await context.transport.pause(back_off_s(problem, failures, context.chance()))


@dataclass(slots=True, kw_only=True)
class StreamProgress:
    """Progress of a stream across connections.

    Attributes:
        position: the position of the last event or bookmark; None before the first.
        whole: whether no filter applies, so that no event may be missing.
        reached: whether the server has answered before.
        reported: whether the caller knows that the server is unreachable.
    """

    position: int | None
    whole: bool
    reached: bool = False
    reported: bool = False

    def new_events(self, lines: Sequence[bytes]) -> list[EventInfo]:
        """Return the new events among lines.

        Raises:
            BadAnswer: an event is missing, or a line is neither event nor notice.
        """
        found = []
        for said in map(parse_line, lines):
            if isinstance(said, EventInfo) and self._is_new(said):
                found.append(said)
            elif isinstance(said, int) and (self.position is None or not self.whole):
                self.position = max(said, self.position or 0)  # without a filter only events move it
        return found

    def _is_new(self, event: EventInfo) -> bool:
        if self.position is not None and event.position <= self.position:
            return False
        if self.whole and self.position is not None and event.position != self.position + 1:
            raise BadAnswer(
                f"after position {self.position} the server sent {event.position}: events are missing"
            )
        self.position = event.position
        return True


async def _stream(
    context: CallContext, selection: EventSelection, progress: StreamProgress
) -> AsyncGenerator[EventInfo, None]:
    after = [] if progress.position is None else [("after", str(progress.position))]
    request = Request("GET", f"{EVENTS}/stream{query([*selection.filters, *after])}", {"Accept": LINES})
    stream = await context.transport.open(request)
    with closing(stream):
        answer = stream.answer
        if answer.status != HTTPStatus.OK:
            raise decode_refusal(answer, context.address)
        if answer.headers.get("content-type", "").partition(";")[0].strip().lower() != LINES:
            raise foreign_answer(answer, context.address)
        progress.reached, progress.reported = True, False
        lines = LineSplitter()
        while chunk := await stream.read():
            for event in progress.new_events(lines.feed(chunk)):
                yield event
