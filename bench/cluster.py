"""A node over PostgreSQL beside a server alone over SQLite; and several nodes (`bench.nodes`)."""

import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import uvloop

from bench import driver, forwarding, ledger, models, nodes, postgres
from bench.driver import TINY, Server
from bench.models import NETWORKS
from bench.postgres import Postgres
from bench.table import Row, format_ms, median_ratio
from events.log import Log
from events.sqlite.datalock import LEDGER
from nodes.postgres.connection import DatabaseClock
from nodes.postgres.log import SharedLog

LOAD_GOAL, APPEND_GOAL, VERIFY_GOAL = 1.15, 0.5, 2.0
APPENDED = {64: 20_000, 1: 2_000}
"""Facts of each measurement, by the number of writers."""


def measure(folder: Path, *, repeats: int, rounds: int, seconds: float, facts: int) -> list[Row]:
    """Measure all parts over a PostgreSQL server of our own; without its programs, say so.

    Args:
        folder: An empty directory on a disk.
        repeats: Loads and unloads for each median.
        rounds: Rounds of appending, and kills of a node, to take the median of.
        seconds: Of each measurement of inferences.
        facts: How long the log is that is verified, and caught up with.
    """
    with postgres.running(folder) as database:
        if database is None:
            return [Row(f"cluster: skipped: {postgres.MISSING}", "", "", None)]
        return [
            *_measure_loads(database, folder / "loads", repeats),
            *(_measure_appends(database, folder, writers, rounds) for writers in APPENDED),
            *_measure_long_log(database, folder / "long", facts),
            *forwarding.measure(folder / "forwarding", database, rounds=rounds, seconds=seconds),
            nodes.measure_kills(folder / "kills", database, rounds=rounds),
        ]


def _measure_loads(database: Postgres, folder: Path, repeats: int) -> list[Row]:
    """Load and unload through a node and through a server alone, in turn, from one repository."""
    folder.mkdir()
    options = driver.UNLIMITED
    node = ("--ledger", database.create_ledger(), "--node-address", "http://127.0.0.1")
    driver.run("key", "rotate", "--data", folder / "node" / "data")
    with (
        driver.running(folder / "alone", *options) as alone,
        driver.running(folder / "node", *options, *node, repository=alone.repository) as shared,
    ):
        network = NETWORKS[0]
        models.write(alone.repository, network.name, network.build())
        rows: list[Row] = []
        for model_id, what in ((TINY, "tiny model"), (network.name, f"54 MB {network.what}")):
            for server in (alone, shared):
                _load_and_unload(server, model_id)  # its first load copies the files
            rows += _load_rows(alone, shared, model_id, what, repeats)
        return rows


def _load_rows(alone: Server, shared: Server, model_id: str, what: str, repeats: int) -> list[Row]:
    took = {alone: list[tuple[float, float]](), shared: list[tuple[float, float]]()}
    for number in range(repeats):
        for server in (alone, shared) if number % 2 else (shared, alone):
            took[server].append(_load_and_unload(server, model_id))
    rows = []
    for index, verb in enumerate(("load", "unload")):
        ours, beside = ([each[index] for each in took[server]] for server in (shared, alone))
        ratio = median(ours) / median(beside)
        name = f"{verb} of a {what}, PostgreSQL ÷ SQLite"
        times = format_ms(median(ours), decimals=1), format_ms(median(beside), decimals=1)
        rows.append(Row(name, *times, ratio, f"≤ {LOAD_GOAL:.2f}", ratio <= LOAD_GOAL))
    return rows


def _load_and_unload(server: Server, model_id: str) -> tuple[float, float]:
    """Return the milliseconds of both."""
    return server.load(model_id), server.unload(model_id)


def _measure_appends(database: Postgres, folder: Path, writers: int, rounds: int) -> Row:
    """Append the same facts to both logs, in turn."""
    rates = [_append_round(database, folder, writers, number) for number in range(rounds)]
    ours, beside = zip(*rates, strict=True)
    ratio = median_ratio(ours, beside)
    figures = f"{median(ours):,.0f}/s", f"{median(beside):,.0f}/s"
    name = f"append, durable, {writers} writer{'s' if writers > 1 else ''}, facts, PostgreSQL ÷ SQLite"
    if writers == 1:
        return Row(name, *figures, ratio)
    return Row(name, *figures, ratio, f"≥ {APPEND_GOAL:.2f}", ratio >= APPEND_GOAL)


def _append_round(database: Postgres, folder: Path, writers: int, number: int) -> tuple[float, float]:
    """Return the events per second of both; the log that begins changes."""
    home = folder / f"append-{writers}-{number}"
    home.mkdir()
    shared, alone = _replicated_log(database.create_ledger(), home), Log(home / "alone.db")
    facts, per_s = APPENDED[writers], dict[Log, float]()
    for log in (shared, alone) if number % 2 else (alone, shared):
        took_s, _ = uvloop.run(ledger.append_all(log, ledger.yield_denials, writers=writers, facts=facts))
        per_s[log] = facts // writers * writers / took_s
    return per_s[shared], per_s[alone]


def _replicated_log(address: str, data: Path) -> Log:
    """Return the log of a server over a database, with its replica in `data`; it is not open yet."""
    return SharedLog(address, data, DatabaseClock())


def _measure_long_log(database: Postgres, folder: Path, facts: int) -> list[Row]:
    """Write a long ledger, copy it into a database, verify both, and let a new node catch up."""
    folder.mkdir()
    address, data = database.create_ledger(), folder / "data"
    data.mkdir()
    ledger.write_ledger(data / LEDGER, facts)
    uvloop.run(_stop_server(Log(data / LEDGER)))  # a file whose server ended in order is complete
    copied_s = _timed("migrate", "--ledger", database.owners(address), "--data", data)
    verified_s = _timed("verify", "--ledger", address)
    beside_s = _timed("verify", "--data", data)
    ratio, size = verified_s / beside_s, f"{facts:,} events"
    caught_up_s = _catch_up_s(address, folder / "new")
    rate = f"{caught_up_s:.1f} s, {facts / caught_up_s:,.0f}/s"
    return [
        Row(f"copy {size} into an empty database, verified before and after", f"{copied_s:.1f} s", "", None),
        Row(
            f"verify and fold {size} from PostgreSQL ÷ from SQLite",
            f"{verified_s:.1f} s",
            f"{beside_s:.1f} s",
            ratio,
            f"≤ {VERIFY_GOAL:.2f}",
            ratio <= VERIFY_GOAL,
        ),
        Row(
            f"a new node's empty replica until it has {size} ÷ verifying them there",
            rate,
            f"{beside_s:.1f} s",
            caught_up_s / beside_s,
        ),
    ]


async def _stop_server(log: Log) -> None:
    """Append that a server stopped, and leave one complete file."""
    await log.open()
    await log.server_stopped()
    await log.close()


def _timed(*arguments: str | Path) -> float:
    """Return the seconds that a command takes."""
    start = time.perf_counter()
    driver.run(*arguments)
    return time.perf_counter() - start


def _catch_up_s(address: str, data: Path) -> float:
    """Return the seconds in which a new process fills an empty replica."""
    data.mkdir()
    command = [sys.executable, "-m", "bench.cluster", address, str(data)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - our own module
    return float(done.stdout)


async def _caught_up_s(address: str, data: Path) -> float:
    log = _replicated_log(address, data)
    start = time.perf_counter()
    await log.open()
    took_s = time.perf_counter() - start
    await log.close()
    return took_s


if __name__ == "__main__":
    print(uvloop.run(_caught_up_s(sys.argv[1], Path(sys.argv[2]))))
