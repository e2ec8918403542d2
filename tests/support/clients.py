"""The clients of others and ours behind one interface, played connections, and binary tensors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from ml_dtypes import bfloat16
from onnx import TensorProto
from tritonclient.http import InferenceServerClient, InferInput, aio
from tritonclient.utils import deserialize_bytes_tensor

from loadledger import AsyncClient, Client
from loadledger.address import Address
from loadledger.operations import Operations
from loadledger.problems import ClientProblem
from loadledger.requests import Answer, CallContext, Request
from loadledger.transport import iterate, run
from support import models
from support.servers import Server, address, bearer, standing

KINDS = ["Client", "AsyncClient"]
"""What tests are repeated for."""

LIMIT_S = 60.0
"""Nothing here takes this long; it is there so that a bug fails a test and does not hang it."""


class Blocked:
    """An asynchronous client that blocks: each call runs to its answer; its iterators can be closed.

    Attributes:
        client: ours, or somebody else's.
    """

    def __init__(self, client: Any, runner: asyncio.Runner) -> None:
        self.client = client
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        def called(*arguments: Any, **options: Any) -> Any:
            made = getattr(self.client, name)(*arguments, **options)
            if name in ("jobs", "models", "events"):
                return self._iterated(made)
            return self._runner.run(_in_time(made))

        return called

    def _iterated(self, made: Any) -> Generator[Any, None, None]:
        try:
            while True:
                try:
                    value = self._runner.run(_in_time(anext(made)))
                except StopAsyncIteration:
                    return
                yield value
        finally:
            self._runner.run(made.aclose())


@contextmanager
def connected(kind: str, url: str, token: str | None = None, **options: Any) -> Iterator[Client]:
    """Give a client of this kind; it is closed in the end."""
    if kind == "Client":
        with Client(url, token=token, **options) as client:
            yield client
        return
    with asyncio.Runner() as runner:
        client_of_loop = AsyncClient(url, token=token, **options)
        try:
            blocked: Any = Blocked(client_of_loop, runner)
            yield blocked
        finally:
            runner.run(client_of_loop.close())


async def _in_time(coroutine: Any) -> Any:
    async with asyncio.timeout(LIMIT_S):
        return await coroutine


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


T = TypeVar("T")

ADDRESS = Address("http://ledger.example:8080", "s3cr3t-token")
NDJSON = Answer(200, {"content-type": "application/x-ndjson"}, b"")


class OutOfAnswers(Exception):
    """The call goes on after the last answer: what it did before is what counts."""


@dataclass(slots=True)
class Played:
    """A transport of answers that are known before, and what a call did with it.

    Attributes:
        answers: answers, parts of streams, and problems.
        took_s: how long each takes to come.
        requests: what was asked.
        pauses: how long nothing was done, each time.
        given: what came out of the iteration.
        closed: how many streams were closed.
        now: the time, in seconds.
    """

    answers: Iterable[Answer | bytes | ClientProblem]
    took_s: float = 0.0
    requests: list[Request] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)
    given: list[Any] = field(default_factory=list)
    closed: int = 0
    now: float = 100.0
    _iterator: Iterator[Answer | bytes | ClientProblem] | None = None

    @property
    def calls(self) -> Operations:
        """The calls of a client over this."""
        return Operations(CallContext(ADDRESS, 30.0, self, now=lambda: self.now, chance=lambda: 1.0))

    def play(self, call: Coroutine[Any, Any, T]) -> T:
        """Return what a call returns; when the answers are used up, it ends."""
        return run(call)

    def iterate(self, values: AsyncGenerator[Any, None]) -> None:
        """Have all the values given that there are, or until the answers are used up."""
        for value in iterate(values):
            self.given.append(value)

    async def send(self, request: Request) -> Answer:
        """Answer."""
        self.requests.append(request)
        answer = self.next()
        assert isinstance(answer, Answer)
        return answer

    async def open(self, request: Request) -> PlayedStream:
        """Answer with a stream."""
        return PlayedStream(self, await self.send(request))

    async def pause(self, seconds: float) -> None:
        """Have time pass."""
        self.pauses.append(seconds)
        self.now += seconds

    def next(self) -> Answer | bytes:
        """Return the next answer, or part of a stream."""
        if self._iterator is None:
            self._iterator = iter(self.answers)
        self.now += self.took_s
        answer = next(self._iterator, None)
        if answer is None:
            raise OutOfAnswers
        if isinstance(answer, ClientProblem):
            raise answer
        return answer


@dataclass(slots=True)
class PlayedStream:
    """A stream of parts that are known before."""

    played: Played
    answer: Answer

    async def read(self) -> bytes:
        """Return the next part."""
        part = self.played.next()
        assert isinstance(part, bytes)
        return part

    def close(self) -> None:
        """Count it."""
        self.played.closed += 1


def answer(members: Any, status: int = 200, **headers: str) -> Answer:
    """Return an answer of JSON."""
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    return Answer(status, {"content-type": "application/json", **named}, msgspec.json.encode(members))


def problem(status: int, code: str, detail: str = "no", **members: Any) -> Answer:
    """Return a refusal as the server writes one."""
    body = {"status": status, "code": code, "detail": detail, **members}
    return replace(answer(body, status), headers={"content-type": "application/problem+json"})


def job(status: str = "pending", **members: Any) -> dict[str, Any]:
    """Return a job's members."""
    return {"id": "j1", "kind": "load", "model_id": "m", "version": 1, "status": status, **members}


def event_line(position: int, **members: Any) -> bytes:
    """Return an event as a stream has it."""
    return msgspec.json.encode({"position": position, "type": "LoadStarted", **members})


def bookmark(position: int) -> bytes:
    """Return the line that says where a stream is."""
    return b'{"stream":"bookmark","position":%d}' % position


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
