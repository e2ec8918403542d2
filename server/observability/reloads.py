"""Thrash: the reloads after evictions of the last hour, and the time that inferences waited for loads."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from aiohttp import web

from answers.resources import LoadUsage, Reloads
from features.ondemand.app import DEMAND
from features.ondemand.loads import COMPLETED
from server.appkeys import CONSUMER, LOG

HOUR_S = 3600


class WaitCounts(NamedTuple):
    """Counts that only grow.

    Attributes:
        reloads: completed loads of models whose last unload was an eviction.
        waited_s: how long inferences waited for loads on demand.
        inference_s: how long all inferences took, with such waits of those that were not answered here.
    """

    reloads: int = 0
    waited_s: float = 0.0
    inference_s: float = 0.0


class LastHour:
    """A sliding window over readings, one each `every_s`, from the server's start on."""

    def __init__(self, every_s: int) -> None:
        self._readings = deque([WaitCounts()], maxlen=HOUR_S // every_s + 1)

    def add(self, counts: WaitCounts) -> None:
        self._readings.append(counts)

    def since(self, counts: WaitCounts) -> WaitCounts:
        """Return by how much the counts grew in the hour until now, whose counts these are."""
        then = self._readings[0]
        return WaitCounts(
            counts.reloads - then.reloads,
            counts.waited_s - then.waited_s,
            counts.inference_s - then.inference_s,
        )


LAST_HOUR = web.AppKey("last_hour", LastHour)


def read_counts(app: web.Application) -> WaitCounts:
    consumer, waited_s = app[CONSUMER], app[DEMAND].waited_s
    all_waits_s = sum(waited_s.values())
    answered_s = consumer.totals.answered_s(consumer.loads.values())
    reloads = app[LOG].tally.reloads.total()
    return WaitCounts(reloads, all_waits_s, answered_s + all_waits_s - waited_s[COMPLETED])


def describe_reloads(
    hour: WaitCounts, uses: Sequence[LoadUsage], free_bytes: int, max_loaded: int | None
) -> Reloads | None:
    """Describe the reloads of an hour; None without any."""
    if not hour.reloads:
        return None
    return Reloads(
        last_hour=hour.reloads,
        waited_s=round(hour.waited_s, 3),
        share=round(min(1.0, hour.waited_s / hour.inference_s), 3) if hour.inference_s > 0 else 0.0,
        limits=find_tight_limits(uses, free_bytes, max_loaded),
    )


def find_tight_limits(uses: Sequence[LoadUsage], free_bytes: int, max_loaded: int | None) -> list[str]:
    """Return the limits that leave no room for one more model, the largest of those that are loaded.

    One slot may be free while a model is evicted for the next: then that is the limit if memory is not.
    """
    lacks_memory = free_bytes < max((max(use.memory_bytes, use.reserved_bytes) for use in uses), default=0)
    slots = 0 if lacks_memory else 1
    lacks_slots = max_loaded is not None and len({use.model_id for use in uses}) + slots >= max_loaded
    return [name for name, lacks in (("memory", lacks_memory), ("max_loaded", lacks_slots)) if lacks]
