"""A repository with what the tests of the clients ask."""

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ml_dtypes import bfloat16
from onnx import TensorProto
from tritonclient.http import InferenceServerClient, InferInput, aio

from support import models
from support.clients import Blocked
from support.process import Server
from support.standing import address, bearer, standing

ELEMENTS: dict[str, int] = {
    "BOOL": TensorProto.BOOL,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16,
    "BF16": TensorProto.BFLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}
"""The protocol's datatypes; `identity-BOOL` gives back its BOOL, and so on."""
FLOATS: dict[str, Any] = {"FP16": np.float16, "BF16": bfloat16, "FP32": np.float32, "FP64": np.float64}
CLIENT_MODELS = ("subtract", "loop", *(f"identity-{datatype}" for datatype in ELEMENTS))
"""What there is to load, beside `corrupt`, which cannot be, and `idle`, which no test loads."""


@dataclass(frozen=True)
class ServedClients:
    """A server with these models, and clients of it.

    Attributes:
        server: with all loaded but `idle` and `corrupt`.
        runner: the loop of asynchronous clients.
        triton: Triton's clients, `sync` and `aio`.
        resources: closed with the server.
    """

    server: Server
    runner: asyncio.Runner
    triton: Mapping[str, Any]
    resources: ExitStack


@contextmanager
def serving_clients(folder: Path) -> Iterator[ServedClients]:
    """Start a server on all models in a new folder, and Triton's clients."""

    async def open_aio() -> aio.InferenceServerClient:
        return aio.InferenceServerClient(address(server))

    client_repository(folder / "repository")
    with ExitStack() as resources:
        server = resources.enter_context(standing(folder / "repository"))
        runner = resources.enter_context(asyncio.Runner())
        sync = resources.enter_context(InferenceServerClient(address(server), concurrency=4))
        for_loops = runner.run(open_aio())
        resources.callback(lambda: runner.run(for_loops.close()))
        for name in CLIENT_MODELS:
            sync.load_model(name, headers=bearer(server, "admin"))
        yield ServedClients(server, runner, {"sync": sync, "aio": Blocked(for_loops, runner)}, resources)


def client_repository(root: Path) -> None:
    """Write all of them, and `corrupt`."""
    for datatype, element in ELEMENTS.items():
        models.save(models.identity(element, [None, None]), root, f"identity-{datatype}")
    models.save(models.subtract(), root, "subtract")
    models.save(models.counting_loop(), root, "loop")
    models.save(models.identity(), root, "idle")
    models.save_bytes(models.CORRUPT, root, "corrupt")


def sample(datatype: str) -> Any:
    """Return a matrix of 2 by 3 with the datatype's extremes, as Triton's client takes it."""
    if datatype == "BYTES":
        return np.array([["", "a", "ü€"], ["\n", "0", "long " * 100]], object)
    if datatype == "BOOL":
        return np.array([[True, False, True], [False, False, True]])
    if datatype in FLOATS:
        return np.array([[0, -0.0, 1.5], [-2, np.inf, -np.inf]], FLOATS[datatype])
    limits = np.iinfo(datatype.lower())
    return np.array([[0, 1, 2], [limits.min, limits.max, 3]], datatype.lower())


def tensor(name: str, array: Any, datatype: str = "FP32", *, binary: bool = True) -> InferInput:
    """Return an input of Triton's clients."""
    given = InferInput(name, list(array.shape), datatype)
    given.set_data_from_numpy(array, binary_data=binary)
    return given


def floats(name: str, *values: float, binary: bool = True) -> InferInput:
    """Return an input of FP32 numbers."""
    return tensor(name, np.array(values, np.float32), binary=binary)
