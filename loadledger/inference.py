"""How is an inference written and its answer read? Tensors in binary; small ones as JSON where it has them.

What does not fit its datatype stays JSON, so that the server says what is wrong with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from loadledger.address import Address
from loadledger.problems import BadAnswer
from loadledger.requests import Answer, decode_value, encode_json
from loadledger.tensors import flatten, pack, unpack

HEADER_LENGTH = "Inference-Header-Content-Length"
MAX_LENGTH_DIGITS = 18
SMALL_ELEMENTS = 256
"""A tensor of so many elements stays readable as JSON, which takes the server no longer."""

_BINARY_ONLY = frozenset({"FP16", "BF16"})

Json = dict[str, Any]


def encode_inference(tensors: Iterable[Json], members: Mapping[str, Any]) -> tuple[dict[str, str], bytes]:
    """Return the header fields and the body of an inference; its outputs are to come back in binary.

    Raises:
        ValueError: a value cannot be sent.
    """
    heads, payload = list[Json](), list[bytes]()
    for tensor in tensors:
        data = _binary_data(tensor)
        if data is None:
            heads.append(tensor)
            continue
        parameters = {**(tensor.get("parameters") or {}), "binary_data_size": len(data)}
        heads.append({key: tensor[key] for key in tensor if key != "data"} | {"parameters": parameters})
        payload.append(data)
    parameters = {"binary_data_output": True, **(members.get("parameters") or {})}
    text = encode_json({"inputs": heads, **members, "parameters": parameters})
    fields = {"Content-Type": "application/json", "Accept": "application/json, application/octet-stream"}
    if payload:
        fields |= {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(text))}
    return fields, b"".join([text, *payload])


def decode_inference(answer: Answer, address: Address) -> Json:
    """Return the answer to an inference with the elements of each output as a list, `data`.

    Raises:
        ServerError: the server refused.
        BadAnswer: the body has another shape.
    """
    length = answer.headers.get(HEADER_LENGTH.lower(), str(len(answer.body)))
    is_length = length.isascii() and length.isdecimal() and len(length) <= MAX_LENGTH_DIGITS
    if not is_length or int(length) > len(answer.body):
        raise _foreign(address, "a length beyond the body")
    text, payload = answer.body[: int(length)], answer.body[int(length) :]
    told: Json = decode_value(replace(answer, body=text), Json, address)
    outputs = told.get("outputs")
    start = 0
    for output in outputs if isinstance(outputs, list) else ():
        size = _binary_size(output)
        if size is None:
            continue
        try:
            output["data"] = _elements(output, payload[start : start + size])
        except (ValueError, TypeError, KeyError) as error:
            raise _foreign(address, str(error)) from None
        start += size
    return told


def _elements(output: Json, data: bytes) -> list[Any]:
    values = unpack(output["datatype"], data)
    if len(values) != math.prod(output["shape"]):
        raise ValueError(f"{len(data)} bytes are not of its shape")
    return values


def _binary_data(tensor: Json) -> bytes | None:
    """Return a tensor's data in binary; None if it stays JSON."""
    data, datatype = tensor.get("data"), tensor.get("datatype")
    if isinstance(data, bytes):
        return data
    if not isinstance(data, list | tuple) or not isinstance(datatype, str):
        return None
    try:
        shape, values = flatten(str(tensor.get("name")), data)
    except ValueError:  # ragged
        return None
    if len(shape) != 1 and shape != [*tensor.get("shape", ())]:
        return None
    if len(values) <= SMALL_ELEMENTS and datatype not in _BINARY_ONLY and all(map(_has_json, values)):
        return None
    return pack(datatype, values)


def _has_json(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _binary_size(output: Any) -> int | None:
    """Return the bytes of a binary output, whose parameters then no longer say so; None of a JSON one."""
    parameters = output.get("parameters") if isinstance(output, dict) else None
    size = parameters.pop("binary_data_size", None) if isinstance(parameters, dict) else None
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        return None
    if not parameters:
        del output["parameters"]
    return size


def _foreign(address: Address, why: str) -> BadAnswer:
    return BadAnswer(f"{address.url} does not answer as loadledger does ({why}): is this its URL?")
