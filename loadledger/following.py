"""The ledger's events as they happen, over every loss of the connection: none twice, and none left out."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass
from http import HTTPStatus

from loadledger import answers
from loadledger.address import query
from loadledger.asking import Setting, passes, pause_s
from loadledger.exchange import Request
from loadledger.lines import Lines, Place, message
from loadledger.listing import EventPage, Listing, Pairs, pages
from loadledger.problems import BadAnswer, ClientProblem
from loadledger.records import Event
from loadledger.waiting import Away

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
            raise answers.refusal(answer, setting.address)
        if answer.headers.get("content-type", "").partition(";")[0].strip().lower() != LINES:
            raise BadAnswer(f"{setting.address.url} answers no stream of events: is this its URL?")
        track.reached, track.told = True, False
        lines = Lines()
        while chunk := await stream.read():
            for event in track.news(lines.feed(chunk)):
                yield event
