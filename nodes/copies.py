"""Copies of a model at several nodes: which node gets the next one, and which copies end. Pure.

The placer requests one copy after the other, as loads by the system, and places them like other loads. A copy
at a node that drains, of another version than the model serves from, or with fewer workers counts as missing:
it ends once its replacement is loaded, or if there will be none.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Set as AbstractSet

from events.models import LoadedModel, Model, ModelState
from events.serving import Serving
from events.state import State
from events.types import Cause
from nodes.placement import NodeView, explain_lack, find_node_for_model, find_usable, list_ready
from runtime.scheduler.actions import Action, RequestReload, UnloadAutomatically
from runtime.scheduler.scheduler import is_crash_loop, needs_repair, reload_at


def find_steps(view: NodeView) -> Iterator[tuple[str, Action]]:
    """Yield the next step of each model that has fewer or more copies than wanted, and when it is due."""
    for model in view.recorded.models.values():
        loaded = _find_copied(model)
        is_busy = model.loads or model.unloads or needs_repair(model)
        step = None if loaded is None or is_busy else _find_step(view, loaded)
        if step is not None:
            yield step


def _find_copied(model: Model) -> LoadedModel | None:
    """Return a loaded model that has or wants several copies, with the load that they are to be of."""
    serving, template = model.serving, model.template
    if model.phase is not ModelState.LOADED or serving is None or template is None:
        return None
    is_copied = model.copies or serving.parameters.wanted_copies > 1
    return LoadedModel(model, template) if is_copied else None


def _count_wanted(model: Model) -> int:
    return 1 if model.serving is None else model.serving.parameters.wanted_copies


def _find_step(view: NodeView, loaded: LoadedModel) -> tuple[str, Action] | None:
    """Return the next step: a further copy, or the end of one that is too much or outdated.

    A copy at a node that drains ends once there is another, if no node can have one now. An outdated one
    waits to be replaced, but for a failure of that, which may be for want of the room that it takes.
    """
    model, wanted, ready = loaded.model, _count_wanted(loaded.model), list_ready(view.usable, loaded)
    if len(ready) == wanted == len(model.servings):
        return None  # as of most models at each decision
    drained = [each for each in model.servings if each.at not in view.usable]
    older = [each for each in model.servings if each not in ready and each not in drained]
    if len(ready) >= wanted:
        surplus = [*ready[wanted:], *older, *drained]
    elif not is_crash_loop(model) and find_node_for_model(view, loaded, is_copy=True) is not None:
        has_failed = model.retries is not None
        if not (has_failed and ready and older):
            due_at = reload_at(view, loaded) if has_failed or model.incidents else view.now
            return due_at, RequestReload(loaded, Cause.COPY)
        surplus = older
    elif is_crash_loop(model) or not find_node_for_model(view, loaded, is_copy=True, at_once=False):
        surplus = [*older, *drained] if ready else []
    else:
        surplus = drained if ready else []
    return (view.now, _end(model, surplus[-1])) if surplus else None


def _end(model: Model, copy: Serving) -> UnloadAutomatically:
    return UnloadAutomatically(LoadedModel(model.view_at(copy.server), copy), Cause.COPY)


def count_copies(state: State, untrusted: AbstractSet[str], model: Model) -> tuple[int, str | None]:
    """Return how many copies of a model are ready, and the reason why others are missing."""
    loaded = _find_copied(model)
    if loaded is None:
        return 0, None
    ready = list_ready(find_usable(state, untrusted), loaded)
    reason = None
    if len(ready) < _count_wanted(model):
        reason = explain_lack(state, untrusted, loaded, ready)
        if is_crash_loop(model):
            reason = f"a load by a person, since workers died {len(model.incidents)} times within 10 minutes"
        if model.loads:
            reason = f"job {model.loads[0].job_id}"
    return len(ready), reason
