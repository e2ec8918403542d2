"""Statements that servers sign: JSON arrays of text, in UTF-8. Pure.

Each has an id that is used once, so a signature in the log is good for nothing else.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from msgspec import UNSET, UnsetType
from msgspec.structs import astuple

from events.serving import AdmittedBytes
from events.types import Justification
from features.facts import ServerSignature

Sign = Callable[[bytes], ServerSignature]
"""Signs a statement with the key of this server."""

IsSigned = Callable[[bytes, ServerSignature | UnsetType], bool]
"""Whether a server that may sign has signed a statement; of a ledger of one server it has."""


def emergency_statement(
    job_id: str, model_id: str, version: int | None, actor: str, said: Justification
) -> bytes:
    """Return the bytes that a server signs which has seen the role `emergency` of who asks for a load."""
    what = "loadledger-emergency-v1", job_id, model_id, version, actor
    return msgspec.json.encode((*what, said.emergency or "", said.digest or None))


def load_statement(model_id: str, passed: AdmittedBytes) -> bytes:
    """Return the bytes that a server signs for a load, with what it passed."""
    what = "loadledger-load-v1", passed.job_id, model_id, passed.version, passed.digest
    parts = (None if part is UNSET else part for part in astuple(passed.evidence))
    return msgspec.json.encode((*what, *parts))
