"""The operator's rules `[[record]]`: of which models inferences are recorded, and for how long. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from enum import StrEnum

from msgspec import Struct

from features.rules import matches_any


class Failures(StrEnum):
    """Which failed inferences are recorded: all, or the same share as of others."""

    ALL = "all"
    SHARE = "share"


class What(StrEnum):
    """The parts of tensors that are recorded."""

    DIGESTS = "digests"
    TENSORS = "tensors"


class RecordRule(Struct, frozen=True, gc=False, kw_only=True):
    """One table: the first whose globs match a model holds for it.

    Attributes:
        models: globs.
        share: of the inferences, more than 0 and at most 1.
        failures: which failed ones.
        what: names, datatypes, shapes and digests of tensors, or these and their bytes.
        max_bytes: of the files of these models together; the oldest are erased first.
        keep_s: how long a file is kept after its end.
    """

    models: tuple[str, ...]
    share: float = 1.0
    failures: Failures = Failures.SHARE
    what: What = What.DIGESTS
    max_bytes: int = 10 * 10**9
    keep_s: int = 30 * 86400


def find_rule(rules: Iterable[RecordRule], model_id: str) -> RecordRule | None:
    return next((rule for rule in rules if matches_any(rule.models, model_id)), None)


def is_chosen(request_id: str, share: float) -> bool:
    """Whether a share of all requests has this one.

    The first eight bytes of the id's SHA-256, a number with the highest byte first, are less than that share
    of 2**64. So everybody can repeat the choice, each node makes the same, and a larger share has all of a
    smaller one.
    """
    number = int.from_bytes(hashlib.sha256(request_id.encode()).digest()[:8])
    return number < share * 2**64
