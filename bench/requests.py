"""The requests that the benches of inference send: the same bytes to whoever is asked."""

import http.client
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.models import ADD_ONE

ANSWER_LIMIT_S = 60
LENGTH = "Inference-Header-Content-Length"


@dataclass(frozen=True, slots=True)
class Target:
    """A server that is asked.

    Args:
        name: What the table calls it.
        port: Where it listens on 127.0.0.1.
        token: A bearer token, if it asks for one.
    """

    name: str
    port: int
    token: str = ""


@dataclass(frozen=True, slots=True)
class Request:
    """An inference on the model that adds one: float32 values in, as many out, in the same form.

    Args:
        elements: How many values.
        binary: As raw bytes, both ways, rather than as JSON.
    """

    elements: int
    binary: bool

    def content(self, target: Target) -> bytes:
        """Return all bytes of the request, its head included."""
        headers, body = self._headers(target), self._body()[1]
        lines = [f"{name}: {value}\r\n" for name, value in {**headers, "Content-Length": len(body)}.items()]
        return f"POST {_path()} HTTP/1.1\r\nHost: 127.0.0.1\r\n{''.join(lines)}\r\n".encode() + body

    def write(self, target: Target, folder: Path) -> Path:
        """Write the bytes to a file for the load generator."""
        form = "binary" if self.binary else "json"
        path = folder / f"{target.name}-{self.elements}-{form}".replace(" ", "-")
        path.write_bytes(self.content(target))
        return path

    def check(self, target: Target) -> None:
        """Ask once and end the bench if the answer is wrong: a server can be quick at saying nothing."""
        connection = http.client.HTTPConnection("127.0.0.1", target.port, timeout=ANSWER_LIMIT_S)
        connection.request("POST", _path(), self._body()[1], self._headers(target))
        response = connection.getresponse()
        content = response.read()
        connection.close()
        told = f"{target.name}, {self}: {response.status} {content[:1000]!r}"
        if response.status != http.HTTPStatus.OK:
            raise SystemExit(told)
        if not self._is_right(content, int(response.headers.get(LENGTH, 0))):
            raise SystemExit(f"a wrong answer: {told}")

    def _headers(self, target: Target) -> dict[str, str]:
        headers = {"Authorization": f"Bearer {target.token}"} if target.token else {}
        return headers | ({LENGTH: str(self._body()[0])} if self.binary else {})

    def _body(self) -> tuple[int, bytes]:
        """Return the length of the JSON, and the body, which begins with it."""
        tensor: dict[str, Any] = {"name": "x", "shape": [1, self.elements], "datatype": "FP32"}
        asked: dict[str, Any] = {"inputs": [tensor]}
        raw = b""
        if self.binary:
            raw = self._values().tobytes()
            tensor["parameters"] = {"binary_data_size": len(raw)}
            asked["parameters"] = {"binary_data_output": True}
        else:
            tensor["data"] = self._values().tolist()
        head = json.dumps(asked, separators=(",", ":")).encode()
        return len(head), head + raw

    def _values(self, offset: int = 0) -> "np.ndarray[Any, np.dtype[np.float32]]":
        return np.arange(offset, self.elements + offset, dtype=np.float32)

    def _is_right(self, content: bytes, head_bytes: int) -> bool:
        expected = self._values(offset=1)
        if self.binary:
            return content[head_bytes:] == expected.tobytes()
        data = [output.get("data") for output in json.loads(content)["outputs"]]
        return bool(np.array_equal(np.ravel(data), expected))


def _path() -> str:
    return f"/v2/models/{ADD_ONE}/infer"
