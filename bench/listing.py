"""Pages of a long log: how long a list of events takes, whatever is asked for, and wherever it begins."""

import asyncio
import random
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from statistics import median
from typing import NamedTuple

from bench import stories
from bench.table import Row
from events.clock import add_seconds
from events.log import encode_drafts
from events.sqlite.queries import Head
from events.sqlite.reader import EVERYTHING, EventFilter, EventQuery, Reader, open_reader
from events.sqlite.schema import connect
from events.types import AccessDenied, Draft

PLACES = 20
"""Pages of each list that are asked for: the first, the newest, and others that begin anywhere."""
GOAL_MS = 100.0
"""Of the median: the worst of twenty on shared cores says more of what else they do."""
GROUP = 1024
DENIED = AccessDenied("POST /api/v1/models/{id}/load", 1)
ALICE, MALLORY, FIRST = "alice@example.org", "mallory@example.org", "carol@example.org"


class Case(NamedTuple):
    """What is asked for: values of columns, and of the time perhaps no more than a half."""

    what: str
    wanted: EventFilter = EVERYTHING
    since: bool = False
    until: bool = False


CASES = (
    Case("everything"),
    Case("a type, 1 of 18", EventFilter(types=("LoadStarted",))),
    Case("a type, 1 of 60,000", EventFilter(types=("ServerStarted",))),
    Case("a model, 1 of 300", EventFilter(models=("model-007",))),
    Case("an actor, 2 of 3", EventFilter(actors=(MALLORY,))),
    Case("an actor of the first event alone", EventFilter(actors=(FIRST,))),
    Case("an actor of no event", EventFilter(actors=("nobody",))),
    Case("a job of no event", EventFilter(jobs=("nothing",))),
    Case("16 models", EventFilter(models=tuple(f"model-{number:03}" for number in range(16)))),
    Case("since a time", since=True),
    Case("until a time", until=True),
    Case("a model, since a time", EventFilter(models=("model-007",)), since=True),
    Case("an actor of the first event alone, since a time", EventFilter(actors=(FIRST,)), since=True),
    Case("a type, until a time", EventFilter(types=("LoadFailed",)), until=True),
    Case("a type and a model", EventFilter(types=("LoadFailed",), models=("model-007",))),
    Case("a type and an actor that meet", EventFilter(types=("LoadRequested",), actors=(ALICE,))),
    Case("a type and an actor that never meet", EventFilter(types=("LoadStarted",), actors=(MALLORY,))),
    Case("a model and an actor that never meet", EventFilter(models=("model-007",), actors=(MALLORY,))),
    Case(
        "two types, a model and an actor, since a time",
        EventFilter(("LoadRequested", "UnloadRequested"), ("model-007",), (), (ALICE,)),
        since=True,
    ),
)


def measure(folder: Path, *, listed: int) -> list[Row]:
    """Write a log of so many events, and ask for pages of it as the server does.

    Args:
        folder: An empty directory, with room for half a kilobyte an event.
        listed: How many events.
    """
    path = folder / "listed.db"
    write(path, listed)
    return asyncio.run(_listed(path, listed))


def write(path: Path, listed: int) -> None:
    """Write a log of so many events, without what they come to: lists look at nothing else."""
    head, told = Head(), islice(_facts(), listed)
    with closing(connect(path)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("PRAGMA cache_size = -200000")  # KiB: jobs have random ids, all over their index
        while group := list(islice(told, GROUP)):
            now = add_seconds(stories.START, stories.APART_S * head.position)
            _, rows, head = encode_drafts(group, head, now)
            connection.execute("BEGIN")
            connection.executemany(
                "INSERT INTO events (position, body, hash) VALUES (?, ?, ?)",
                [(row.position, row.body, row.hash) for row in rows],
            )
            connection.execute("COMMIT")


def _facts() -> Iterator[Draft]:
    """Yield facts without end: those of a busy server, and twice as many of somebody who may do nothing."""
    yield Draft("first", DENIED, FIRST)
    for number, fact in enumerate(stories.stories()):
        yield from (fact, Draft(f"{number:036}", DENIED, MALLORY), Draft(f"{number:035}+", DENIED, MALLORY))


async def _listed(path: Path, listed: int) -> list[Row]:
    async with open_reader(path) as reader:
        return [await _row(reader, case, listed) for case in CASES]


async def _row(reader: Reader, case: Case, listed: int) -> Row:
    """Ask for pages in both directions, each at places of its own, so that none is asked for twice."""
    dice = random.Random(case.what)  # noqa: S311 - the same places each time
    starts = [0, *(dice.randrange(listed) for _ in range(PLACES // 2 - 1))]
    half = add_seconds(stories.START, stories.APART_S * listed / 2)
    since, until = half if case.since else None, half if case.until else None
    took_ms = []
    for place in starts:
        for asked in (
            EventQuery(case.wanted, after=place, since=since, until=until),
            EventQuery(case.wanted, before=listed + 1 - place, since=since, until=until, newest_first=True),
        ):
            start = time.perf_counter()
            await reader.event_page(asked)
            took_ms.append((time.perf_counter() - start) * 1000)
    middle_ms = median(took_ms)
    figures = f"{middle_ms:.1f} ms, worst {max(took_ms):.1f}"
    name = f"a page of {listed:,} events: {case.what}"
    return Row(name, figures, "", None, f"≤ {GOAL_MS:.0f} ms", middle_ms <= GOAL_MS)
