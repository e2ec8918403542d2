"""The log as CloudEvents 1.0 in JSON, one a line, for programs that already read those.

It is written and never read again: `verify` takes `jsonl`. `data` is the whole event in canonical form;
`ledgerhash` is SHA-256 of the bytes of `ledgerprevious` and the UTF-8 of `data` as it stands in the line.
"""

from __future__ import annotations

import json

from events.export import Lines
from events.signing import SignedHead, key_id
from events.store import Row
from events.types import SYSTEM

TYPE_PREFIX = "dev.loadledger."
"""CloudEvents ask for reverse-DNS names; what follows is the event's own type."""

HEAD_TYPE = f"{TYPE_PREFIX}head.v1"
"""The type of the last line: the signed head."""

SEQUENCE_DIGITS = 19
"""As many as the largest position has, so that text sorts as numbers (CloudEvents' `sequence` extension)."""


def cloudevents(public_key: bytes) -> Lines:
    """Return the form whose lines are CloudEvents; `source` names the ledger by its public key."""
    source = f"urn:loadledger:{key_id(public_key)}"
    return Lines(
        lambda _after: b"",
        lambda row, previous: _event(row, previous, source),
        lambda head: _head(head, source),
    )


def _event(row: Row, previous: bytes, source: str) -> bytes:
    event = json.loads(row.body)
    attributes = {
        "specversion": "1.0",
        "id": event["id"],
        "source": source,
        "type": TYPE_PREFIX + event["type"],
        "subject": event["model_id"],
        "time": event["recorded_at"],
        "datacontenttype": "application/json",
        "sequence": _sequence(row.position),
        "correlationid": event["job_id"],
        "authtype": "system" if event["actor"] == SYSTEM else "unknown",
        "authid": event["actor"],
        "ledgerprevious": previous.hex(),
        "ledgerhash": row.hash.hex(),
    }
    return _line(attributes, row.body)


def _head(head: SignedHead, source: str) -> bytes:
    statement = head.statement
    attributes = {
        "specversion": "1.0",
        "id": f"head-{statement.position}-{statement.hash.hex()[:16]}",
        "source": source,
        "type": HEAD_TYPE,
        "time": statement.recorded_at or None,
        "datacontenttype": "application/json",
        "sequence": _sequence(statement.position),
        "ledgerhash": statement.hash.hex(),
    }
    return _line(attributes, json.dumps(head.members(), separators=(",", ":")))


def _sequence(position: int) -> str:
    return f"{position:0{SEQUENCE_DIGITS}}"


def _line(attributes: dict[str, str | None], data: str) -> bytes:
    """Write a CloudEvent around `data`, which is JSON already; what is null is left out."""
    given = {name: value for name, value in attributes.items() if value is not None}
    return f'{json.dumps(given, separators=(",", ":"))[:-1]},"data":{data}}}\n'.encode()
