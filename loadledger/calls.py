"""What a client can do, as flows: written down once, for the client that blocks and the other one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypedDict

from loadledger.address import path
from loadledger.asking import Setting, asked, get, post
from loadledger.effects import Flow
from loadledger.following import Wish, followed_events, listed_events
from loadledger.inferring import Json, Question, inferred
from loadledger.listing import JobPage, Listing, ModelPage, listed, optional, several
from loadledger.problems import ServerError
from loadledger.records import Head, Health, Job, Model, Resources
from loadledger.tensors import Inputs
from loadledger.waiting import Away, Patience, job_request, submitted, waited_for

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
    """The flows of one server.

    Every method raises ValueError at once for what cannot be sent; the flow raises a `ClientProblem`.
    """

    def __init__(self, setting: Setting) -> None:
        self._setting = setting

    def load(
        self,
        model_id: str,
        version: int | None,
        parameters: Mapping[str, Any],
        *,
        patience: Patience | None,
        key: str | None,
    ) -> Flow[Job]:
        """Return the load's job."""
        body = dict(parameters) if version is None else {"version": version, **parameters}
        request = post(f"/api/v1{path('models', model_id, 'load')}", body=body, key=key)
        return submitted(self._setting, request, patience)

    def unload(
        self, model_id: str | None, *, force: bool, patience: Patience | None, key: str | None
    ) -> Flow[Job]:
        """Return the unload's job; without a model it is the active one's."""
        target = path("models", "unload") if model_id is None else path("models", model_id, "unload")
        request = post(f"/api/v1{target}", [("force", "true")] if force else [], key=key)
        return submitted(self._setting, request, patience)

    def cancel(self, job_id: str, *, key: str | None) -> Flow[Job]:
        """Return the job that is to be cancelled."""
        return asked(self._setting, post(f"/api/v1{path('jobs', job_id, 'cancel')}", key=key), Job)

    def job(self, job_id: str, at: At | None) -> Flow[Job]:
        """Return a job."""
        return asked(self._setting, job_request(job_id, at), Job)

    def wait_for(self, job_id: str, patience: Patience) -> Flow[Job]:
        """Return a job that has ended."""
        return waited_for(self._setting, job_id, patience)

    def jobs(self, *, model: str | None, status: str | None, at: At | None, limit: int | None) -> Flow[int]:
        """Give jobs, newest first."""
        pairs = optional(model=model, status=status, at=at)
        return listed(self._setting, Listing("/api/v1/jobs", JobPage, pairs, most=_checked(limit)))

    def models(self, at: At | None) -> Flow[int]:
        """Give models, by id."""
        return listed(self._setting, Listing("/api/v1/models", ModelPage, optional(at=at)))

    def model(self, model_id: str, at: At | None) -> Flow[Model]:
        """Return a model."""
        return asked(self._setting, get(f"/api/v1{path('models', model_id)}", optional(at=at)), Model)

    def resources(self) -> Flow[Resources]:
        """Return the budget and what is taken of it."""
        return asked(self._setting, get("/api/v1/resources"), Resources)

    def head(self) -> Flow[Head]:
        """Return the end of the ledger."""
        return asked(self._setting, get("/api/v1/events/head"), Head)

    def health(self) -> Flow[Health]:
        """Return whether the server can serve."""
        try:
            return (yield from asked(self._setting, get("/health/ready"), Health))
        except ServerError as problem:
            if problem.code != UNWELL:
                raise
            return Health(status=problem.detail)

    def get(self, target: str, pairs: Mapping[str, str]) -> Flow[Any]:
        """Return the JSON at a path."""
        if not target.startswith("/"):
            raise ValueError(f"{target!r} does not begin with /")
        if not _PATH.fullmatch(target):
            raise ValueError(
                f"{target!r} has characters that no path has: encode them, and give a query as such"
            )
        return asked(self._setting, get(target, list(pairs.items())), Any)

    def infer(
        self,
        model_id: str,
        inputs: Inputs,
        *,
        version: int | None,
        outputs: Iterable[str] | None,
        parameters: Mapping[str, Any] | None,
        timeout_s: float | None,
    ) -> Flow[Json]:
        """Return the model's answer."""
        at = () if version is None else ("versions", str(version))
        model = f"/v2{path('models', model_id, *at)}"
        named = None if outputs is None else [{"name": name} for _, name in several("outputs", outputs)]
        options = {"outputs": named, "parameters": parameters}
        return inferred(self._setting, Question(model, inputs, options, timeout_s))

    def events(
        self,
        *,
        follow: bool,
        after: int | None,
        filters: Mapping[str, Iterable[str]],
        moments: Mapping[str, At | None],
        on_away: Away | None,
    ) -> Flow[int] | Flow[None]:
        """Give events."""
        if follow and moments.get("until") is not None:
            raise ValueError("until ends a list, and follow never ends: leave one out")
        chosen = [pair for name, values in filters.items() for pair in several(name, values)]
        wish = Wish(chosen, after, optional(**moments), on_away)
        return followed_events(self._setting, wish) if follow else listed_events(self._setting, wish)


def _checked(limit: int | None) -> int | None:
    if limit is not None and limit < 1:
        raise ValueError("limit is at least 1")
    return limit
