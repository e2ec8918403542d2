"""What a look at the server comes to, as samples of metrics: computed in a thread, from plain values."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import cast

from prometheus_client import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from events.clock import seconds_between
from events.jobs import JobKind, JobStatus
from events.models import ModelState
from events.series import OTHERS, Observed
from events.tally import BARE
from runtime.machine import pressure
from runtime.statistics import TOOK_S, Statistics
from server.metrics.families import FAMILIES, Family
from server.metrics.look import Look, Samples

BREATH = 256
"""Lines that are written at a time: about a millisecond."""
BREATH_S = 0.0001
"""For the loop to notice that it may go on; without a pause it would wait for 5 ms."""

_UNENDED = (JobStatus.PENDING, JobStatus.IN_PROGRESS)


class Collected(Collector):
    """The metrics of one look, for prometheus-client's encoders.

    Args:
        look: what was seen.
        ledger_bytes: what the ledger's files take.
        beside: further collectors, which are asked each time.
    """

    def __init__(self, look: Look, ledger_bytes: int, beside: Iterable[Collector] = ()) -> None:
        self._samples = samples_of(look) | {"ledger_size_bytes": [((), ledger_bytes)]}
        self._beside = tuple(beside)

    def collect(self) -> Iterator[Metric]:
        """Give one family after the other, those without samples too: their names are known to be right."""
        for family in FAMILIES.values():
            yield _metric(family, self._samples)
        yield from chain.from_iterable(each.collect() for each in self._beside)


def samples_of(look: Look) -> Samples:
    """Return all that a look comes to, but for the sizes of files."""
    memory = _memory(look)
    return {**look.samples, **_inferences(look), **_models(look), **_loads(look), **_jobs(look), **memory}


def _inferences(look: Look) -> Samples:
    sums = look.statistics.items()
    stages = ("queue", "input", "infer", "output")
    return {
        "inference_duration_seconds": [((name,), _took(each)) for name, each in sums],
        "inference_failures_total": [((name,), each.failures) for name, each in sums],
        "inferences_total": [((name,), each.inferences) for name, each in sums],
        "inference_executions_total": [((name,), each.executions) for name, each in sums],
        "inference_stage_seconds_total": [
            ((name, stage), getattr(each, f"{stage}_ns") / 1e9) for name, each in sums for stage in stages
        ],
    }


def _took(statistics: Statistics) -> Observed:
    return Observed(TOOK_S, tuple(statistics.took), statistics.total_ns / 1e9)


def _models(look: Look) -> Samples:
    states = Counter(model.state for model in look.models)
    serving = {load.model_id for load in look.loads if load.is_serving}
    shown = [model for model in look.models if look.names.get(model.id, OTHERS) != OTHERS]
    others = [model_id in serving for model_id, name in look.names.items() if name == OTHERS]
    infos = [
        (model.id, str(model.serving.version), model.serving.prepared)
        for model in shown
        if model.serving is not None and model.id in serving
    ]
    return {
        "models": [((state.value,), states[state]) for state in ModelState],
        "model_serving": [
            *(((model.id,), float(model.id in serving)) for model in shown),
            *([((OTHERS,), float(all(others)))] if others else []),
        ],
        "model_info": [
            ((name, version, BARE if prepared is None else prepared.form), 1)
            for name, version, prepared in infos
        ],
        "least_recently_used_age_seconds": [((), _idle_s(look))],
    }


def _idle_s(look: Look) -> float:
    """Return how long the model has been idle that has been it the longest; one that runs is not idle."""
    idle = [load for load in look.loads if load.is_serving and not load.in_flight]
    ages = [(look.now_ns - load.last_used_ns) / 1e9 for load in idle if load.last_used_ns]
    unused = {load.model_id for load in idle if not load.last_used_ns}
    loaded = (model.serving.loaded_at for model in look.models if model.id in unused and model.serving)
    return max([0.0, *ages, *(seconds_between(at, look.now) for at in loaded)])


def _loads(look: Look) -> Samples:
    workers, memory, in_flight = Counter[str](), Counter[str](), Counter[str]()
    for load in look.loads:
        workers[load.name] += load.workers
        memory[load.name] += load.memory_bytes
        in_flight[load.name] += load.in_flight
    return {
        "model_workers": [((name,), count) for name, count in workers.items()],
        "model_memory_bytes": [((name,), size) for name, size in memory.items()],
        "inference_in_flight": [((name,), count) for name, count in in_flight.items()],
    }


def _jobs(look: Look) -> Samples:
    counts = Counter((job.kind, job.status) for job in look.jobs)
    age_s = max((seconds_between(job.created_at, look.now) for job in look.jobs), default=0.0)
    return {
        "jobs": [
            ((kind.value, status.value), counts[kind, status]) for kind in JobKind for status in _UNENDED
        ],
        "oldest_job_age_seconds": [((), age_s)],
    }


def _memory(look: Look) -> Samples:
    reserved = look.preparing_bytes + sum(load.memory_bytes for load in look.loads if not load.is_loaded)
    samples: Samples = {
        "memory_reserved_bytes": [((), reserved)],
        "memory_used_bytes": [((), sum(load.memory_bytes for load in look.loads if load.is_loaded))],
    }
    found = pressure()
    if found is not None:
        percents = {"memory": found.memory_some_percent, "cpu": found.cpu_some_percent}
        samples["pressure_ratio"] = [
            ((name,), percent / 100) for name, percent in percents.items() if percent is not None
        ]
    return samples


def _metric(family: Family, samples: Samples) -> Metric:
    """Make a family of prometheus-client's, whose samples can be read once."""
    metric = Metric(family.base, family.text, family.kind, family.unit)
    metric.samples = cast("list[Sample]", _lines(family, samples))
    return metric


def _lines(family: Family, samples: Samples) -> Iterator[Sample]:
    """Give one sample after the other, and the event loop its turn: who encodes them holds the interpreter.

    All samples in a list would be garbage collected, too, which stops everybody.
    """
    for number, sample in enumerate(_all(family, samples), 1):
        yield sample
        if number % BREATH == 0:
            time.sleep(BREATH_S)


def _all(family: Family, samples: Samples) -> Iterator[Sample]:
    for labels, value in samples.get(family.name.removeprefix("loadledger_"), ()):
        named = dict(zip(family.labels, labels, strict=True))
        if isinstance(value, Observed):
            yield from _histogram(family.name, named, value)
        else:
            yield Sample(family.name, named, value)


def _histogram(name: str, labels: dict[str, str], observed: Observed) -> Iterator[Sample]:
    """Give a histogram as the format has it: each bucket counts those before it, too."""
    count = 0
    for bound, more in zip((*map(repr, observed.bounds), "+Inf"), observed.counts, strict=True):
        count += more
        yield Sample(f"{name}_bucket", {**labels, "le": bound}, count)
    yield Sample(f"{name}_sum", labels, observed.total_s)
    yield Sample(f"{name}_count", labels, count)
