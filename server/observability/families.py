"""Families of metrics for Prometheus: a name, a help text, and values by labels."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import accumulate
from typing import Any, TypeVar

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from events.counters import HistogramSnapshot

V = TypeVar("V")

SERIES_AT_ONCE = 64
"""Series that are added without a pause: about a millisecond for histograms."""

PAUSE_S = 0.0001
"""Hands the interpreter to the event loop, which would otherwise wait 5 ms for it."""

_UNITS = ("seconds", "bytes", "ratio")


def _family(
    kind: type[CounterMetricFamily | GaugeMetricFamily],
    name: str,
    text: str,
    values: Mapping[Any, float] | float,
    labels: str = "",
) -> Metric:
    """Return a family with one value, or with one per key: the value of the label, or of all labels."""
    family = kind(f"loadledger_{name}", text, labels=labels.split(), unit=_unit(name))
    for key, value in _series(values):
        family.add_metric(key, value)
    return family


counter = partial(_family, CounterMetricFamily)
gauge = partial(_family, GaugeMetricFamily)


def histogram(
    name: str, text: str, values: Mapping[Any, HistogramSnapshot] | HistogramSnapshot, labels: str = ""
) -> HistogramMetricFamily:
    """Return a family of histograms; each bucket includes the ones before it."""
    family = HistogramMetricFamily(f"loadledger_{name}", text, labels=labels.split(), unit=_unit(name))
    for key, observed in _series(values):
        bounds = (*map(repr, observed.bounds), "+Inf")
        buckets = list(zip(bounds, accumulate(observed.counts), strict=True))
        family.add_metric(key, buckets, observed.total_s)
    return family


def _series(values: Mapping[Any, V] | V) -> Iterator[tuple[tuple[str, ...], V]]:
    if not isinstance(values, Mapping):
        yield (), values
        return
    for number, (key, value) in enumerate(values.items(), 1):
        yield key if isinstance(key, tuple) else (key,), value
        if number % SERIES_AT_ONCE == 0:
            time.sleep(PAUSE_S)


def _unit(name: str) -> str:
    last = name.removesuffix("_total").rpartition("_")[2]
    return last if last in _UNITS else ""
