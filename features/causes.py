"""The causes of loads that have rules of their own."""

from __future__ import annotations

from collections.abc import Mapping

from events.commands import CauseRules
from events.types import Cause
from features.ondemand import rules as ondemand

RULES_OF_CAUSES: Mapping[Cause, CauseRules] = {Cause.DEMAND: ondemand.RULES}
