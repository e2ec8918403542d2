"""The clients of the contract, each behind one interface: Triton's and KServe's, unchanged, and ours.

The asynchronous ones run to their answer in a loop of their own.
"""

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.http as triton
from ml_dtypes import bfloat16
from onnx import TensorProto
from tritonclient.http import aio
from tritonclient.utils import InferenceServerException

from loadledger import ServerError
from support.clients import Blocked, connected
from support.servers import Server, address, bearer, grpc_address
from support.tritongrpc import triton_grpc, triton_grpc_aio

INTEGERS = ("UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64")
FLOATS: dict[str, Any] = {"FP16": np.float16, "BF16": bfloat16, "FP32": np.float32, "FP64": np.float64}
ELEMENTS: dict[str, int] = {
    **{datatype: TensorProto.DataType.Value(datatype) for datatype in ("BOOL", *INTEGERS)},
    "FP16": TensorProto.FLOAT16,
    "BF16": TensorProto.BFLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}
"""The protocol's datatypes; the model `identity-BOOL` returns its BOOL, and so on."""
BINARY: tuple[tuple[bool, bool], ...] = ((True, True), (True, False), (False, True), (False, False))
"""Whether inputs and outputs are sent as bytes; else they are JSON, or typed contents of gRPC."""
STATUSES = {
    "INVALID_ARGUMENT": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
"""The HTTP status that a status of gRPC stands for."""


def tensor(name: str, array: Any, datatype: str = "FP32", *, binary: bool = True) -> triton.InferInput:
    """Return an input of Triton's clients of HTTP."""
    given = triton.InferInput(name, list(array.shape), datatype)
    given.set_data_from_numpy(array, binary_data=binary)
    return given


def floats(name: str, *values: float, binary: bool = True) -> triton.InferInput:
    return tensor(name, np.array(values, np.float32), binary=binary)


@dataclass(frozen=True)
class Inference:
    """One request of the contract; a role of None sends no token."""

    model: str
    arrays: Mapping[str, Any]
    role: str | None = "infer"
    datatype: str = "FP32"
    binary: tuple[bool, bool] | None = None
    timeout_us: int | None = None


class Triton:
    """Triton's client; the one for asyncio is `Blocked`."""

    encodings = BINARY
    datatypes = tuple(ELEMENTS)
    error = InferenceServerException

    def __init__(self, server: Server, resources: ExitStack, kind: str) -> None:
        self._server, self._client = server, resources.enter_context(triton_client(server, kind))

    def is_live(self) -> bool:
        return bool(self._client.is_server_live() and self._client.is_server_ready())

    def is_model_ready(self, model: str, role: str | None) -> bool:
        return bool(self._client.is_model_ready(model, headers=headers(self._server, role)))

    def infer(self, request: Inference) -> Any:
        binary = request.binary
        inputs = [
            tensor(name, array, request.datatype, binary=(binary or BINARY[0])[0])
            for name, array in request.arrays.items()
        ]
        result = self._client.infer(
            request.model,
            inputs,
            outputs=binary and [triton.InferRequestedOutput("y", binary_data=binary[1])],
            headers=headers(self._server, request.role),
            timeout=request.timeout_us,
        )
        if binary is not None:
            assert ("data" in result.get_output("y")) is not binary[1]
        return result.as_numpy(result.get_response()["outputs"][0]["name"])

    def status(self, error: Any) -> int:
        return int(error.status())

    def load(self, model: str) -> None:
        self._client.load_model(model, headers=headers(self._server, "admin"))

    def unload(self, model: str) -> None:
        self._client.unload_model(model, headers=headers(self._server, "admin"))


class KServe:
    """KServe's client, which has no calls for loads and no BF16."""

    encodings = BINARY
    datatypes = tuple(datatype for datatype in ELEMENTS if datatype != "BF16")

    def __init__(self, server: Server, resources: ExitStack) -> None:
        self._kserve = import_kserve()
        self._server = server
        client = self._kserve.InferenceRESTClient(self._kserve.RESTConfig(protocol="v2"))
        self._client = Blocked(client, resources.enter_context(asyncio.Runner()))
        resources.callback(self._client.close)

    @property
    def error(self) -> type[Exception]:
        import httpx  # noqa: PLC0415 - it comes with KServe

        return httpx.HTTPStatusError

    def is_live(self) -> bool:
        url = self._server.url
        return bool(self._client.is_server_live(url) and self._client.is_server_ready(url))

    def is_model_ready(self, model: str, role: str | None) -> bool:
        url = self._server.url
        return bool(self._client.is_model_ready(url, model, headers=headers(self._server, role)))

    def infer(self, request: Inference) -> Any:
        there, back = request.binary or BINARY[0]
        inputs = kserve_inputs(request, binary=there)
        timeout = {"timeout": request.timeout_us} if request.timeout_us else {}
        parameters = {"binary_data_output": back, **timeout}
        received: dict[str, str] = {}
        answer = self._client.infer(
            self._server.url,
            self._kserve.InferRequest(request.model, inputs, request_id="seven", parameters=parameters),
            request.model,
            headers=headers(self._server, request.role),
            response_headers=received,
        )
        assert (answer.id, answer.model_name) == ("seven", request.model)
        assert ("inference-header-content-length" in received) is back
        assert received["loadledger-model"].startswith(f"{request.model}/1;position=")
        return answer.outputs[0].as_numpy()

    def status(self, error: Any) -> int:
        return int(error.response.status_code)


class TritonGrpc(Triton):
    """Triton's client of gRPC, which sends and reads raw tensors only."""

    encodings = BINARY[:1]

    def __init__(self, server: Server, resources: ExitStack, kind: str) -> None:
        self._server, self._client = server, resources.enter_context(triton_grpc_client(server, kind))

    def is_model_ready(self, model: str, role: str | None) -> bool:
        try:
            return super().is_model_ready(model, role)
        except InferenceServerException as error:
            if self.status(error) != 401:
                raise
            return False

    def infer(self, request: Inference) -> Any:
        inputs = [grpc_tensor(name, array, request.datatype) for name, array in request.arrays.items()]
        sent = headers(self._server, request.role)
        result = self._client.infer(request.model, inputs, headers=sent, timeout=request.timeout_us)
        return result.as_numpy(result.get_response().outputs[0].name)

    def status(self, error: Any) -> int:
        return STATUSES[error.status().removeprefix("StatusCode.")]


class KServeGrpc:
    """KServe's client of gRPC, which sends raw or typed tensors."""

    encodings = (BINARY[0], BINARY[-1])
    datatypes = KServe.datatypes
    error = grpc.RpcError

    def __init__(self, server: Server, resources: ExitStack) -> None:
        self._kserve = import_kserve()
        self._server, runner = server, resources.enter_context(asyncio.Runner())
        self._client = Blocked(runner.run(self._opened()), runner)
        resources.callback(self._client.close)

    def is_live(self) -> bool:
        return bool(self._client.is_server_live() and self._client.is_server_ready())

    def is_model_ready(self, model: str, role: str | None) -> bool:
        try:
            return bool(self._client.is_model_ready(model, headers=self._metadata(role)))
        except grpc.RpcError as error:
            if self.status(error) != 401:
                raise
            return False

    def infer(self, request: Inference) -> Any:
        raw, _ = request.binary or BINARY[0]
        timeout = {"timeout": request.timeout_us} if request.timeout_us else {}
        asked = self._kserve.InferRequest(
            request.model, kserve_inputs(request, binary=raw), request_id="seven", parameters=timeout
        )
        answer = self._client.infer(asked, headers=self._metadata(request.role))
        assert (answer.id, answer.model_name, answer.model_version) == ("seven", request.model, "1")
        assert bool(answer.outputs[0].data) is not raw  # typed, as the request
        return answer.outputs[0].as_numpy()

    def status(self, error: Any) -> int:
        return STATUSES[error.code().name]

    async def _opened(self) -> Any:
        return self._kserve.InferenceGRPCClient(grpc_address(self._server))

    def _metadata(self, role: str | None) -> tuple[tuple[str, str], ...]:
        return tuple(headers(self._server, role).items())


class Ours:
    """`loadledger.Client` or `AsyncClient`, which send binary tensors; each has one token."""

    encodings = ((True, True),)
    datatypes = tuple(ELEMENTS)
    error = (ServerError, ValueError)

    def __init__(self, server: Server, resources: ExitStack, kind: str) -> None:
        self._clients = {
            role: resources.enter_context(connected(kind, server.url, role and server.api.token(role)))
            for role in (None, "infer", "audit", "admin")
        }

    def is_live(self) -> bool:
        return self._clients[None].health().status == "ok"

    def is_model_ready(self, model: str, role: str | None) -> bool:
        try:
            return self._clients[role].model(model).state == "loaded"
        except ServerError:
            return False

    def infer(self, request: Inference) -> Any:
        parameters = {"timeout": request.timeout_us} if request.timeout_us else None
        client = self._clients[request.role]
        [output] = client.infer(request.model, request.arrays, parameters=parameters).values()
        return output

    def status(self, error: Any) -> int:
        return 400 if isinstance(error, ValueError) else int(error.status)  # which it refuses by itself

    def load(self, model: str) -> None:
        self._clients["admin"].load(model, wait=True)

    def unload(self, model: str) -> None:
        self._clients["admin"].unload(model, wait=True)


def headers(server: Server, role: str | None) -> dict[str, str]:
    """Return new headers for each call: Triton's client and KServe's write theirs into them.

    The names of gRPC's metadata have lower case.
    """
    return {} if role is None else {"authorization": bearer(server, role)["Authorization"]}


def import_kserve() -> Any:
    """Import KServe's client, or skip the test."""
    return pytest.importorskip("kserve", reason="KServe's client is not made for this Python")


def kserve_inputs(request: Inference, *, binary: bool) -> list[Any]:
    """Return the inputs of KServe's clients."""
    inputs = []
    for name, array in request.arrays.items():
        inputs.append(import_kserve().InferInput(name, list(array.shape), request.datatype))
        inputs[-1].set_data_from_numpy(array, binary_data=binary)
    return inputs


def grpc_tensor(name: str, array: Any, datatype: str = "FP32") -> Any:
    """Return an input of Triton's clients of gRPC."""
    return triton_grpc.InferInput(name, list(array.shape), datatype).set_data_from_numpy(array)


def triton_client(server: Server, kind: str) -> AbstractContextManager[Any]:
    """Open Triton's client `sync` or `aio`."""
    return _opened({"sync": triton, "aio": aio}[kind], address(server))


def triton_grpc_client(server: Server, kind: str) -> AbstractContextManager[Any]:
    """Open Triton's client of gRPC `sync` or `aio`."""
    return _opened({"sync": triton_grpc, "aio": triton_grpc_aio}[kind], grpc_address(server))


@contextmanager
def _opened(module: Any, url: str) -> Iterator[Any]:
    if not module.__name__.endswith("aio"):
        with module.InferenceServerClient(url) as client:
            yield client
        return

    async def opened() -> Any:
        return module.InferenceServerClient(url)

    with asyncio.Runner() as runner:
        blocked = Blocked(runner.run(opened()), runner)
        yield blocked
        blocked.close()


Dialect = Triton | TritonGrpc | KServe | KServeGrpc | Ours
