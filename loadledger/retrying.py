"""Whether to try again, and when: pure decisions, for requests and for streams alike."""

from __future__ import annotations

from loadledger.problems import Busy, ClientProblem, ServerUnreachable

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 2.0
"""Between tries to reach a server: its return is noticed soon, and to be refused costs nearly nothing."""


def passes(problem: ClientProblem, *, reached: bool) -> bool:
    """Whether to try again may help, with a server that had answered before or not.

    A server that never answered is more often a wrong URL than one that starts, so that is told at once.
    What is refused only for coming too often is waited for in any case.
    """
    if isinstance(problem, Busy):
        return reached or problem.code == "rate_limited"
    return reached and isinstance(problem, ServerUnreachable)


def pause_s(problem: ClientProblem | None, failures: int, chance: float) -> float:
    """Return how long to wait: doubling, spread so that many clients do not come back at once.

    Args:
        problem: what went wrong, which may say when to come back.
        failures: in a row, counted from 1.
        chance: from 0 to 1.
    """
    wanted = min(FIRST_PAUSE_S * 2.0 ** min(failures - 1, 10), LONGEST_PAUSE_S) * (0.5 + chance / 2)
    if isinstance(problem, Busy) and problem.retry_after_s is not None:
        return max(wanted, problem.retry_after_s)
    return wanted
