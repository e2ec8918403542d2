"""A client of gRPC with the server's own messages, which get along with those of other clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from features.grpc.messages import HEALTH, SERVICE, message_class
from support.servers import LIMIT_S, Server, find_gateways
from support.workers import until

GRPC = ("--grpc-port=0", "--log-level=info")
"""Arguments of a server with gRPC, whose port is in its log."""
ANY_LENGTH = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))


@dataclass(frozen=True, slots=True)
class GatewayProcess:
    """The gateway of a server, as the server logged it."""

    address: str
    pid: int


async def find_gateway(server: Server, besides: Sequence[int] = ()) -> GatewayProcess:
    """Wait until the server has a gateway, of none of these process ids, and return it."""

    def started() -> list[GatewayProcess]:
        return [GatewayProcess(*found) for found in find_gateways(server) if found[1] not in besides]

    await until(lambda: bool(started()))
    return started()[-1]


@dataclass(frozen=True, slots=True)
class GrpcClient:
    """Calls over one channel, with a token."""

    channel: grpc.aio.Channel
    token: str = ""

    def call(
        self,
        name: str,
        request: Any,
        *,
        service: str = SERVICE,
        timeout_s: float = LIMIT_S,
        request_id: str | None = None,
    ) -> Any:
        """Return the running call of a method; awaited, it returns the response's message or raises."""
        response = message_class(f"{service.rpartition('.')[0]}.{_response_of(name)}")
        method: Any = self.channel.unary_unary(
            f"/{service}/{name}", lambda message: message.SerializeToString(), response.FromString
        )
        metadata = (("authorization", f"Bearer {self.token}"),) if self.token else ()
        if request_id is not None:
            metadata = (*metadata, ("x-request-id", request_id))
        return method(request, timeout=timeout_s, metadata=metadata)

    async def ask(self, method: str, /, **fields: Any) -> Any:
        return await self.call(method, message_class(f"inference.{method}Request")(**fields))

    async def infer(self, model_id: str, array: NDArray[Any], **fields: Any) -> NDArray[np.float32]:
        """Return the only output, FP32, of a model with one input of 32-bit floats."""
        answer = await self.call("ModelInfer", inference(model_id, array, **fields))
        return np.frombuffer(answer.raw_output_contents[0], np.float32)

    async def status(self) -> str:
        """Return the server's status in the health checking protocol."""
        request = message_class(f"{HEALTH}CheckRequest")()
        answer = await self.call("Check", request, service=HEALTH)
        name: str = answer.DESCRIPTOR.fields_by_name["status"].enum_type.values_by_number[answer.status].name
        return name


def _response_of(name: str) -> str:
    return "HealthCheckResponse" if name == "Check" else f"{name}Response"


def inference(
    model_id: str, array: NDArray[Any], name: str = "x", datatype: str = "FP32", **fields: Any
) -> Any:
    """Return a request with one raw input."""
    request = message_class("inference.ModelInferRequest")(model_name=model_id, **fields)
    request.inputs.add(name=name, datatype=datatype, shape=array.shape)
    request.raw_input_contents.append(array.tobytes())
    return request


@asynccontextmanager
async def grpc_client(
    address: str, token: str = "", root_certificate: bytes | None = None
) -> AsyncIterator[GrpcClient]:
    if root_certificate is None:
        channel = grpc.aio.insecure_channel(address, options=ANY_LENGTH)
    else:
        trust = grpc.ssl_channel_credentials(root_certificate)
        channel = grpc.aio.secure_channel(address, trust, options=ANY_LENGTH)
    async with channel:
        yield GrpcClient(channel, token)


async def refusal(call: Any) -> tuple[str, dict[str, str]]:
    """Return the status and trailing metadata of a call, or awaitable of one, that must fail."""
    try:
        await asyncio.wait_for(call, LIMIT_S)
    except grpc.aio.AioRpcError as error:
        return error.code().name, dict(error.trailing_metadata())
    raise AssertionError("it was answered")
