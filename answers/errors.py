"""Why a job, a model or a request failed."""

from __future__ import annotations

from typing import Annotated

from answers.answer import AnswerBody, about, as_format


class ErrorInfo(AnswerBody, frozen=True, kw_only=True):
    """Why a job or a model failed."""

    code: str
    message: str


class Problem(AnswerBody, frozen=True, kw_only=True):
    """The one body of all errors (RFC 9457); clients ignore unknown members (section 3.2)."""

    type: Annotated[str, about("Identifies the problem."), as_format("uri")]
    title: Annotated[str, about("Title of the code; always the same.")]
    status: Annotated[int, about("The HTTP status.")]
    detail: Annotated[str, about("What happened, for people.")]
    instance: Annotated[str | None, about("Reference to the server's log."), as_format("uri")] = None
    code: Annotated[str, about("Stable; for programs.")]
    error: Annotated[str, about("Same as detail, for clients of the Open Inference Protocol.")]
