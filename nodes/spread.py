"""The spread of inferences over the copies of a model: of two at random, the one with the lower cost.

The cost of a copy is the time until it has answered: the requests that are in flight there and one more,
times its mean service time. A copy at this node keeps an inference unless its cost is clearly higher. What
is known of the others is what their last answer to this node said, or else their hints, with what this node
itself has in flight there. Pure but for the sample; times are of a monotonic clock.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from runtime.consumer.running import RunningLoad

CLEARLY = 2.0
"""Ratio of costs above which another copy is worth the detour: figures are a moment old."""
DETOUR_US = 1000
"""Of a forwarded request, as measured."""
OVERHEAD_US = 300
"""Of a request beside its service, as measured: between other nodes, smaller differences are noise."""
GUESSED_US = 1000
"""Service time of a model before a copy has answered."""
HEARD_S = 2.0
"""Validity of an answer's figures; after it the hints count, which come with each renewal of a lease."""
AVOIDED_S = 1.0
"""Back-off before a node is asked again that was not reached."""
MAX_HEARD = 4096
"""Copies whose figures are remembered; for a forgotten copy, the hints count."""
CANDIDATES = 2
MAX_DIGITS = 9

Key = tuple[str, str]
"""A node and a model."""


@dataclass(frozen=True, slots=True)
class CopyFigures:
    """How busy a copy of a model is.

    Attributes:
        in_flight: requests that are queued or running there.
        service_us: mean time that its worker takes for one; 0 is unknown.
        idle_s: whole seconds since the last inference ended; 0 while there is one.
    """

    in_flight: int = 0
    service_us: int = 0
    idle_s: int = 0

    @property
    def header(self) -> str:
        """The value of `Loadledger-Load`."""
        return f"{self.in_flight};{self.service_us}"


@dataclass(frozen=True, slots=True)
class _Heard:
    """Figures of an answer, with this node's requests in flight there at its arrival."""

    figures: CopyFigures
    sent: int
    at_s: float


class Spread:
    """The choice among copies, by their figures as this node knows them.

    Args:
        sample: returns so many different elements, as `random.sample`.
    """

    def __init__(self, sample: Callable[[Sequence[str], int], list[str]] = random.sample) -> None:
        self._sample = sample
        self._heard: dict[Key, _Heard] = {}
        self._sent: dict[Key, int] = {}
        self._avoided: dict[str, float] = {}

    @contextmanager
    def sending(self, node_id: str, model_id: str) -> Generator[None, None, None]:
        """Count a request that is in flight at another node."""
        key = node_id, model_id
        self._sent[key] = self._sent.get(key, 0) + 1
        try:
            yield
        finally:
            self._sent[key] -= 1
            if not self._sent[key]:
                del self._sent[key]

    def hear(self, node_id: str, model_id: str, header: str, now_s: float) -> None:
        """Note the `Loadledger-Load` of an answer that has come, if it is one."""
        in_flight, _, service_us = header.partition(";")
        if not (_is_figure(in_flight) and _is_figure(service_us)):
            return
        key, figures = (node_id, model_id), CopyFigures(int(in_flight), int(service_us))
        self._heard.pop(key, None)
        self._heard[key] = _Heard(figures, self._sent.get(key, 0), now_s)
        if len(self._heard) > MAX_HEARD:
            del self._heard[next(iter(self._heard))]

    def avoid(self, node_id: str, now_s: float) -> None:
        """Note that a node was not reached."""
        left = {each: until_s for each, until_s in self._avoided.items() if until_s > now_s}
        self._avoided = {**left, node_id: now_s + AVOIDED_S}

    def is_avoided(self, node_id: str, now_s: float) -> bool:
        return self._avoided.get(node_id, now_s) > now_s

    def choose(
        self,
        model_id: str,
        own: CopyFigures | None,
        others: Mapping[str, CopyFigures | None],
        late: Collection[str],
        now_s: float,
    ) -> str | None:
        """Return the node that answers an inference, or None if it is this node, or no node can.

        Args:
            model_id: of the model.
            own: figures of the copy here, None if none may answer here.
            others: the nodes with other copies, and the figures in their hints.
            late: nodes whose leases are late, which are avoided.
            now_s: the time.
        """
        able = [each for each in others if each not in late and not self.is_avoided(each, now_s)]
        if own is None:
            able = able or list(others)
        if not able:
            return None
        names = self._sample(able, min(CANDIDATES, len(able)))
        figures = {name: self._estimate((name, model_id), others[name], now_s) for name in names}
        known = [each.service_us for each in (own, *figures.values()) if each is not None and each.service_us]
        unknown_us = sum(known) / len(known) if known else GUESSED_US
        best = min(names, key=lambda name: _cost_us(figures[name], unknown_us, OVERHEAD_US))
        limit_us = CLEARLY * _cost_us(figures[best], unknown_us) + DETOUR_US
        return None if own is not None and _cost_us(own, unknown_us) <= limit_us else best

    def _estimate(self, key: Key, hint: CopyFigures | None, now_s: float) -> CopyFigures:
        """Return the figures of another copy, with this node's present requests in flight there."""
        heard, sent = self._heard.get(key), self._sent.get(key, 0)
        if heard is None or now_s - heard.at_s > HEARD_S:
            said = hint or CopyFigures()
            return CopyFigures(max(said.in_flight, sent), said.service_us)
        by_others = max(heard.figures.in_flight - heard.sent, 0)
        return CopyFigures(by_others + sent, heard.figures.service_us)


def measure_copy(load: RunningLoad, age_s: float = 0.0) -> CopyFigures:
    """Return the figures of a load at this node, which was loaded `age_s` seconds ago."""
    done, in_flight = load.statistics, load.in_flight
    busy_us = (done.input_ns + done.infer_ns + done.output_ns) // 1000
    idle_s = (time.monotonic_ns() - load.last_used_ns) / 1e9 if load.last_used_ns else age_s
    return CopyFigures(in_flight, busy_us // max(done.requests, 1), 0 if in_flight else max(int(idle_s), 0))


def _cost_us(figures: CopyFigures, unknown_us: float, overhead_us: float = 0.0) -> float:
    return (figures.in_flight + 1) * ((figures.service_us or unknown_us) + overhead_us)


def _is_figure(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= MAX_DIGITS
