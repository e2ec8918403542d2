"""`Prefer: wait=N` (RFC 7240): how long a client would like to wait for the end of its job."""

from __future__ import annotations

import re

MAX_WAIT_S = 60
"""Longer than this, proxies and clients give up by themselves (DESIGN.md, "HTTP")."""

_WAIT = re.compile(r"wait\s*=\s*\"?(\d{1,9})\"?\s*(?:;.*)?", re.ASCII | re.IGNORECASE)


def wait_s(fields: list[str]) -> int:
    """Return the seconds to wait, 0 where nothing is preferred; the first `wait` counts, others are ignored.

    Args:
        fields: the values of all `Prefer` header fields, in order.
    """
    for preference in ",".join(fields).split(","):
        match = _WAIT.fullmatch(preference.strip())
        if match is not None:
            return min(MAX_WAIT_S, int(match[1]))
    return 0
