"""Errors of calls: the gRPC status of each HTTP status, and refusals of the gateway's own."""

from __future__ import annotations

import msgspec

CODE = "loadledger-code"
"""The stable error code, in the trailing metadata."""
PUSHBACK = "grpc-retry-pushback-ms"
"""When to try again, as Retry-After (gRPC proposal A6); clients that retry by themselves obey it."""

STATUSES = {
    **dict.fromkeys((400, 414, 415, 422, 431), "INVALID_ARGUMENT"),
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    **dict.fromkeys((405, 501, 505), "UNIMPLEMENTED"),
    **dict.fromkeys((408, 504), "DEADLINE_EXCEEDED"),
    **dict.fromkeys((409, 412), "FAILED_PRECONDITION"),
    **dict.fromkeys((413, 429, 507), "RESOURCE_EXHAUSTED"),
    500: "INTERNAL",
    503: "UNAVAILABLE",
}
"""The gRPC status of each HTTP status in `server.errors.ERRORS`."""
MAX_TEXT_BYTES = 6 * 2**10
"""Of an error's text: clients refuse trailing metadata of 8 KiB, where other bytes than ASCII take three."""


Metadata = tuple[tuple[str, str], ...]


class CallRefused(Exception):
    """A call ends with this status, by its name in gRPC, text, code, and further trailing metadata."""

    def __init__(self, status: str, text: str, code: str, metadata: Metadata = ()) -> None:
        super().__init__(_clip(text))
        self.status, self.code = status, code
        self.metadata: Metadata = ((CODE, code), *metadata)

    def to_status(self) -> tuple[str, str, Metadata]:
        """Return status, text and trailing metadata."""
        return self.status, str(self), self.metadata


def too_many() -> CallRefused:
    """Return the refusal of a message for which there is no memory."""
    text = "too many large messages are in memory at once; try again"
    return CallRefused("RESOURCE_EXHAUSTED", text, "bodies_full")


def _clip(text: str) -> str:
    encoded = text.encode(errors="replace")
    most = MAX_TEXT_BYTES if text.isascii() else MAX_TEXT_BYTES // 3
    return text if len(encoded) <= most else encoded[:most].decode(errors="ignore") + "…"


class InvalidCall(CallRefused):
    """The call's message is malformed, or contradicts itself."""

    def __init__(self, text: str) -> None:
        super().__init__("INVALID_ARGUMENT", text, "invalid_input")


class _Problem(msgspec.Struct):
    """The members of an error's body that a call gets."""

    error: str
    code: str


def refusal_of(status: int, body: bytes, retry_after: str, metadata: Metadata) -> CallRefused:
    """Return the error of an HTTP answer, with its field Retry-After, and further trailing metadata."""
    try:
        problem = msgspec.json.decode(body, type=_Problem)
    except msgspec.DecodeError:
        problem = _Problem(f"the server answered {status}", "internal")
    pushback = ((PUSHBACK, f"{retry_after}000"),) if retry_after.isdigit() else ()
    found = STATUSES.get(status, "INTERNAL")
    return CallRefused(found, problem.error, problem.code, (*pushback, *metadata))
