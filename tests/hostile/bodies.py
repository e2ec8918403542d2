"""Inference requests that no client should send: JSON and binary tensors, lengths, codings, header fields."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import numpy as np
from hostile.mutations import EDGES, mutate_bytes

from runtime.wire import DATATYPES
from server.v2.codec import HEADER_LENGTH

NUMBERS: tuple[Any, ...] = (
    0, -0.0, 1.5, 1e308, -1e-320, 2**53 + 1, *EDGES, 10**30, True, None, "", "1", "\ud800", "é" * 40,
    float("nan"), float("inf"), -float("inf"),
)  # fmt: skip
"""Elements of tensors; `json.dumps` writes NaN and Infinity, which are numbers in data alone."""
SHAPES: tuple[Any, ...] = (
    [], [0], [1], [2], [3], [1, 1], [2, 2], [64], [1, 64], [-1], [0, 2**31 - 1], [2**31], [2**31 - 1] * 8,
    [2**32, 2**32], [2**62, 4], [1] * 64, [1] * 65, [1] * 100_000, [True], [1.0], ["1"], [None], [[1]],
    None, "1", {},
)  # fmt: skip
"""Shapes that overflow 32 or 64 bits, are empty or have too many dimensions, and values that are no shape."""
TEXTS: tuple[Any, ...] = ("", "x", "y", "\0", "x" * 5000, "\udfff", "\u202ex", "../x", "id", 1, None, [], {})
"""Names and ids."""
PARAMETERS = (
    "binary_data_size", "binary_data_output", "binary_data", "timeout", "sequence_id", "priority",
    "classification", "shared_memory_region", "shared_memory_byte_size", "triton_x", "unknown",
)  # fmt: skip
LENGTHS: tuple[str, ...] = (
    "", "0", "1", "-1", "+1", " 7", "1.5", "1e3", "0x10", "9" * 5000, "\u00b2", "00000000000012",
)  # fmt: skip
"""Values of Inference-Header-Content-Length that are no length, or not this body's."""


@dataclass(frozen=True, slots=True)
class Body:
    """A request's body and the header fields that describe it, true or not."""

    data: bytes
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """An inference request that is right, from which wrong ones are made."""

    inputs: tuple[dict[str, Any], ...]
    others: dict[str, Any] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """Return the request with its tensors in JSON."""
        return {"inputs": [dict(each) for each in self.inputs], **self.others}

    def binary(self) -> tuple[dict[str, Any], bytes]:
        """Return the request and the data of its tensors."""
        inputs, payload = [], b""
        for each in self.inputs:
            described = {name: value for name, value in each.items() if name != "data"}
            data = _raw(each)
            inputs.append({**described, "parameters": {"binary_data_size": len(data)}})
            payload += data
        return {"inputs": inputs, **self.others}, payload


def _raw(tensor: dict[str, Any]) -> bytes:
    if tensor["datatype"] == "BYTES":
        texts = [str(each).encode() for each in tensor["data"]]
        return b"".join(len(each).to_bytes(4, "little") + each for each in texts)
    return np.array(tensor["data"], DATATYPES[tensor["datatype"]].numpy).tobytes()


def make_body(rng: Random, request: Request) -> Body:
    """Return a hostile body made of a right request."""
    return rng.choice(KINDS)(rng, request)


def _wrong_json(rng: Random, request: Request) -> Body:
    document: Any = request.json()
    for _ in range(rng.choice((1, 1, 2, 3))):
        document = _change(rng, document)
    return Body(_dump(document))


def _change(rng: Random, value: Any, depth: int = 0) -> Any:
    """Change one member or element somewhere within a JSON value."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        name = rng.choice(sorted(value))
        return {**value, name: _replacement(rng, name, value[name], depth)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        index = rng.randrange(len(value))
        return [*value[:index], _replacement(rng, "", value[index], depth), *value[index + 1 :]]
    return _anything(rng)


def _replacement(rng: Random, name: str, value: Any, depth: int) -> Any:
    if isinstance(value, dict | list) and rng.random() < 0.7:
        return _change(rng, value, depth + 1)
    match name:
        case "datatype":
            return rng.choice((*DATATYPES, *TEXTS))
        case "shape":
            return rng.choice(SHAPES)
        case "name" | "id":
            return rng.choice(TEXTS)
        case "data":
            return _data(rng)
        case "parameters":
            return {rng.choice(PARAMETERS): rng.choice(NUMBERS) for _ in range(rng.choice((0, 1, 3)))}
    return _anything(rng)


def _anything(rng: Random) -> Any:
    return rng.choice((*NUMBERS, *SHAPES, *TEXTS))


def _data(rng: Random) -> Any:
    """Return elements: too few, too many, ragged, of other types, nested."""
    elements = [rng.choice(NUMBERS) for _ in range(rng.choice((0, 1, 1, 2, 64, 1000)))]
    return rng.choice((elements, [elements, elements], [elements, [1]], [[[elements]]], elements * 2))


def _dump(document: Any) -> bytes:
    return json.dumps(document, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _wrong_text(rng: Random, request: Request) -> Body:
    """Change the text of a request: its keys come twice, it is nested deeply, or not JSON."""
    text = _dump(request.json())
    depth = rng.choice((10, 33, 1000, 100_000))
    makers: tuple[Callable[[], bytes], ...] = (
        lambda: mutate_bytes(rng, text),
        lambda: b'{"inputs":[],' + text[1:],
        lambda: text[:-1] + b',"inputs":[]}',
        lambda: text.replace(b'"name"', b'"name":"y","name"', 1),
        lambda: text.replace(b'"data": [', b'"data": ' + b"[" * depth, 1),
        lambda: text.replace(b'"data": [', b'"data": ' + b"[" * depth + b"]" * depth + b',"data":[', 1),
        lambda: b"[" * depth + b"]" * depth,
        lambda: b'{"inputs":' * depth,
        lambda: b"\xef\xbb\xbf" + text,
        lambda: text.decode().encode("utf-16"),
        lambda: text + rng.choice((b"\0", b"{}", b" " * 1000, b",")),
        lambda: b"",
    )
    return Body(rng.choice(makers)())


def _wrong_binary(rng: Random, request: Request) -> Body:
    """Change a binary request: sizes, shapes, data, and where the JSON ends."""
    document, payload = request.binary()
    for _ in range(rng.choice((0, 1, 1, 2))):
        document = _change(rng, document) if rng.random() < 0.6 else _resize(rng, document)
    if rng.random() < 0.5:
        payload = mutate_bytes(rng, payload)
    text = _dump(document)
    body = text + payload
    length = rng.choice((len(text), len(text), len(text), *(len(body) + each for each in (-1, 0, 1)), 0))
    value: str = str(length) if rng.random() < 0.8 else rng.choice(LENGTHS)
    return Body(body, ((HEADER_LENGTH, value),) * rng.choice((1, 1, 1, 1, 2)))


def _resize(rng: Random, document: Any) -> Any:
    if not isinstance(document, dict) or not isinstance(document.get("inputs"), list):
        return document
    inputs = [dict(each) if isinstance(each, dict) else each for each in document["inputs"]]
    chosen = rng.choice(inputs or [None])
    if isinstance(chosen, dict):
        chosen["parameters"] = {"binary_data_size": rng.choice(NUMBERS)}
    return {**document, "inputs": inputs}


def _wrong_coding(rng: Random, request: Request) -> Body:
    """Compress a body, and break it: garbage, cut off, followed by more, twice, under another name."""
    body = make_body(rng, request) if rng.random() < 0.3 else Body(_dump(request.json()))
    packed = rng.choice(PACKERS)(body.data)
    changed = rng.choice(
        (packed, mutate_bytes(rng, packed), packed[:-4], packed + packed, gzip.compress(packed))
    )
    name = rng.choice(("gzip", "deflate", "x-gzip", "GZIP ", "br", "gzip, gzip", "identity", "", "\xff"))
    return replace(body, data=changed, headers=(*body.headers, ("Content-Encoding", name)))


PACKERS: tuple[Callable[[bytes], bytes], ...] = (gzip.compress, zlib.compress, bytes)


def _large(rng: Random, request: Request) -> Body:
    """Make a body of many small things, or one that compresses to little."""
    count = rng.choice((1000, 100_000, 1_000_000))
    piece = rng.choice((b"[],", b"{},", b"0,", b'"",', b"[1],", b"null,", b'{"data":[1]},', b" "))
    text = _dump(request.json())
    filled = rng.choice(
        (
            text.replace(b'"data": [', b'"data": [' + piece * count, 1),
            text.replace(b'"inputs": [', b'"inputs": [' + piece * count, 1),
            text.replace(b'"shape": [', b'"shape": [' + piece * count, 1),
            text[:-1] + b',"outputs":[' + piece * count + b"{}]}",
        )
    )
    return Body(gzip.compress(filled, 1), (("Content-Encoding", "gzip"),))


KINDS: tuple[Callable[[Random, Request], Body], ...] = (
    *(_wrong_json,) * 6,
    *(_wrong_text,) * 3,
    *(_wrong_binary,) * 6,
    *(_wrong_coding,) * 3,
    _large,
)
