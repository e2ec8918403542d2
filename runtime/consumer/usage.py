"""Use of the runtime, for people: memory by load, waiting jobs, pending demand, and inference totals.

Statistics begin at zero with each load. When a load ends, its counts are added to the totals of its model, so
that no metric goes back when a model is unloaded or swapped.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from answers.resources import LoadUsage
from events.counters import ModelLabels
from events.state import State
from features.rooms import MEMBERS_OF_USE
from runtime.consumer.running import RunningLoad
from runtime.statistics import Statistics


def list_usage(live: Iterable[RunningLoad], state: State, now: str) -> list[LoadUsage]:
    there = [load for load in live if not load.is_gone]
    found = (_describe_use(load, state, now) for load in there)
    return sorted(found, key=lambda use: (use.model_id, use.job_id))


def _describe_use(load: RunningLoad, state: State, now: str) -> LoadUsage:
    run = load.to_view(state.unended_job(load.job_id), now)
    is_reserved = load.report is None
    model = state.models.get(load.model_id)
    serving = model.find_serving(load.job_id) if model is not None else None
    first = model.serving if model is not None and serving is not None else None
    settings = load.parameters if first is None else first.parameters  # a copy has those of the first
    members = dict[str, Any]()
    for list_members in MEMBERS_OF_USE:
        members |= list_members(load.allocation, run.taken)
    return LoadUsage(
        model_id=load.model_id,
        version=load.version,
        job_id=load.job_id,
        phase=run.phase.value,
        workers=len(load.alive_workers),
        reserved_bytes=run.memory_bytes if is_reserved else 0,
        memory_bytes=0 if is_reserved else run.memory_bytes,
        memory_at_load_bytes=serving.memory_bytes if serving is not None else None,
        cpu_s=sum(worker.cpu_s for worker in load.alive_workers),
        in_flight=load.in_flight,
        oldest_request_s=load.oldest_request_s,
        last_used_at=run.last_used_at,
        pinned=settings.pinned,
        keep_alive_s=settings.keep_alive_s,
        **members,
    )


class InferenceTotals:
    """Sums of the inferences of all loads that have ended.

    Args:
        names: bounds the models that are counted separately.
    """

    def __init__(self, names: ModelLabels) -> None:
        self._names = names
        self._ended: dict[str, Statistics] = {}

    def end(self, load: RunningLoad) -> None:
        """Add the counts of an ended load, including those of late answers. May be repeated."""
        sum_ = self._ended.setdefault(self._names.of(load.model_id), Statistics())
        if load.statistics is not sum_:
            sum_.add(load.statistics)
            load.statistics = sum_

    def answered_s(self, live: Iterable[RunningLoad]) -> float:
        """Return the seconds of all answered inferences, of the ended loads and of these running ones."""
        counts = [*self._ended.values(), *(load.statistics for load in live)]
        return sum(each.total_ns for each in {id(each): each for each in counts}.values()) / 1e9

    def with_live(self, live: Iterable[RunningLoad]) -> dict[str, Statistics]:
        """Return the sums by label, of the ended loads and of these running ones, each given once."""
        sums: dict[str, Statistics] = {}
        labelled = ((self._names.of(load.model_id), load.statistics) for load in live)
        running = [(name, counts) for name, counts in labelled if counts is not self._ended.get(name)]
        for name, counts in [*self._ended.items(), *running]:
            sums.setdefault(name, Statistics()).add(counts)
        return sums
