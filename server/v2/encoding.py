"""Answers of the Open Inference Protocol v2: JSON, and after it the binary tensors, one after the other.

The elements of JSON outputs are the worker's text, taken over as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from runtime.wire import Buffer, Tensor


class _BinarySize(msgspec.Struct, gc=False):
    binary_data_size: int


class _TextOutput(msgspec.Struct, gc=False):
    """No `parameters`: Triton's C++ client refuses them where they say no binary_data_size."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: msgspec.Raw


class _BinaryOutput(msgspec.Struct, gc=False):
    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: _BinarySize


class _Answer(msgspec.Struct, omit_defaults=True, gc=False):
    model_name: str
    model_version: str
    outputs: list[_TextOutput | _BinaryOutput]
    id: str | None = None


_ENCODER = msgspec.json.Encoder()


def encode_response(
    model_id: str, version: int, request_id: str | None, tensors: Sequence[Tensor]
) -> tuple[list[Buffer], int | None]:
    """Return the answer as buffers to be written one after the other, and how many bytes of it are JSON.

    That is None if all are, and the answer `application/json`; else it is `application/octet-stream` with
    `Inference-Header-Content-Length`. Binary outputs without any bytes make no binary answer, as Triton has
    it. The data of binary outputs is not copied.
    """
    outputs: list[_TextOutput | _BinaryOutput] = []
    payload: list[Buffer] = []
    for tensor in tensors:
        if tensor.text:
            text = msgspec.Raw(tensor.data)
            outputs.append(_TextOutput(tensor.name, tensor.datatype, tensor.shape, text))
            continue
        size = _BinarySize(len(tensor.data))
        outputs.append(_BinaryOutput(tensor.name, tensor.datatype, tensor.shape, size))
        if size.binary_data_size:
            payload.append(tensor.data)
    head = _ENCODER.encode(_Answer(model_id, str(version), outputs, request_id))
    return [head, *payload], len(head) if payload else None
