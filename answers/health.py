"""Liveness and readiness."""

from __future__ import annotations

from typing import Annotated

from answers.answer import AnswerBody, about


class Health(AnswerBody, frozen=True, kw_only=True):
    """The checks, all passed."""

    status: str
    checks: dict[str, bool]


class NotReady(AnswerBody, frozen=True, kw_only=True):
    """A failed check of `/health/ready`."""

    check: Annotated[str, about("Its name, as in `checks`.")]
    cause: str
    cure: Annotated[str, about("What an operator can do.")]


class ServerLive(AnswerBody, frozen=True, kw_only=True):
    """The server is alive."""

    live: bool


class ServerReady(AnswerBody, frozen=True, kw_only=True):
    """The server is ready."""

    ready: bool
