"""The index of the repository extension: each version that the ledger knows of, and its state. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from events.models import Model, ModelState

Entry = dict[str, str]
ReadyState = Literal["READY", "LOADING", "UNLOADING", "UNAVAILABLE"]
"""Of Triton's. UNKNOWN does not happen here."""

UNLOADED = "unloaded"
"""The reason that Triton gives; its clients tell by it an unload from a failed load."""


class _Version(NamedTuple):
    """What is to be said of one version."""

    state: ReadyState
    reason: str = ""


def index(models: Mapping[str, Model], found: Iterable[str], *, only_ready: bool = False) -> list[Entry]:
    """Return an entry per version, by name and version; a model that was never loaded has its name alone.

    A model of which nothing is loaded, and which is not in the repository any more, has none.

    Args:
        models: the recorded state.
        found: the ids of the models in the repository.
        only_ready: give only versions that can be asked.
    """
    in_repository = set(found)
    entries: list[Entry] = []
    for name in sorted(in_repository | models.keys()):
        model = models.get(name) or Model(name)
        if name in in_repository or _is_live(model):
            entries += _entries(model, only_ready=only_ready)
    return entries


def _entries(model: Model, *, only_ready: bool) -> list[Entry]:
    versions = sorted(_versions(model).items())
    if only_ready:
        return [_entry(model.id, *known) for known in versions if known[1].state == "READY"]
    return [_entry(model.id, *known) for known in versions] or [{"name": model.id}]


def _versions(model: Model) -> dict[int, _Version]:
    """Return the versions that the state still knows of."""
    versions: dict[int, _Version] = {}
    if model.last_version is not None:
        reason = model.error.message if model.error is not None else UNLOADED
        versions[model.last_version] = _Version("UNAVAILABLE", reason)
    if model.previous is not None:
        versions[model.previous.version] = _Version("UNAVAILABLE", "it made way for another version")
    versions |= {load.version: _Version("LOADING") for load in model.loads}
    serving = model.serving
    if serving is not None:  # said last: a version that serves can be asked while it is loaded anew
        lost = model.phase is ModelState.LOST
        if not lost or all(load.version != serving.version for load in model.loads):
            versions[serving.version] = _serving(model)
    return versions


def _serving(model: Model) -> _Version:
    if model.phase is ModelState.LOADED:
        return _Version("READY")
    if model.phase is ModelState.UNLOADING:
        return _Version("UNLOADING")
    why = model.error.message if model.error is not None else "the server was started again"
    return _Version("UNAVAILABLE", f"lost, and to be loaded again: {why}")


def _is_live(model: Model) -> bool:
    return model.serving is not None or bool(model.loads)


def _entry(name: str, number: int, version: _Version) -> Entry:
    entry: Entry = {"name": name, "version": str(number), "state": version.state}
    return {**entry, "reason": version.reason} if version.reason else entry
