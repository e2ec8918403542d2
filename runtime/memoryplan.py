"""The plan of a container's memory: what workers, bodies, shared tensors and the server may take together.

The sum stays below the limit of the container, so that a model ends before its container does: with
`memory.oom.group` the kernel kills all processes of a container when one passes the limit.
"""

from __future__ import annotations

from dataclasses import dataclass

from events.values import PlannedMemory
from runtime.memory import MAX_LEDGER_BYTES, MemoryLimit, format_megabytes

SERVER_BYTES = 192 * 2**20
"""The server, the fork server and a spare worker: 87 MB at the start, also with a ledger of 200,000 events,
and 98 MB after 50 clients with bodies of 4 MB, 10 that read lists and 10 streams. While 16 bodies of 64 MiB
arrive, 178 MB beside what is counted of them: buffers of connections, and what malloc keeps (measured)."""
BODIES_BYTES = 2**30
"""Least memory for bodies of requests and answers, where the limit allows it."""
LARGEST_BODIES = 16
"""Requests of the largest size in the memory for bodies: a subject has half of it, and a request of long JSON
counts four times while it is read."""
BODIES_SHARE = 8
"""Bodies have an eighth of a small limit, and room for the largest request of two subjects."""
SHARED_BYTES = 2**30
SHARED_SHARE = 16
"""Shared tensors have a sixteenth of the limit, at most `SHARED_BYTES`: of 16 workers all that they share."""
OBSERVED_BYTES = 64 * 2**20
"""Requests and answers that an observer of inferences keeps, if there is one: a hundred of 600 KB."""
GROWTH_SHARE = 8
"""Beside the budget an eighth of it is left, into which models grow between two measurements."""
USUAL_PERCENT = 80
"""The budget without a setting, if bodies and server leave so much: the kernel's caches need some memory."""
LEAST_SHARE, SMALL_SHARE = 8, 3
"""The budget without a setting is at least an eighth of the limit. In a container that is too small for that
beside the server it is a third, which does not fit, as the server says."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The parts of a container's memory, with their limits in bytes.

    Attributes:
        limit: the limit of the container or machine.
        budget_bytes: for all workers, by which loads are admitted.
        bodies_bytes: for bodies of requests and answers.
        shared_bytes: for tensors that the server and workers share.
        server_bytes: for the server's own processes.
        max_request_bytes: limit of a request, which the memory for bodies depends on.
    """

    limit: MemoryLimit
    budget_bytes: int
    bodies_bytes: int
    shared_bytes: int
    server_bytes: int
    max_request_bytes: int

    @property
    def beside_bytes(self) -> int:
        """All parts but the workers'."""
        return self.bodies_bytes + self.shared_bytes + self.server_bytes

    @property
    def growth_bytes(self) -> int:
        return self.budget_bytes // GROWTH_SHARE

    @property
    def total_bytes(self) -> int:
        return min(MAX_LEDGER_BYTES, self.budget_bytes + self.growth_bytes + self.beside_bytes)

    @property
    def workers_bytes(self) -> int:
        """The limit of all workers together, with their growth, beyond which one of them ends."""
        return max(self.limit.bytes - self.beside_bytes, self.budget_bytes + self.growth_bytes)

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.limit.bytes

    @property
    def excess_bytes(self) -> int:
        return max(0, self.total_bytes - self.limit.bytes)

    def to_recorded(self) -> PlannedMemory:
        """Return the plan as the ledger has it."""
        return PlannedMemory(
            limit_bytes=self.limit.bytes,
            budget_bytes=self.budget_bytes,
            growth_bytes=self.growth_bytes,
            bodies_bytes=self.bodies_bytes,
            shared_bytes=self.shared_bytes,
            server_bytes=self.server_bytes,
            excess_bytes=self.excess_bytes or None,
            kills_together=self.limit.kills_together,
        )

    @property
    def fitting_budget_bytes(self) -> int:
        """The largest budget that fits, or 0."""
        return largest_budget(self.limit.bytes - self.beside_bytes)


def largest_budget(workers_bytes: int) -> int:
    """Return the largest budget that fits with its growth into what workers may take together."""
    return max(0, workers_bytes) * GROWTH_SHARE // (GROWTH_SHARE + 1)


def plan_memory(
    limit: MemoryLimit, budget_bytes: int | None, max_request_bytes: int, more_bytes: int = 0
) -> MemoryPlan:
    """Return the plan for a limit.

    Args:
        limit: the limit of the container or machine.
        budget_bytes: the operator's budget, which is kept whether or not it fits; None is the default.
        max_request_bytes: limit of a request.
        more_bytes: for further processes of the server.
    """
    server = SERVER_BYTES + more_bytes
    usual_bodies = max(BODIES_BYTES, LARGEST_BODIES * max_request_bytes)
    bodies = min(usual_bodies, max(limit.bytes // BODIES_SHARE, 2 * max_request_bytes))
    shared = min(SHARED_BYTES, limit.bytes // SHARED_SHARE)
    if budget_bytes is None:
        left = largest_budget(limit.bytes - bodies - shared - server)
        budget_bytes = min(limit.bytes * USUAL_PERCENT // 100, left)
        if left < limit.bytes // LEAST_SHARE:
            budget_bytes = max(1, limit.bytes // SMALL_SHARE)
    return MemoryPlan(limit, budget_bytes, bodies, shared, server, max_request_bytes)


def describe_plan(plan: MemoryPlan) -> str:
    """Return the parts of a plan in a sentence, and in another what follows from their sum."""
    mb, limit = format_megabytes, plan.limit
    parts = (
        f"memory of {mb(limit.bytes)} ({limit.source}): {mb(plan.budget_bytes)} for models and"
        f" {mb(plan.growth_bytes)} for their growth, {mb(plan.bodies_bytes)} for requests and answers,"
        f" {mb(plan.shared_bytes)} for shared tensors, {mb(plan.server_bytes)} for the server"
    )
    if plan.fits:
        fits = "" if limit.source == "machine" else " A model ends before the container does."
        return f"{parts}.{fits}"
    return f"{parts}. {describe_excess(plan)}"


def describe_excess(plan: MemoryPlan) -> str:
    """Return what may happen, and what to set, if the sum of a plan passes the limit."""
    mb, limit = format_megabytes, plan.limit
    killed = "all processes of the container at once" if limit.kills_together else "the server"
    fitting = plan.fitting_budget_bytes
    is_enough = fitting > limit.bytes // LEAST_SHARE
    smaller = f"set --memory-budget to {fitting // 2**20}MiB or less, or " if is_enough else ""
    return (
        f"That is {mb(plan.excess_bytes)} more than there is, so the kernel may kill {killed}:"
        f" {smaller}give the {_place(limit)} more, or lower --max-request-size."
    )


def _place(limit: MemoryLimit) -> str:
    return "machine" if limit.source == "machine" else "container"
