"""The rules about approval: how many persons approve the bytes of some models."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum

from msgspec import Struct
from msgspec.structs import replace

NOT_APPROVED = "not_approved"
"""Error code of a load whose bytes too few other persons have approved."""


class AddedMode(StrEnum):
    """The versions that an approval rule lets pass: any, or only those whose adder the ledger has."""

    ANY = "any"
    RECORDED = "recorded"


class ApprovalRule(Struct, frozen=True, gc=False):
    """A rule about approval: how many other persons approve the bytes that some models are loaded from.

    Attributes:
        models: globs, as in `TrustRule`.
        approvals: how many other persons must approve.
        added: `recorded` if the ledger must have who added the bytes.
        emergency: whether the role `emergency` may pass without.
    """

    models: tuple[str, ...]
    approvals: int = 1
    added: AddedMode = AddedMode.ANY
    emergency: bool = True


def list_weaker_approval(before: ApprovalRule, after: ApprovalRule | None) -> Iterator[str]:
    """Yield each way in which a rule is weaker than before; `after` is None for a removed rule."""
    after, name = after or replace(before, approvals=0), f"approval for {', '.join(before.models)}"
    if after.approvals < before.approvals:
        yield f"{name}: {after.approvals} must approve instead of {before.approvals}"
    if before.added is AddedMode.RECORDED and after.added is AddedMode.ANY:
        yield f"{name}: bytes pass whose adder the ledger does not have"
    if after.emergency and not before.emergency:
        yield f"{name}: the role emergency may pass without"
