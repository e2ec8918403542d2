r"""Export: the log as lines that verify by themselves, with a signed head at their end.

`jsonl`, each line one JSON object, in ASCII:

    {"export":"loadledger-export-v1","after":{"position":0,"hash":"0000…"}}
    {"position":1,"hash":"…","body":"{\"actor\":…}"}
    …
    {"head":{"position":…,"hash":"…","recorded_at":"…",…,"signature":"…"}}

`body` is the text whose UTF-8 is hashed, so a verifier never writes canonical JSON. `cloudevents` writes one
CloudEvent a line instead, for other programs; loadledger does not read those files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from events.audit.signing import Sign, SignedHead, Statement, key_id
from events.codec import hash_body
from events.errors import LedgerDamaged, NothingThere
from events.sqlite import queries
from events.sqlite.readonly import open_read_only
from events.storage import Row
from events.types import SYSTEM, Anchor

FORMAT = "loadledger-export-v1"
"""The mark in the first line; another format will have another."""

TYPE_PREFIX = "dev.loadledger."
"""CloudEvents ask for reverse-DNS names; the event's own type follows."""

HEAD_TYPE = f"{TYPE_PREFIX}head.v1"
"""The type of the last line, the signed head."""

SEQUENCE_DIGITS = 19
"""The digits of the largest position, so that text sorts as numbers (CloudEvents' `sequence` extension)."""

_ENCODER = json.JSONEncoder(separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class ExportFormat:
    """An export format: the lines before the events, for one event (with the previous hash), and after."""

    first: Callable[[Anchor], bytes]
    event: Callable[[Row, bytes], bytes]
    last: Callable[[SignedHead], bytes]


def export(
    path: Path, form: ExportFormat, sign: Sign, *, after: int = 0, until: int | None = None
) -> Iterator[bytes]:
    """Yield the lines of the events after position `after` up to and including `until`, and the signed head.

    `until` defaults to the head when the export begins. Memory does not grow with the log. The chain is
    checked on the way, so a head is signed only if it follows from the lines.

    Raises:
        IncompleteCopy: `incomplete_copy`, the file may lack its newest events.
        NothingThere: `nothing_there`, `until` is beyond the head or before `after`.
        LedgerDamaged: `ledger_damaged`, naming the position.
        LogUnavailable: `log_unavailable`, the file cannot be read.
    """
    with open_read_only(path, refuses_incomplete=True) as ledger:
        end = queries.read_head(ledger).position
        last = end if until is None else until
        if not after <= last <= end:
            raise NothingThere(
                f"there are no events from after position {after} to {last}: the log ends at position {end}"
            )
        digest = queries.find_hash(ledger, after)
        if digest is None:
            raise LedgerDamaged(f"the event at position {after} is missing; `verify` says more")
        position = after
        if opening := form.first(Anchor(position, digest)):
            yield opening
        for row in queries.read_rows(ledger, after, last):
            if row.position != position + 1:
                break
            position, previous, digest = position + 1, digest, hash_body(digest, row.body)
            if digest != row.hash:
                raise LedgerDamaged(f"the event at position {position} was changed; `verify` says more")
            yield form.event(row, previous)
        if position != last:
            raise LedgerDamaged(f"the event at position {position + 1} is missing; `verify` says more")
        yield form.last(sign(Statement(last, digest, queries.recorded_at(ledger, last))))


def _line(members: dict[str, object]) -> bytes:
    return _ENCODER.encode(members).encode("ascii") + b"\n"


JSONL = ExportFormat(
    lambda after: _line({"export": FORMAT, "after": {"position": after.position, "hash": after.hash.hex()}}),
    lambda row, _: _line({"position": row.position, "hash": row.hash.hex(), "body": row.body}),
    lambda head: _line({"head": head.members()}),
)
"""The format that has the exact bodies and hashes, and that loadledger reads again."""


def cloudevents(public_key: bytes) -> ExportFormat:
    """Return the format whose lines are CloudEvents 1.0, for programs that read CloudEvents.

    `source` names the ledger by its public key. `data` is the whole event in canonical form; `ledgerhash` is
    SHA-256 of the bytes of `ledgerprevious` and the UTF-8 of `data` as it stands in the line.
    """
    source = f"urn:loadledger:{key_id(public_key)}"
    return ExportFormat(
        lambda _: b"",
        lambda row, previous: make_cloudevent(row, previous, source),
        lambda head: _cloudevent_head(head, source),
    )


def make_cloudevent(row: Row, previous: bytes, source: str) -> bytes:
    """Return the line of an event, given the hash of the one before it."""
    event = json.loads(row.body)
    attributes = {
        "specversion": "1.0",
        "id": event["id"],
        "source": source,
        "type": TYPE_PREFIX + event["type"],
        "subject": event["model_id"],
        "time": event["recorded_at"],
        "datacontenttype": "application/json",
        "sequence": f"{row.position:0{SEQUENCE_DIGITS}}",
        "correlationid": event["job_id"],
        "authtype": "system" if event["actor"] == SYSTEM else "unknown",
        "authid": event["actor"],
        "ledgerprevious": previous.hex(),
        "ledgerhash": row.hash.hex(),
    }
    return _cloudevent_line(attributes, row.body)


def _cloudevent_head(head: SignedHead, source: str) -> bytes:
    statement = head.statement
    attributes = {
        "specversion": "1.0",
        "id": f"head-{statement.position}-{statement.hash.hex()[:16]}",
        "source": source,
        "type": HEAD_TYPE,
        "time": statement.recorded_at or None,
        "datacontenttype": "application/json",
        "sequence": f"{statement.position:0{SEQUENCE_DIGITS}}",
        "ledgerhash": statement.hash.hex(),
    }
    return _cloudevent_line(attributes, json.dumps(head.members(), separators=(",", ":")))


def _cloudevent_line(attributes: dict[str, str | None], data: str) -> bytes:
    """Write a CloudEvent around `data`, which is JSON text; null attributes are left out."""
    given = {name: value for name, value in attributes.items() if value is not None}
    return f'{json.dumps(given, separators=(",", ":"))[:-1]},"data":{data}}}\n'.encode()
