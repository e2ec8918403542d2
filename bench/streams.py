"""Delay of events on many streams, and the memory of streams.

The events are real: loaded models are pinned and unpinned, which takes three events and no process.
"""

import asyncio
import json
import re
import resource
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from bench import driver, models
from bench.driver import Server
from bench.table import Row

MODELS = 4
EVENTS_EACH = 2
"""`LoadRequested`, and `ModelSettingsChanged`."""
LATE_S = 1.0
OPEN_AT_ONCE = 50
STREAMS_EACH = 20
"""Streams of a subject, as many as it may have open."""
LIMIT_S = 120.0
_ID = b"\nid: "
_LIVE = b"\nevent: live\n"
_TIME = re.compile(rb'"recorded_at":"([^"]{27})"')


@dataclass(slots=True)
class Heard:
    """Events that one stream has received.

    Attributes:
        position: of the last event.
        events: how many came since it was live.
        late: how many came more than a second after they were recorded, or in a piece with such a one.
        delays_s: of the oldest event of each piece.
        wrong: an error, if there was one.
    """

    position: int = 0
    events: int = 0
    late: int = 0
    delays_s: list[float] = field(default_factory=list)
    wrong: str = ""
    live: bool = False


class Ear(asyncio.Protocol):
    """A connection that reads a stream as cheaply as it can, since it shares the cores."""

    def __init__(self, request: bytes, heard: Heard, tell: Callable[[], None]) -> None:
        self._request = request
        self._heard = heard
        self._tell = tell
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask for the stream."""
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Count the events of a piece, which have to follow each other."""
        now, heard = time.time(), self._heard
        whole, _, self._rest = (self._rest + data).rpartition(b"\n\n")
        number, last = whole.count(_ID), whole.rfind(_ID) + len(_ID)
        was_live, heard.live = heard.live, heard.live or _LIVE in whole
        if not number:
            self._tell()
            return
        position = int(whole[last : whole.index(b"\n", last)])
        if was_live:
            if position != heard.position + number:
                heard.wrong = f"{number} events up to {position} after {heard.position}"
            first = _TIME.search(whole)
            assert first is not None
            delay_s = now - datetime.fromisoformat(first[1].decode()).timestamp()
            heard.events += number
            heard.late += number if delay_s > LATE_S else 0
            heard.delays_s.append(delay_s)
        heard.position = position
        self._tell()

    def connection_lost(self, exc: Exception | None) -> None:
        """Record that the stream has ended, which is an error."""
        self._heard.wrong = self._heard.wrong or f"the stream ended: {exc}"
        self._tell()


class Audience:
    """Streams of one server, all from the head on, of as many subjects as it takes."""

    def __init__(self, port: int, tokens: Sequence[str]) -> None:
        self._port, self._tokens = port, tokens
        self._changed = asyncio.Event()
        self._transports: list[asyncio.BaseTransport] = []
        self.heard: list[Heard] = []

    async def grow(self, number: int) -> None:
        """Open so many, and wait until all of them are live."""
        for first in range(0, number, OPEN_AT_ONCE):
            await asyncio.gather(*(self._open() for _ in range(first, min(number, first + OPEN_AT_ONCE))))
        await self._until(lambda heard: heard.live)

    async def hear(self, position: int) -> None:
        """Wait until all have received an event."""
        await self._until(lambda heard: heard.position >= position)

    def leave(self) -> None:
        """Close all."""
        for transport in self._transports:
            assert isinstance(transport, asyncio.WriteTransport)
            transport.abort()

    async def _open(self) -> None:
        token = self._tokens[len(self.heard) // STREAMS_EACH]
        request = (
            f"GET /api/v1/events/stream HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n\r\n"
        ).encode()
        heard = Heard()
        self.heard.append(heard)
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_connection(
            lambda: Ear(request, heard, self._changed.set), "127.0.0.1", self._port
        )
        self._transports.append(transport)

    async def _until(self, holds: Callable[[Heard], bool]) -> None:
        async with asyncio.timeout(LIMIT_S):
            while not all(holds(heard) for heard in self.heard):
                wrong = next((heard.wrong for heard in self.heard if heard.wrong), None)
                if wrong is not None:
                    raise SystemExit(f"a tail heard what it must not: {wrong}")
                self._changed.clear()
                await self._changed.wait()
                await asyncio.sleep(0.05)  # checks all streams, so not for each piece


def measure(server: Server, *, tails: int, seconds: float, per_second: int = 100) -> list[Row]:
    """Open streams, append events for a while, and measure how late they come.

    Args:
        server: Started without a limit of loads.
        tails: How many.
        seconds: How long.
        per_second: Events.
    """
    _allow_descriptors(tails)
    names = [f"told-{number}" for number in range(MODELS)]
    for name in names:
        models.write(server.repository, name, models.tiny())
        server.load(name)
    before = _resident(server.pid)
    heard, most = asyncio.run(_fan_out(server, names, tails, seconds, per_second))
    delays = sorted(delay for each in heard for delay in each.delays_s)
    events, late = sum(each.events for each in heard), sum(each.late for each in heard)
    name = f"{tails} tails, {heard[0].events / seconds:.0f} events/s for {seconds:g} s"
    median_ms, latest_ms = delays[len(delays) // 2] * 1000, delays[-1] * 1000
    return [
        Row(f"{name}: late by more than 1 s", f"{late} of {events}", "", None, "0", late == 0),
        Row(f"{name}: median, and latest", f"{median_ms:.0f}, {latest_ms:.0f} ms", "", None),
        Row(f"{name}: memory of the server, a tail", f"{(most - before) / tails / 1024:.0f} KiB", "", None),
    ]


async def _fan_out(
    server: Server, names: list[str], tails: int, seconds: float, per_second: int
) -> tuple[list[Heard], int]:
    audience = Audience(server.port, _issue_tokens(server, -(-tails // STREAMS_EACH)))
    await audience.grow(tails)
    until = time.monotonic() + seconds
    pause_s = EVENTS_EACH * len(names) / per_second
    posting = [
        asyncio.to_thread(_pin_and_unpin, server, name, until, pause_s, threading.Event()) for name in names
    ]
    most = 0
    sampling = asyncio.gather(*posting)
    while not sampling.done():
        most = max(most, _resident(server.pid))
        await asyncio.sleep(0.5)
    await sampling
    with closing(server.connect()) as connection:  # the idle one may have been closed by now
        server.send(connection, "GET", f"/api/v1/events?before={driver.BEYOND_ALL}&limit=1")
        position = driver.read(connection).json()["as_of"]
    await audience.hear(position)
    audience.leave()
    return audience.heard, most


def _issue_tokens(server: Server, count: int) -> list[str]:
    """Return tokens of as many subjects."""
    bodies = [
        json.dumps({"subject": f"tail-{number}", "roles": ["audit"]}).encode() for number in range(count)
    ]
    return [server.ask("POST", "/api/v1/tokens", body).json()["token"] for body in bodies]


def _pin_and_unpin(
    server: Server, model_id: str, until: float, pause_s: float, never: threading.Event
) -> None:
    connection, path, pinned = server.connect(), f"/api/v1/models/{model_id}/load", False
    due = time.monotonic()
    while due < until:
        pinned = not pinned
        body = json.dumps({"pinned": pinned}).encode()
        server.send(connection, "POST", path, body, driver.WAIT)
        driver.completed_job(driver.read(connection), path)
        due += pause_s
        never.wait(max(0.0, due - time.monotonic()))
    connection.close()


def _allow_descriptors(tails: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < tails + 100:
        raise SystemExit(f"{tails} tails need as many descriptors, and {hard} are allowed: see `ulimit -Hn`")


def _resident(pid: int) -> int:
    found = re.search(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
