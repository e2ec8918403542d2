"""The client for event loops."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

from loadledger.address import Address
from loadledger.asking import Setting
from loadledger.calls import At, Calls, LoadParameters
from loadledger.looping import Runner
from loadledger.options import MAX_ANSWER_BYTES, Options
from loadledger.records import Event, Head, Health, Job, Model, Resources
from loadledger.tensors import Inputs
from loadledger.waiting import Away, Patience, Told


class AsyncClient:
    """What `Client` is, for a program with an event loop: the same methods, to be awaited or iterated.

    Use `async with`, or await `close`. It belongs to the event loop that it is first used in, whose tasks may
    share it. Who is cancelled lets go of the connection; a job that was asked for goes on. An iterator that
    is left before its end holds its connection until it is closed: use `contextlib.aclosing`.

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
        self._options = options
        self._calls = Calls(Setting(options.address, timeout_s))
        self._runner = Runner(options)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"AsyncClient({self.url!r})"

    @property
    def url(self) -> str:
        """The server's, without a slash at its end."""
        return self._options.address.url

    async def close(self) -> None:
        """Close the connections; what waits for one in other tasks, or wants one later, has RuntimeError."""
        await self._runner.close()

    async def load(
        self,
        model_id: str,
        version: int | None = None,
        *,
        wait: bool = False,
        wait_s: float | None = None,
        on_stage: Told | None = None,
        on_away: Away | None = None,
        idempotency_key: str | None = None,
        **parameters: Unpack[LoadParameters],
    ) -> Job:
        """Have a model loaded, and return the job: see `Client.load`."""
        patience = Patience(wait_s, on_stage, on_away) if wait else None
        flow = self._calls.load(model_id, version, parameters, patience=patience, key=idempotency_key)
        return await self._runner.run(flow)

    async def unload(
        self,
        model_id: str | None = None,
        *,
        force: bool = False,
        wait: bool = False,
        wait_s: float | None = None,
        on_stage: Told | None = None,
        on_away: Away | None = None,
        idempotency_key: str | None = None,
    ) -> Job:
        """Have a model unloaded, and return the job: see `Client.unload`."""
        patience = Patience(wait_s, on_stage, on_away) if wait else None
        flow = self._calls.unload(model_id, force=force, patience=patience, key=idempotency_key)
        return await self._runner.run(flow)

    async def cancel(self, job_id: str, *, idempotency_key: str | None = None) -> Job:
        """Have a job cancelled, and return it as it is: see `Client.cancel`."""
        return await self._runner.run(self._calls.cancel(job_id, key=idempotency_key))

    async def job(self, job_id: str, *, at: At | None = None) -> Job:
        """Return a job, perhaps as it was in the past."""
        return await self._runner.run(self._calls.job(job_id, at))

    async def wait_for(
        self,
        job_id: str,
        *,
        timeout_s: float | None = None,
        on_change: Told | None = None,
        on_away: Away | None = None,
    ) -> Job:
        """Return a job when it has ended, whatever its end: see `Client.wait_for`."""
        return await self._runner.run(self._calls.wait_for(job_id, Patience(timeout_s, on_change, on_away)))

    def jobs(
        self,
        *,
        model: str | None = None,
        status: str | None = None,
        at: At | None = None,
        limit: int | None = None,
    ) -> AsyncGenerator[Job, None]:
        """Return jobs, newest first, page by page as they are wanted; no more than `limit`."""
        return self._runner.iterate(self._calls.jobs(model=model, status=status, at=at, limit=limit))

    def models(self, *, at: At | None = None) -> AsyncGenerator[Model, None]:
        """Return models by their ids, in the repository or loaded; page by page as they are wanted."""
        return self._runner.iterate(self._calls.models(at))

    async def model(self, model_id: str, *, at: At | None = None) -> Model:
        """Return a model, perhaps as it was in the past."""
        return await self._runner.run(self._calls.model(model_id, at))

    async def resources(self) -> Resources:
        """Return the memory budget, what is taken of it, and who waits for it."""
        return await self._runner.run(self._calls.resources())

    async def head(self) -> Head:
        """Return the signed end of the ledger."""
        return await self._runner.run(self._calls.head())

    async def health(self) -> Health:
        """Return whether requests can be served: `status` is then `ok`, else it says what is not well."""
        return await self._runner.run(self._calls.health())

    async def infer(
        self,
        model_id: str,
        inputs: Inputs,
        *,
        version: int | None = None,
        outputs: Iterable[str] | None = None,
        parameters: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        """Ask a model, and return its answer: see `Client.infer`."""
        flow = self._calls.infer(
            model_id, inputs, version=version, outputs=outputs, parameters=parameters, timeout_s=timeout_s
        )
        return await self._runner.run(flow)

    def events(
        self,
        *,
        after: int | None = None,
        follow: bool = False,
        types: Iterable[str] = (),
        models: Iterable[str] = (),
        jobs: Iterable[str] = (),
        actors: Iterable[str] = (),
        since: At | None = None,
        until: At | None = None,
        on_away: Away | None = None,
    ) -> AsyncGenerator[Event, None]:
        """Return the ledger's events, those that there are or all to come: see `Client.events`."""
        filters = {"type": types, "model": models, "job": jobs, "actor": actors}
        moments = {"since": since, "until": until}
        flow = self._calls.events(
            follow=follow, after=after, filters=filters, moments=moments, on_away=on_away
        )
        return self._runner.iterate(flow)

    async def get(self, path: str, query: Mapping[str, str] | None = None) -> Any:
        """Return the JSON at a path of the server, such as `/v2/models/stats`, that has no method here."""
        return await self._runner.run(self._calls.get(path, query or {}))
