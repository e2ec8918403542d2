"""The command in this process, both clients behind one interface, played answers, and binary tensors."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass, field, replace
from inspect import isasyncgen
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import click
import msgspec
import numpy as np
from click.testing import CliRunner, Result
from tritonclient.utils import deserialize_bytes_tensor, triton_to_np_dtype

from answers.events import EventInfo
from answers.jobs import JobInfo
from loadledger import AsyncClient, Client
from loadledger.address import Address
from loadledger.cli.main import SECTIONS, find_command, main
from loadledger.errors import ClientProblem
from loadledger.operations import Operations
from loadledger.requests import Answer, CallContext, Request, T
from server.config import settings
from support.answers import fill_json
from support.http import Api

LIMIT_S = 60.0
"""Nothing takes this long; a bug fails a test instead of hanging it."""

# The command

NO_SETTINGS: dict[str, str | None] = dict.fromkeys(
    [
        *(setting.variable for setting in settings()),
        *(f"LOADLEDGER_{name}" for name in ("CONFIG", "TOKEN", "URL", "PROFILE", "CA")),
        *("XDG_CONFIG_HOME", "XDG_DATA_HOME"),
    ]
) | {"LOADLEDGER_VISIBLE_DEVICES": "none"}

NEW_HOME = str(Path(gettempdir(), "new-user"))
"""A home folder that does not exist, and that any user may create."""


def run_command(
    *arguments: object, typed: str | None = None, color: bool = False, **environment: Any
) -> Result:
    """Run `loadledger` in this process, with these variables, and no devices unless one names them."""
    env = {**NO_SETTINGS, "HOME": NEW_HOME, **environment}
    words = [str(argument) for argument in arguments]
    result = CliRunner().invoke(main, words, input=typed, env=env, color=color, prog_name="loadledger")
    assert "Traceback" not in result.output
    return result


def printed(*arguments: object, code: int = 0, **environment: Any) -> str:
    """Return the output of a command that must end with this code and print nothing on stderr."""
    result = run_command(*arguments, **environment)
    assert (result.exit_code, result.stderr) == (code, ""), (arguments, result.output)
    return result.stdout


def printed_json(*arguments: object, code: int = 0, **environment: Any) -> Any:
    """Return the JSON that a command prints."""
    return json.loads(printed(*arguments, "--json", code=code, **environment))


def refused(*arguments: object, code: int = 2, **environment: Any) -> str:
    """Return the reason of a command that must end with this code and print nothing else."""
    result = run_command(*arguments, **environment)
    assert (result.exit_code, result.stdout) == (code, ""), (arguments, result.output)
    assert result.stderr.strip(), arguments
    return result.stderr


def every_command() -> dict[str, click.Command]:
    """Return all commands by what is typed."""
    found: dict[str, click.Command] = {}
    for name in (name for names in SECTIONS.values() for name in names):
        command = find_command(name)
        assert command.name == name
        inner = command.commands if isinstance(command, click.Group) else {}
        found |= {f"{name} {each}": inner[each] for each in inner} or {name: command}
    return found


class Shell:
    """Runs commands in this process as a person: with a server's URL, and a token of this subject."""

    def __init__(self, api: Api, *roles: str, subject: str = "alice") -> None:
        token = api.token(*roles, subject=subject)
        self.environment: dict[str, Any] = {"LOADLEDGER_URL": api.url, "LOADLEDGER_TOKEN": token}

    def run(self, *arguments: str, typed: str | None = None, **environment: Any) -> Result:
        """Run a command."""
        return run_command(*arguments, typed=typed, **{**self.environment, **environment})

    def prints(self, command: str, **environment: Any) -> str:
        """Return the output of a command that must succeed."""
        result = self.run(*shlex.split(command), **environment)
        assert result.exit_code == 0, result.output
        return result.stdout

    def json(self, command: str) -> Any:
        """Return the JSON that a command prints, which must succeed."""
        return json.loads(self.prints(f"{command} --json"))

    def refused(self, code: int, command: str, **environment: Any) -> str:
        """Return the reason of a command that must end with this code and print nothing else."""
        return refused(*shlex.split(command), code=code, **{**self.environment, **environment})


@contextmanager
def lost_output(place: str) -> Iterator[int]:
    """Open an output that cannot be written: `pipe` has no reader any more, `/dev/full` no room."""
    if place == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open(place, os.O_WRONLY)
    try:
        yield writer
    finally:
        os.close(writer)


# Both clients

KINDS = ["Client", "AsyncClient"]


class Blocked:
    """An asynchronous client that blocks: each call runs to its answer; its iterators can be closed."""

    def __init__(self, client: Any, runner: asyncio.Runner) -> None:
        self.client = client
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        def called(*arguments: Any, **options: Any) -> Any:
            made = getattr(self.client, name)(*arguments, **options)
            if isinstance(made, AbstractAsyncContextManager):
                return self._enter(made)
            return self._iterate(made) if isasyncgen(made) else self._runner.run(_in_time(made))

        return called

    @contextmanager
    def _enter(self, manager: Any) -> Iterator[Any]:
        yield self._runner.run(_in_time(manager.__aenter__()))
        self._runner.run(_in_time(manager.__aexit__(None, None, None)))

    def _iterate(self, values: Any) -> Generator[Any, None, None]:
        end = object()
        try:
            while (value := self._runner.run(_in_time(anext(values, end)))) is not end:
                yield value
        finally:
            self._runner.run(values.aclose())


async def _in_time(awaitable: Any) -> Any:
    async with asyncio.timeout(LIMIT_S):
        return await awaitable


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


# Played answers

ADDRESS = Address("http://ledger.example:8080", "s3cr3t-token")
NDJSON = Answer(200, {"content-type": "application/x-ndjson"}, b"")


class OutOfAnswers(Exception):
    """The client asks for more than the answers that were given."""


@dataclass(slots=True)
class Played:
    """A transport that plays given answers and records what the client does.

    Attributes:
        answers: answers, parts of streams, and problems, in order.
        took_s: duration of each.
        closed: number of closed streams.
        now: the client's clock, in seconds.
    """

    answers: Iterable[Answer | bytes | ClientProblem]
    took_s: float = 0.0
    requests: list[Request] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)
    closed: int = 0
    now: float = 100.0
    _left: Iterator[Answer | bytes | Exception] = field(init=False)

    def __post_init__(self) -> None:
        self._left = iter(self.answers)

    @property
    def client(self) -> Client:
        """A client over this transport."""
        client = Client(ADDRESS.url, token=ADDRESS.token)
        context = CallContext(ADDRESS, 30.0, self, now=lambda: self.now, chance=lambda: 1.0)
        client._calls = Operations(context)
        return client

    async def call(self, work: Callable[[], T]) -> T:
        return work()

    async def send(self, request: Request) -> Answer:
        """Return the next answer."""
        self.requests.append(request)
        answer = self.next()
        assert isinstance(answer, Answer)
        return answer

    async def open(self, request: Request) -> PlayedStream:
        """Return the next answer as a stream."""
        return PlayedStream(self, await self.send(request))

    async def pause(self, seconds: float) -> None:
        """Let time pass."""
        self.pauses.append(seconds)
        self.now += seconds

    def next(self) -> Answer | bytes:
        """Return the next answer or part of a stream, or raise the next problem."""
        self.now += self.took_s
        answer = next(self._left, OutOfAnswers())
        if isinstance(answer, Exception):
            raise answer
        return answer


@dataclass(slots=True)
class PlayedStream:
    """A stream of given parts."""

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
    named = {"id": "j1", "kind": "load", "model_id": "m", "version": 1, "status": status, **members}
    return fill_json(JobInfo, **named)


def event_line(position: int, **members: Any) -> bytes:
    """Return an event as a line of a stream, without its end."""
    return msgspec.json.encode(fill_json(EventInfo, position=position, type="LoadStarted") | members)


def event_lines(*positions: int) -> bytes:
    """Return events as lines of a stream."""
    return b"".join(event_line(position) + b"\n" for position in positions)


def bookmark(position: int) -> bytes:
    """Return the line that tells a stream's position."""
    return b'{"stream":"bookmark","position":%d}' % position


# Binary tensors

HEADER_LENGTH = "Inference-Header-Content-Length"


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor, its data in the binary form."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes

    @property
    def array(self) -> Any:
        """The tensor for ONNX Runtime in Python, in numpy's memory; BF16 as unsigned integers.

        Some of its sums depend on how memory is aligned, so this is not left to chance.
        """
        if self.datatype == "BYTES":
            texts = [element.decode() for element in deserialize_bytes_tensor(self.data)]
            return np.array(texts, object).reshape(self.shape)
        dtype = np.uint16 if self.datatype == "BF16" else triton_to_np_dtype(self.datatype)
        return np.frombuffer(self.data, dtype).reshape(self.shape).copy()


def binary_request(values: Sequence[Value]) -> tuple[dict[str, str], bytes]:
    """Return headers and body of a request with binary inputs and outputs."""
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
