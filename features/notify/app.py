"""Receivers of events as a resource of the application: a coroutine for each sends what it has not yet."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import aiohttp
from aiohttp import hdrs, web
from aiohttp.abc import AbstractResolver, ResolveResult

from answers.resources import OperatorNotice
from events.errors import LedgerProblem
from events.log import Log
from events.storage import Row
from features.notify.delivery import Delivery, NotDelivered, back_off_s, describe_status, make_deliveries
from features.notify.progress import FOLDER, Progress, find_latest, read_progress, write_progress
from features.notify.table import NAME, Receiver
from runtime.repository import start_call
from server.appkeys import CONFIG, LOG, READER
from server.cluster import CLUSTER, Cluster

_log = logging.getLogger(__name__)

TIMEOUT_S = 30.0
"""For the answer to a delivery: Standard Webhooks recommends 15 to 30 s."""
BODY_S = 1.0
"""For the body of an answer, which says nothing: once it is read, the connection can be used again."""
KEPT_S = 15.0
"""For which an idle connection is kept."""
ANSWER_BYTES = 8192
"""Of an answer that may have arrived and not been read."""
PAGE = 32
"""Events that are read at a time."""
PAUSE_S = 0.02
"""After a page: a receiver that catches up takes no more than a share of the event loop."""
SAVE_EVERY_S = 1.0
"""Pause between writes of progress. A server that is killed sends again what was acknowledged meanwhile."""

Gauge = tuple[str, str, Mapping[Any, float], str]
ReadRows = Callable[[int, int], Awaitable[Sequence[Row]]]
Send = Callable[[Receiver, Delivery], Awaitable[None]]


class Sender:
    """Sends the ledger's events to one receiver, one at a time, each until it is acknowledged.

    Of several servers one does; the others keep what it leaves, to go on from there.

    Attributes:
        name: the receiver's.
        problem: why the last attempt failed; None after a success.
        is_unsaved: whether the last write of the progress failed; nothing is sent before one succeeds.
    """

    def __init__(self, receiver: Receiver, path: Path, log: Log, cluster: Cluster) -> None:
        self._receiver = receiver
        self._path = path
        self._log = log
        self._cluster = cluster
        self._duty = f"{NAME}/{receiver.name}"
        self._progress: Progress | None = None
        self._saved: Progress | None = None
        self._is_read = False
        self._failures = 0
        self.name = receiver.name
        self.problem: str | None = None
        self.is_unsaved = False
        cluster.duties[self._duty] = ""

    def sends(self) -> bool:
        """Whether this server is the one that sends."""
        return self._cluster.has_duty(self._duty)

    @property
    def lag(self) -> int:
        """The events that wait for the receiver, as far as this server knows."""
        head = self._log.head.position
        return 0 if self._progress is None else max(head - self._progress.position, 0)

    async def read(self) -> None:
        """Read the progress from its file, and let other servers know it.

        Raises:
            OSError: it cannot be read.
            ValueError: it has something else.
        """
        saved = await asyncio.to_thread(read_progress, self._path)
        if saved is not None:
            self._reach(saved)
        self._saved, self._is_read = saved, True

    async def save(self) -> None:
        """Write the progress to its file, unless that has it.

        Raises:
            OSError: it cannot be written.
            WrongTarget: `wrong_target`, something else has its name.
        """
        progress = self._progress
        if progress is not None and progress != self._saved:
            await asyncio.to_thread(write_progress, self._path, progress)
            self._saved, self.is_unsaved = progress, False

    async def run(self, read_rows: ReadRows, send: Send, source: str) -> None:
        """Send until cancelled; no error ends it earlier.

        Args:
            read_rows: reads the events after a position, at most as many as the second number.
            send: sends a delivery once. Raises NotDelivered.
            source: of the CloudEvents.
        """
        with self._log.subscribed() as wakeup:
            while True:
                wakeup.clear()
                try:
                    while await self._send_page(read_rows, send, source):
                        pass
                except (NotDelivered, LedgerProblem, OSError, ValueError) as error:
                    await self._back_off(str(error))
                except Exception as error:  # noqa: BLE001 - whatever it is, others get their events
                    _log.exception("a defect in sending events to %s", self.name)
                    await self._back_off(f"a defect, {type(error).__name__}: the server's log has it")
                else:
                    self._failures, self.problem = 0, None
                    await wakeup.wait()

    async def _send_page(self, read_rows: ReadRows, send: Send, source: str) -> bool:
        """Send the next events; return whether there may be more.

        Raises:
            NotDelivered: one was not acknowledged, or is not the next one that the receiver has to get.
            LedgerProblem: the ledger cannot be read, or the file written.
            OSError: the file of the progress cannot be read or written.
            ValueError: the file has something else.
        """
        progress = await self._find_progress()
        if progress is None or not self.sends() or progress.position == self._log.head.position:
            return False
        rows = await read_rows(max(progress.position - 1, 0), PAGE)
        for delivery in make_deliveries(progress, rows, source):
            if self.is_unsaved:
                await self.save()
            if not self.sends():
                return False
            await send(self._receiver, delivery)
            self._reach(delivery.reached)
            if self.problem is not None:
                _log.info("events are delivered to %s again", self.name)
            self._failures, self.problem = 0, None
        await asyncio.sleep(PAUSE_S)
        return bool(rows)

    async def _find_progress(self) -> Progress | None:
        """Return how far the receiver has events; None if that is not known yet."""
        if not self._is_read:
            await self.read()
        latest, duties = self._find_latest(), self._cluster.duties
        if latest is None and not duties[self._duty] and self.sends():
            head, first = self._log.head, self._receiver.first
            begin = Progress(head.position, head.hash.hex()) if first is None else Progress(first - 1)
            duties[self._duty] = begin.encode().decode()
            _log.info("%s is a new receiver of events, from %d on", self.name, begin.position + 1)
            latest = self._find_latest()
        if latest is not None:
            self._reach(latest)
            if self._saved is None:
                await self.save()  # so that the next start does not begin later
        return latest

    def _find_latest(self) -> Progress | None:
        """Return how far the receiver has events, or where it begins, once other servers can know that."""
        return find_latest(self._progress, self._cluster.read_handovers(self._duty))

    def _reach(self, progress: Progress) -> None:
        self._progress = progress
        self._cluster.duties[self._duty] = progress.encode().decode()

    async def _back_off(self, problem: str) -> None:
        """Note why an attempt failed, and wait until the next one is due."""
        self._failures += 1
        if self.problem is None:
            _log.warning("events are not delivered to %s, and wait: %s", self.name, problem)
        self.problem = problem
        await asyncio.sleep(back_off_s(self._failures))


async def send(session: aiohttp.ClientSession, receiver: Receiver, delivery: Delivery) -> None:
    """Send a delivery once.

    Raises:
        NotDelivered: it was not acknowledged.
    """
    headers = delivery.sign(receiver.keys, int(time.time()))
    try:
        async with session.post(
            receiver.url, data=delivery.body, headers=headers, allow_redirects=False
        ) as answer:
            problem = describe_status(answer.status)
            with suppress(TimeoutError, aiohttp.ClientError):
                async with asyncio.timeout(BODY_S):
                    await answer.content.read(ANSWER_BYTES)
    except TimeoutError:
        problem = f"it did not answer within {TIMEOUT_S:g} s"
    except aiohttp.ClientConnectorError as error:
        problem = str(error)
    except aiohttp.ClientResponseError:
        problem = "its answer is no HTTP"
    except (aiohttp.ClientError, OSError) as error:  # whose texts may have the whole URL
        problem = f"the connection failed: {type(error).__name__}"
    if problem is not None:
        raise NotDelivered(problem)


class Resolver(AbstractResolver):
    """Looks up receivers' names in threads that nothing else uses, and no stop waits for.

    The event loop's lookups share two threads (libuv's): two name servers that do not answer would hold up
    the names of other nodes and of the ledger's database, by 10 s as measured.
    """

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        look_up = partial(socket.getaddrinfo, host, port, family=family, type=socket.SOCK_STREAM)
        found = await asyncio.shield(start_call(host, look_up, name="names of receivers"))
        return [
            ResolveResult(
                hostname=host,
                host=str(address[0]),
                port=int(address[1]),
                family=kind,
                proto=protocol,
                flags=socket.AI_NUMERICHOST,
            )
            for kind, _, protocol, _, address in found
        ]

    async def close(self) -> None:
        """Close nothing: a lookup's thread ends with it, or with the process."""


def _open_socket(address: aiohttp.AddrInfoType) -> socket.socket:
    """Return a socket with little room for answers: endless ones take turns with other work."""
    opened = socket.socket(*address[:3])
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, ANSWER_BYTES)
    return opened


SENDERS = web.AppKey("senders", list[Sender])


async def announce_progress(app: web.Application) -> None:
    """Let other servers know the receivers, and how far they have events, before this server joins them."""
    receivers = cast("tuple[Receiver, ...]", app[CONFIG].tables.get(NAME, ()))
    folder = app[CONFIG].data / FOLDER
    app[SENDERS] = [Sender(each, folder / each.name, app[LOG], app[CLUSTER]) for each in receivers]
    for sender in app[SENDERS]:
        with suppress(OSError, ValueError):  # it tries again, and reports them
            await sender.read()


async def open_senders(app: web.Application) -> AsyncIterator[None]:
    """Send events to the receivers of the configuration, from where each has them."""
    senders = app[SENDERS]
    if not senders:
        yield
        return
    [first] = await app[READER].rows(0, 1)
    source = f"urn:loadledger:{first.hash.hex()[:32]}"  # the same at all nodes
    connector = aiohttp.TCPConnector(
        limit=0, keepalive_timeout=KEPT_S, resolver=Resolver(), socket_factory=_open_socket
    )
    async with aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
        headers={hdrs.USER_AGENT: f"loadledger/{version('loadledger')}"},
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
    ) as session:
        work = [each.run(app[READER].rows, partial(send, session), source) for each in senders]
        tasks = [asyncio.create_task(each, name="notify") for each in (*work, _save_progress(senders))]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await _save_all(senders)


async def _save_progress(senders: Sequence[Sender]) -> None:
    while True:
        await asyncio.sleep(SAVE_EVERY_S)
        await _save_all(senders)


async def _save_all(senders: Iterable[Sender]) -> None:
    for sender in senders:
        try:
            await sender.save()
        except (LedgerProblem, OSError):
            sender.is_unsaved = True  # it tries again before it sends anything, and reports the error


async def read_gauges(app: web.Application) -> Sequence[Gauge]:
    """Return the metrics of the receivers to which this server sends."""
    senders = [each for each in app[SENDERS] if each.sends()]
    lag = {each.name: each.lag for each in senders}
    failing = {each.name: float(each.problem is not None) for each in senders}
    return (
        ("notify_lag_events", "Events that wait for a receiver.", lag, "receiver"),
        ("notify_failing", "1 if the last attempt to send an event failed; else 0.", failing, "receiver"),
    )


def read_notices(app: web.Application) -> list[OperatorNotice]:
    """Return a notice for each receiver that does not take its events."""
    return [
        OperatorNotice(
            title=f"Events are not delivered to {each.name}",
            why=f"{each.lag} of them wait: {each.problem}." if each.lag else f"{each.problem}.",
            todo="Mend what it says; delivery then goes on where it was, within a minute.",
        )
        for each in app[SENDERS]
        if each.problem is not None and each.sends()
    ]
