"""The client's exceptions; each message says what is wrong and what to do.

Messages are safe to print: a server's text in them is bounded, and free of control characters and the token.
"""

from __future__ import annotations

import os
import re
import socket
import ssl
from collections.abc import Callable, Mapping
from typing import Any

from answers.jobs import JobInfo

REASON_CHARACTERS = 4096
"""Longest reason of a failed job: the runtime's message and the worker's last lines."""
ID_CHARACTERS = 100
"""Longest id and status of a job; a real server's are shorter."""
_ENDS = {"failed": "failed", "cancelled": "was cancelled"}
OTHER_RELEASE = "this client is of another release than the server, or this is not its URL"
ADVICE = {
    "no_credentials": "set LOADLEDGER_TOKEN, or save one with `loadledger login`"
    " (`loadledger token --role admin --subject NAME` creates one)",
    "invalid_token": "get a new one: `loadledger token --role admin --subject NAME` creates one",
    "forbidden": "use a token with that role (`loadledger token --role …`)",
    "unknown_model": "`loadledger models` lists them",
    "unknown_version": "`loadledger show MODEL` lists its versions",
    "unknown_node": "`loadledger nodes` lists them",
    "unknown_token": "`loadledger token list` lists them",
    "not_loaded": "`loadledger ps` lists loaded models",
    "not_found": OTHER_RELEASE,
    "method_not_allowed": OTHER_RELEASE,
    "out_of_service": "`loadledger load MODEL --wait` loads it",
    "bytes_gone": "`loadledger load MODEL --wait` takes the files that the repository has now",
    "version_in_use": "`loadledger rm --force` ends its loads",
}
"""Advice, by the server's error codes, in the command's words; MODEL is the model that the detail names."""
_COMMANDS = {
    r'POST /api/v1/models/([\w.-]+)/load and body \{"version": (\d+)\}': r"`loadledger load \1/\2 --wait`",
    r"POST /api/v1/models/([\w.-]+)/load": r"`loadledger load \1 --wait`",
    r"GET /api/v1/models/([\w.-]+)/verify\?version=(\d+)": r"`loadledger verify-model \1/\2`",
    r"GET \.\.\./verify": "`loadledger verify-model`",
    r"GET /api/v1/models/([\w.-]+)": r"`loadledger show \1`",
    r"GET /api/v1/models": "`loadledger models`",
    r"GET /api/v1/jobs/([\w.-]+)": r"`loadledger job \1`",
    r"GET /api/v1/jobs": "`loadledger jobs`",
    r"add \?force=true": "add --force",
    "(no route has this path|[A-Z]+ is not a method of this route).*": "the server has no such request",
    "Authorization field, of the form Bearer <token>": "token",
    "Idempotency-Key": "idempotency key",
}
"""Requests that a server's details name, as patterns, and the commands that send them."""
_OF_HTTP = re.compile(r"[;:,] [^;:,]*(?:\b(?:GET|POST|PUT|DELETE|PATCH) /|\bAuthorization\b)[^;]*")
"""Advice in HTTP without a command, which is left out."""


class ClientProblem(Exception):
    """Root of the client's exceptions; it can be pickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), self.args, self.__dict__)


CHOOSE_URL = "is this its URL? --url or LOADLEDGER_URL names another"
CHECK_URL = f"is the server running, and {CHOOSE_URL}"
CHECK_NETWORK = "is its machine up, and does a firewall let this one through?"
CHECK_LOG = f"it or a proxy before it has stopped: see its log; {CHOOSE_URL}"
WAIT_LONGER = (
    "see what it does (`loadledger top`), or wait longer (timeout_s, `loadledger infer --timeout`);"
    f" if nothing ever answers, {CHOOSE_URL}"
)


class ServerUnreachable(ClientProblem):
    """The server does not answer: it is absent, the connection was lost, or the time limit passed.

    Attributes:
        url: the server's URL.
        reason: in a few words.
        sent: the request may have arrived.
        lost: the connection ended before the answer, as when the server is killed; no time limit passed.
    """

    def __init__(
        self, url: str, reason: str, advice: str = CHECK_URL, *, sent: bool = False, lost: bool = False
    ) -> None:
        what = "does not answer" if sent else "cannot be reached"
        super().__init__(f"{url} {what}: {reason}; {advice}")
        self.url = url
        self.reason = reason
        self.sent = sent
        self.lost = lost


class ServerError(ClientProblem):
    """The server refused the request.

    Attributes:
        status: the HTTP status.
        code: stable, for programs; such as `http_502` from a proxy.
        detail: the problem, for people.
        retry_after_s: when to retry, if the server says so.
        instance: id of the failure in the server's log, or None.
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
        text = in_commands(detail).rstrip("." if advice else "")
        named = re.search(r"model '([^']+)'", detail)
        advice = advice.replace("MODEL", named[1]) if named else advice
        hint = f"; {advice}" if advice and "`loadledger " not in text and not text.endswith("?") else ""
        super().__init__(f"the server answered {status}: {text}{hint} ({code})")
        self.status = status
        self.code = code
        self.detail = detail
        self.retry_after_s = retry_after_s
        self.instance = instance


class NotAllowed(ServerError):
    """The token is missing or invalid (401), or lacks the role (403)."""


class NotFound(ServerError):
    """There is no such model, version, job or route (404)."""


class Busy(ServerError):
    """The server is busy or unavailable (429, 502, 503, 504): a retry may succeed."""


class BadAnswer(ClientProblem):
    """The answer is not loadledger's, or longer than the client accepts."""


class SourceProblem(ClientProblem):
    """A source cannot be fetched; nothing was sent to a server.

    Attributes:
        code: stable, for programs: `invalid_source` (a name), `source_not_found`, `source_denied`,
            `source_unreachable`, `source_changed`, `digest_mismatch`, `source_invalid` (a malformed or
            unsupported answer), `not_installed` (an extra), `no_space` (here).
        is_transient: whether a retry may succeed soon.
    """

    def __init__(self, code: str, message: str, *, is_transient: bool = False) -> None:
        super().__init__(f"{message} ({code})")
        self.code, self.is_transient = code, is_transient


class JobFailed(ClientProblem):
    """An awaited job failed or was cancelled.

    Attributes:
        job: its final state.
        code: code of its error, or `cancelled`.
    """

    def __init__(self, job: JobInfo, hide: Callable[[str], str] = str) -> None:
        error = job.error
        self.job = job
        self.code = error.code if error is not None else job.status
        about = job.model_id if job.version is None else f"{job.model_id}/{job.version}"
        reason = f": {error.message} ({error.code})" if error is not None else ""
        what = hide(f"{job.kind} of {about} {_ENDS.get(job.status, 'ended')}{reason}")
        job_id = printable(hide(job.id), ID_CHARACTERS)
        super().__init__(f"the {printable(what, REASON_CHARACTERS)}; job {job_id}")


class JobUnfinished(ClientProblem):
    """The limit of the wait passed before the job ended; the job continues.

    Attributes:
        job: its latest known state.
    """

    def __init__(
        self, job: JobInfo, waited_s: float, reason: str = "", hide: Callable[[str], str] = str
    ) -> None:
        self.job = job
        why = f" ({reason})" if reason else ""
        what = " is still ".join(printable(hide(text), ID_CHARACTERS) for text in (job.id, job.status))
        super().__init__(f"job {what} after {waited_s:g} s{why}; it continues: wait for it again")


def in_commands(detail: str) -> str:
    """Return a server's detail with commands in place of the requests that it names."""
    for request, command in _COMMANDS.items():
        detail = re.sub(request, command, detail)
    return _OF_HTTP.sub("", detail)


def printable(text: str, most: int) -> str:
    """Return a text as one printable line of bounded length."""
    short = text if len(text) <= most else f"{text[: most - 1]}…"
    return "".join(letter if letter.isprintable() else " " for letter in short)


def failure_reason(error: BaseException) -> str:
    """Return why a connection failed, in the operating system's words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        reason = (error.reason or "no reason given").replace("_", " ").lower()
        return f"TLS fails: {reason}" if reason != "wrong version number" else "it has no TLS, use http://"
    if isinstance(error, socket.gaierror):
        return "its name is not known"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno).lower()
    return "the server closed it"


def _restore(
    kind: type[ClientProblem], arguments: tuple[Any, ...], members: Mapping[str, Any]
) -> ClientProblem:
    """Restore a pickled problem, whose constructor's arguments are not kept."""
    problem = kind.__new__(kind, *arguments)
    problem.__dict__.update(members)
    return problem
