"""Receivers of pushed events: HTTP servers that check each delivery, keep it, and answer as a test says.

async with receiving() as receiver:
    receiver.plans.append(answer(500))  # the next delivery; later ones are answered as `usual` says
    async with local_server(folder, tables=receiver.tables(first=1)) as api:
        await receiver.until(lambda: receiver.sequences[-1:] == [api.position])
receiver.check(await api.events())
"""

import asyncio
import base64
import hashlib
import hmac
import json
import os
import socket
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import cast

from events.types import Event
from features.notify.table import Receiver
from support.http import LIMIT_S, Api, Json, when
from support.postgres import Address, free_address

SECRET = "whsec_" + base64.b64encode(b"a distinctive secret of tests").decode()
KEY = base64.b64decode(SECRET.removeprefix("whsec_"))
PATH = "/hooks/a-distinctive-path?token=a-distinctive-query"
CLOCK_S = 300
"""How far a delivery's timestamp may be from the time: as Standard Webhooks' libraries have it."""

Plan = Callable[[asyncio.StreamWriter], Awaitable[None]]
"""Answers one delivery; the connection goes on, unless the plan closes it."""


def answer(status: int, body: bytes = b"", **fields: str) -> Plan:
    """Answer with a status, a body, and header fields, `_` for `-`."""

    async def write(writer: asyncio.StreamWriter) -> None:
        lines = [f"HTTP/1.1 {status} Whatever", *(f"{k.replace('_', '-')}: {v}" for k, v in fields.items())]
        length = [] if status == 204 else [f"Content-Length: {len(body)}"]
        writer.write("\r\n".join([*lines, *length, "\r\n"]).encode() + body)
        await writer.drain()

    return write


def write_raw(data: bytes) -> Plan:
    """Send these bytes, and close."""

    async def write(writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await close(writer)

    return write


async def close(writer: asyncio.StreamWriter) -> None:
    """Close the connection, without an answer."""
    writer.close()


async def answer_and_close(writer: asyncio.StreamWriter) -> None:
    """Acknowledge, and close the connection without saying so in the answer."""
    await answer(204)(writer)
    writer.close()


async def hang(writer: asyncio.StreamWriter) -> None:
    """Answer nothing until the sender has gone."""
    with suppress(ConnectionError):
        await writer.wait_closed()


def answer_late(released: asyncio.Event, plan: Plan | None = None) -> Plan:
    """Answer once the event is set, by default with 204."""

    async def write(writer: asyncio.StreamWriter) -> None:
        await released.wait()
        await (plan or answer(204))(writer)

    return write


def write_endlessly(head: bytes, repeated: bytes) -> Plan:
    """Send `head`, and `repeated` as fast as the sender takes it until the connection ends."""

    async def write(writer: asyncio.StreamWriter) -> None:
        connection = socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno()))
        connection.settimeout(LIMIT_S)
        with closing(connection):
            writing = asyncio.create_task(asyncio.to_thread(_flood, connection, head, repeated))
            try:
                await asyncio.shield(writing)
            finally:
                with suppress(OSError):  # the sender has gone
                    connection.shutdown(socket.SHUT_RDWR)
                await asyncio.wait([writing])
        writer.close()

    return write


def _flood(connection: socket.socket, head: bytes, repeated: bytes) -> None:
    with suppress(OSError):
        connection.sendall(head)
        while True:
            connection.sendall(repeated)


@dataclass(frozen=True, slots=True)
class Arrival:
    """One delivery; `body` as it was sent."""

    id: str
    at_s: int
    signatures: str
    target: str
    body: bytes

    @property
    def event(self) -> Json:
        """The CloudEvent."""
        return json.loads(self.body)

    @property
    def sequence(self) -> int:
        """The position of the event."""
        return int(self.event["sequence"])


@dataclass(slots=True)
class ReceiverServer:
    """A receiver, which listens or not.

    Attributes:
        name: in the operator's table.
        path: of its URL, with the query.
        tls: of a receiver with HTTPS.
        host: in its URL; None is the address.
        arrived: all deliveries in order, whether it answered them or not.
        plans: for the next deliveries.
        usual: for those without a plan of their own.
        is_deaf: accepts connections, and reads nothing.
        problems: of deliveries that a receiver should refuse; a test fails for each.
        address: where it listens, whenever it does.
    """

    name: str = "tests"
    path: str = PATH
    tls: ssl.SSLContext | None = None
    host: str | None = None
    arrived: list[Arrival] = field(default_factory=list)
    plans: deque[Plan] = field(default_factory=deque)
    usual: Plan = field(default_factory=lambda: answer(204))
    is_deaf: bool = False
    problems: list[str] = field(default_factory=list)
    address: Address = field(default_factory=free_address)
    _server: asyncio.Server | None = None
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def url(self) -> str:
        """Its URL, with all that is secret."""
        host, port = self.address
        return f"{'http' if self.tls is None else 'https'}://{self.host or host}:{port}{self.path}"

    @property
    def sequences(self) -> list[int]:
        """The positions of all deliveries in order, also of those that were sent again."""
        return [each.sequence for each in self.arrived]

    def tables(self, *, first: int | None = None) -> Mapping[str, tuple[Receiver, ...]]:
        """Return `Config.tables` with this receiver alone."""
        return tables_of(self, first=first)

    async def start(self) -> None:
        """Listen."""
        self._server = await asyncio.start_server(self._connected, *self.address, ssl=self.tls)

    async def stop(self) -> None:
        """Listen no more, and close all connections."""
        if self._server is not None:
            self._server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._server = None

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until this holds."""

        async def look() -> tuple[bool, str]:
            return holds(), f"{self.name} has {self.sequences[-20:]}"

        await when(look, lambda seen: seen[0])

    def check(self, log: Sequence[Event], first: int, last: int | None = None) -> None:
        """Check that the events from `first` to `last` have arrived in order, and no other.

        An event that arrived before may arrive again.

        Args:
            log: all events of the ledger.
            first: the position of the first one.
            last: of the last one that is looked at: later ones may arrive meanwhile. Without it, whichever
                arrived.
        """
        assert self.problems == []
        firsts = {each.id: each for each in reversed(self.arrived)}
        ordered = list(
            dict.fromkeys(each.id for each in self.arrived if last is None or each.sequence <= last)
        )
        reached = first + len(ordered) - 1 if last is None else last
        assert [firsts[name].sequence for name in ordered] == list(range(first, reached + 1))
        assert ordered == [event.id for event in log[first - 1 : reached]]
        previous = firsts[ordered[0]].event["ledgerprevious"] if ordered else ""
        for each in map(firsts.__getitem__, ordered):
            data = each.body.partition(b',"data":')[2][:-1]
            digest = hashlib.sha256(bytes.fromhex(previous) + data).hexdigest()
            assert (each.event["ledgerprevious"], each.event["ledgerhash"]) == (previous, digest)
            assert each.event["id"] == each.id == each.event["data"]["id"]
            previous = digest
        for each in self.arrived:
            assert each.event == firsts[each.id].event

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while not writer.is_closing():
                await self._take(reader, writer)
        except (asyncio.IncompleteReadError, OSError):
            pass  # the sender has gone
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.is_deaf:
            cast("asyncio.Transport", writer.transport).pause_reading()
            await asyncio.Event().wait()
        head = (await reader.readuntil(b"\r\n\r\n")).decode("ascii")
        first, *lines = head.rstrip().split("\r\n")
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = await reader.readexactly(int(fields["content-length"]))
        self.problems += _list_problems(first, fields, body)
        self.arrived.append(
            Arrival(
                fields["webhook-id"],
                int(fields["webhook-timestamp"]),
                fields["webhook-signature"],
                first.split(" ")[1],
                body,
            )
        )
        plan = self.plans.popleft() if self.plans else self.usual
        await plan(writer)


def _list_problems(first: str, fields: Mapping[str, str], body: bytes) -> Iterable[str]:
    """Yield why a receiver should refuse a delivery."""
    if not first.startswith("POST "):
        yield first
    if fields["content-type"] != "application/cloudevents+json":
        yield fields["content-type"]
    if abs(time.time() - int(fields["webhook-timestamp"])) > CLOCK_S:
        yield fields["webhook-timestamp"]
    signed = f"{fields['webhook-id']}.{fields['webhook-timestamp']}.".encode() + body
    wanted = base64.b64encode(hmac.new(KEY, signed, hashlib.sha256).digest()).decode()
    if f"v1,{wanted}" not in fields["webhook-signature"].split(" "):
        yield fields["webhook-signature"]


@asynccontextmanager
async def receiving(
    name: str = "tests",
    *,
    usual: Plan | None = None,
    tls: ssl.SSLContext | None = None,
    is_deaf: bool = False,
) -> AsyncIterator[ReceiverServer]:
    """Run a receiver, which takes all deliveries unless it is told otherwise."""
    receiver = ReceiverServer(name, tls=tls, usual=usual or answer(204), is_deaf=is_deaf)
    if tls is not None:
        receiver.host, receiver.address = "localhost", ("127.0.0.1", receiver.address[1])
    await receiver.start()
    try:
        yield receiver
    finally:
        await receiver.stop()


def tables_of(*receivers: ReceiverServer, first: int | None = None) -> Mapping[str, tuple[Receiver, ...]]:
    """Return `Config.tables` with these receivers; `first` is the position of the first event, or None."""
    return {
        "notify": tuple(
            Receiver(name=each.name, url=each.url, keys=(KEY,), first=first) for each in receivers
        )
    }


def write_tables(folder: Path, *receivers: ReceiverServer, first: int | str = 1) -> tuple[str, str]:
    """Write a configuration with these receivers; return the arguments of a server with it.

    Args:
        folder: of the file, and of the file of the secret.
        receivers: the receivers.
        first: `from` of each.
    """
    secret, file = folder / "secret", folder / "notify.toml"
    for path in (secret, file):
        path.touch(mode=0o600)
    secret.write_text(SECRET + "\n")
    file.write_text(
        "".join(
            f'[[notify]]\nname = "{each.name}"\nurl = "{each.url}"\nsecret_file = "secret"\n'
            f"from = {json.dumps(first)}\n"
            for each in receivers
        )
    )
    return "--config", str(file)


async def list_notices(api: Api) -> dict[str, str]:
    """Return why receivers get no events, by name."""
    notices = (await api.get("/api/v1/resources")).json.get("notices", [])
    title = "Events are not delivered to "
    return {
        each["title"].removeprefix(title): each["why"] for each in notices if each["title"].startswith(title)
    }


async def notice_when(api: Api, name: str, text: str) -> str:
    """Wait until the notice of a receiver has this text; without a text, until there is none."""
    notices = await when(
        partial(list_notices, api),
        lambda seen: text in seen[name] if text and name in seen else not text and name not in seen,
    )
    return notices.get(name, "")


async def read_metrics(api: Api) -> dict[str, float]:
    """Return the metrics of receivers, at most a second old; see `metrics_of`."""
    text = (await api.get("/metrics")).body.decode()
    prefix = "loadledger_notify_"
    lines = [line.rpartition(" ") for line in text.splitlines() if line.startswith(prefix)]
    return {name.removeprefix(prefix): float(value) for name, _, value in lines}


def metrics_of(receiver: ReceiverServer, *, waiting: int, is_failing: bool = False) -> dict[str, float]:
    """Return the metrics of a receiver for which so many events wait."""
    label = f'{{receiver="{receiver.name}"}}'
    return {f"lag_events{label}": waiting, f"failing{label}": is_failing}


async def metrics_when(api: Api, wanted: Mapping[str, float]) -> None:
    """Wait until these are among the metrics of receivers."""
    await when(partial(read_metrics, api), lambda seen: wanted.items() <= seen.items())


async def delivered(api: Api, *receivers: ReceiverServer) -> int:
    """Wait until the last event has been sent to these receivers; return its position."""

    async def look() -> tuple[int, list[list[int]]]:
        position = (await api.get("/api/v1/events/head")).json["position"]
        return position, [each.sequences[-1:] for each in receivers]

    position, _ = await when(look, lambda seen: all(each == [seen[0]] for each in seen[1]))
    return position
