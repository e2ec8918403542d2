"""`Client` and `AsyncClient`: the operations as blocking methods, and for event loops."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Self

from loadledger.address import MAX_ANSWER_BYTES, Address, ConnectionOptions
from loadledger.operations import Operations
from loadledger.profiles import find_target
from loadledger.requests import CallContext, T
from loadledger.transports.blocking import BlockingTransport, iterate, read_control_key, run
from loadledger.transports.nodes import FailoverTransport

P = ParamSpec("P")


def _blocking(
    method: Callable[Concatenate[Operations, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Client, P], T]:
    """Make an operation a blocking method."""

    @wraps(method)
    def call(self: Client, /, *arguments: P.args, **options: P.kwargs) -> T:
        return run(method(self._calls, *arguments, **options))

    return call


def _iterating(
    method: Callable[Concatenate[Operations, P], AsyncGenerator[T, None]],
) -> Callable[Concatenate[Client, P], Generator[T, None, None]]:
    """Make an operation that yields a method that iterates."""

    @wraps(method)
    def call(self: Client, /, *arguments: P.args, **options: P.kwargs) -> Generator[T, None, None]:
        return iterate(method(self._calls, *arguments, **options))

    return call


def _managing(
    method: Callable[Concatenate[Operations, P], AbstractAsyncContextManager[T]],
) -> Callable[Concatenate[Client, P], AbstractContextManager[T]]:
    """Make an operation around an `async with` block one around a `with` block."""

    @contextmanager
    def manage(manager: AbstractAsyncContextManager[T]) -> Generator[T, None, None]:
        value = run(manager.__aenter__())
        try:
            yield value
        except BaseException as error:
            if not run(manager.__aexit__(type(error), error, error.__traceback__)):
                raise
        else:
            run(manager.__aexit__(None, None, None))

    @wraps(method)
    def call(self: Client, /, *arguments: P.args, **options: P.kwargs) -> AbstractContextManager[T]:
        return manage(method(self._calls, *arguments, **options))

    return call


class ServerClient:
    """The base of both clients: the arguments that name a server, and its URL."""

    def __init__(
        self,
        url: str = "",
        *,
        token: str | None = None,
        timeout_s: float = 30.0,
        ca_file: Path | str | None = None,
        max_answer_bytes: int = MAX_ANSWER_BYTES,
    ) -> None:
        if not url:
            kind = type(self).__name__
            raise ValueError(
                f"name the server by its URL, or take that of `loadledger login`: {kind}.from_profile()"
            )
        self._open(
            [
                ConnectionOptions(address, timeout_s, ca_file, max_answer_bytes)
                for address in Address.each_of(url, token)
            ]
        )

    @classmethod
    def from_profile(
        cls, profile: str | None = None, *, timeout_s: float = 30.0, max_answer_bytes: int = MAX_ANSWER_BYTES
    ) -> Self:
        """Return a client of the server that the command line talks to.

        The variables LOADLEDGER_URL, LOADLEDGER_TOKEN and LOADLEDGER_CA count first, then the profile that
        `loadledger login` wrote, then http://127.0.0.1:8080. A profile's token goes to its own URL only.

        Args:
            profile: name or path of the profile; default: LOADLEDGER_PROFILE, then the one without a name.
            timeout_s: as of the client.
            max_answer_bytes: as of the client.

        Raises:
            ProfileProblem: the profile does not exist, or cannot be used.
        """
        target = find_target(None, profile, os.environ)
        return cls(
            target.url,
            token=target.token,
            timeout_s=timeout_s,
            ca_file=target.ca,
            max_answer_bytes=max_answer_bytes,
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    @property
    def url(self) -> str:
        """The server's URL, without a trailing slash; of several, the first."""
        return self._address.url

    def _open(self, options: Sequence[ConnectionOptions]) -> None:
        raise NotImplementedError

    def _make_context(
        self, options: Sequence[ConnectionOptions], connect: Callable[[ConnectionOptions], Any]
    ) -> CallContext:
        self._address = options[0].address
        self._transport = FailoverTransport(options, connect)
        return CallContext(self._address, options[0].timeout_s, self._transport)


class Client(ServerClient):
    """A blocking client of a server; close it after use, or use `with`.

    Threads may share it. An iterator belongs to one thread and holds a connection until it ends or is closed.

    Args:
        url: such as http://127.0.0.1:8080, or https://example.org/loadledger behind a proxy. Several URLs of
            nodes are separated by commas: the next one is asked when one is not there.
        token: as `loadledger token` prints it.
        timeout_s: limit of each answer; `wait_s` limits the wait for a job.
        ca_file: certificates of authorities, in PEM, instead of the system's.
        max_answer_bytes: longest accepted answer.

    Attributes:
        data: the server's data directory, if it is reached over the control socket there.

    Raises:
        ValueError: an argument is invalid.
    """

    data: Path | None = None

    @classmethod
    def of_data(cls, data: Path, *, timeout_s: float = 30.0) -> Self:
        """Return a client of the server that runs on a data directory, over the control socket there.

        It needs no token of yours: the one in the directory is for the server's own user and root. The socket
        has the routes of tokens, sign-in links and nodes.

        Raises:
            ServerUnreachable: no server runs there, or it is another user's.
        """
        address = Address.of("http://localhost", read_control_key(data))
        client = cls("http://localhost", timeout_s=timeout_s)
        client._open([ConnectionOptions(address, timeout_s, data=data)])
        client.data = data
        return client

    def _open(self, options: Sequence[ConnectionOptions]) -> None:
        self._calls = Operations(self._make_context(options, BlockingTransport))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; an iterator closes its own."""
        for transport in self._transport.close_all():
            transport.close()

    load = _blocking(Operations.load)
    unload = _blocking(Operations.unload)
    add = _blocking(Operations.add)
    add_files = _blocking(Operations.add_files)
    remove = _blocking(Operations.remove)
    set_label = _blocking(Operations.set_label)
    remove_label = _blocking(Operations.remove_label)
    cancel = _blocking(Operations.cancel)
    approve = _blocking(Operations.approve)
    withdraw_approval = _blocking(Operations.withdraw_approval)
    verify_model = _blocking(Operations.verify_model)
    job = _blocking(Operations.job)
    wait_for = _blocking(Operations.wait_for)
    jobs = _iterating(Operations.jobs)
    models = _iterating(Operations.models)
    model = _blocking(Operations.model)
    version = _blocking(Operations.version)
    resources = _blocking(Operations.resources)
    nodes = _blocking(Operations.nodes)
    drain = _blocking(Operations.drain)
    head = _blocking(Operations.head)
    health = _blocking(Operations.health)
    metadata = _blocking(Operations.metadata)
    infer = _blocking(Operations.infer)
    loaded = _managing(Operations.loaded)
    events = _iterating(Operations.events)
    records = _iterating(Operations.records)
    record_files = _iterating(Operations.record_files)
    erase_record_file = _blocking(Operations.erase_record_file)
    get = _blocking(Operations.get)
    post = _blocking(Operations.post)


class AsyncClient(ServerClient, Operations):
    """An asynchronous client of a server, with the methods and the arguments of `Client`.

    Use `async with`, or await `close`. It belongs to the event loop of its first use, whose tasks may share
    it. Cancelling a task closes its connection and leaves its job running. An iterator that is left early
    holds its connection until it is closed: use `contextlib.aclosing`.
    """

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections; pending and later calls raise RuntimeError."""
        for transport in self._transport.close_all():
            await transport.close()

    def _open(self, options: Sequence[ConnectionOptions]) -> None:
        from loadledger.transports.asynchronous import AioTransport  # imports aiohttp

        Operations.__init__(self, self._make_context(options, AioTransport))
