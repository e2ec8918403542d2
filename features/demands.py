"""Demands of loads on the server that runs them, where several share a ledger."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from events.types import LoadParameters
from features.devices import placement as devices
from runtime.process.pool import WorkerPool


class Demand(Protocol):
    """A demand of a load on the attributes of its server."""

    def is_met(self, attributes: Iterable[str]) -> bool:
        """Whether a server with these attributes may run the load."""

    def rank(self, attributes: Iterable[str]) -> int:
        """Return a lower number for the better of two servers."""

    def describe(self) -> str:
        """Return the demand in words, for a sentence about servers; empty if each meets it."""


DEMANDS: tuple[Callable[[LoadParameters], Sequence[Demand]], ...] = (devices.list_demands,)

ATTRIBUTES: tuple[Callable[[WorkerPool], Iterable[str]], ...] = (devices.list_attributes,)
"""Functions that return attributes of this server, by what its pool of workers has found."""


def list_demands(parameters: LoadParameters) -> tuple[Demand, ...]:
    return tuple(demand for each in DEMANDS for demand in each(parameters))
