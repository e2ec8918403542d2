"""The protocol's binary tensors as a client writes and reads them, with no code of the server."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tritonclient.utils import deserialize_bytes_tensor

HEADER_LENGTH = "Inference-Header-Content-Length"
DTYPES = {
    "BOOL": "?",
    "UINT8": "u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "INT8": "i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "FP16": "<f2",
    "BF16": "<u2",
    "FP32": "<f4",
    "FP64": "<f8",
    "BYTES": "O",
}
"""What numpy calls the protocol's datatypes; it has no BF16, whose two bytes are an unsigned integer here."""


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor, its data as the binary form has it."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes

    @property
    def array(self) -> Any:
        """The tensor as ONNX Runtime takes it from Python, in memory of numpy's.

        Some of its sums depend on how memory is aligned, so this is not left to chance.
        """
        if self.datatype != "BYTES":
            return np.frombuffer(self.data, DTYPES[self.datatype]).reshape(self.shape).copy()
        texts = [element.decode() for element in deserialize_bytes_tensor(self.data)]
        return np.array(texts, object).reshape(self.shape)


def binary_request(values: Sequence[Value]) -> tuple[dict[str, str], bytes]:
    """Return headers and body of a request that sends and wants all tensors as bytes."""
    inputs = [
        {
            "name": value.name,
            "datatype": value.datatype,
            "shape": value.shape,
            "parameters": {"binary_data_size": len(value.data)},
        }
        for value in values
    ]
    header = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    headers = {HEADER_LENGTH: str(len(header)), "Content-Type": "application/octet-stream"}
    return headers, b"".join((header, *(value.data for value in values)))


def binary_answer(headers: Mapping[str, str], body: bytes) -> dict[str, Value]:
    """Return the outputs of an answer whose every tensor is bytes, or empty; nothing may be left over."""
    length = int(headers.get(HEADER_LENGTH, len(body)))
    found, position = dict[str, Value](), length
    for output in json.loads(body[:length])["outputs"]:
        assert output.get("data", []) == [], output
        size = output.get("parameters", {}).get("binary_data_size", 0)
        data = body[position : position + size]
        position += size
        found[output["name"]] = Value(output["name"], output["datatype"], tuple(output["shape"]), data)
    assert position == len(body)
    return found
