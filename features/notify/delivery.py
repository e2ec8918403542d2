"""Deliveries: an event's CloudEvent, and the header fields that sign it by Standard Webhooks 1.0. Pure.

https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec
from msgspec import Struct

from events.audit.export import make_cloudevent
from events.codec import GENESIS
from events.storage import Row
from features.notify.progress import Progress

MEDIA_TYPE = "application/cloudevents+json"
"""Of one CloudEvent with its attributes and its data in the body ("structured mode")."""
FIRST_BACK_OFF_S, LONGEST_BACK_OFF_S = 1.0, 60.0
_RENAME = 'give the receiver another name, and the position to begin at as its "from"'


class NotDelivered(Exception):
    """A receiver has not acknowledged an event; the message says why, and has nothing of its URL's path."""


class Delivery(Struct, frozen=True, gc=False):
    """The request that brings an event to a receiver, but for its header fields.

    Attributes:
        id: the event's, the same whenever it is sent again.
        reached: the receiver's progress once it has acknowledged this one.
    """

    id: str
    body: bytes
    reached: Progress

    def sign(self, keys: Iterable[bytes], at_s: int) -> Mapping[str, str]:
        """Return the header fields of an attempt, signed by each key; `at_s` is in seconds since 1970."""
        signed = b"%b.%d.%b" % (self.id.encode(), at_s, self.body)
        digests = (hmac.digest(key, signed, hashlib.sha256) for key in keys)
        return {
            "Content-Type": MEDIA_TYPE,
            "webhook-id": self.id,
            "webhook-timestamp": str(at_s),
            "webhook-signature": " ".join(f"v1,{base64.b64encode(each).decode()}" for each in digests),
        }


def make_deliveries(progress: Progress, rows: Sequence[Row], source: str) -> Iterator[Delivery]:
    """Yield the deliveries of the events after a receiver's progress.

    Args:
        progress: what it has acknowledged.
        rows: the event at that position, unless it is 0, and those after it.
        source: the ledger's, as its CloudEvents have it.

    Raises:
        NotDelivered: the ledger is not the one that the receiver knows.
    """
    position, previous = progress.position, GENESIS
    if not rows and not progress.hash:  # the ledger is not there yet
        return
    if position:
        if not rows or rows[0].position != position:
            raise NotDelivered(
                f"the ledger has no event {position}, up to which the receiver has all: {_RENAME}"
            )
        previous, rows = rows[0].hash, rows[1:]
        if progress.hash not in ("", previous.hex()):
            raise NotDelivered(
                f"the event {position} that it has acknowledged is another one in this ledger: {_RENAME}"
            )
    for row in rows:
        if row.position != position + 1:
            raise NotDelivered(f"event {position + 1} is missing in the ledger: run `loadledger verify`")
        body = make_cloudevent(row, previous, source).rstrip(b"\n")
        yield Delivery(msgspec.json.decode(row.body)["id"], body, Progress(row.position, row.hash.hex()))
        position, previous = row.position, row.hash


def describe_status(status: int) -> str | None:
    """Return why an answer with a status acknowledges nothing, or None if it does."""
    if status in range(200, 300):
        return None
    if status in range(300, 400):
        return f"it answered {status}, and redirects are not followed: write the address where it leads"
    return f"it answered {status}"


def back_off_s(failures: int) -> float:
    """Return the exponential back-off of a receiver after so many failures in a row."""
    return min(FIRST_BACK_OFF_S * 2.0 ** (min(failures, 10) - 1), LONGEST_BACK_OFF_S)
