"""The ledger's events as they happen, over every loss of the connection: none twice, and none left out.

The lines of a stream of events: cut out of what arrives, and what each says.

Lists that come in pages: they are asked for one after the other, and given as one.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import msgspec

from loadledger import requests
from loadledger.address import query
from loadledger.jobs import Away
from loadledger.problems import BadAnswer, ClientProblem
from loadledger.records import Event, Job, Model
from loadledger.requests import Request, Setting, get, passes, patiently, pause_s

MAX_LINE_BYTES = 16 * 2**20
"""Of an event; what is longer is none."""


class Lines:
    """Cuts lines out of chunks, wherever those end.

    Args:
        most: bytes that a line may have.
    """

    def __init__(self, most: int = MAX_LINE_BYTES) -> None:
        self._most = most
        self._rest = bytearray()

    def feed(self, chunk: bytes) -> list[bytes]:
        """Return the lines that a chunk completes, without their ends; what is left waits for the next.

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
            raise BadAnswer(
                f"what the server sends is no stream of events: a line has {length} bytes or more"
            )


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stream is, though no event of it has that position."""

    position: int


def message(line: bytes) -> Event | Place | None:
    """Return what a line of a stream says; None if it is nothing that matters here.

    Raises:
        BadAnswer: it is no line of such a stream.
    """
    if not line.strip():
        return None
    try:
        notice = msgspec.json.decode(line, type=_Notice)
    except _NOT_JSON:
        raise _no_event(line) from None
    if notice.stream is None:
        return event(line)
    if notice.stream == "bookmark" and notice.position is not None:
        return Place(notice.position)
    return None


def event(line: bytes) -> Event:
    """Return the event that a line is.

    Raises:
        BadAnswer: it is none.
    """
    try:
        return Event.read(line)
    except _NOT_JSON:
        raise _no_event(line) from None


class _Notice(msgspec.Struct):
    stream: str | None = None
    position: int | None = None


_NOT_JSON = (msgspec.MsgspecError, ValueError, RecursionError)


def _no_event(line: bytes) -> BadAnswer:
    return BadAnswer(f"the server sent a line of {len(line)} bytes that is no event")


PAGE = 500

Pairs = list[tuple[str, str]]


class JobPage(msgspec.Struct):
    """Some jobs."""

    jobs: list[Job]
    as_of: int = 0
    next_cursor: int | None = None

    def values(self) -> Sequence[Job]:
        """Return them."""
        return self.jobs


class ModelPage(msgspec.Struct):
    """Some models."""

    models: list[Model]
    as_of: int = 0
    next_cursor: str | None = None

    def values(self) -> Sequence[Model]:
        """Return them."""
        return self.models


class EventPage(msgspec.Struct):
    """Some events, the text of each as it is."""

    events: list[msgspec.Raw]
    as_of: int
    next_cursor: int | None = None

    def values(self) -> Sequence[Event]:
        """Return them."""
        return [event(bytes(text)) for text in self.events]


@dataclass(frozen=True, slots=True)
class Listing:
    """Which list.

    Attributes:
        target: where it is.
        page: what a page of it is.
        pairs: what is asked for.
        cursor: the name of the parameter that says where to go on.
        most: no more than this.
    """

    target: str
    page: type[JobPage | ModelPage | EventPage]
    pairs: Pairs
    cursor: str = "cursor"
    most: int | None = None


async def listed(setting: Setting, listing: Listing) -> AsyncGenerator[Any, None]:
    """Yield the values of a list."""
    async for values, _ in pages(setting, listing):
        for value in values:
            yield value


async def pages(setting: Setting, listing: Listing) -> AsyncGenerator[tuple[Sequence[Any], int], None]:
    """Yield the pages of a list: the values of each, and the position that it reflects."""
    pairs, cursor, left, reached = listing.pairs, None, listing.most, False
    while True:
        size = PAGE if left is None else min(PAGE, left)
        place: Pairs = [] if cursor is None else [(listing.cursor, str(cursor))]
        others = [pair for pair in pairs if not place or pair[0] != listing.cursor]
        request = get(listing.target, [*others, *place, ("limit", str(size))])
        page: Any = await patiently(setting, request, listing.page, reached=reached)
        values = page.values()[:left]
        yield values, int(page.as_of)
        left = None if left is None else left - len(values)
        if page.next_cursor is None or left == 0:
            return
        if page.next_cursor == cursor:
            raise BadAnswer(f"{setting.address.url} gives the same page of {listing.target} again and again")
        cursor, reached = page.next_cursor, True
        pairs = _as_of(pairs, page.as_of)


def several(name: str, values: Iterable[str]) -> Pairs:
    """Return a parameter that may be repeated.

    Raises:
        TypeError: it is one text, whose letters are not meant.
    """
    if isinstance(values, str):
        raise TypeError(f"{name} takes several texts, such as ({values[:40]!r},), not one")
    return [(name, value) for value in values]


def optional(**values: object) -> Pairs:
    """Return the parameters that have a value."""
    return [(name, str(value)) for name, value in values.items() if value is not None]


def _as_of(pairs: Pairs, position: int) -> Pairs:
    """Go through the pages of a time by its position: the time itself may come to mean another one."""
    return [(name, str(position) if name == "at" else text) for name, text in pairs]


EVENTS = "/api/v1/events"
LINES = "application/x-ndjson"
LASTING_S = 5.0
"""A connection that lasts so long was a good one, whatever came over it."""


@dataclass(frozen=True, slots=True)
class Wish:
    """Which events.

    Attributes:
        filters: parameters that choose; without any, events have every position.
        after: only those above this position.
        moments: parameters that are places of a list.
        on_away: told once whenever the server cannot be followed.
    """

    filters: Pairs
    after: int | None = None
    moments: Sequence[tuple[str, str]] = ()
    on_away: Away | None = None


def listing_of(wish: Wish) -> Listing:
    """Return the list of the events that there are."""
    after = [] if wish.after is None else [("after", str(wish.after))]
    return Listing(EVENTS, EventPage, [*wish.filters, *wish.moments, *after], cursor="after")


async def followed_events(setting: Setting, wish: Wish) -> AsyncGenerator[Event, None]:
    """Yield events as they happen, for ever: after the wish's position, or from now on."""
    after = wish.after
    if wish.moments:
        async for events, as_of in pages(setting, listing_of(wish)):
            for event in events:
                yield event
            after = as_of
    track = Track(after, whole=not wish.filters)
    failures = 0
    while True:
        opened_at, position, problem = setting.now(), track.position, None
        try:
            async with aclosing(_stream(setting, wish, track)) as news:
                async for event in news:
                    yield event
        except ClientProblem as trouble:
            if not passes(trouble, reached=track.reached):
                raise
            problem = trouble
        if problem is not None and wish.on_away is not None and not track.told:
            wish.on_away(problem)
            track.told = True
        lasted = setting.now() - opened_at >= LASTING_S or track.position != position
        failures = 1 if lasted else failures + 1
        await setting.transport.pause(pause_s(problem, failures, setting.chance()))


class Track:
    """How far a stream has come.

    Attributes:
        position: of the last event or bookmark; None as long as none was seen.
        whole: whether every event is asked for, so that none may be missing.
        reached: whether the server has ever answered.
        told: whether somebody knows that it is away.
    """

    def __init__(self, position: int | None, *, whole: bool) -> None:
        self.position = position
        self.whole = whole
        self.reached = False
        self.told = False

    def news(self, lines: Sequence[bytes]) -> list[Event]:
        """Return the events among lines that were not seen yet.

        Raises:
            BadAnswer: an event is missing, or a line is none.
        """
        found = []
        for said in map(message, lines):
            if isinstance(said, Event) and self._is_new(said):
                found.append(said)
            elif isinstance(said, Place):
                self._move(said.position)
        return found

    def _move(self, position: int) -> None:
        """Go on to a bookmark; where all events are asked for, only an event leads on."""
        if self.position is None or (not self.whole and position > self.position):
            self.position = position

    def _is_new(self, event: Event) -> bool:
        if self.position is not None and event.position <= self.position:
            return False
        if self.whole and self.position is not None and event.position != self.position + 1:
            raise BadAnswer(
                f"after position {self.position} the server sent {event.position}: what is between is missing"
            )
        self.position = event.position
        return True


async def _stream(setting: Setting, wish: Wish, track: Track) -> AsyncGenerator[Event, None]:
    """Yield what one connection tells, to its end."""
    after = [] if track.position is None else [("after", str(track.position))]
    request = Request("GET", f"{EVENTS}/stream{query([*wish.filters, *after])}", {"Accept": LINES})
    stream = await setting.transport.open(request)
    with closing(stream):
        answer = stream.answer
        if answer.status != HTTPStatus.OK:
            raise requests.refusal(answer, setting.address)
        if answer.headers.get("content-type", "").partition(";")[0].strip().lower() != LINES:
            raise BadAnswer(f"{setting.address.url} answers no stream of events: is this its URL?")
        track.reached, track.told = True, False
        lines = Lines()
        while chunk := await stream.read():
            for event in track.news(lines.feed(chunk)):
                yield event
