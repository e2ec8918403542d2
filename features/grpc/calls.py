"""A call from its first byte to its last: its limits, the HTTP request that answers it, and its error."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import unquote

import aiohttp
import grpc
from multidict import CIMultiDict

from features.grpc.errors import CallRefused, InvalidCall, Metadata, too_many
from features.grpc.gatewaywire import MAX_CALLS, RESERVE
from features.grpc.inference import HEADER_LENGTH, read_call, write_answer
from features.grpc.memory import FRESH_S, CallMemory, MessageRoom
from features.grpc.translation import CHECK, INFER, METHODS, HttpAnswer, HttpRequest, health, model_path
from runtime.wire import Buffer

RECEIVE_S = 60.0
"""Time for a message to arrive."""
COUNTED_FROM_BYTES = 16 * 2**10
"""Least message or answer that is counted: less, in each of MAX_CALLS, is 16 MB."""
JOINED_BYTES = 2**16
"""Tensors that are copied behind the JSON; longer ones are sent as they are."""

FORWARDED_FOR = "x-forwarded-for"
_SENT = frozenset({"authorization", "traceparent", "tracestate", "x-request-id"})
"""Metadata of a call that become header fields."""
_log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]


class Calls(grpc.GenericRpcHandler):
    """The handler of all methods.

    Args:
        session: connected with the server's socket.
        room: memory for messages.

    Attributes:
        is_stopping: whether new calls are refused.
        ended: set while no call is running.
    """

    def __init__(self, session: aiohttp.ClientSession, room: MessageRoom) -> None:
        self._session = session
        self._room = room
        self._running = Counter[str]()
        self.is_stopping = False
        self.ended = asyncio.Event()
        self.ended.set()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
        """Return the handler of a method, with a stream, since then it decides when a message is received."""
        path = str(details.method)

        async def handle(_: AsyncIterator[bytes], context: Context) -> bytes:
            return await self._handle(path, context)

        return grpc.stream_unary_rpc_method_handler(handle)

    async def _handle(self, path: str, context: Context) -> bytes:
        memory = CallMemory(self._room, address_of(context.peer()), context.peer())
        context.add_done_callback(lambda _: self._end(memory))  # type: ignore[arg-type] # a class in the stubs
        try:
            answer, metadata = await self._answer(path, context, memory)
        except CallRefused as refused:
            refusal = refused.to_status()  # the exception itself would keep the message in memory
        except MemoryError:
            refusal = too_many().to_status()
        except grpc.aio.BaseError:  # the client has left
            raise
        except Exception:  # noqa: BLE001 - the last place where one can be turned into an answer
            _log.exception("a call of %s failed", path)
            text = "the call failed; the server's log has the reason"
            refusal = CallRefused("INTERNAL", text, "internal").to_status()
        else:
            context.set_trailing_metadata(metadata)
            return answer
        status, text, metadata = refusal
        return await context.abort(grpc.StatusCode[status], text, metadata)

    async def _answer(self, path: str, context: Context, memory: CallMemory) -> tuple[bytes, Metadata]:
        """Return the answer's message, and its trailing metadata."""
        headers = CIMultiDict(_headers_of(context))
        if path == INFER:
            return await self._infer(context, headers, memory)
        if path == CHECK:
            return await self._check_health(context, headers, memory)
        if path not in METHODS:
            name = path.rpartition("/")[2]
            raise CallRefused("UNIMPLEMENTED", f"{name:.64} is not supported", "not_supported")
        method = METHODS[path]
        asked = method.read(await self._receive(context, memory))
        answered = await self._send(asked, headers, memory)
        return method.answer(answered).SerializeToString(), answered.metadata

    async def _infer(
        self, context: Context, headers: CIMultiDict[str], memory: CallMemory
    ) -> tuple[bytes, Metadata]:
        call = await read_call(await self._receive(context, memory), memory.take)
        headers[HEADER_LENGTH] = str(len(call.head))
        request = HttpRequest(model_path(call.model_name, call.model_version, "/infer"), call.head)
        answered = await self._send(request, headers, memory, call.tensors)
        answered.check()
        length = answered.headers.get(HEADER_LENGTH)
        header_bytes = None if length is None else int(length)
        return await write_answer(
            answered.body, header_bytes, memory.take if call.typed else None
        ), answered.metadata

    async def _check_health(
        self, context: Context, headers: CIMultiDict[str], memory: CallMemory
    ) -> tuple[bytes, Metadata]:
        """Answer whether the server is ready; without one, or while it stops, it is not."""
        method = METHODS[CHECK]
        asked = method.read(await self._receive(context, memory, is_probe=True))
        if not self.is_stopping:
            with suppress(CallRefused):
                return method.answer(await self._send(asked, headers, memory)).SerializeToString(), ()
        return health(serving=False).SerializeToString(), ()

    async def _receive(self, context: Context, memory: CallMemory, *, is_probe: bool = False) -> bytes:
        """Receive the message.

        Raises:
            CallRefused: RESOURCE_EXHAUSTED; DEADLINE_EXCEEDED; UNAVAILABLE, the server stops.
        """
        loop, is_refused = asyncio.get_running_loop(), False

        def refuse() -> None:
            nonlocal is_refused
            if not limit.expired():
                is_refused = True
                limit.reschedule(loop.time())

        await self._room.admit(memory, is_probe=is_probe)
        timer = loop.call_later(FRESH_S, self._room.slow_down, memory, refuse)
        try:
            async with asyncio.timeout(RECEIVE_S) as limit:
                message = await context.read()
        except TimeoutError:
            text = f"the message did not arrive within {RECEIVE_S:g} s"
            late = CallRefused("DEADLINE_EXCEEDED", text, "body_timeout")
            raise too_many() if is_refused else late from None
        finally:
            timer.cancel()
            self._room.has_arrived(memory)
        if not isinstance(message, bytes):
            raise InvalidCall("the call has no message")
        self._begin(memory, is_probe=is_probe)
        if len(message) >= COUNTED_FROM_BYTES:
            memory.take(len(message))
        return message

    def _begin(self, call: CallMemory, *, is_probe: bool) -> None:
        """Count a call whose message has arrived: without one it takes nobody's place."""
        if self.is_stopping and not is_probe:
            raise CallRefused("UNAVAILABLE", "the server is stopping", "shutting_down")
        running, more = self._running, RESERVE if is_probe else 0
        if running.total() >= MAX_CALLS + more or running[call.address] >= MAX_CALLS // 2 + more:
            text = f"{MAX_CALLS} calls are running, or {MAX_CALLS // 2} of this address; try again"
            raise CallRefused("RESOURCE_EXHAUSTED", text, "too_many_connections")
        running[call.address] += 1
        call.has_begun = True
        self.ended.clear()

    def _end(self, call: CallMemory) -> None:
        """Forget a call whose answer its client has read, or that has failed."""
        call.give_back()
        if call.has_begun:
            self._running -= {call.address: 1}
            if not self._running:
                self.ended.set()

    async def _send(
        self,
        request: HttpRequest,
        headers: CIMultiDict[str],
        memory: CallMemory,
        tensors: list[Buffer] | None = None,
    ) -> HttpAnswer:
        """Send a request to the server, and receive its answer, which then counts in its place.

        The tensors are taken out of their list, so that their memory is free when they are sent.

        Raises:
            CallRefused: UNAVAILABLE, the server does not answer; RESOURCE_EXHAUSTED.
        """
        method = "GET" if request.body is None else "POST"
        body: Any = request.body
        if tensors:
            tensors.insert(0, request.body or b"")
            size = sum(map(len, tensors))
            body = b"".join(tensors) if size <= JOINED_BYTES else _take_out(tensors)
            headers["Content-Length"] = str(size)
        try:
            async with self._session.request(
                method, request.path, data=body, headers=headers, allow_redirects=False
            ) as response:
                memory.give_back()
                if (length := response.content_length or 0) >= COUNTED_FROM_BYTES:
                    memory.take(length)
                return HttpAnswer(response.status, response.headers, await response.read())
        except (aiohttp.ClientError, OSError, ValueError) as error:
            text = f"the server does not answer: {error}"
            raise CallRefused("UNAVAILABLE", text, "shutting_down") from None


async def _take_out(parts: list[Buffer]) -> AsyncIterator[Buffer]:
    while parts:
        yield parts.pop(0)


def address_of(peer: str) -> str:
    """Return the address in gRPC's name of a peer, such as `ipv6:%5B::1%5D:50051`."""
    host = unquote(peer.partition(":")[2]).rpartition(":")[0]
    return host.strip("[]")


def _headers_of(context: Context) -> Iterator[tuple[str, str]]:
    """Yield the header fields of a call's HTTP request; its client is the last one in X-Forwarded-For."""
    hops = []
    for name, value in context.invocation_metadata() or ():
        if isinstance(value, str) and value.isprintable():
            if name in _SENT:
                yield name, value
            elif name == FORWARDED_FOR:
                hops.append(value)
    yield FORWARDED_FOR, ", ".join([*hops, address_of(context.peer())])
