"""The states that a recorded history folds to: a digest of each step's changes, and the last state."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from events.codec import decode_event
from events.sqlite.queries import as_text
from events.state import State

KINDS = ("models", "jobs", "tokens", "nodes")


def fold_steps(bodies: Iterable[str]) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Fold events; return a digest of the stored texts that each one changed, and the last text of each."""
    state, steps = State(), list[str]()
    last: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
    for body in bodies:
        changes, step = state.apply(decode_event(body)), hashlib.sha256()
        changed: dict[str, Any] = {"models": changes.models, "jobs": changes.jobs, **changes.registers}
        for kind in KINDS:
            for key, entity in sorted(changed.get(kind, {}).items()):
                text = "null" if entity is None else as_text(entity)
                step.update(f"{kind} {key} {text}\n".encode())
                last[kind][key] = json.loads(text)
        steps.append(step.hexdigest()[:16])
    return steps, last
