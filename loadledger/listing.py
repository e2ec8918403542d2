"""Lists that come in pages: they are asked for one after the other, and given as one."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from loadledger.asking import Setting, get, patiently
from loadledger.lines import event
from loadledger.problems import BadAnswer
from loadledger.records import Event, Job, Model

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
