"""What the system unloads by itself: idle models, what outgrew the budget, what is not restored. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from events.clock import later
from events.models import Model, ModelState
from events.types import Cause
from runtime.scheduling.actions import RequestEnd
from runtime.scheduling.eviction import LOOK_S, Eviction, loaded_at
from runtime.scheduling.sight import Running, Sight


@dataclass(frozen=True, slots=True)
class Removal:
    """The next end to be requested; else when to look again, if ever."""

    action: RequestEnd | None = None
    wake_at: str | None = None


def remove(sight: Sight, eviction: Eviction) -> Removal:
    """Find what is to be unloaded though nobody asks for it."""
    let_go = next((model for model in sight.state.models.values() if _is_let_go(sight, model)), None)
    if let_go is not None:
        return Removal(RequestEnd(let_go, Cause.RESTART))
    times: list[str] = []
    for model, ends_at in _idle_ends(sight):
        if ends_at <= sight.now:
            return Removal(RequestEnd(model, Cause.IDLE))
        times.append(ends_at)
    missing = _outgrown(sight)
    if missing > 0:
        victims = eviction.fewest(missing) or eviction.victims
        if victims:
            return Removal(RequestEnd(victims[0].model, Cause.EVICTION))
        times += filter(None, [eviction.next_at])
    return Removal(wake_at=min(times, default=None))


def _is_let_go(sight: Sight, model: Model) -> bool:
    """Whether a model was lost with the server, and is not to come back."""
    lost = model.phase is ModelState.LOST and model.lost_by is Cause.RESTART
    return lost and not sight.policy.restores and not model.loads and not model.unloads


def _idle_ends(sight: Sight) -> Iterator[tuple[Model, str]]:
    """Yield of the models that are unloaded when they are idle those that are first, and when that is.

    A busy one is looked at again when it can have been idle for long enough at the soonest.
    """
    first: dict[float, tuple[str, Model]] = {}
    for model, run in sight.at_rest:
        stays_s = _stays_s(sight, model, run)
        if stays_s is not None:
            since = sight.now if run.busy else max(run.last_used_at or "", loaded_at(model))
            if stays_s not in first or since < first[stays_s][0]:
                first[stays_s] = since, model
    for stays_s, (since, model) in first.items():
        yield model, later(since, stays_s)


def _stays_s(sight: Sight, model: Model, run: Running) -> float | None:
    """Return for how long a model stays without a request, from the end of the last; null is for ever.

    One that was not asked yet has at least the time that any model has: it was loaded for something.
    """
    assert model.serving is not None
    keep_alive_s = model.serving.parameters.keep_alive_s
    if keep_alive_s is None or keep_alive_s < 0 or model.serving.parameters.pinned:
        return None
    if run.busy:
        return max(keep_alive_s, LOOK_S)
    return keep_alive_s if run.last_used_at is not None else max(keep_alive_s, sight.policy.min_residency_s)


def _outgrown(sight: Sight) -> int:
    """Return by how many bytes the workers outgrew the budget, if idle ones are to make up for it."""
    if sight.free_bytes is None or not sight.policy.evicts:
        return 0
    return -sight.free_bytes - sight.coming_bytes
