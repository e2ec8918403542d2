"""Events as they are handed on: as the text that is stored, which is never decoded and encoded again."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """An event, and the members that filters look at.

    Attributes:
        line: the body, exactly as it is hashed, with one member more at its end: `hash`, in hexadecimal.
            It is one line of UTF-8, without its end.
    """

    position: int
    type: str
    model_id: str | None
    job_id: str | None
    actor: str
    line: bytes


@dataclass(frozen=True, slots=True)
class EventFilter:
    """Which events: in each field that names some, one of these; a field without any lets all pass."""

    types: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    jobs: tuple[str, ...] = ()
    actors: tuple[str, ...] = ()

    @property
    def columns(self) -> dict[str, tuple[str, ...]]:
        """Return what is asked of which column of the log, each value once."""
        asked = {
            "job_id": self.jobs,
            "model_id": self.models,
            "type": self.types,
            "actor": self.actors,
        }
        return {column: tuple(dict.fromkeys(values)) for column, values in asked.items() if values}

    def matches(self, event: StoredEvent) -> bool:
        """Whether an event is asked for."""
        return (
            (not self.types or event.type in self.types)
            and (not self.models or event.model_id in self.models)
            and (not self.jobs or event.job_id in self.jobs)
            and (not self.actors or event.actor in self.actors)
        )


EVERYTHING = EventFilter()


class _Members(msgspec.Struct, gc=False):
    position: int
    type: str
    actor: str
    model_id: str | None
    job_id: str | None


_DECODER = msgspec.json.Decoder(_Members)


def stored_event(body: bytes, digest: bytes) -> StoredEvent:
    """Return the event of a row.

    Raises:
        msgspec.DecodeError: the body is damaged.
        UnicodeDecodeError: likewise.
    """
    members = _DECODER.decode(body)
    line = b'%b,"hash":"%b"}' % (body[:-1], digest.hex().encode())
    return StoredEvent(members.position, members.type, members.model_id, members.job_id, members.actor, line)


def hash_of(line: bytes) -> bytes:
    """Return the 32 bytes of the hash in a line."""
    return bytes.fromhex(line[-66:-2].decode())
