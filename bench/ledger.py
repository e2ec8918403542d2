"""The ledger by itself: appending beside plain SQLite, verifying a long log, and asking what was so in it."""

import asyncio
import gc
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import count, islice, pairwise
from pathlib import Path
from statistics import median

import uvloop

from bench import stories
from bench.table import Row
from events.audit.verify import verify
from events.commands import Record
from events.log import Log
from events.sqlite.history import open_past
from events.sqlite.schema import connect, connect_read_only
from events.types import AccessDenied, Draft

WRITERS = 64
APPENDED = 20_000
MOMENTS = 100
APPEND_GOAL, VERIFY_GOAL, VERIFY_GOAL_MB, AS_OF_GOAL_S = 0.5, 1.3, 200, 0.5


def measure(folder: Path, *, facts: int, rounds: int) -> list[Row]:
    """Append in rounds, then write a ledger of so many facts, verify it and ask it about its past.

    Args:
        folder: An empty directory.
        facts: How long the long log is.
        rounds: Rounds of appending to take the median of.
    """
    rows = [
        _append(folder, "facts", _denials, rounds),
        _append(folder, "loads and unloads", _loads, rounds),
    ]
    path = folder / "long.db"
    stories.write(path, facts)
    return [*rows, *_verify(path, facts), *asyncio.run(_as_of(path, facts))]


def _append(folder: Path, what: str, source: Callable[[int], Iterator[Draft]], rounds: int) -> Row:
    """Let 64 writers append, each one fact after the other; then insert the same rows in the same groups.

    Ours runs in the server's event loop. What is appended, and what is inserted, is made before.
    """
    figures = []
    for number in range(rounds):
        ours, plain = folder / f"{what}-{number}.db", folder / f"{what}-{number}-plain.db"
        took_s, ends = uvloop.run(_written(ours, source))
        figures.append((APPENDED / took_s, APPENDED / _inserted_s(ours, plain, ends)))
        for path in (ours, plain):
            path.unlink()
    rate, plain_rate = (median(each) for each in zip(*figures, strict=True))
    ratio = rate / plain_rate
    name = f"append, durable, {WRITERS} writers, {what} ÷ plain sqlite3, the same rows in the same groups"
    beside = f"{plain_rate:,.0f}/s"
    return Row(name, f"{rate:,.0f}/s", beside, ratio, f"≥ {APPEND_GOAL:.2f}", ratio >= APPEND_GOAL)


async def _written(path: Path, source: Callable[[int], Iterator[Draft]]) -> tuple[float, list[int]]:
    """Return the seconds that it took, and the last position of each group."""
    log, ends = Log(path), [0]
    await log.open()
    committed = log.subscribe()

    async def watch() -> None:
        while True:
            committed.clear()
            await committed.wait()
            ends.append(log.head.position)

    async def tell(facts: list[Record]) -> None:
        for fact in facts:
            await log.submit(fact)

    watching = asyncio.create_task(watch())
    told = [
        [Record((draft,)) for draft in islice(source(number), APPENDED // WRITERS)]
        for number in range(WRITERS)
    ]
    gc.freeze()  # so that Python does not look through what the bench holds, again and again
    start = time.perf_counter()
    await asyncio.gather(*map(tell, told))
    took_s = time.perf_counter() - start
    gc.unfreeze()
    watching.cancel()
    await log.close()
    return took_s, [*ends, log.head.position]


def _denials(number: int) -> Iterator[Draft]:
    data = AccessDenied("POST /api/v1/models/{id}/load", 1)
    return (Draft(f"{number:08}-{each:027}", data, "mallory@example.org") for each in count())


def _loads(number: int) -> Iterator[Draft]:
    return stories.cycles(f"model-{number:03}", random.Random(number))  # noqa: S311 - the same each time


def _inserted_s(ours: Path, plain: Path, ends: list[int]) -> float:
    with closing(connect_read_only(ours)) as source, closing(connect(plain)) as target:
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
    dice = random.Random(1)  # noqa: S311 - the same moments each time
    models, jobs = [], []
    async with open_past(path) as past:
        for _ in range(MOMENTS):
            at = str(dice.randint(1, facts))
            start = time.perf_counter()
            await past.state(at)
            between = time.perf_counter()
            await past.jobs(at)
            models.append(between - start)
            jobs.append(time.perf_counter() - between)
    return [
        _slowest(f"models as of a moment of {facts:,} events, slowest of {MOMENTS}", max(models)),
        _slowest(f"100 jobs as of a moment of {facts:,} events, slowest of {MOMENTS}", max(jobs)),
    ]


def _slowest(name: str, took_s: float) -> Row:
    return Row(name, f"{took_s * 1000:.0f} ms", "", None, f"≤ {AS_OF_GOAL_S:g} s", took_s <= AS_OF_GOAL_S)


def _peak_mb() -> float:
    """Return the most memory that this process had; `getrusage` would count that of its parent, too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak_kib,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(peak_kib) * 1024 / 1e6


def _tell(path: Path) -> None:
    start = time.perf_counter()
    verification = verify(path)
    took_s = time.perf_counter() - start
    assert verification.verified, verification.finding
    peak_mb = _peak_mb()
    start = time.perf_counter()
    with closing(connect_read_only(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    check_s = time.perf_counter() - start
    print(json.dumps({"verify_s": took_s, "peak_mb": peak_mb, "check_s": check_s}))


if __name__ == "__main__":
    _tell(Path(sys.argv[1]))
