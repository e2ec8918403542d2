"""The roles of the server, and which of them may call a route."""

from __future__ import annotations

from enum import Enum


class Access(Enum):
    """Roles that may call a route: any of the value's; PUBLIC needs no token. They decide the rate limit."""

    PUBLIC = frozenset[str]()
    ANY = frozenset({"admin", "infer", "audit", "approve", "emergency"})
    ADMIN = frozenset({"admin"})
    INFER = frozenset({"infer", "admin"})
    AUDIT = frozenset({"audit", "admin"})
    APPROVE = frozenset({"approve"})
    VERIFY = frozenset({"admin", "audit", "approve"})
    EMERGENCY = frozenset({"emergency"})
    """The roles for a load's `emergency`, beside `ADMIN`."""

    @property
    def records(self) -> bool:
        """Whether a route may change something that the ledger records."""
        return self in (Access.ADMIN, Access.APPROVE)


ROLES = Access.ANY.value
"""All roles: none includes another, so that an administrator alone neither approves nor passes without."""
