"""The trace that a request belongs to: W3C Trace Context (Recommendation, 2021), read strictly.

What is malformed is as if it had not come: then a new trace begins here, as section 2.2.4 has it. Nothing is
sent back: the Recommendation knows no field of answers.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

TRACEPARENT, TRACESTATE = "traceparent", "tracestate"
MAX_MEMBERS = 32
MAX_STATE_CHARACTERS = 4096
"""Section 3.3.1.5 asks for 512 at least; what is longer than this is dropped whole."""

_SAMPLED = 0x01
_PARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.ASCII)
_KEY_CHARACTERS = r"[a-z0-9_\-*/]"
_MEMBER = re.compile(
    rf"(?P<key>[a-z]{_KEY_CHARACTERS}{{0,255}}|[a-z0-9]{_KEY_CHARACTERS}{{0,240}}@[a-z]{_KEY_CHARACTERS}{{0,13}})"
    r"=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Trace:
    """A place in a trace.

    Attributes:
        trace_id: 32 hexadecimal digits, not all 0.
        span_id: 16 of them: what happens here is a part of that span.
        sampled: whether the trace is recorded, as far as who asked knows.
        state: what tracing systems say of it, as a `tracestate` field; empty if nothing.
        remote: whether who asked has named it.
    """

    trace_id: str
    span_id: str
    sampled: bool
    state: str = ""
    remote: bool = False


def new_trace() -> Trace:
    """Return a trace that begins here."""
    return Trace(_some_digits(32), _some_digits(16), sampled=False)


def given_trace(parents: Sequence[str], states: Sequence[str]) -> Trace | None:
    """Return the trace that a request names; None if it names none, or not as the Recommendation has it.

    Args:
        parents: the values of its `traceparent` fields, of which there has to be one.
        states: the values of its `tracestate` fields, which are one list.
    """
    found = _PARENT.fullmatch(parents[0].strip(" \t")) if len(parents) == 1 else None
    if found is None:
        return None
    version, trace_id, span_id, flags, rest = found.groups()
    if version == "ff" or (version == "00" and rest is not None):
        return None
    if not trace_id.strip("0") or not span_id.strip("0"):
        return None
    sampled = bool(int(flags, 16) & _SAMPLED)
    return Trace(trace_id, span_id, sampled, given_state(states), remote=True)


def given_state(states: Sequence[str]) -> str:
    """Return the members of `tracestate` fields as one field; nothing if any of it is malformed."""
    joined = ",".join(states)
    members = [member for part in joined.split(",") if (member := part.strip(" \t"))]
    if len(joined) > MAX_STATE_CHARACTERS or len(members) > MAX_MEMBERS:
        return ""
    found = [_MEMBER.fullmatch(member) for member in members]
    keys = {match["key"] for match in found if match is not None}
    return ",".join(members) if len(keys) == len(members) else ""


def _some_digits(count: int) -> str:
    """Return random hexadecimal digits, not all of which are 0."""
    while not (digits := secrets.token_hex(count // 2)).strip("0"):
        pass
    return digits
