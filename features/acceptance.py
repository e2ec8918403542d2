"""Conditions of features on a load that a person or an inference asks for, by any of the API's ways.

One that does not hold refuses the request with an error code of its own, and nothing is recorded; that is
decided before the load joins another one, or changes nothing. A check before a load (`features.checks`) comes
later: it needs the files, and ends a job.
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
    """Return the request with the conditions of all features; its `cause` says who asks."""
    return replace(command, conditions=tuple(one for each in CONDITIONS for one in each(command, config)))
