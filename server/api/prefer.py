"""`Prefer: wait=N` (RFC 7240): how long a client would like to wait for the end of its job."""

from __future__ import annotations

import re

MAX_WAIT_S = 60
"""Longer than this, proxies and clients give up by themselves (DESIGN.md, "HTTP")."""

_PREFERENCE = re.compile(r'(?:[^",]|"(?:[^"\\]|\\.)*"?)+')  # a comma in a quoted string separates nothing
_WAIT = re.compile(r'wait\s*=\s*(?:"(\d+)"|(\d+))\s*(?:;.*)?', re.ASCII | re.IGNORECASE)


def wait_s(fields: list[str]) -> int:
    """Return the seconds to wait, 0 where nothing is preferred; the first `wait` counts, others are ignored.

    Args:
        fields: the values of all `Prefer` header fields, in order.
    """
    for preference in _PREFERENCE.findall(",".join(fields)):
        match = _WAIT.fullmatch(preference.strip())
        if match is not None:
            digits = (match[1] or match[2]).lstrip("0")
            return min(MAX_WAIT_S, int(digits[:3] or 0))  # of 3 digits or more any is past the limit
    return 0
