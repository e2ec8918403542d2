"""What can go wrong for a client: every exception names it, and says what to do.

The texts are safe to print: what a server sent is bounded, has no control characters, and never the token.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Callable, Mapping
from typing import Any

from loadledger.records import Job

REASON_CHARACTERS = 4096
"""Of why a job failed: the model's runtime and the last lines of its worker may have much to say."""
ID_CHARACTERS = 100
"""Of a job's id and status, of which a proper server's have fewer."""


class ClientProblem(Exception):
    """What was asked for cannot be had. It may cross from one process to another."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self), self.args, self.__dict__)


class ServerUnreachable(ClientProblem):
    """The server does not answer: nobody is there, the connection was lost, or time was up.

    Attributes:
        url: the server's, as the client was given it.
        reason: in a few words.
        sent: whether the request may have arrived all the same.
    """

    def __init__(self, url: str, reason: str, *, sent: bool = False) -> None:
        what = "does not answer" if sent else "cannot be reached"
        super().__init__(f"{url} {what}: {reason}; is the server running, and is this its URL?")
        self.url = url
        self.reason = reason
        self.sent = sent


class ServerError(ClientProblem):
    """The server refused, and said why.

    Attributes:
        status: of the answer, in HTTP.
        code: stable, what programs decide by; `http_502`, say, where something before the server answered.
        detail: what happened, for people.
        retry_after_s: when to come back, if the server said so.
        instance: what to look for in the server's log, if anything.
    """

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        retry_after_s: float | None = None,
        instance: str | None = None,
        advice: str = "",
    ) -> None:
        told = f"the server answered {status}: {detail}" + (f"; {advice}" if advice else "")
        super().__init__(f"{told} ({code})")
        self.status = status
        self.code = code
        self.detail = detail
        self.retry_after_s = retry_after_s
        self.instance = instance


class NotAllowed(ServerError):
    """The token is missing, not valid (401), or its roles do not allow this (403)."""


class NotFound(ServerError):
    """There is no such model, version, job or route (404)."""


class Busy(ServerError):
    """Not now (429, 502, 503, 504): the same request may be answered later."""


class Archived(ServerError):
    """What was asked for lies before what the log still holds (410).

    Attributes:
        oldest: the first position that is retained.
        after: what to give as `after` to begin there.
    """

    oldest: int
    after: int

    def begin_at(self, oldest: int) -> Archived:
        """Say where to begin, and return it."""
        self.oldest = oldest
        self.after = max(0, oldest - 1)
        return self


class BadAnswer(ClientProblem):
    """The answer is none of loadledger's, or larger than this client takes."""


class JobFailed(ClientProblem):
    """The job that was waited for failed, or was cancelled.

    Attributes:
        job: as it ended.
        code: of the reason; `cancelled` if it was.
    """

    def __init__(self, job: Job, hide: Callable[[str], str] = str) -> None:
        error = job.error
        self.job = job
        self.code = error.code if error is not None else job.status
        about = job.model_id if job.version is None else f"{job.model_id}/{job.version}"
        reason = f": {error.message} ({error.code})" if error is not None else ""
        what = clean(
            hide(f"{job.kind} of {about} {_ENDS.get(job.status, 'ended')}{reason}"), REASON_CHARACTERS
        )
        super().__init__(f"the {what}; job {clean(hide(job.id), ID_CHARACTERS)}")


class JobUnfinished(ClientProblem):
    """The job has not ended in the time that it was given; it goes on, and can be waited for again.

    Attributes:
        job: as it was last seen.
    """

    def __init__(self, job: Job, waited_s: float, reason: str = "", hide: Callable[[str], str] = str) -> None:
        self.job = job
        why = f" ({reason})" if reason else ""
        what = " is still ".join(clean(hide(text), ID_CHARACTERS) for text in (job.id, job.status))
        super().__init__(f"job {what} after {waited_s:g} s{why}; it goes on: wait for it again")


def clean(text: str, most: int) -> str:
    """Return a text that can be printed: in one line, without control characters, not too long."""
    short = text if len(text) <= most else f"{text[: most - 1]}…"
    return "".join(letter if letter.isprintable() else " " for letter in short)


def reason(error: BaseException) -> str:
    """Return why a connection failed, in the words of the system, which mean more than a library's."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS fails: {(error.reason or 'no reason given').replace('_', ' ').lower()}"
    if isinstance(error, socket.gaierror):
        return "its name is not known"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno).lower()
    return "the server closed it"


def _again(kind: type[ClientProblem], told: tuple[Any, ...], members: Mapping[str, Any]) -> ClientProblem:
    """Make a copy: what a problem was made from is not kept, as pickle takes it to be."""
    problem = kind.__new__(kind, *told)
    problem.__dict__.update(members)
    return problem


_ENDS = {"failed": "failed", "cancelled": "was cancelled"}
