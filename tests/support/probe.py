"""A program that asks a model every 10 ms and records each answer; `support.campaign` runs it.

It is a process of its own, so that a test that keeps its own interpreter busy is not measured. It never waits
for an answer before it asks again, so a server that hangs for a second has a hundred requests to answer.
"""

import asyncio
import json
import sys
import time

INTERVAL_S = 0.01
MOST = 128
"""Requests in flight; beyond, the probe waits for an answer."""
LIMIT_S = 30.0
"""An answer that takes longer counts as none."""
READY = b"answered\n"
"""Printed when so many connections are open."""
CONNECTIONS = 16
"""Opened at first, so that a server without descriptors answers over them."""


class Probe:
    """Asks one model over connections of its own.

    Args:
        target: `host`, `port`, and `request`, the text of the request.
    """

    def __init__(self, target: dict[str, str]) -> None:
        self._host, self._port = target["host"], int(target["port"])
        self._request = target["request"].encode()
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self.samples: list[tuple[float, float, str]] = []

    async def run(self, stop: asyncio.Event) -> None:
        """Ask until it is told to stop; then wait for the answers."""
        asked = {asyncio.create_task(self._sample()) for _ in range(CONNECTIONS)}
        await asyncio.wait(asked)
        sys.stdout.buffer.write(READY)
        sys.stdout.buffer.flush()
        due = time.monotonic()
        while not stop.is_set():
            asked = {task for task in asked if not task.done()}
            if len(asked) < MOST:
                asked.add(asyncio.create_task(self._sample()))
            due = max(due + INTERVAL_S, time.monotonic() - 1)  # a stopped probe does not catch up
            await asyncio.sleep(max(0.0, due - time.monotonic()))
        await asyncio.gather(*asked)
        for _, writer in self._idle:
            writer.close()

    async def _sample(self) -> None:
        began = time.monotonic()
        try:
            async with asyncio.timeout(LIMIT_S):
                outcome = await self._ask()
        except TimeoutError:
            outcome = "no answer"
        except (OSError, asyncio.IncompleteReadError) as error:
            outcome = type(error).__name__
        self.samples.append((began, time.monotonic() - began, outcome))

    async def _ask(self) -> str:
        """Return the status, and what an error says; an idle connection that was closed is asked again."""
        while self._idle:
            try:
                return await self._ask_over(*self._idle.pop())
            except (OSError, asyncio.IncompleteReadError):
                continue
        return await self._ask_over(*await asyncio.open_connection(self._host, self._port))

    async def _ask_over(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        is_kept = False
        try:
            writer.write(self._request)
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            length = int(head.partition("content-length: ")[2].partition("\r\n")[0])
            body = await reader.readexactly(length)
            is_kept = "connection: close" not in head
        finally:
            if is_kept:
                self._idle.append((reader, writer))
            else:
                writer.close()
        status = head.split(" ", 2)[1]
        if status == "200":
            return status
        later = " retry-after" if "\r\nretry-after: " in head else ""
        return f"{status} {json.loads(body).get('code')}{later}"


async def _main() -> None:
    probe, stop = Probe(json.loads(sys.stdin.readline())), asyncio.Event()
    reading = asyncio.create_task(asyncio.to_thread(sys.stdin.readline))  # until the test closes it
    reading.add_done_callback(lambda _: stop.set())
    await probe.run(stop)
    json.dump(probe.samples, sys.stdout)


if __name__ == "__main__":
    asyncio.run(_main())
