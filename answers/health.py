"""Liveness and readiness."""

from __future__ import annotations

from answers.answer import AnswerBody


class Health(AnswerBody, frozen=True, kw_only=True):
    """The checks, all passed."""

    status: str
    checks: dict[str, bool]


class ServerLive(AnswerBody, frozen=True, kw_only=True):
    """The server is alive."""

    live: bool


class ServerReady(AnswerBody, frozen=True, kw_only=True):
    """The server is ready."""

    ready: bool
