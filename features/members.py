"""What features add to answers: functions that return members of a job's, a model's and a moment's answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from events.history import ShownModel
from events.jobs import Job
from events.presence import Liveness
from features.nodes import members as nodes

T = TypeVar("T")
Members = Mapping[str, Any]

OF_JOBS: tuple[Callable[[Job], Members], ...] = (nodes.show_place,)
OF_MODELS: tuple[Callable[[ShownModel], Members], ...] = (nodes.show_copies,)
OF_MOMENTS: tuple[Callable[[Liveness | None], Members], ...] = (nodes.show_presences,)
"""Of answers with `?at=`."""


def collect(functions: Iterable[Callable[[T], Members]], shown: T) -> dict[str, Any]:
    """Return the members that these functions add for an object."""
    return {name: value for function in functions for name, value in function(shown).items()}
