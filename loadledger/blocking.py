"""Runs flows and blocks meanwhile."""

from __future__ import annotations

import http.client
import time
from collections.abc import Generator
from contextlib import closing
from typing import Any, TypeVar

from loadledger.connections import Response, Transport
from loadledger.effects import Answer, Effect, Flow, Give, More, Open, Pause, Request, Send, Shut
from loadledger.options import Options
from loadledger.problems import ClientProblem

T = TypeVar("T")


class Runner:
    """Runs flows; each has a stream of its own, if it wants one."""

    def __init__(self, options: Options) -> None:
        self._transport = Transport(options)

    def close(self) -> None:
        """Close all connections that nobody uses."""
        self._transport.close()

    def run(self, flow: Flow[T]) -> T:
        """Return what a flow returns."""
        try:
            next(self._driven(flow))
        except StopIteration as end:
            result: T = end.value
            return result
        raise AssertionError("only what is iterated gives values")

    def iterate(self, flow: Flow[Any]) -> Generator[Any, None, None]:
        """Give what a flow gives."""
        yield from self._driven(flow)

    def _driven(self, flow: Flow[T]) -> Generator[Any, None, T]:
        with closing(flow), closing(_Steps(self._transport)) as steps:
            told, problem = None, None
            while True:
                try:
                    effect = flow.send(told) if problem is None else flow.throw(problem)
                except StopIteration as end:
                    result: T = end.value
                    return result
                told, problem = None, None
                if isinstance(effect, Give):
                    yield from effect.values
                    continue
                try:
                    told = steps.done(effect)
                except ClientProblem as trouble:
                    problem = trouble


class _Steps:
    """Does what one flow wants done."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._stream: Response | None = None

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def done(self, effect: Effect) -> Answer | bytes | None:
        match effect:
            case Send(request):
                return self._transport.send(request)
            case Pause(seconds):
                time.sleep(seconds)
            case Open(request):
                return self._open(request)
            case More():
                assert self._stream is not None
                return self._stream.read()
            case Shut():
                self.close()
        return None

    def _open(self, request: Request) -> Answer:
        self.close()
        self._stream = self._transport.open(request)
        if self._stream.status == http.client.OK:
            return Answer(self._stream.status, self._stream.headers, b"")
        return self._transport.refused(self._stream)
