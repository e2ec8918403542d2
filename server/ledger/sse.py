"""How a stream of events is written down: as server-sent events (WHATWG HTML, section 9.2) or JSON lines.

Events carry their position as `id`. What is not in the log has none, so that a client that comes back says
the position of the last event, or bookmark, that it has seen.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from events.stored import StoredEvent
from server.compression import accepted

RETRY_MS = 1000
"""How long a browser waits before it connects again."""

_FIELD = re.compile(r"[ -~]+")


class ServerSentEvents:
    """`text/event-stream`, which browsers read by themselves."""

    media_type = "text/event-stream"

    def opening(self, position: int) -> bytes:
        """Return how long to wait before coming back, and from where to go on then."""
        return b"retry: %d\nid: %d\n\n" % (RETRY_MS, position)

    def events(self, events: Sequence[StoredEvent]) -> bytes:
        """Return an event for each, named by its type."""
        return b"".join(
            b"id: %d\n%bdata: %b\n\n" % (event.position, _named(event.type), event.line) for event in events
        )

    def bookmark(self, position: int) -> bytes:
        """Return an id alone, which a browser keeps and tells nobody."""
        return b"id: %d\n\n" % position

    def notice(self, kind: str, members: Mapping[str, object]) -> bytes:
        """Return an event without id."""
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), _json(members))

    def heartbeat(self, position: int) -> bytes:  # noqa: ARG002 - other forms say it
        """Return a comment."""
        return b": heartbeat\n\n"

    def end(self, reason: str) -> bytes:
        """Return a comment."""
        return b": %b\n\n" % reason.encode()


class JsonLines:
    """`application/x-ndjson`: a line for each event; lines with a member `stream` are about the stream."""

    media_type = "application/x-ndjson"

    def opening(self, position: int) -> bytes:
        """Return a bookmark."""
        return self.bookmark(position)

    def events(self, events: Sequence[StoredEvent]) -> bytes:
        """Return a line for each."""
        return b"".join(b"%b\n" % event.line for event in events)

    def bookmark(self, position: int) -> bytes:
        """Return a line that says the position."""
        return self.notice("bookmark", {"position": position})

    def notice(self, kind: str, members: Mapping[str, object]) -> bytes:
        """Return a line whose member `stream` says what it is."""
        return _json({"stream": kind, **members}) + b"\n"

    def heartbeat(self, position: int) -> bytes:
        """Return a bookmark: it may be the same as the last."""
        return self.bookmark(position)

    def end(self, reason: str) -> bytes:
        """Return a line that says why."""
        return self.notice("end", {"reason": reason})


Form = ServerSentEvents | JsonLines
"""A way to write a stream; each part ends so that it can be read without what follows."""

SSE = ServerSentEvents()
NDJSON = JsonLines()


def chosen_form(accept: str | None) -> Form:
    """Return what the field Accept asks for: JSON lines where it names them and prefers nothing else here."""
    weights = accepted(accept)
    lines = weights.get(NDJSON.media_type, 0.0)
    return NDJSON if lines > weights.get(SSE.media_type, 0.0) else SSE


def _named(kind: str) -> bytes:
    """Return the line that names an event; there is none for a type that could break out of its line."""
    return b"event: %b\n" % kind.encode() if _FIELD.fullmatch(kind) else b""


def _json(members: Mapping[str, object]) -> bytes:
    return json.dumps(members, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
