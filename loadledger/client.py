"""The client that blocks."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

from loadledger.address import Address
from loadledger.asking import Setting
from loadledger.blocking import Transport, iterate, run
from loadledger.calls import At, Calls, LoadParameters
from loadledger.options import MAX_ANSWER_BYTES, Options
from loadledger.records import Event, Head, Health, Job, Model, Resources
from loadledger.tensors import Inputs
from loadledger.waiting import Away, Told


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

    def load(
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
        """Have a model loaded, and return the job.

        Args:
            model_id: its folder in the repository.
            version: the highest if left out.
            wait: until the job has ended, over restarts of the server.
            wait_s: no longer than this.
            on_stage: told the job at once, and whenever its status, stage or what it waits for has changed.
            on_away: told why, once each time the server cannot be asked.
            idempotency_key: the same for the same request; one that is new if left out.
            parameters: how to load.

        Raises:
            JobFailed: `wait`, and the job failed or was cancelled.
            JobUnfinished: `wait_s` is over; the job goes on.
            ServerError: it was refused: `unknown_model`, `unknown_version`, `queue_full`, …
            ServerUnreachable: nobody answers. If `sent`, the job may be there all the same.
        """
        return run(
            self._calls.load(
                model_id,
                version,
                wait=wait,
                wait_s=wait_s,
                on_stage=on_stage,
                on_away=on_away,
                idempotency_key=idempotency_key,
                **parameters,
            )
        )

    def unload(
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
        """Have a model unloaded, the active one if none is named, and return the job; see `load`.

        Args:
            model_id: which.
            force: do not wait for running requests, nor for a worker that is stuck.
            wait: as of `load`, with all that follows.
            wait_s: see there.
            on_stage: see there.
            on_away: see there.
            idempotency_key: see there.

        Raises:
            ServerError: it was refused: `unknown_model`, `not_loaded`, `nothing_loaded`.
        """
        return run(
            self._calls.unload(
                model_id,
                force=force,
                wait=wait,
                wait_s=wait_s,
                on_stage=on_stage,
                on_away=on_away,
                idempotency_key=idempotency_key,
            )
        )

    def cancel(self, job_id: str, *, idempotency_key: str | None = None) -> Job:
        """Have a job cancelled, and return it as it is: `wait_for` tells what came of that.

        Raises:
            ServerError: `unknown_job`, or too late: `already_started`, `already_finished`.
        """
        return run(self._calls.cancel(job_id, idempotency_key=idempotency_key))

    def job(self, job_id: str, *, at: At | None = None) -> Job:
        """Return a job, perhaps as it was in the past."""
        return run(self._calls.job(job_id, at=at))

    def wait_for(
        self,
        job_id: str,
        *,
        timeout_s: float | None = None,
        on_change: Told | None = None,
        on_away: Away | None = None,
    ) -> Job:
        """Return a job when it has ended, whatever its end, over restarts of the server.

        Raises:
            JobUnfinished: `timeout_s` is over; the job goes on.
        """
        return run(self._calls.wait_for(job_id, timeout_s=timeout_s, on_change=on_change, on_away=on_away))

    def jobs(
        self,
        *,
        model: str | None = None,
        status: str | None = None,
        at: At | None = None,
        limit: int | None = None,
    ) -> Generator[Job, None, None]:
        """Return jobs, newest first, page by page as they are wanted; no more than `limit`."""
        return iterate(self._calls.jobs(model=model, status=status, at=at, limit=limit))

    def models(self, *, at: At | None = None) -> Generator[Model, None, None]:
        """Return models by their ids, in the repository or loaded; page by page as they are wanted."""
        return iterate(self._calls.models(at=at))

    def model(self, model_id: str, *, at: At | None = None) -> Model:
        """Return a model, perhaps as it was in the past."""
        return run(self._calls.model(model_id, at=at))

    def resources(self) -> Resources:
        """Return the memory budget, what is taken of it, and who waits for it."""
        return run(self._calls.resources())

    def head(self) -> Head:
        """Return the signed end of the ledger."""
        return run(self._calls.head())

    def health(self) -> Health:
        """Return whether requests can be served: `status` is then `ok`, else it says what is not well."""
        return run(self._calls.health())

    def infer(
        self,
        model_id: str,
        inputs: Inputs,
        *,
        version: int | None = None,
        outputs: Iterable[str] | None = None,
        parameters: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        """Ask a model, and return its answer as the Open Inference Protocol has it. It runs at most once.

        A model that is not loaded is loaded first, if the server does that (`--on-demand on`).

        Args:
            model_id: which.
            inputs: by name a nested list or an array, whose datatype is then asked for first; or tensors.
            version: which; the one that serves if left out.
            outputs: names of those that are wanted; all if left out.
            parameters: of the request.
            timeout_s: other than the client's.
        """
        return run(
            self._calls.infer(
                model_id, inputs, version=version, outputs=outputs, parameters=parameters, timeout_s=timeout_s
            )
        )

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
    ) -> Generator[Event, None, None]:
        """Return the ledger's events in their order: those that there are, or with `follow` all to come.

        What is followed goes on after a lost connection or a restart of the server where it was: no event
        comes twice, and none is left out. Close the iterator, or leave its loop, to end it.

        Args:
            after: only above this position; if left out, from the oldest on, or with `follow` from now on.
            follow: go on with what happens, for ever.
            types: only of one of these types.
            models: only of one of these models.
            jobs: only of one of the jobs with these ids.
            actors: only by one of these.
            since: only from this position or time on.
            until: only up to this position or time; not with `follow`.
            on_away: told why, once each time the server cannot be followed.

        Raises:
            Archived: when iterated; what is asked for is not in the log any more. Its `after` is.
            ServerError: when iterated, `beyond_head`: this is not the ledger that it was.
        """
        return iterate(
            self._calls.events(
                after=after,
                follow=follow,
                types=types,
                models=models,
                jobs=jobs,
                actors=actors,
                since=since,
                until=until,
                on_away=on_away,
            )
        )

    def get(self, path: str, query: Mapping[str, str] | None = None) -> Any:
        """Return the JSON at a path of the server, such as `/v2/models/stats`, that has no method here."""
        return run(self._calls.get(path, query))
