"""How long a model whose load on demand failed is left alone, before an inference may ask for it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from events.models import Model
from server.errors import ServerProblem

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
"""As a lost model's (DESIGN.md, "Crash")."""
MAX_SETBACKS = 1000
"""Beyond so many the oldest is forgotten: that model is then tried sooner than it might be, nothing else."""

Wish = tuple[str, int | None]
"""A model, and the version of it that is named; None is whatever version the repository has to offer."""


class DemandFailed(ServerProblem):
    """The model could not be loaded on demand.

    Args:
        detail: why.
        retry_after_s: before that, it is not tried again on demand.
        http_headers: such as where the job is.
    """

    code = "load_failed"

    def __init__(
        self, detail: str = "", retry_after_s: float = 1, *, http_headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(detail, http_headers=http_headers)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class _Setback:
    """The last failure; `model` is what was recorded right after it."""

    reason: str
    model: Model | None
    pause_s: float
    until_s: float


class Setbacks:
    """The failures that count: those after which nothing else has happened to the model."""

    def __init__(self) -> None:
        self._by_wish: dict[Wish, _Setback] = {}

    def check(self, wish: Wish, model: Model | None, now_s: float) -> None:
        """Let pass what may be asked for; forgets a failure that somebody's load or unload has outdated.

        Raises:
            DemandFailed: `load_failed`, with the reason of the last time.
        """
        setback = self._by_wish.get(wish)
        if setback is None:
            return
        if setback.model is not model:
            del self._by_wish[wish]
        elif now_s < setback.until_s:
            told = f"{setback.reason}; it is tried again when asked in {setback.until_s - now_s:.1f} s"
            raise DemandFailed(told, setback.until_s - now_s)

    def note(self, wish: Wish, reason: str, before: Model | None, after: Model | None, now_s: float) -> float:
        """Remember a failure, and return how many seconds the wish is to rest.

        Args:
            wish: what was asked for.
            reason: for those who ask meanwhile.
            before: the model as recorded when it was asked for.
            after: and when that had failed; for other versions, this attempt is no news.
            now_s: on the loop's clock.
        """
        last = self._by_wish.pop(wish, None)
        pause_s = FIRST_PAUSE_S if last is None else min(LONGEST_PAUSE_S, last.pause_s * 2)
        for other, setback in self._by_wish.items():
            if other[0] == wish[0] and setback.model is before:
                self._by_wish[other] = replace(setback, model=after)
        self._by_wish[wish] = _Setback(reason, after, pause_s, now_s + pause_s)
        while len(self._by_wish) > MAX_SETBACKS:
            del self._by_wish[next(iter(self._by_wish))]
        return pause_s
