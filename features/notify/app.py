"""Receivers of events as a resource of the application: a coroutine for each sends what it has not yet."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
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
from events.sqlite.listing import Reader
from features.notify.delivery import Delivery, NotDelivered, describe_status, make_deliveries, pause_s
from features.notify.progress import FOLDER, Progress, find_latest, read_progress, write_progress
from features.notify.table import NAME, Receiver
from runtime.repository import start_call
from server.appkeys import CONFIG, LOG, READER
from server.cluster import CLUSTER, Cluster

_log = logging.getLogger(__name__)

TIMEOUT_S = 30.0
"""For the answer to a delivery: Standard Webhooks recommends 15 to 30 s."""
KEPT_S = 15.0
"""For which an idle connection is kept."""
PAGE = 32
"""Events that are read at a time."""
PAUSE_S = 0.02
"""After a page: a receiver that catches up takes no more than a share of the event loop."""
SAVE_EVERY_S = 1.0
"""Pause between writes of progress. A server that is killed sends again what was acknowledged meanwhile."""
CLOSE_S = 5.0
"""For the last writes: a disk that hangs delays the end no longer."""

ANSWER_BYTES = 8192
"""Of an answer that may have arrived and not been read: its status is all that counts."""

Gauge = tuple[str, str, Mapping[Any, float], str]


class Sender:
    """Sends the ledger's events to one receiver, one at a time, each until it is acknowledged.

    Of several servers one does; the others keep what it leaves, to go on from there.

    Attributes:
        name: the receiver's.
        delivered: events that were acknowledged, since the start.
        problem: why the last attempt failed; None after a success.
        has_unsaved: whether the last write of the progress failed.
    """

    def __init__(
        self,
        receiver: Receiver,
        folder: Path,
        *,
        source: str,
        log: Log,
        reader: Reader,
        cluster: Cluster,
        session: aiohttp.ClientSession,
    ) -> None:
        self._receiver = receiver
        self._path = folder / receiver.name
        self._source = source
        self._log = log
        self._reader = reader
        self._cluster = cluster
        self._session = session
        self._duty = f"{NAME}/{receiver.name}"
        self._progress: Progress | None = None
        self._saved: Progress | None = None
        self._is_read = False
        self._failures = 0
        self.name = receiver.name
        self.delivered = 0
        self.problem: str | None = None

    def sends(self) -> bool:
        """Whether this server is the one that sends."""
        return self._cluster.has_duty(self._duty)

    @property
    def lag(self) -> int:
        """The events that wait for the receiver, as far as this server knows."""
        head = self._log.head.position
        return 0 if self._progress is None else max(head - self._progress.position, 0)

    async def run(self) -> None:
        """Send until cancelled; no error ends it earlier."""
        with self._log.subscribed() as wakeup:
            while True:
                wakeup.clear()
                try:
                    while await self._send_page():
                        pass
                except (NotDelivered, LedgerProblem, OSError, ValueError) as error:
                    await self._pause(str(error))
                except Exception as error:  # noqa: BLE001 - whatever it is, others get their events
                    _log.exception("a defect in sending events to %s", self.name)
                    await self._pause(f"a defect, {type(error).__name__}: the server's log has it")
                else:
                    self._failures, self.problem = 0, None
                    await wakeup.wait()

    async def save(self) -> None:
        """Write the progress to its file, unless that has it.

        Raises:
            OSError: it cannot be written.
            WrongTarget: `wrong_target`, something else has its name.
        """
        progress = self._progress
        if progress is not None and progress != self._saved:
            await asyncio.to_thread(write_progress, self._path, progress)
            self._saved, self.has_unsaved = progress, False

    async def _send_page(self) -> bool:
        """Send the next events; return whether there may be more.

        Raises:
            NotDelivered: one was not acknowledged, or is not the next one that the receiver has to get.
            LedgerProblem: the ledger cannot be read, or the file.
            OSError: the file of the progress cannot be read or written.
            ValueError: the file has something else.
        """
        progress = await self._find_progress()
        if progress is None or not self.sends() or progress.position == self._log.head.position:
            return False
        rows = await self._reader.rows(max(progress.position - 1, 0), PAGE)
        for delivery in make_deliveries(progress, rows, self._source):
            if not self.sends():
                return False
            await self._deliver(delivery)
            self._reach(delivery.reached)
            self.delivered += 1
            if self.problem is not None:
                _log.info("events are delivered to %s again", self.name)
            self._failures, self.problem = 0, None
        await asyncio.sleep(PAUSE_S)
        return bool(rows)

    async def _find_progress(self) -> Progress | None:
        """Return how far the receiver has events; None if that is not known yet."""
        if not self._is_read:
            self._progress = self._saved = await asyncio.to_thread(read_progress, self._path)
            self._is_read = True
        latest, duties = self._find_latest(), self._cluster.duties
        if latest is None and not duties[self._duty] and self.sends():
            head, first = self._log.head, self._receiver.first
            begin = Progress(head.position, head.hash.hex()) if first is None else Progress(first - 1)
            duties[self._duty] = begin.encode().decode()
            latest = self._find_latest()
        if latest is not None:
            self._reach(latest)
            if self._saved is None:  # so that the next server does not begin later
                await self.save()
        return latest

    def _find_latest(self) -> Progress | None:
        """Return how far the receiver has events, or where it begins, once other servers can know that."""
        return find_latest(self._progress, self._cluster.read_handovers(self._duty))

    async def _deliver(self, delivery: Delivery) -> None:
        """Send a delivery once.

        Raises:
            NotDelivered: it was not acknowledged.
        """
        headers = delivery.sign(self._receiver.keys, int(time.time()))
        try:
            async with self._session.post(
                self._receiver.url, data=delivery.body, headers=headers, allow_redirects=False
            ) as answer:
                problem = describe_status(answer.status)
        except TimeoutError:
            problem = f"it did not answer within {TIMEOUT_S:g} s"
        except aiohttp.ClientConnectorError as error:
            problem = str(error)
        except (aiohttp.ClientError, OSError) as error:  # whose texts may have the whole URL
            problem = f"the connection failed: {type(error).__name__}"
        if problem is not None:
            raise NotDelivered(problem)

    def _reach(self, progress: Progress) -> None:
        self._progress = progress
        self._cluster.duties[self._duty] = progress.encode().decode()

    async def _pause(self, problem: str) -> None:
        """Wait until the next attempt is due."""
        self._failures += 1
        if self.problem is None:
            _log.warning("events are not delivered to %s, and wait: %s", self.name, problem)
        self.problem = problem
        await asyncio.sleep(pause_s(self._failures))


class Resolver(AbstractResolver):
    """Looks up receivers' names in threads that nothing else uses.

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
        """Wait for no lookup: its thread ends with the process."""


def _open_socket(address: aiohttp.AddrInfoType) -> socket.socket:
    """Return a socket with little room for answers: endless ones take turns with other work."""
    opened = socket.socket(*address[:3])
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, ANSWER_BYTES)
    return opened


SENDERS = web.AppKey("senders", list[Sender])


def _list_receivers(app: web.Application) -> tuple[Receiver, ...]:
    return cast("tuple[Receiver, ...]", app[CONFIG].tables.get(NAME, ()))


async def announce_progress(app: web.Application) -> None:
    """Set what other servers are told of the receivers, before this one joins them."""
    duties = app[CLUSTER].duties
    for receiver in _list_receivers(app):
        progress = None
        with suppress(OSError, ValueError):  # the sender reports them
            progress = await asyncio.to_thread(read_progress, app[CONFIG].data / FOLDER / receiver.name)
        duties[f"{NAME}/{receiver.name}"] = "" if progress is None else progress.encode().decode()


async def open_senders(app: web.Application) -> AsyncIterator[None]:
    """Send events to the receivers of the configuration, from where each has them."""
    app[SENDERS] = senders = list[Sender]()
    receivers = _list_receivers(app)
    if not receivers:
        yield
        return
    [first] = await app[READER].rows(0, 1)
    source = f"urn:loadledger:{first.hash.hex()[:32]}"  # the same at all nodes
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(
            resolver=Resolver(), keepalive_timeout=KEPT_S, socket_factory=_open_socket
        ),
        timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
        headers={hdrs.USER_AGENT: f"loadledger/{version('loadledger')}"},
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
    ) as session:
        senders += [
            Sender(
                each,
                app[CONFIG].data / FOLDER,
                source=source,
                log=app[LOG],
                reader=app[READER],
                cluster=app[CLUSTER],
                session=session,
            )
            for each in receivers
        ]
        tasks = [asyncio.create_task(each.run(), name="notify") for each in senders]
        saving = asyncio.create_task(_save_progress(senders), name="notify progress")
        yield
        for task in (*tasks, saving):
            task.cancel()
        await asyncio.wait([*tasks, saving])
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await _save_all(senders)


async def _save_progress(senders: Sequence[Sender]) -> None:
    while True:
        await asyncio.sleep(SAVE_EVERY_S)
        await _save_all(senders)


async def _save_all(senders: Iterable[Sender]) -> None:
    """Write the progress of each that has a new one; what cannot be written is left for another time."""
    for sender in senders:
        try:
            await sender.save()
        except (LedgerProblem, OSError) as error:
            if not sender.has_unsaved:
                _log.warning("how far %s has events could not be written: %s", sender.name, error)
            sender.has_unsaved = True


async def read_gauges(app: web.Application) -> Sequence[Gauge]:
    """Return the metrics of receivers; the lag is known to the server that sends."""
    senders = app[SENDERS]
    return (
        (
            "notify_lag_events",
            "Events that wait for a receiver.",
            {each.name: each.lag for each in senders if each.sends()},
            "receiver",
        ),
        (
            "notify_delivered_total",
            "Events that a receiver has acknowledged.",
            {each.name: each.delivered for each in senders},
            "receiver",
        ),
    )


def read_notices(app: web.Application) -> list[OperatorNotice]:
    """Return a notice for each receiver that does not take its events."""
    return [
        OperatorNotice(
            title=f"Events are not delivered to {each.name}",
            why=f"{each.lag} of them wait: {each.problem}." if each.lag else f"{each.problem}.",
            todo="Once the receiver takes them, delivery goes on where it was, within a minute.",
        )
        for each in app[SENDERS]
        if each.problem is not None and each.sends()
    ]
