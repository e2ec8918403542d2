"""Requests in the shapes of real traces: evictions by value need less time of loads than LRU does."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate, count
from math import exp, log

import pytest
from support.fleet import tell
from support.history import at

from events.clock import add_seconds
from events.models import Model, ModelState
from events.serving import Serving
from events.state import State
from events.types import LoadParameters
from runtime.rooms import MACHINE
from runtime.scheduler.eviction import Eviction, choose_enough
from runtime.scheduler.view import Amount, LoadView, Observations, Phase, Policy, SchedulerView
from runtime.statistics import RequestRates

TICK_S = 5.0
"""How often rates are updated."""

Trace = Iterator[tuple[float, str]]
"""Seconds since the start, and the model that is asked then."""

Size = Callable[[str], int]
"""Megabytes of a model."""


@dataclass
class Cache:
    """Models in a limited memory, to the product's own choice of victims.

    Attributes:
        loads_s: the time of loads so far that were not the first of their model.
    """

    budget: int
    size: Size
    by_use: bool = False
    loads_s: float = 0.0
    _runs: dict[str, LoadView] = field(default_factory=dict)
    _models: dict[str, Model] = field(default_factory=dict)
    _rates: RequestRates = field(default_factory=RequestRates)
    _ticked_s: float = 0.0
    _positions: Iterator[int] = field(default_factory=lambda: count(1))

    def ask(self, now_s: float, name: str) -> None:
        """Answer a request; a model that is not loaded is loaded first."""
        now = add_seconds(at(0), now_s)
        while self._ticked_s + TICK_S <= now_s:
            self._ticked_s += TICK_S
            self._rates.decay(TICK_S)
        if name not in self._runs:
            self._evict(self.size(name), now)
            self._load(name, now)
        self._rates.add(name, 1)
        run = self._runs[name]
        self._runs[name] = replace(run, last_used_at=now, requests=run.requests + 1)

    def _evict(self, needed: int, now: str) -> None:
        free = self.budget - sum(run.memory_bytes for run in self._runs.values())
        if needed <= free:
            return
        policy = Policy(1, budget_bytes=self.budget, evicts=True, min_residency_s=0)
        observations = Observations(requests_per_s=self._rates.per_s)
        view = SchedulerView(State(models=self._models), self._runs, policy, now, observations)
        eviction, room = Eviction(view), view.find_room(MACHINE)
        victims = eviction.choose({room: Amount(needed - free)})
        if self.by_use:
            idle = sorted(
                eviction.idle_in(room), key=lambda each: self._runs[each.model.id].last_used_at or ""
            )
            victims = choose_enough(idle, needed - free)
        assert victims is not None
        for victim in victims:
            del self._runs[victim.model.id]

    def _load(self, name: str, now: str) -> None:
        if name in self._models:
            self.loads_s += load_s_of(self.size(name))
        position = next(self._positions)
        serving = Serving(name, 1, position, now, "system", ("w",), (), 1, 1, LoadParameters())
        self._models[name] = Model(name, ModelState.LOADED, serving=serving)
        taken = {MACHINE: self.size(name)}
        self._runs[name] = LoadView(name, name, Phase.SERVING, taken=taken, load_s=load_s_of(self.size(name)))


def load_s_of(megabytes: int) -> float:
    return 0.3 + megabytes / 1000


def rotate(_: random.Random) -> Trace:
    """Twelve models in turn, one each second."""
    return ((float(n), f"m{n % 12}") for n in range(3000))


def rotate_roughly(dice: random.Random) -> Trace:
    """Twelve models in turn, of which each fifth request is for any of them."""
    return ((float(n), f"m{dice.randrange(12) if dice.random() < 0.2 else n % 12}") for n in range(3000))


def draw_by_zipf(exponent: float, models: int) -> Callable[[random.Random], Trace]:
    """Return the trace of models whose popularity falls with their rank, in the manner of Zipf's law."""

    def draw(dice: random.Random) -> Trace:
        weights = [*accumulate(1 / rank**exponent for rank in range(1, models + 1))]
        names = [f"m{number}" for number in range(models)]
        now_s = 0.0
        for name in dice.choices(names, cum_weights=weights, k=3000):
            now_s += dice.expovariate(1.0)
            yield now_s, name

    return draw


def scan(dice: random.Random) -> Trace:
    """Six models are asked all the time; each ten minutes, each of thirty is asked once."""
    for number in range(3000):
        scanned = number % 600
        yield float(number), f"m{scanned + 6}" if scanned < 30 else f"m{dice.randrange(6)}"


def shift(dice: random.Random) -> Trace:
    """The popular models are others every quarter of an hour."""
    for number in range(3000):
        first = number // 900 * 7
        yield float(number), f"m{(first + min(int(dice.expovariate(0.25)), 29)) % 30}"


def burst(dice: random.Random) -> Trace:
    """Each of thirty models is asked in bursts of a minute, with ten minutes between."""
    starts = {f"m{number}": dice.uniform(0, 660) for number in range(30)}
    for number in range(6000):
        now_s = number / 2
        on = [name for name, start_s in starts.items() if (now_s - start_s) % 660 < 60]
        if on:
            yield now_s, dice.choice(on)


def equal(_: str) -> int:
    return 700


def unequal(name: str) -> int:
    """Return a size between 20 MB and 4 GB, of which each order of magnitude is as likely."""
    return round(20 * exp(log(200) * random.Random(name).random()))


@pytest.mark.parametrize("size", [equal, unequal])  # of the models; `most` is the bound of the ratio
@pytest.mark.parametrize(
    ("shape", "models", "share", "most"),
    [
        (rotate, 12, 8 / 12, 0.9),
        (rotate_roughly, 12, 8 / 12, 0.95),
        (draw_by_zipf(0.8, 30), 30, 1 / 3, 0.95),
        (draw_by_zipf(1.2, 30), 30, 1 / 3, 0.95),
        (draw_by_zipf(1.0, 200), 200, 1 / 5, 0.95),
        (scan, 36, 0.4, 0.95),
        (shift, 30, 1 / 3, 1.02),
        (burst, 30, 0.15, 1.2),
    ],
)
def test_evictions_by_value_load_less_than_those_by_use(
    shape: Callable[[random.Random], Trace], models: int, share: float, most: float, size: Size
) -> None:
    names = [f"m{number}" for number in range(models)]
    budget = max(round(share * sum(map(size, names))), *map(size, names))
    caches = [Cache(budget, size), Cache(budget, size, by_use=True)]
    for cache in caches:
        for now_s, name in shape(random.Random(1)):
            cache.ask(now_s, name)
    by_value, by_use = (cache.loads_s for cache in caches)
    tell(f"{size.__name__}: {by_value / by_use:.2f} of the {by_use:.0f} s of loads of LRU")
    assert by_value <= most * by_use
