"""Events, and the signed head of the ledger."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from answers.answer import AnswerBody, about


class EventInfo(AnswerBody, frozen=True, kw_only=True, dict=True):
    """An event exactly as it is stored and hashed, with its hash."""

    position: int
    id: str
    type: str
    schema: int
    job_id: str | None
    model_id: str | None
    version: int | None
    worker_id: str | None
    actor: str
    recorded_at: str
    data: dict[str, Any]
    hash: Annotated[
        str,
        about(
            "Hexadecimal SHA-256 of the previous hash and the UTF-8 text of the event as it "
            "stands here, without this member, which is the last."
        ),
    ]

    @classmethod
    def read(cls, line: bytes) -> EventInfo:
        """Parse an event and keep its line.

        Raises:
            msgspec.MsgspecError: it is no event.
        """
        event = msgspec.json.decode(line, type=cls)
        event.__dict__["line"] = line  # beside the members, so that nothing that is sent can be taken for it
        return event

    def __reduce__(self) -> str | tuple[Any, ...]:
        return (EventInfo.read, (self.line,)) if "line" in self.__dict__ else super().__reduce__()

    def __copy__(self) -> EventInfo:
        return self

    @property
    def line(self) -> bytes:
        """The exact line of an event that was `read`, to be stored and hashed again."""
        line: bytes = self.__dict__["line"]
        return line


class EventList(AnswerBody, frozen=True, kw_only=True):
    """One page of the events."""

    events: list[EventInfo]
    as_of: Annotated[int, about("The position that the page reflects; a stream can start there.")]
    next_cursor: Annotated[int | None, about("`after` or `before` of the next page; null on the last page.")]


class Head(AnswerBody, frozen=True, kw_only=True):
    """The signed head; docs/verify-it-yourself.md describes the signed text."""

    position: int
    hash: Annotated[str, about("Hexadecimal.")]
    recorded_at: str | None
    algorithm: Annotated[str, about("Ed25519.")]
    key_id: Annotated[str, about("32 hexadecimal digits of the public key's SHA-256.")]
    public_key: Annotated[str, about("DER (RFC 8410) in base64.")]
    signature: Annotated[str, about("64 bytes in base64.")]
