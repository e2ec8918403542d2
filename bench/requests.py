"""Inferences over HTTP: their bytes, and whether the answer is right."""

import http.client
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.models import ADD_ONE

CHECK_LIMIT_S = 60
LENGTH = "Inference-Header-Content-Length"


@dataclass(frozen=True, slots=True)
class Target:
    """A measured server.

    Args:
        name: What the table calls it.
        port: Where it listens on 127.0.0.1.
        token: A bearer token, if it asks for one.
    """

    name: str
    port: int
    token: str = ""


class Request:
    """An inference of a model, in the same form both ways.

    Args:
        model_id: The model.
        inputs: Its tensors, by name.
        outputs: What a right answer has, in the model's order.
        binary: As raw bytes rather than as JSON.
    """

    def __init__(
        self,
        model_id: str,
        inputs: Mapping[str, NDArray[np.float32]],
        outputs: Sequence[NDArray[np.float32]],
        *,
        binary: bool,
    ) -> None:
        self.model_id, self.binary, self._outputs = model_id, binary, outputs
        self._head_bytes, self._body = encode(inputs, binary=binary)

    @property
    def path(self) -> str:
        """Return the path of the URL."""
        return f"/v2/models/{self.model_id}/infer"

    def content(self, target: Target) -> bytes:
        """Return all bytes of the request, its head included."""
        headers = {**self._headers(target), "Content-Length": len(self._body)}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f"POST {self.path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{lines}\r\n".encode() + self._body

    def write(self, target: Target, folder: Path) -> Path:
        """Write the bytes to a file for the load generator."""
        form = "binary" if self.binary else "json"
        path = folder / f"{target.name}-{self.model_id}-{len(self._body)}-{form}".replace(" ", "-")
        path.write_bytes(self.content(target))
        return path

    def check(self, target: Target) -> None:
        """Send it once and end the bench if the answer is wrong: an empty one would be quick."""
        connection = http.client.HTTPConnection("127.0.0.1", target.port, timeout=CHECK_LIMIT_S)
        connection.request("POST", self.path, self._body, self._headers(target))
        response = connection.getresponse()
        content = response.read()
        connection.close()
        told = f"{target.name}, {self}: {response.status} {content[:1000]!r}"
        if response.status != http.HTTPStatus.OK:
            raise SystemExit(told)
        outputs = _decode(content, int(response.headers.get(LENGTH, 0)), binary=self.binary)
        if not (len(outputs) == len(self._outputs) and all(map(np.array_equal, outputs, self._outputs))):
            raise SystemExit(f"a wrong answer: {told}")

    def __str__(self) -> str:
        return f"{self.model_id} in {'binary' if self.binary else 'JSON'}"

    def _headers(self, target: Target) -> dict[str, str]:
        headers = {"Authorization": f"Bearer {target.token}"} if target.token else {}
        return headers | ({LENGTH: str(self._head_bytes)} if self.binary else {})


Body = tuple[int, bytes]
"""The length of the JSON, and all of a request's body, which begins with it."""


def encode(inputs: Mapping[str, NDArray[np.float32]], *, binary: bool) -> Body:
    """Return the body of an inference; the outputs are asked for in the same form."""
    tensors = [
        {"name": name, "shape": values.shape, "datatype": "FP32", **_data(values, binary=binary)}
        for name, values in inputs.items()
    ]
    asked: dict[str, Any] = {"inputs": tensors}
    if binary:
        asked["parameters"] = {"binary_data_output": True}
    head = json.dumps(asked, separators=(",", ":")).encode()
    return len(head), b"".join([head, *(values.tobytes() for values in inputs.values() if binary)])


def _data(values: NDArray[np.float32], *, binary: bool) -> dict[str, Any]:
    if binary:
        return {"parameters": {"binary_data_size": values.nbytes}}
    return {"data": values.ravel().tolist()}


def _decode(content: bytes, head_bytes: int, *, binary: bool) -> list[NDArray[np.float32]]:
    """Return the outputs of an answer, flat; none of an answer that has no data."""
    if not binary:
        return [
            np.ravel(output.get("data", [])).astype(np.float32) for output in json.loads(content)["outputs"]
        ]
    outputs, begin = list[NDArray[np.float32]](), head_bytes
    for output in json.loads(content[:head_bytes] or content)["outputs"]:
        end = begin + output["parameters"]["binary_data_size"]
        outputs.append(np.frombuffer(content[begin:end], np.float32))
        begin = end
    return outputs


def add_one_inputs(elements: int) -> dict[str, NDArray[np.float32]]:
    """Return so many values for the model that adds one."""
    return {"x": np.arange(elements, dtype=np.float32).reshape(1, elements)}


def add_one_request(elements: int, *, binary: bool, model_id: str = ADD_ONE) -> Request:
    """Return an inference of the model that adds one, under any name, of so many values."""
    inputs = add_one_inputs(elements)
    return Request(model_id, inputs, [inputs["x"][0] + 1], binary=binary)
