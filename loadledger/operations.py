"""What a client can do: written down once, for the client that blocks and the other one.

Inferences: also of a model that may have to be loaded for them.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Iterable, Mapping
from typing import Any, Literal, TypedDict, Unpack

from loadledger.address import path
from loadledger.jobs import Away, Patience, Told, job_request, submitted, waited_for
from loadledger.problems import ServerError
from loadledger.records import Event, Head, Health, Job, Model, Resources
from loadledger.requests import Request, Setting, asked, encoded, get, post
from loadledger.stream import (
    JobPage,
    Listing,
    ModelPage,
    Wish,
    followed_events,
    listed,
    listing_of,
    optional,
    several,
)
from loadledger.tensors import Inputs, is_complete, tensors

Json = dict[str, Any]

NOT_LOADED = frozenset({"model_not_loaded", "model_unloading"})
REFUSED = "invalid_input"
"""The server's code for inputs that are not the model's; nothing was run then."""


async def inferred(
    setting: Setting, path: str, inputs: Inputs, options: Mapping[str, Any], timeout_s: float | None
) -> Json:
    """Return the answer of the model at a path.

    Of a model that is not loaded nobody can say what it takes, and on demand nothing but a question loads it.
    So that goes out with datatypes that the values look like. This cannot change an answer, since others than
    the model's are refused; and by then the server can say which they are.

    Raises:
        ServerError: with the server's code.
        ValueError: an input is none of the model's, or its lists are of different lengths.
    """
    wanted = {name: value for name, value in options.items() if value is not None}

    async def ask(metadata: Json | None) -> Json:
        body = encoded({"inputs": tensors(inputs, metadata), **wanted})
        headers = {"Content-Type": "application/json"}
        request = Request("POST", f"{path}/infer", headers, body, repeatable=False, timeout_s=timeout_s)
        return await asked(setting, request, Json)

    async def ask_as_told() -> Json:
        """Ask with the datatypes that the server says are the model's."""
        return await ask(await asked(setting, get(path), Json))

    if is_complete(inputs):
        return await ask(None)
    try:
        return await ask_as_told()
    except ServerError as problem:
        if problem.code not in NOT_LOADED:
            raise
    try:
        return await ask(None)
    except ServerError as problem:
        if problem.code != REFUSED:
            raise
        refused = problem
    try:
        return await ask_as_told()
    except ServerError as problem:
        raise (refused if problem.code in NOT_LOADED else problem) from None


At = int | str
"""A position of the ledger, or a time with its offset, such as 2026-01-31T14:02:00Z."""

UNWELL = "unhealthy"

_PATH = re.compile(r"[!-\"$->@-~]+")
"""Visible characters of ASCII, of which `#` and `?` end a path."""


class LoadParameters(TypedDict, total=False):
    """How to load; what is left out, the model's loadledger.toml says, or else the server."""

    timeout_s: int
    memory_limit_bytes: int | None
    priority: Literal["high", "normal", "low"]
    keep_alive_s: int | None
    strategy: Literal["beside", "in_place", "auto"]
    pinned: bool
    instances: int
    max_batch_size: int
    max_queue_delay_us: int


class Calls:
    """The calls of one server; what cannot be sent is a ValueError, before anything is."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting

    @property
    def url(self) -> str:
        """The server's, without a slash at its end."""
        return self._setting.address.url

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
        body = {**parameters} if version is None else {"version": version, **parameters}
        request = post(f"/api/v1{path('models', model_id, 'load')}", body=body, key=idempotency_key)
        return await submitted(self._setting, request, Patience(wait_s, on_stage, on_away) if wait else None)

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
        target = path("models", "unload") if model_id is None else path("models", model_id, "unload")
        request = post(f"/api/v1{target}", [("force", "true")] if force else [], key=idempotency_key)
        return await submitted(self._setting, request, Patience(wait_s, on_stage, on_away) if wait else None)

    async def cancel(self, job_id: str, *, idempotency_key: str | None = None) -> Job:
        """Have a job cancelled, and return it as it is: `wait_for` tells what came of that.

        Raises:
            ServerError: `unknown_job`, or too late: `already_started`, `already_finished`.
        """
        return await asked(
            self._setting, post(f"/api/v1{path('jobs', job_id, 'cancel')}", key=idempotency_key), Job
        )

    async def job(self, job_id: str, *, at: At | None = None) -> Job:
        """Return a job, perhaps as it was in the past."""
        return await asked(self._setting, job_request(job_id, at), Job)

    async def wait_for(
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
        return await waited_for(self._setting, job_id, Patience(timeout_s, on_change, on_away))

    def jobs(
        self,
        *,
        model: str | None = None,
        status: str | None = None,
        at: At | None = None,
        limit: int | None = None,
    ) -> AsyncGenerator[Job, None]:
        """Return jobs, newest first, page by page as they are wanted; no more than `limit`."""
        if limit is not None and limit < 1:
            raise ValueError("limit is at least 1")
        pairs = optional(model=model, status=status, at=at)
        return listed(self._setting, Listing("/api/v1/jobs", JobPage, pairs, most=limit))

    def models(self, *, at: At | None = None) -> AsyncGenerator[Model, None]:
        """Return models by their ids, in the repository or loaded; page by page as they are wanted."""
        return listed(self._setting, Listing("/api/v1/models", ModelPage, optional(at=at)))

    async def model(self, model_id: str, *, at: At | None = None) -> Model:
        """Return a model, perhaps as it was in the past."""
        return await asked(self._setting, get(f"/api/v1{path('models', model_id)}", optional(at=at)), Model)

    async def resources(self) -> Resources:
        """Return the memory budget, what is taken of it, and who waits for it."""
        return await asked(self._setting, get("/api/v1/resources"), Resources)

    async def head(self) -> Head:
        """Return the signed end of the ledger."""
        return await asked(self._setting, get("/api/v1/events/head"), Head)

    async def health(self) -> Health:
        """Return whether requests can be served: `status` is then `ok`, else it says what is not well."""
        try:
            return await asked(self._setting, get("/health/ready"), Health)
        except ServerError as problem:
            if problem.code != UNWELL:
                raise
            return Health(status=problem.detail)

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
        at = () if version is None else ("versions", str(version))
        model = f"/v2{path('models', model_id, *at)}"
        named = None if outputs is None else [{"name": name} for _, name in several("outputs", outputs)]
        options = {"outputs": named, "parameters": parameters}
        return await inferred(self._setting, model, inputs, options, timeout_s)

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
        if follow and until is not None:
            raise ValueError("until ends a list, and follow never ends: leave one out")
        filters = {"type": types, "model": models, "job": jobs, "actor": actors}
        chosen = [pair for name, values in filters.items() for pair in several(name, values)]
        wish = Wish(chosen, after, optional(since=since, until=until), on_away)
        return followed_events(self._setting, wish) if follow else listed(self._setting, listing_of(wish))

    async def get(self, path: str, query: Mapping[str, str] | None = None) -> Any:
        """Return the JSON at a path of the server, such as `/v2/models/stats`, that has no method here."""
        if not path.startswith("/"):
            raise ValueError(f"{path!r} does not begin with /")
        if not _PATH.fullmatch(path):
            raise ValueError(
                f"{path!r} has characters that no path has: encode them, and give a query as such"
            )
        return await asked(self._setting, get(path, list((query or {}).items())), Any)
