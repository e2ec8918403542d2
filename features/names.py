"""Names of versions that loads set: what commands and outcomes of loads ask of features."""

from __future__ import annotations

from features.labels import commands

is_named = commands.is_labelled
"""Whether a load of a version has no name to set."""
find_naming = commands.find_labelling
"""Returns why the names of a version keep it in the repository."""
draft_names = commands.draft_labels
"""Returns the drafts that set the name of a load, for the append of its outcome."""
