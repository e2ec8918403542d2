"""Conditions of features on a load, right before `LoadRequested` is appended.

One that does not hold refuses the request with an error code of its own, and nothing is recorded. A check
before a load (`features.checks`) comes later: it needs the files, and ends a job.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from events.commands import Condition
from events.jobcommands import RequestLoad
from features.labels import conditions as labels
from server.config import Config

ListConditions = Callable[[RequestLoad, Config], Iterable[Condition]]

CONDITIONS: tuple[ListConditions, ...] = (labels.list_conditions,)

CODES = ("too_many_labels",)
"""Error codes of these conditions."""


def add_conditions(command: RequestLoad, config: Config) -> RequestLoad:
    """Return the request of a person or an inference with the conditions of all features."""
    return replace(command, conditions=tuple(one for each in CONDITIONS for one in each(command, config)))
