"""A repository with what the tests of the clients ask."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from ml_dtypes import bfloat16
from onnx import TensorProto
from tritonclient.http import InferenceServerClient, InferInput

from support import models
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


@contextmanager
def serving_client_models(folder: Path) -> Iterator[Server]:
    """Start a server on all of them in a new folder, and load what can be and is not `idle`."""
    client_repository(folder / "repository")
    with standing(folder / "repository") as server, InferenceServerClient(address(server)) as client:
        for name in CLIENT_MODELS:
            client.load_model(name, headers=bearer(server, "admin"))
        yield server


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
