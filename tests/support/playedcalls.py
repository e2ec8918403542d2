"""Calls of the client, played: a transport answers from a list, and the clock is a number."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Coroutine, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import msgspec

from loadledger.address import Address
from loadledger.asking import Setting
from loadledger.blocking import iterate, run
from loadledger.calls import Calls
from loadledger.exchange import Answer, Request
from loadledger.problems import ClientProblem

T = TypeVar("T")

ADDRESS = Address("http://ledger.example:8080", "s3cr3t-token")
NDJSON = Answer(200, {"content-type": "application/x-ndjson"}, b"")


class OutOfAnswers(Exception):
    """The call goes on after the last answer: what it did before is what counts."""


@dataclass(slots=True)
class Played:
    """A transport of answers that are known before, and what a call did with it.

    Attributes:
        answers: answers, parts of streams, and problems.
        took_s: how long each takes to come.
        requests: what was asked.
        pauses: how long nothing was done, each time.
        given: what came out of the iteration.
        closed: how many streams were closed.
        now: the time, in seconds.
    """

    answers: Iterable[Answer | bytes | ClientProblem]
    took_s: float = 0.0
    requests: list[Request] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)
    given: list[Any] = field(default_factory=list)
    closed: int = 0
    now: float = 100.0
    _iterator: Iterator[Answer | bytes | ClientProblem] | None = None

    @property
    def calls(self) -> Calls:
        """The calls of a client over this."""
        return Calls(Setting(ADDRESS, 30.0, self, now=lambda: self.now, chance=lambda: 1.0))

    def play(self, call: Coroutine[Any, Any, T]) -> T:
        """Return what a call returns; when the answers are used up, it ends."""
        return run(call)

    def iterate(self, values: AsyncGenerator[Any, None]) -> None:
        """Have all the values given that there are, or until the answers are used up."""
        for value in iterate(values):
            self.given.append(value)

    async def send(self, request: Request) -> Answer:
        """Answer."""
        self.requests.append(request)
        answer = self.next()
        assert isinstance(answer, Answer)
        return answer

    async def open(self, request: Request) -> PlayedStream:
        """Answer with a stream."""
        return PlayedStream(self, await self.send(request))

    async def pause(self, seconds: float) -> None:
        """Have time pass."""
        self.pauses.append(seconds)
        self.now += seconds

    def next(self) -> Answer | bytes:
        """Return the next answer, or part of a stream."""
        if self._iterator is None:
            self._iterator = iter(self.answers)
        self.now += self.took_s
        answer = next(self._iterator, None)
        if answer is None:
            raise OutOfAnswers
        if isinstance(answer, ClientProblem):
            raise answer
        return answer


@dataclass(slots=True)
class PlayedStream:
    """A stream of parts that are known before."""

    played: Played
    answer: Answer

    async def read(self) -> bytes:
        """Return the next part."""
        part = self.played.next()
        assert isinstance(part, bytes)
        return part

    def close(self) -> None:
        """Count it."""
        self.played.closed += 1


def answer(members: Any, status: int = 200, **headers: str) -> Answer:
    """Return an answer of JSON."""
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    return Answer(status, {"content-type": "application/json", **named}, msgspec.json.encode(members))


def problem(status: int, code: str, detail: str = "no", **members: Any) -> Answer:
    """Return a refusal as the server writes one."""
    body = {"status": status, "code": code, "detail": detail, **members}
    return replace(answer(body, status), headers={"content-type": "application/problem+json"})


def job(status: str = "pending", **members: Any) -> dict[str, Any]:
    """Return a job's members."""
    return {"id": "j1", "kind": "load", "model_id": "m", "version": 1, "status": status, **members}


def event_line(position: int, **members: Any) -> bytes:
    """Return an event as a stream has it."""
    return msgspec.json.encode({"position": position, "type": "LoadStarted", **members})


def bookmark(position: int) -> bytes:
    """Return the line that says where a stream is."""
    return b'{"stream":"bookmark","position":%d}' % position
