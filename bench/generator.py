"""Clients in a process of their own, which cost little beside the server that they measure.

`python -m bench.generator rate PORT CLIENTS SECONDS WARM_UP_S REQUEST...` sends the bytes of the files over
open connections, one request in flight on each, the files in turn to the clients, and prints its `Result` as
JSON. The time counts after the warm-up. Any answer but 200 ends it, with the answer's text and exit code 1.

`python -m bench.generator record PORT REQUEST CLIENTS` sends in the same way and prints an empty line when it
has begun. It ends when its standard input does, and prints its `Answers` as JSON. Any answer but 200 is
counted as failed, and the request is sent again.
"""

import asyncio
import gc
import json
import subprocess
import sys
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import cast

import uvloop

HOST = "127.0.0.1"
BUFFER_BYTES = 2**20
TEXT_BYTES = 4096
LENGTH = b"\r\ncontent-length: "
LAST_ANSWER_LIMIT_S = 60
"""From the end of the time to the last answer of a slow server."""
WARM_UP_S = 0.3
PAUSE_S = 0.005
"""After a refusal: long enough to leave the cores to the load, and short beside it."""


@dataclass(frozen=True, slots=True)
class Result:
    """Result of one run: responses per second, and their latency in milliseconds."""

    per_s: float
    p50_ms: float
    p99_ms: float


class WrongAnswer(Exception):
    """The server closed the connection, or its answer is not a 200 with a Content-Length."""


def measure_rate(port: int, *requests: Path, clients: int, seconds: float) -> Result:
    """Measure in a process of its own, after a warm-up; a wrong answer ends the bench with its text."""
    warm_up_s = min(WARM_UP_S, seconds)
    arguments = [str(each) for each in (port, clients, seconds, warm_up_s, *requests)]
    done = subprocess.run(  # noqa: S603 - our own module and paths of ours
        [sys.executable, "-m", "bench.generator", "rate", *arguments],
        stdout=subprocess.PIPE,
        timeout=seconds + warm_up_s + 2 * LAST_ANSWER_LIMIT_S,
        check=False,
    )
    if done.returncode:
        raise SystemExit(
            f"the load generator ended with {done.returncode}: {requests[0].name} to port {port}"
        )
    return Result(**json.loads(done.stdout))


class Client(asyncio.BufferedProtocol):
    """A connection that sends the request, waits for the whole answer, and sends it again until `stop`."""

    def __init__(self, request: bytes, begin: float, stop: float) -> None:
        self.latencies: list[float] = []
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request, self._begin, self._stop = request, begin, stop
        self._buffer = bytearray(BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._arrived = 0
        self._length: int | None = None  # of the whole answer; None while its head is awaited
        self._is_good = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the first request."""
        # uvloop's does not declare that it is one.
        self._transport = cast(asyncio.Transport, transport)
        self._send()

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - what the buffer has left is given
        """Return the buffer; the body of a good answer is overwritten."""
        return self._view if self._is_good else self._view[self._arrived :]

    def buffer_updated(self, nbytes: int) -> None:
        """Count the bytes; at the end of an answer, record its latency and send again."""
        self._arrived += nbytes
        try:
            if self._length is None:
                self._read_head()
            if self._length is not None and self._arrived >= self._length:
                self._answered(self._length)
            self._check_room()
        except WrongAnswer as error:
            self._end(error)

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail, unless the client has closed the connection."""
        self._end(WrongAnswer(f"the server closed the connection: {exc or 'no reason'}: {self._text()}"))

    def _send(self) -> None:
        self._arrived, self._length, self._is_good = 0, None, False
        self._sent = time.perf_counter()
        self._transport.write(self._request)

    def _read_head(self) -> None:
        """Set the answer's length and whether it is good, as soon as its head is here."""
        end = self._buffer.find(b"\r\n\r\n", 0, self._arrived)
        if end < 0:
            return
        head = bytes(self._view[: end + 2]).lower()
        start = head.find(LENGTH) + len(LENGTH)
        if start < len(LENGTH):
            raise WrongAnswer(f"no Content-Length: {self._text()}")
        self._length = end + 4 + int(head[start : head.index(b"\r", start)])
        self._is_good = head.startswith(b"http/1.1 200")

    def _check_room(self) -> None:
        if not self._is_good and self._arrived == BUFFER_BYTES:
            raise WrongAnswer(self._text())

    def _answered(self, length: int) -> None:
        now = time.perf_counter()
        if not self._is_good:
            raise WrongAnswer(self._text())
        if self._arrived > length:
            raise WrongAnswer(f"{self._arrived - length} bytes more than its Content-Length")
        if self._begin <= now < self._stop:
            self.latencies.append(now - self._sent)
        if now < self._stop:
            self._send()
        else:
            self._end(None)

    def _text(self) -> str:
        return bytes(self._view[: min(self._arrived, TEXT_BYTES)]).decode(errors="replace")

    def _end(self, error: WrongAnswer | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(error) if error else self.ended.set_result(None)
        self._transport.abort()


async def generate(
    port: int, requests: Sequence[bytes], clients: int, seconds: float, warm_up_s: float
) -> Result:
    """Run the clients, which take the requests in turn, and return their measurements.

    Raises:
        WrongAnswer: one of them was answered something else than 200.
        TimeoutError: an answer is still missing long after the end.
    """
    begin = time.perf_counter() + warm_up_s
    stop = begin + seconds
    loop = asyncio.get_running_loop()
    protocols = [Client(requests[index % len(requests)], begin, stop) for index in range(clients)]
    for protocol in protocols:
        await loop.create_connection(lambda protocol=protocol: protocol, HOST, port)  # type: ignore[misc]
    async with asyncio.timeout(warm_up_s + seconds + LAST_ANSWER_LIMIT_S):
        await asyncio.gather(*(protocol.ended for protocol in protocols))
    latencies = sorted(latency for protocol in protocols for latency in protocol.latencies)
    if not latencies:
        raise WrongAnswer(f"no answer within {seconds} s; give it more time")
    return Result(len(latencies) / seconds, _rank(latencies, 0.50), _rank(latencies, 0.99))


def _rank(latencies: list[float], share: float) -> float:
    return latencies[int(share * (len(latencies) - 1))] * 1000


def _print_rate(port: str, clients: str, seconds: str, warm_up_s: str, *requests: str) -> None:
    contents = [Path(request).read_bytes() for request in requests]
    result = uvloop.run(generate(int(port), contents, int(clients), float(seconds), float(warm_up_s)))
    print(json.dumps(asdict(result)))


@dataclass(frozen=True, slots=True)
class Answers:
    """Responses to the clients.

    Args:
        answered_s: Times of the good answers by client, on `time.monotonic()`, which all processes share.
        failed: How many other answers there were.
        reason: The first of these.
    """

    answered_s: Sequence[Sequence[float]]
    failed: int
    reason: str

    @property
    def total(self) -> int:
        """Return the number of requests."""
        return sum(map(len, self.answered_s)) + self.failed

    def within(self, begin_s: float, end_s: float) -> int:
        """Return how many were answered in this time."""
        return sum(bisect_left(times, end_s) - bisect_left(times, begin_s) for times in self.answered_s)

    def longest_gap_s(self, begin_s: float, end_s: float) -> float:
        """Return the longest time in which one client had no answer."""
        return max(longest_gap(times, begin_s, end_s) for times in self.answered_s)


def longest_gap(times: Sequence[float], begin: float, end: float) -> float:
    """Return the longest gap between two consecutive times of which a part lies between begin and end.

    Args:
        times: In ascending order; before the first and after the last nothing is known, so begin and end
            take their place.
        begin: Where to look from.
        end: And until when.
    """
    first, last = bisect_right(times, begin), bisect_left(times, end)
    before = times[first - 1] if first else begin
    after = times[last] if last < len(times) else end
    return max(later - earlier for earlier, later in pairwise([before, *times[first:last], after]))


class RecordingClient(Client):
    """A client that records the time of each response, and continues after a failed one."""

    def __init__(self, request: bytes) -> None:
        super().__init__(request, begin=0, stop=0)
        self.answered_s: list[float] = []
        self.failed = 0
        self.reason = ""
        self.is_stopping = False

    def _answered(self, length: int) -> None:  # noqa: ARG002 - the load generator's counts it
        if self._is_good:
            self.answered_s.append(time.monotonic())
        else:
            self.failed += 1
            self.reason = self.reason or self._text()
        if self.is_stopping:
            self._end(None)
        elif self._is_good:
            self._send()
        else:
            asyncio.get_running_loop().call_later(PAUSE_S, self._send)


@contextmanager
def recording(port: int, request: Path, *, clients: int) -> Iterator[Callable[[], Answers]]:
    """Send requests in a process of its own; yield a function that stops it and returns the answers."""
    command = [sys.executable, "-m", "bench.generator", "record", str(port), str(request), str(clients)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:  # noqa: S603 - our own module
        try:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise SystemExit("the clients did not start; what they wrote stands above")
            yield lambda: _stopped(process)
        finally:
            process.kill()


def _stopped(process: "subprocess.Popen[bytes]") -> Answers:
    output, _ = process.communicate(timeout=2 * LAST_ANSWER_LIMIT_S)
    if process.returncode:
        raise SystemExit(f"the clients ended with {process.returncode}; what they wrote stands above")
    return Answers(**json.loads(output))


async def record(port: int, request: bytes, clients: int) -> Answers:
    """Send requests until standard input ends.

    Raises:
        WrongAnswer: the server closed a connection, or answered what cannot be counted.
        TimeoutError: an answer is still missing long after the end.
    """
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), stopped.set)
    askers = [RecordingClient(request) for _ in range(clients)]
    for asker in askers:
        await loop.create_connection(lambda asker=asker: asker, HOST, port)  # type: ignore[misc]
    await asyncio.sleep(WARM_UP_S)
    print(flush=True)
    await stopped.wait()
    for asker in askers:
        asker.is_stopping = True
    async with asyncio.timeout(LAST_ANSWER_LIMIT_S):
        await asyncio.gather(*(asker.ended for asker in askers))
    reason = next((asker.reason for asker in askers if asker.reason), "")
    return Answers([asker.answered_s for asker in askers], sum(asker.failed for asker in askers), reason)


def _print_answers(port: str, request: str, clients: str) -> None:
    answers = uvloop.run(record(int(port), Path(request).read_bytes(), int(clients)))
    # An unbuffered `sys.stdout` (PYTHONUNBUFFERED) does not write the rest after a short write.
    with open(sys.stdout.fileno(), "w", closefd=False) as output:
        json.dump(asdict(answers), output)


def main(kind: str, *arguments: str) -> None:
    """Run the command line."""
    gc.disable()  # there is nothing to collect here, and a pause would count as the server's
    try:
        if kind == "rate":
            _print_rate(*arguments)
        else:
            _print_answers(*arguments)
    except (WrongAnswer, TimeoutError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None


if __name__ == "__main__":
    main(*sys.argv[1:])
