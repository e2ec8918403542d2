"""A call from its first byte to its last: its limits, the HTTP request that answers it, and its error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

import aiohttp
import grpc
from google.protobuf.message import DecodeError

from features.grpc.errors import CallRefused, InvalidCall
from features.grpc.gatewaywire import MAX_CALLS, RESERVE
from features.grpc.inference import HEADER_LENGTH, read_call, write_answer
from features.grpc.memory import CallMemory, MessageRoom
from features.grpc.translation import CHECK, INFER, METHODS, HttpAnswer, HttpRequest, health, model_path
from runtime.wire import Buffer

LONG_S = 1.0
"""A message that takes longer to arrive counts as the largest: its length is known only at its end."""
RECEIVE_S = 60.0
"""Time for a message to arrive, and for its client to read the answer."""
MAX_MESSAGE_BYTES = 2**20
"""Request of another method than ModelInfer, as the server's limit for JSON."""
JOINED_BYTES = 2**16
"""Tensors that are copied behind the JSON, which is faster than to send them in parts."""

FORWARDED_FOR = "x-forwarded-for"
_SENT = frozenset({"authorization", "traceparent", "tracestate", "x-request-id"})
"""Metadata of a call that become header fields."""
_RETURNED = frozenset({"loadledger-model", "x-request-id", "www-authenticate"})
"""Header fields of an answer that become trailing metadata."""

Context = grpc.aio.ServicerContext[Any, Any]


class Calls(grpc.GenericRpcHandler):
    """The handler of all methods.

    Args:
        session: connected with the server's socket.
        max_request_bytes: the largest ModelInferRequest.
        room: memory for messages.

    Attributes:
        is_stopping: whether new calls are refused.
        ended: set while no call is running.
    """

    def __init__(self, session: aiohttp.ClientSession, max_request_bytes: int, room: MessageRoom) -> None:
        self._session = session
        self._max_request_bytes = max_request_bytes
        self._room = room
        self._running = 0
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
        memory = CallMemory(self._room, address_of(context.peer()))
        self._running += 1
        self.ended.clear()
        context.add_done_callback(lambda _: self._end(memory))  # type: ignore[arg-type] # a class in the stubs
        try:
            self._check(path)
            answer, metadata = await self._answer(path, context, memory)
        except CallRefused as refused:
            await context.abort(grpc.StatusCode[refused.status], str(refused), refused.metadata)
        context.set_trailing_metadata(metadata)
        return answer

    def _end(self, memory: CallMemory) -> None:
        """Forget a call whose answer its client has read, or that has failed."""
        memory.give_back()
        self._running -= 1
        if not self._running:
            self.ended.set()

    def _check(self, path: str) -> None:
        """Refuse a call of an unknown method, one too many, or one while the server stops."""
        if path not in METHODS and path != INFER:
            name = path.rpartition("/")[2]
            raise CallRefused("UNIMPLEMENTED", f"{name:.64} is not supported", "not_supported")
        if self.is_stopping and path != CHECK:
            raise CallRefused("UNAVAILABLE", "the server is stopping", "shutting_down")
        if self._running > (MAX_CALLS + RESERVE if path == CHECK else MAX_CALLS):
            text = f"more than {MAX_CALLS} calls are running; try again"
            raise CallRefused("RESOURCE_EXHAUSTED", text, "too_many_connections")

    async def _answer(self, path: str, context: Context, memory: CallMemory) -> tuple[bytes, Any]:
        message = await self._receive(context, memory)
        headers = dict(_headers_of(context))
        if path == INFER:
            return await self._infer(message, headers, memory)
        if len(message) > MAX_MESSAGE_BYTES:
            raise CallRefused(
                "RESOURCE_EXHAUSTED",
                f"the message has {len(message)} bytes, and may have {MAX_MESSAGE_BYTES}",
                "body_too_large",
            )
        method = METHODS[path]
        try:
            asked = method.ask(method.request.FromString(message))
        except DecodeError as error:
            raise InvalidCall(f"the message is not the request of {path[1:]}: {error}") from None
        if path == CHECK and self.is_stopping:
            return health(serving=False).SerializeToString(), ()
        try:
            answered = await self._send(asked, headers, memory)
        except CallRefused:
            if path != CHECK:
                raise
            return health(serving=False).SerializeToString(), ()
        return method.answer(answered).SerializeToString(), _metadata_of(answered)

    async def _receive(self, context: Context, memory: CallMemory) -> bytes:
        """Receive the message; one that takes long holds memory for the largest.

        Raises:
            CallRefused: RESOURCE_EXHAUSTED, or DEADLINE_EXCEEDED.
        """
        loop, refusals = asyncio.get_running_loop(), list[CallRefused]()

        def hold() -> None:
            try:
                memory.take(self._max_request_bytes)
            except CallRefused as refused:
                refusals.append(refused)
                limit.reschedule(loop.time())

        timer = loop.call_later(LONG_S, hold)
        try:
            async with asyncio.timeout(RECEIVE_S) as limit:
                message = await context.read()
        except TimeoutError:
            text = f"the message did not arrive within {RECEIVE_S:g} s"
            late = CallRefused("DEADLINE_EXCEEDED", text, "body_timeout")
            raise (refusals or [late])[0] from None
        finally:
            timer.cancel()
        memory.give_back()
        if not isinstance(message, bytes):
            raise InvalidCall("the call has no message")
        memory.take(len(message))
        return message

    async def _infer(self, message: bytes, headers: dict[str, str], memory: CallMemory) -> tuple[bytes, Any]:
        call = await read_call(message, memory.take)
        headers[HEADER_LENGTH] = str(len(call.head))
        request = HttpRequest(model_path(call.model_name, call.model_version, "/infer"), call.head)
        answered = await self._send(request, headers, memory, call.tensors)
        answered.check()
        length = answered.headers.get(HEADER_LENGTH)
        header_bytes = None if length is None else int(length)
        return await write_answer(answered.body, header_bytes, typed=call.typed), _metadata_of(answered)

    async def _send(
        self,
        request: HttpRequest,
        headers: Mapping[str, str],
        memory: CallMemory,
        tensors: Sequence[Buffer] = (),
    ) -> HttpAnswer:
        """Send a request to the server, and receive its answer.

        Raises:
            CallRefused: UNAVAILABLE, the server does not answer; RESOURCE_EXHAUSTED.
        """
        method = "GET" if request.body is None else "POST"
        body: Any = request.body
        if tensors:
            parts = [request.body or b"", *tensors]
            size = sum(map(len, parts))
            body = b"".join(parts) if size <= JOINED_BYTES else _iterate(parts)
            headers = {**headers, "Content-Length": str(size)}
        try:
            async with self._session.request(method, request.path, data=body, headers=headers) as response:
                memory.take(response.content_length or 0)
                return HttpAnswer(response.status, response.headers, await response.read())
        except (aiohttp.ClientError, OSError, ValueError) as error:
            text = f"the server does not answer: {error}"
            raise CallRefused("UNAVAILABLE", text, "shutting_down") from None


async def _iterate(parts: list[Buffer]) -> AsyncIterator[Buffer]:
    for part in parts:
        yield part


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


def _metadata_of(answer: HttpAnswer) -> tuple[tuple[str, str], ...]:
    return tuple((name.lower(), value) for name, value in answer.headers.items() if name.lower() in _RETURNED)
