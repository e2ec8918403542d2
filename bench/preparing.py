"""Inferences and loads of one network during the preparation of another, beside the same without it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median

from bench import driver, generator, models
from bench.driver import Server
from bench.models import NETWORKS, Network
from bench.prepared import LOOK_S, PREPARING_LIMIT_S, wait_until_prepared
from bench.requests import Request, Target
from bench.table import Row, median_ratio, rate_row
from runtime.optimised.store import OptimisedStore
from runtime.store.folder import STORE

OPTIONS = (*driver.UNLIMITED, "--prepared-size=20GB")
SERVED, PREPARED = NETWORKS[:2]
"""A network that serves or is loaded, and one that is prepared meanwhile, which takes longer."""
LOADED = f"{SERVED.name}-loaded"
CLIENTS = (1, 8)
LOADS_IN_TURN = 5
"""Loads of one measurement, one after the other."""
INFERENCES_GOAL, LOADS_GOAL = 0.95, 1.05


class Preparations:
    """Starts preparations of a network, of other bytes each time.

    Args:
        server: The server that prepares.
        network: The network.
    """

    def __init__(self, server: Server, network: Network) -> None:
        self._server, self._content = server, network.build()
        self._names = (f"{network.name}-{number}" for number in count())

    @contextmanager
    def running(self) -> Iterator[None]:
        """Begin one, by a first load, and wait for its end at the end; it has to last until then."""
        name = next(self._names)
        path = models.write(self._server.repository, name, models.renamed(self._content, name))
        self._server.load(name)
        self._wait(is_preparing=True)
        yield
        if not self._is_preparing():
            raise SystemExit("the preparation ended before the measurement: give it fewer --seconds")
        self._wait(is_preparing=False)
        self._server.unload(name)
        path.unlink()

    def _is_preparing(self) -> bool:
        return self._server.ask("GET", "/api/v1/resources").json()["preparing"] is not None

    def _wait(self, *, is_preparing: bool) -> None:
        until = time.monotonic() + PREPARING_LIMIT_S
        while self._is_preparing() is not is_preparing:
            if time.monotonic() > until:
                raise SystemExit(f"a preparation has not {'begun' if is_preparing else 'ended'}")
            time.sleep(LOOK_S)


def measure(folder: Path, *, rounds: int, seconds: float) -> list[Row]:
    """Measure inferences and loads of one network without and with a preparation of another, in turn.

    Args:
        folder: An empty directory.
        rounds: How often.
        seconds: Of each measurement of inferences, after its warm-up.
    """
    with driver.running(folder, *OPTIONS) as server:
        store = OptimisedStore(folder / "data" / STORE, limit_bytes=0)
        for name in (LOADED, SERVED.name):
            models.write(server.repository, name, models.renamed(SERVED.build(), name))
            server.load(name)
            wait_until_prepared(store, name)
        server.unload(LOADED)
        preparations = Preparations(server, PREPARED)
        request = Request(SERVED.name, SERVED.values(), (), binary=True)
        path = request.write(Target("ours", server.port, server.token), folder)
        rows = []
        for clients in CLIENTS:
            with_one, without = _pairs(preparations, rounds, partial(_rate, server, path, clients, seconds))
            name = f"inferences, {clients} client{'s' * (clients > 1)}, during a preparation ÷ without"
            rows.append(rate_row(name, with_one, without, INFERENCES_GOAL))
        with_one, without = _pairs(preparations, rounds, partial(_loads_ms, server))
        took = f"{median(with_one):.1f} ms", f"{median(without):.1f} ms"
        ratio = median_ratio(with_one, without)
        name = "later loads during a preparation ÷ without"
        return [*rows, Row(name, *took, ratio, f"≤ {LOADS_GOAL:.2f}", ratio <= LOADS_GOAL)]


def _pairs(
    preparations: Preparations, rounds: int, measured: Callable[[], float]
) -> tuple[list[float], list[float]]:
    """Return the figures during preparations, and those right before each."""
    with_one, without = list[float](), list[float]()
    for _ in range(rounds):
        without.append(measured())
        with preparations.running():
            with_one.append(measured())
    return with_one, without


def _rate(server: Server, request: Path, clients: int, seconds: float) -> float:
    return generator.measure_rate(server.port, request, clients=clients, seconds=seconds).per_s


def _loads_ms(server: Server) -> float:
    took_ms = []
    for _ in range(LOADS_IN_TURN):
        took_ms.append(server.load(LOADED))
        server.unload(LOADED)
    return median(took_ms)
