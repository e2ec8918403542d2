"""The client that blocks."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from loadledger.address import MAX_ANSWER_BYTES, Address, Options
from loadledger.operations import Calls
from loadledger.requests import Setting
from loadledger.transport import Transport, iterate, run

P = ParamSpec("P")
T = TypeVar("T")


def _blocking(
    method: Callable[Concatenate[Calls, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Client, P], T]:
    """Return the method of `Client` that does the same, and blocks meanwhile."""

    @wraps(method)
    def called(self: Client, /, *arguments: P.args, **options: P.kwargs) -> T:
        return run(method(self._calls, *arguments, **options))

    return called


def _iterating(
    method: Callable[Concatenate[Calls, P], AsyncGenerator[T, None]],
) -> Callable[Concatenate[Client, P], Generator[T, None, None]]:
    """Return the method of `Client` that iterates over the same."""

    @wraps(method)
    def called(self: Client, /, *arguments: P.args, **options: P.kwargs) -> Generator[T, None, None]:
        return iterate(method(self._calls, *arguments, **options))

    return called


class Client:
    """A server, as programs see it that may block; close it when it is not used any more, or use `with`.

    Threads may share one. An iterator is for one thread; it holds a connection until it ends or is closed.

    Args:
        url: such as http://127.0.0.1:8080, or https://example.org/loadledger behind a proxy.
        token: as `loadledger token` prints it.
        timeout_s: for each answer, but not for a job that is waited for.
        ca_file: certificates to trust, in PEM, instead of the system's.
        max_answer_bytes: what is longer is not taken.

    Raises:
        ValueError: one of these cannot be.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout_s: float = 30.0,
        ca_file: Path | str | None = None,
        max_answer_bytes: int = MAX_ANSWER_BYTES,
    ) -> None:
        options = Options(Address.of(url, token), timeout_s, ca_file, max_answer_bytes)
        self._transport = Transport(options)
        self._calls = Calls(Setting(options.address, timeout_s, self._transport))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self.url!r})"

    @property
    def url(self) -> str:
        """The server's, without a slash at its end."""
        return self._calls.url

    def close(self) -> None:
        """Close the connections; an iterator closes its own."""
        self._transport.close()

    load = _blocking(Calls.load)
    unload = _blocking(Calls.unload)
    cancel = _blocking(Calls.cancel)
    job = _blocking(Calls.job)
    wait_for = _blocking(Calls.wait_for)
    jobs = _iterating(Calls.jobs)
    models = _iterating(Calls.models)
    model = _blocking(Calls.model)
    resources = _blocking(Calls.resources)
    head = _blocking(Calls.head)
    health = _blocking(Calls.health)
    infer = _blocking(Calls.infer)
    events = _iterating(Calls.events)
    get = _blocking(Calls.get)
