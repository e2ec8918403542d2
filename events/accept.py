"""How the writer decides a command right before the insert: accept, join an existing job, or refuse. Pure.

Compare and append: a command of the system is refused as `outdated` unless its conditions hold, so nothing is
appended that was decided before a client's command, or before a commit that succeeded though it raised.
Idempotency keys are looked up here, and each command decides the rest, in the module of its subject.
"""

from __future__ import annotations

from collections.abc import Callable

from events.clock import Timestamp
from events.commands import Command, Decision, DecisionInput, Existing, Refused
from events.state import State
from events.types import Idempotency


def accept(
    state: State, command: Command, new_id: Callable[[], str], now: Timestamp, previous: bytes = b""
) -> Decision:
    """Decide `command` on `state`.

    Args:
        state: the live state, with the idempotency key of `command` if it is known, and with the joins of the
            jobs that `Command.list_joinable` yields.
        command: the command to decide.
        new_id: returns the id of a new event.
        now: the ledger's time.
        previous: the hash of the event before.
    """
    repeated = _find_repeated(state, command.idempotency, now)
    if repeated is not None:
        return repeated
    at = DecisionInput(state, new_id, now, previous)
    refusals = (condition.find_refusal(at) for condition in command.conditions)
    return next(filter(None, refusals), None) or command.decide(at)


def _find_repeated(state: State, given: Idempotency | None, now: Timestamp) -> Existing | Refused | None:
    """Return the outcome of the first request with this key; only an accepted request uses its key."""
    known = state.keys.get(given.key_hash) if given is not None else None
    if given is None or known is None or not known.holds(now):
        return None
    if known.fingerprint == given.fingerprint:
        return Existing(known.job_id)
    return Refused(
        "idempotency_mismatch",
        f"this Idempotency-Key was used for another request, that of job {known.job_id}, at "
        f"{known.recorded_at}; repeat that one as it was, or use a new key for this one",
    )
