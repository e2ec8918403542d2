"""Runs flows in an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, closing
from typing import Any, TypeVar

import aiohttp

from loadledger.effects import Answer, Effect, Flow, Give, More, Open, Pause, Request, Send, Shut
from loadledger.loopconnections import Transport, answer_of
from loadledger.options import Options
from loadledger.problems import ClientProblem

T = TypeVar("T")

_OK = 200


class Runner:
    """Runs flows; each has a stream of its own, if it wants one."""

    def __init__(self, options: Options) -> None:
        self._transport = Transport(options)

    async def close(self) -> None:
        """Close all connections."""
        await self._transport.close()

    async def run(self, flow: Flow[T]) -> T:
        """Return what a flow returns."""
        steps = _Steps(self._transport)
        async with aclosing(_driven(flow, steps)) as driven:
            async for _ in driven:
                raise AssertionError("only what is iterated gives values")
        result: T = steps.result
        return result

    async def iterate(self, flow: Flow[Any]) -> AsyncGenerator[Any, None]:
        """Give what a flow gives."""
        async with aclosing(_driven(flow, _Steps(self._transport))) as driven:
            async for value in driven:
                yield value


class _Steps:
    """Does what one flow wants done."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._stream: aiohttp.ClientResponse | None = None
        self.result: Any = None

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    async def done(self, effect: Effect) -> Answer | bytes | None:
        match effect:
            case Send(request):
                return await self._transport.send(request)
            case Pause(seconds):
                await asyncio.sleep(seconds)
            case Open(request):
                return await self._open(request)
            case More():
                assert self._stream is not None
                return await self._transport.read(self._stream)
            case Shut():
                self.close()
        return None

    async def _open(self, request: Request) -> Answer:
        self.close()
        self._stream = await self._transport.open(request)
        if self._stream.status == _OK:
            return answer_of(self._stream, b"")
        return await self._transport.refused(self._stream)


async def _driven(flow: Flow[Any], steps: _Steps) -> AsyncGenerator[Any, None]:
    with closing(flow), closing(steps):
        told, problem = None, None
        while True:
            try:
                effect = flow.send(told) if problem is None else flow.throw(problem)
            except StopIteration as end:
                steps.result = end.value
                return
            told, problem = None, None
            if isinstance(effect, Give):
                for value in effect.values:
                    yield value
                continue
            try:
                told = await steps.done(effect)
            except ClientProblem as trouble:
                problem = trouble
