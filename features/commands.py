"""The parts of features in commands on jobs and versions: rules of causes, and names of versions."""

from __future__ import annotations

from collections.abc import Mapping

from events.commands import CauseRules
from events.types import Cause
from features.labels import commands
from features.ondemand import rules as ondemand

RULES_OF_CAUSES: Mapping[Cause, CauseRules] = {Cause.DEMAND: ondemand.RULES}
"""By the causes of loads that have rules of their own."""

find_naming = commands.find_labelling
"""Returns why the names of a version keep it in the repository."""
draft_name = commands.draft_label
"""Returns what sets the name that a load gives its version, for the append of the load's outcome."""
