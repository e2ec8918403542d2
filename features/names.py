"""Names of versions that loads set: what commands and outcomes of loads ask of features."""

from __future__ import annotations

from features.labels import commands

find_naming = commands.find_labelling
"""Returns why the names of a version keep it in the repository."""
draft_name = commands.draft_label
"""Returns what sets the name of a load, for the append of its outcome."""
