"""Copies of a model at several nodes: one is killed, all are replaced, one is slow; and idle nodes."""

import asyncio
import http.client
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import NamedTuple, Self

from bench import models, postgres
from bench.driver import ANSWER_LIMIT_S
from bench.generator import longest_gap
from bench.nodes import ELEMENTS, NAMES, Fleet, read_node, running, wait_until
from bench.postgres import Postgres
from bench.requests import Target, add_one_inputs, add_one_request, encode
from bench.table import Row
from loadledger import Client, ClientProblem
from nodes.postgres import connection as databases
from runtime.memory import list_descendants

COPIES = 2
CLIENTS, FEW_CLIENTS, THINKING_S = 8, 2, 0.01
"""Of a killed node and of a replacement; of a slow one fewer, which pause: requests do not wait for a core,
and a node that is slow does not make the others quick."""
GAP_GOAL_MS, SLOW_GOAL = 50.0, 1.5
BEFORE_S = 1.0
"""Under load before something happens."""
PHASE_S = 0.002
"""For how long the processes of a slow node run, and are stopped: shorter than an inference."""
IDLE_NODES, IDLE_LEASE_S = (3, 10), 10.0
"""With the lease that nodes have by default."""
SETTLED_S, IDLE_S = 10.0, 30.0
"""After the start, and then of the measurement."""
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
MODEL = "copied"
Call = Callable[[], str]
"""Sends an inference and returns why it failed; empty if it was answered."""


class Asked(NamedTuple):
    """One inference: when it began and ended, and why it failed."""

    begin_s: float
    end_s: float
    problem: str


class Load:
    """Clients that send one inference after the other, each in a thread of its own.

    Args:
        calls: of the clients.
        pause_s: between an answer and the next inference.

    Attributes:
        asked: what they have asked, in the order of the answers.
    """

    def __init__(self, calls: Iterable[Call], pause_s: float = 0.0) -> None:
        self.asked: list[Asked] = []
        self._pause_s = pause_s
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(call,)) for call in calls]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        time.sleep(BEFORE_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _run(self, call: Call) -> None:
        while not self._is_over.wait(self._pause_s):
            begin_s = time.monotonic()
            problem = call()
            self.asked.append(Asked(begin_s, time.monotonic(), problem))

    def list_failed(self, during: str) -> list[Asked]:
        """Return the failed ones, and print the first."""
        failed = [each for each in self.asked if each.problem]
        for each in failed[:1]:
            print(f"copies, {during}, the first failure: {each.problem}", file=sys.stderr)
        return failed

    def p99_ms(self, begin_s: float) -> float:
        """Return the 99th percentile of the latencies of inferences from then on."""
        took_s = sorted(each.end_s - each.begin_s for each in list(self.asked) if each.begin_s >= begin_s)
        return 1000 * took_s[int(0.99 * (len(took_s) - 1))]


def _list_our_clients(fleet: Fleet, count: int) -> list[Call]:
    """Return calls of our blocking client, which knows the URLs of all nodes."""
    inputs = add_one_inputs(ELEMENTS)

    def call(client: Client) -> str:
        try:
            client.infer(MODEL, inputs)
        except ClientProblem as problem:
            return f"{type(problem).__name__}: {problem}"
        return ""

    clients = [Client(",".join(map(fleet.url, NAMES)), token=fleet.any.token) for _ in range(count)]
    return [lambda client=each: call(client) for each in clients]  # type: ignore[misc]


def _list_naive_clients(fleet: Fleet, count: int, names: Sequence[str] = NAMES) -> list[Call]:
    """Return calls of clients that go round the nodes, and try the next one once."""
    return [NaiveClient(fleet, islice(cycle(names), number, None)).call for number in range(count)]


class NaiveClient:
    """A client that asks each node in turn, and if one does not answer well, the next one once.

    Args:
        fleet: of the nodes.
        names: of the nodes, without end.
    """

    def __init__(self, fleet: Fleet, names: Iterator[str]) -> None:
        hosts = {name: fleet.url(name).removeprefix("http://") for name in NAMES}
        self._connections = {
            name: http.client.HTTPConnection(host, timeout=ANSWER_LIMIT_S) for name, host in hosts.items()
        }
        self._names = names
        head_bytes, self._body = encode(add_one_inputs(ELEMENTS), binary=True)
        length = {"Inference-Header-Content-Length": str(head_bytes)}
        self._headers = {"Authorization": f"Bearer {fleet.any.token}", **length}

    def call(self) -> str:
        return self._ask(next(self._names)) and self._ask(next(self._names))

    def _ask(self, name: str) -> str:
        connection = self._connections[name]
        try:
            connection.request("POST", f"/v2/models/{MODEL}/infer", self._body, self._headers)
            response = connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            return f"{name}: {type(error).__name__}: {error}"
        return "" if response.status == http.HTTPStatus.OK else f"{name}: {response.status} {content[:300]!r}"


KINDS = {"our client": _list_our_clients, "going round the URLs, one retry": _list_naive_clients}


def measure(folder: Path, *, rounds: int, seconds: float) -> list[Row]:
    """Measure all of it over a PostgreSQL server of our own; without its programs, say so.

    Args:
        folder: An empty directory on a disk.
        rounds: Kills of a node by kind of client, and ratios of a slow node.
        seconds: Of each measurement with a slow node, and without.
    """
    with postgres.running(folder) as database:
        if database is None:
            return [Row(f"copies: skipped: {postgres.MISSING}", "", "", None)]
        idle = [_measure_idle(folder / f"idle-{count}", database, count) for count in IDLE_NODES]
        return _measure_copies(folder, database, rounds, seconds) + idle


def _measure_copies(folder: Path, database: Postgres, rounds: int, seconds: float) -> list[Row]:
    with running(folder / "copies", database) as fleet:
        models.write(fleet.repository, MODEL, models.add_one_slowly())
        fleet.any.load(MODEL, copies=COPIES, threads=1)
        _wait_for_copies(fleet)
        target = Target(MODEL, fleet.any.port, fleet.any.token)
        add_one_request(ELEMENTS, binary=True, model_id=MODEL).check(target)
        rows = [_measure_kills(fleet, kind, rounds) for kind in KINDS]
        rows += _measure_replacements(fleet)
        return rows + _measure_slow_node(fleet, rounds, seconds)


def _measure_kills(fleet: Fleet, kind: str, rounds: int) -> Row:
    """Kill a node with one of two copies under load until the third node has one, and let it come back."""
    in_flight, later, total = 0, 0, 0
    for _ in range(rounds):
        with Load(KINDS[kind](fleet, CLIENTS)) as load:
            victim = _wait_for_copies(fleet)[0]
            killed_s = time.monotonic()
            fleet.kill(victim)
            _wait_for_copies(fleet)
        failed = load.list_failed(kind)
        in_flight += sum(each.begin_s < killed_s for each in failed)
        later += sum(each.begin_s >= killed_s for each in failed)
        total += len(load.asked)
        fleet.start(victim)
    what = f"copies: inferences failed at kill -9 of one of {COPIES} copies' nodes ({rounds} times), {kind}"
    return Row(what, f"{later:,} of {total:,}, {in_flight:,} in flight", "", None, "0", later == 0)


def _measure_replacements(fleet: Fleet) -> list[Row]:
    """Drain, stop and start each node in turn, under our clients; beside: as long a time without that."""
    with Load(_list_our_clients(fleet, CLIENTS)) as load:
        begin_s = time.monotonic()
        for name in NAMES:
            _replace(fleet, name)
        took_s = time.monotonic() - begin_s
        time.sleep(took_s)
    during = f"{len(NAMES)} nodes are drained, stopped and started in turn ({took_s:.0f} s)"
    failed, total = len(load.list_failed(during)), len(load.asked)
    answered_s = sorted(each.end_s for each in load.asked if not each.problem)
    ours_ms, beside_ms = (
        1000 * longest_gap(answered_s, at_s, at_s + took_s) for at_s in (begin_s, begin_s + took_s)
    )
    gaps, goal = (f"{ours_ms:.0f} ms", f"{beside_ms:.0f} ms", ours_ms / beside_ms), f"≤ {GAP_GOAL_MS:g} ms"
    return [
        Row(
            f"copies: inferences failed while {during}", f"{failed:,} of {total:,}", "", None, "0", not failed
        ),
        Row("copies: longest time without an answer meanwhile ÷ after", *gaps, goal, ours_ms <= GAP_GOAL_MS),
    ]


def _replace(fleet: Fleet, name: str) -> None:
    other = next(node.server for key, node in fleet.nodes.items() if key != name)
    other.ask("POST", f"/api/v1/nodes/{name}/drain")
    wait_until(lambda: not any(read_node(other, name)[what] for what in ("models", "jobs")))
    fleet.stop(name)
    fleet.start(name)
    _wait_for_copies(fleet)


def _measure_slow_node(fleet: Fleet, rounds: int, seconds: float) -> list[Row]:
    """Slow a node with one of two copies to a half; latencies with and without that in turn."""
    slow, quick = _wait_for_copies(fleet)
    third = [name for name in NAMES if name not in (slow, quick)]
    kinds = {
        "our client": _list_our_clients(fleet, FEW_CLIENTS),
        "asking a node without a copy": _list_naive_clients(fleet, FEW_CLIENTS, third),
    }
    rows: list[Row] = []
    for kind, calls in kinds.items():
        what = f"copies: p99 with one of {COPIES} copies' nodes at half its speed ÷ at its speed, {kind}"
        with Load(calls, THINKING_S) as load:
            pairs = [
                [_measure_p99_ms(load, each, seconds) for each in (_slowed(fleet, slow), nullcontext())]
                for _ in range(rounds)
            ]
        load.list_failed(what)
        ratio = median(ours / beside for ours, beside in pairs)
        figures = [f"{median(each):.1f} ms" for each in zip(*pairs, strict=True)]
        rows.append(Row(what, figures[0], figures[1], ratio, f"≤ {SLOW_GOAL:.2f}", ratio <= SLOW_GOAL))
    return rows


def _measure_p99_ms(load: Load, during: AbstractContextManager[None], seconds: float) -> float:
    with during:
        time.sleep(seconds / 4)  # clients and nodes notice
        begin_s = time.monotonic()
        time.sleep(seconds)
        wait_until(lambda: any(each.begin_s >= begin_s for each in list(load.asked)))
        return load.p99_ms(begin_s)


@contextmanager
def _slowed(fleet: Fleet, name: str) -> Iterator[None]:
    """Slow a server and its workers to a half: stop and continue them in turn."""
    server, is_over = fleet.nodes[name].process.pid, threading.Event()
    pids = (server, *list_descendants(server)[1:])

    def slow() -> None:
        while not is_over.wait(PHASE_S):
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            time.sleep(PHASE_S)
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

    slowing = threading.Thread(target=slow)
    slowing.start()
    try:
        yield
    finally:
        is_over.set()
        slowing.join()


def _measure_idle(folder: Path, database: Postgres, count: int) -> Row:
    """Measure the transactions of idle nodes at the database, and the processor time of a node."""
    folder.mkdir()
    names, address = [f"node-{number:02}" for number in range(count)], database.create_ledger()
    fleet = Fleet(folder, address, names, IDLE_LEASE_S)
    fleet.repository.mkdir()
    try:
        for name in names:
            fleet.start(name)
        time.sleep(SETTLED_S)
        before = _count_use(fleet, address)
        time.sleep(IDLE_S)
        commits, rows, cpu_s = (
            (new - old) / IDLE_S for old, new in zip(before, _count_use(fleet, address), strict=True)
        )
    finally:
        for name in list(fleet.nodes):
            fleet.kill(name)
    what = f"copies: {count} idle nodes, lease {IDLE_LEASE_S:g} s; beside: processor time of a node"
    figures = f"{commits:.1f} transactions/s, {rows:.0f} rows read/s"
    return Row(what, figures, f"{100 * cpu_s / count:.1f} % of a core", None)


def _count_use(fleet: Fleet, address: str) -> tuple[float, float, float]:
    """Return the transactions and rows read at the database, and the processor seconds of all nodes."""
    servers = [node.process.pid for node in fleet.nodes.values()]
    pids = [pid for server in servers for pid in (server, *list_descendants(server))]
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    cpu_s = sum(int(each[11]) + int(each[12]) for each in fields) / TICKS_PER_S
    return *asyncio.run(_count_transactions(address)), cpu_s


async def _count_transactions(address: str) -> tuple[float, float]:
    connection = await databases.connect(address)
    counters = "xact_commit::float8, tup_returned::float8"
    query = f"SELECT {counters} FROM pg_stat_database WHERE datname = current_database()"  # noqa: S608
    commits, rows = (await connection.fetch(query))[0]
    await databases.close(connection)
    return commits, rows


def _wait_for_copies(fleet: Fleet) -> list[str]:
    """Wait until the model has its copies at nodes that are there, and return these."""
    found = set[str]()

    def has_copies() -> bool:
        view = fleet.any.ask("GET", f"/api/v1/models/{MODEL}").json()
        found.clear()
        found.update(each["node"] for each in view.get("copies_at", ()))
        return bool(view["copies_ready"] == len(found & fleet.nodes.keys()) == COPIES)

    wait_until(has_copies)
    return sorted(found)
