"""Flows of the client, played: what they want done is answered from a list, and the clock is a number."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import msgspec

from loadledger.address import Address
from loadledger.asking import Setting
from loadledger.effects import Answer, Effect, Flow, Give, Open, Pause, Request, Send, Shut
from loadledger.problems import ClientProblem

T = TypeVar("T")

ADDRESS = Address("http://ledger.example:8080", "s3cr3t-token")
NDJSON = Answer(200, {"content-type": "application/x-ndjson"}, b"")


class OutOfAnswers(Exception):
    """The flow goes on after the last answer: what it did before is what counts."""


@dataclass(slots=True)
class Played:
    """What a flow did.

    Attributes:
        effects: all that it wanted done.
        given: what it gave to whoever iterates.
        now: the time, in seconds.
        result: what it returned.
    """

    answers: Iterable[Answer | bytes | ClientProblem]
    took_s: float = 0.0
    effects: list[Effect] = field(default_factory=list)
    given: list[Any] = field(default_factory=list)
    now: float = 100.0
    result: Any = None

    @property
    def setting(self) -> Setting:
        """What the flow has to be made with."""
        return Setting(ADDRESS, 30.0, now=lambda: self.now, chance=lambda: 1.0)

    @property
    def pauses(self) -> list[float]:
        """How long it did nothing, each time."""
        return [effect.seconds for effect in self.effects if isinstance(effect, Pause)]

    @property
    def requests(self) -> list[Request]:
        """What it asked."""
        return [effect.request for effect in self.effects if isinstance(effect, Send | Open)]

    def play(self, flow: Flow[T]) -> T:
        """Run the flow to its end, or until the answers are used up."""
        answers = iter(self.answers)
        told: Any = None
        problem: ClientProblem | None = None
        try:
            while True:
                effect = flow.send(told) if problem is None else flow.throw(problem)
                self.effects.append(effect)
                told, problem = None, None
                if isinstance(effect, Give):
                    self.given += effect.values
                elif isinstance(effect, Pause):
                    self.now += effect.seconds
                elif not isinstance(effect, Shut):
                    self.now += self.took_s
                    answer = next(answers, OutOfAnswers)
                    if answer is OutOfAnswers:
                        raise OutOfAnswers
                    told, problem = (None, answer) if isinstance(answer, ClientProblem) else (answer, None)
        except StopIteration as end:
            self.result = end.value
            result: T = end.value
            return result
        finally:
            flow.close()


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
