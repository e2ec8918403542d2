"""Speed of the ledger alone: appends beside plain SQLite, verification, time travel, pages."""

import asyncio
import gc
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from itertools import count, islice, pairwise
from pathlib import Path
from statistics import median

import uvloop

from bench.table import Row
from events import storage
from events.audit.verify import verify
from events.clock import add_seconds
from events.codec import GENESIS, encode_event, hash_body
from events.commands import Record
from events.jobs import JobStatus
from events.log import Log
from events.sqlite import queries
from events.sqlite.readonly import open_past, open_read_only
from events.sqlite.schema import Connection, connect
from events.sqlite.timeline import TimelineQuery, read_timeline
from events.sqlite.timetravel import active_at, jobs_at, models_at, read_moment
from events.sqlite.writing import WRITE_GROUP, group_of
from events.state import State, Transaction
from events.types import (
    SYSTEM,
    AccessDenied,
    Cause,
    Data,
    Draft,
    Durations,
    LoadedFile,
    LoadFailed,
    LoadParameters,
    LoadRequested,
    LoadStarted,
    ModelLoaded,
    ModelUnloaded,
    ServerStarted,
    UnloadRequested,
    UnloadStarted,
    record_draft,
)

WRITERS = 64
APPENDED = 20_000
MOMENTS = 100
APPEND_GOAL, VERIFY_GOAL, VERIFY_GOAL_MB, AS_OF_GOAL_S, TIMELINE_GOAL_S = 0.5, 1.3, 200, 0.02, 0.15
LANES, TIMELINES = 100, 5
"""Limits of one answer, and how often it is measured."""
RANGES = {"whole history": 0.0, "middle five minutes": 300.0, "middle minute": 60.0}
"""Seconds of each range; the whole history has more rows than one answer, which are counted."""
MODEL_COUNT = 100
EVENTS_IN_A_GROUP = 256
RESTARTS, FAILURES = 20_000, 20
"""Facts for each start of the server, and loads for each that fails."""
START = "2026-01-01T00:00:00.000000Z"
APART_S = 0.25
DENIED = AccessDenied("POST /api/v1/models/{id}/load", 1)
Source = Callable[[int], Iterator[Draft]]
"""Yields facts without end, by the number of a writer."""


def write_ledger(path: Path, facts: int) -> None:
    """Write a ledger of so many facts, through the writer's own statements but not synced to the disk."""
    state, digest, told = State(), GENESIS, server_facts()
    with closing(connect(path)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        while state.position < facts:
            attempt, rows = Transaction(state), list[storage.Row]()
            head = storage.LogHead(state.position, digest)
            for _ in range(min(EVENTS_IN_A_GROUP, facts - state.position)):
                position = attempt.state.position + 1
                event = record_draft(next(told), position, add_seconds(START, APART_S * position))
                body = encode_event(event)
                digest = hash_body(digest, body)
                rows.append(storage.Row(position, body, digest))
                attempt.apply(event)
            connection.execute(WRITE_GROUP, group_of(rows, attempt.changes, head))
            attempt.commit()


def server_facts() -> Iterator[Draft]:
    """Yield facts without end: many models, each loaded and unloaded again and again."""
    dice = random.Random(1)  # noqa: S311 - the same ledger each time
    under_way = [model_facts(f"model-{number:03}", dice) for number in range(MODEL_COUNT)]
    yield Draft(_id(dice), ServerStarted(unclean=False), SYSTEM)
    for number in range(1, 2**63):
        if number % RESTARTS == 0:
            yield Draft(
                _id(dice),
                ServerStarted(unclean=True, last_seen_at=add_seconds(START, APART_S * number)),
                SYSTEM,
            )
        else:
            yield next(dice.choice(under_way))


def model_facts(model_id: str, dice: random.Random) -> Iterator[Draft]:
    """Yield the facts of a model that is loaded and unloaded again and again."""
    while True:
        job, who = _id(dice), dice.choice(["alice@example.org", "bob@example.org", "scheduler", SYSTEM])
        version = dice.randint(1, 9)

        def fact(data: Data, actor: str = SYSTEM, event_id: str = "") -> Draft:
            return Draft(event_id or _id(dice), data, actor, job, model_id, version)  # noqa: B023 - used at once

        yield fact(LoadRequested.of(LoadParameters(), Cause.REQUEST), who, job)
        yield fact(LoadStarted(1))
        if dice.randrange(FAILURES) == 0:
            yield fact(
                LoadFailed("invalid_model", "the model cannot be loaded: Load model failed: bad graph")
            )
            continue
        yield fact(_model_loaded(dice))
        load, job = job, _id(dice)
        yield fact(UnloadRequested(dice.random() < 0.1, load, Cause.REQUEST), who, job)  # noqa: PLR2004 - some
        yield fact(UnloadStarted())
        yield fact(ModelUnloaded(dice.randrange(10**9), dice.randrange(5), 0))


def _model_loaded(dice: random.Random) -> ModelLoaded:
    names = ("model.onnx", "model.onnx.data")[: dice.randint(1, 2)]
    files = tuple(
        LoadedFile(name, dice.randrange(10**9), dice.randrange(10**18), dice.randbytes(32).hex())
        for name in names
    )
    part = dice.randrange(10**5)
    peak = dice.randrange(10**9)
    durations = Durations(part, part, part, part, part, part, 6 * part)
    return ModelLoaded(files, (_id(dice),), peak // 2, peak, durations)


def _id(dice: random.Random) -> str:
    text = dice.randbytes(16).hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def measure_ledger(folder: Path, *, facts: int, rounds: int) -> list[Row]:
    """Append in rounds, then write a long ledger, verify it, and read past states of it.

    Args:
        folder: An empty directory.
        facts: How long the long log is.
        rounds: Rounds of appending to take the median of.
    """
    rows = [
        _append(folder, "facts", yield_denials, rounds),
        _append(folder, "loads and unloads", yield_loads, rounds),
    ]
    path = folder / "long.db"
    write_ledger(path, facts)
    return [
        *rows,
        *_verify(path, facts),
        *asyncio.run(_as_of(path, facts)),
        *asyncio.run(_timeline(path, facts)),
    ]


def _append(folder: Path, what: str, source: Source, rounds: int) -> Row:
    """Let 64 writers append one fact after the other, then insert the same rows in the same groups.

    Ours runs in the server's event loop. Facts and rows are made before the measurement.
    """
    figures = []
    for number in range(rounds):
        ours, plain = folder / f"{what}-{number}.db", folder / f"{what}-{number}-plain.db"
        took_s, ends = uvloop.run(append_all(Log(ours), source))
        figures.append((APPENDED / took_s, APPENDED / _inserted_s(ours, plain, ends)))
        for path in (ours, plain):
            path.unlink()
    rate, plain_rate = (median(each) for each in zip(*figures, strict=True))
    ratio = rate / plain_rate
    name = f"append, durable, {WRITERS} writers, {what} ÷ plain sqlite3, the same rows in the same groups"
    beside = f"{plain_rate:,.0f}/s"
    return Row(name, f"{rate:,.0f}/s", beside, ratio, f"≥ {APPEND_GOAL:.2f}", ratio >= APPEND_GOAL)


async def append_all(
    log: Log, source: Source, *, writers: int = WRITERS, facts: int = APPENDED
) -> tuple[float, list[int]]:
    """Let writers append facts to an empty log, each one after the other, and close it.

    Args:
        log: Not open yet.
        source: Yields the facts of a writer, by its number.
        writers: How many.
        facts: Of all of them together.

    Returns:
        The seconds that it took, and the last position of each group.
    """
    ends = [0]
    await log.open()

    async def watch() -> None:
        with log.subscribed() as committed:
            while True:
                committed.clear()
                await committed.wait()
                ends.append(log.head.position)

    async def tell(facts: list[Record]) -> None:
        for fact in facts:
            await log.submit(fact)

    watching = asyncio.create_task(watch())
    told = [
        [Record((draft,)) for draft in islice(source(number), facts // writers)] for number in range(writers)
    ]
    gc.freeze()  # the collector need not visit the bench's own objects
    start = time.perf_counter()
    await asyncio.gather(*map(tell, told))
    took_s = time.perf_counter() - start
    gc.unfreeze()
    watching.cancel()
    await log.close()
    return took_s, [*ends, log.head.position]


def yield_denials(number: int) -> Iterator[Draft]:
    """Yield facts without end that change no model; those of each number have other ids."""
    data = AccessDenied("POST /api/v1/models/{id}/load", 1)
    return (Draft(f"{number:08}-{each:027}", data, "mallory@example.org") for each in count())


def yield_loads(number: int) -> Iterator[Draft]:
    """Yield facts without end of a model that is loaded and unloaded; each number is another model."""
    return model_facts(f"model-{number:03}", random.Random(number))  # noqa: S311 - the same each time


def _inserted_s(ours: Path, plain: Path, ends: list[int]) -> float:
    with open_read_only(ours) as source, closing(connect(plain)) as target:
        rows = source.execute("SELECT position, body, hash FROM events ORDER BY position").fetchall()
        start = time.perf_counter()
        for after, until in pairwise(ends):
            target.execute("BEGIN IMMEDIATE")
            target.executemany(
                "INSERT INTO events (position, body, hash) VALUES (?, ?, ?)", rows[after:until]
            )
            target.execute("COMMIT")
        return time.perf_counter() - start


def _verify(path: Path, facts: int) -> list[Row]:
    """Verify in a new process, so that its memory is known; the integrity check is timed after it."""
    command = [sys.executable, "-m", "bench.ledger", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - our own module
    told = json.loads(done.stdout)
    took_s, took_mb, check_s = told["verify_s"], told["peak_mb"], told["check_s"]
    ratio, name = took_s / check_s, f"verify and fold {facts:,} events"
    return [
        Row(
            f"{name} ÷ SQLite's integrity_check of the same file",
            f"{took_s:.1f} s",
            f"{check_s:.1f} s",
            ratio,
            f"≤ {VERIFY_GOAL:.2f}",
            ratio <= VERIFY_GOAL,
        ),
        Row(
            f"{name}: peak memory",
            f"{took_mb:.0f} MB",
            "",
            None,
            f"≤ {VERIFY_GOAL_MB} MB",
            took_mb <= VERIFY_GOAL_MB,
        ),
    ]


async def _as_of(path: Path, facts: int) -> list[Row]:
    queried: dict[str, Callable[[Connection, int], object]] = {
        "100 models": _read_models,
        "100 jobs": partial(jobs_at, query=queries.JobQuery()),
        "pending jobs": partial(jobs_at, query=queries.JobQuery(status=JobStatus.PENDING)),
        "the server and nodes": lambda *_: None,
    }
    rows = []
    async with open_past(path) as past:
        for what, query in queried.items():
            dice, took_s = random.Random(1), []  # noqa: S311 - the same moments each time
            for _ in range(MOMENTS):
                at = str(dice.randint(1, facts))
                start = time.perf_counter()
                await past.run(partial(read_moment, at=at, query=query))
                took_s.append(time.perf_counter() - start)
            name = f"{what} as of a moment of {facts:,} events, slowest of {MOMENTS}"
            rows.append(_slowest(name, max(took_s), AS_OF_GOAL_S))
    return rows


def _read_models(connection: Connection, position: int) -> object:
    return models_at(connection, position, limit=101), active_at(connection, position)


async def _timeline(path: Path, facts: int) -> list[Row]:
    """Read a page of the console's timeline: everything, and the middle of it."""
    end = add_seconds(START, APART_S * facts)
    rows = []
    async with open_past(path) as past:
        for what, span_s in RANGES.items():
            begin_s = max(0.0, (APART_S * facts - span_s) / 2)
            query = TimelineQuery(
                now=end,
                begin=None if what == "whole history" else add_seconds(START, begin_s),
                end=None if what == "whole history" else add_seconds(START, begin_s + span_s),
                limit=LANES,
            )
            took_s = []
            for _ in range(TIMELINES):
                start = time.perf_counter()
                await past.run(partial(read_timeline, query=query))
                took_s.append(time.perf_counter() - start)
            name = f"timeline of {LANES} models over the {what} of {facts:,} events, slowest of {TIMELINES}"
            rows.append(_slowest(name, max(took_s), TIMELINE_GOAL_S))
    return rows


def _slowest(name: str, took_s: float, goal_s: float) -> Row:
    return Row(name, f"{took_s * 1000:.1f} ms", "", None, f"≤ {goal_s * 1000:.0f} ms", took_s <= goal_s)


def _peak_mb() -> float:
    """Return the peak memory of this process; `getrusage` would include that of its parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak_kib,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(peak_kib) * 1024 / 1e6


def _print_verification(path: Path) -> None:
    start = time.perf_counter()
    verification = verify(path)
    took_s = time.perf_counter() - start
    assert verification.verified, verification.finding
    peak_mb = _peak_mb()
    start = time.perf_counter()
    with open_read_only(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    check_s = time.perf_counter() - start
    print(json.dumps({"verify_s": took_s, "peak_mb": peak_mb, "check_s": check_s}))


if __name__ == "__main__":
    _print_verification(Path(sys.argv[1]))
