"""Clients that ask one thing without pause and note when they were answered, while something else happens.

`python -m bench.answers PORT REQUEST CLIENTS` sends the bytes of the file REQUEST, one at a time on each
connection, says by an empty line that it does, and ends when its standard input does: then it prints its
`Answers` as JSON. Any answer but 200 is counted as failed and asked again.
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

import uvloop

from bench.generator import HOST, Client, WrongAnswer

WARM_UP_S = 0.3
# Long enough that those who are refused leave the cores to the load that they wait for, and short beside it.
PAUSE_S = 0.005
LAST_ANSWER_LIMIT_S = 60


@dataclass(frozen=True, slots=True)
class Answers:
    """What the clients were answered.

    Args:
        answered_s: When each of them was, on `time.monotonic()`, which all processes of a machine share.
        failed: Answers that were none.
        reason: The first of these.
    """

    answered_s: Sequence[Sequence[float]]
    failed: int
    reason: str

    @property
    def total(self) -> int:
        """Return how many requests were sent."""
        return sum(map(len, self.answered_s)) + self.failed

    def within(self, begin_s: float, end_s: float) -> int:
        """Return how many were answered in this time."""
        return sum(bisect_left(times, end_s) - bisect_left(times, begin_s) for times in self.answered_s)

    def longest_gap_s(self, begin_s: float, end_s: float) -> float:
        """Return how long the client that waited longest in this time had no answer."""
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


class Asker(Client):
    """A client that notes when it was answered, and goes on after an answer that is none."""

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
def running(port: int, request: Path, *, clients: int) -> Iterator[Callable[[], Answers]]:
    """Ask in a process of its own from now on, and yield what stops it and returns the answers."""
    command = [sys.executable, "-m", "bench.answers", str(port), str(request), str(clients)]
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


async def ask(port: int, request: bytes, clients: int) -> Answers:
    """Ask until nobody holds the other end of the standard input.

    Raises:
        WrongAnswer: the server closed a connection, or answered what cannot be counted.
        TimeoutError: an answer is still missing long after the end.
    """
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), stopped.set)
    askers = [Asker(request) for _ in range(clients)]
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


def main(port: str, request: str, clients: str) -> None:
    """Ask as the command line says, and print the answers."""
    gc.disable()  # there is nothing to collect here, and a pause would count as the server's
    try:
        answers = uvloop.run(ask(int(port), Path(request).read_bytes(), int(clients)))
    except (WrongAnswer, TimeoutError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None
    print(json.dumps(asdict(answers)))


if __name__ == "__main__":
    main(*sys.argv[1:])
