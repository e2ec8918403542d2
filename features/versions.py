"""What features know of the versions of a model, which `events.versions` folds with its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from msgspec import Struct

from events.types import Data, Event
from features.approvals import fold as approvals
from features.labels import fold as labels


class FeaturesOfVersions(
    labels.LabelledVersions,
    approvals.ApprovedVersions,
    Struct,
    frozen=True,
    gc=False,
    kw_only=True,
    omit_defaults=True,
):
    """The members that features give `ModelVersions`."""

    labels: tuple[labels.Label, ...] = ()
    approvals: tuple[approvals.Approval, ...] = ()


STEPS_OF_FEATURES: Mapping[type[Data], Callable[[Any, Event, Any], Any]] = {**labels.STEPS, **approvals.STEPS}
"""By type of event: the next versions of a model."""
