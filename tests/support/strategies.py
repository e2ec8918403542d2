"""Strategies for events and drafts, and for the values of their fields.

They are derived from the data classes themselves, so that a new event type or field is covered the moment it
exists.
"""

import enum
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from hypothesis import strategies as st
from msgspec import UNSET, Struct, UnsetType
from msgspec.structs import replace

from events.types import (
    SYSTEM,
    TYPES,
    Cause,
    Data,
    Draft,
    LoadRequested,
    ModelLoaded,
    ModelSettingsChanged,
    PolicyInForce,
    UnloadRequested,
)
from features.approvals.facts import ApprovalWithdrawn, VersionApproved
from features.rules import LoadPolicy
from support.history import STEPS, History, at, model_loaded

T = TypeVar("T", bound=Struct)

INTEGERS = st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 5)
TEXTS = st.text(max_size=20)
NODES = st.sampled_from(["a", "b"])
HASHES = st.binary(min_size=32, max_size=32).map(bytes.hex)


def values(hint: Any) -> st.SearchStrategy[Any]:
    simple = {
        int: INTEGERS,
        str: TEXTS,
        bool: st.booleans(),
        types.NoneType: st.none(),
        UnsetType: st.just(UNSET),
    }
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in simple:
        return simple[hint]
    if origin in (types.UnionType, typing.Union):
        return st.one_of(*map(values, arguments))
    if origin is tuple and arguments[-1] is not Ellipsis:
        return st.tuples(*map(values, arguments))
    if origin is tuple:
        return st.lists(values(arguments[0]), max_size=3).map(tuple)
    if origin is Mapping:
        return st.dictionaries(*map(values, arguments), max_size=3)
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin is typing.Annotated:
        return bounded(*arguments)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return st.sampled_from(list(hint))
    assert issubclass(hint, Struct), hint
    return instances(hint)


def bounded(kind: type, bounds: Any) -> st.SearchStrategy[Any]:
    if typing.get_origin(kind) is tuple:
        return values(kind)
    if kind is int:
        return st.integers(bounds.ge, 2**64 - 1 if bounds.le is None else bounds.le)
    if kind is bytes:
        return st.binary(max_size=30)
    return HASHES if bounds.pattern else TEXTS


def instances(kind: type[T], *, without: str = "") -> st.SearchStrategy[T]:
    """Return a strategy for instances of a struct, all fields but this one given."""
    hints = typing.get_type_hints(kind, include_extras=True)
    timestamps = st.none() | st.integers(-1_000, 1_000).map(at)
    known: dict[str, st.SearchStrategy[Any]] = dict.fromkeys(
        ("last_event_at", "last_seen_at", "no_node_since"), timestamps
    )
    is_optional = typing.get_origin(hints.get("server")) is types.UnionType
    known |= {"server": NODES | st.just(UNSET) if is_optional else NODES}
    known |= {"node_id": NODES, "epoch": st.integers(1, 2)}
    names = (name for name in kind.__struct_fields__ if name != without)
    return st.builds(kind, **{name: known.get(name, values(hints[name])) for name in names})


def any_data() -> st.SearchStrategy[Data]:
    return st.sampled_from(sorted(TYPES)).flatmap(lambda name: instances(TYPES[name]))


IDS = st.sampled_from(["a", "b", "c", "d"])
MODELS = st.sampled_from(["m", "n"])


@st.composite
def drafts(draw: st.DrawFn) -> Draft:
    """Return drafts of all types whose ids, jobs, models and workers collide all the time."""
    data = draw(any_data())
    event_id, job_id = draw(IDS), draw(IDS | st.none())
    if isinstance(data, LoadRequested | UnloadRequested) and draw(st.integers(0, 3)):
        job_id = event_id
    # Of rules for their models the audit would miss signatures and approvals (`tests/events/audit`).
    if isinstance(data, LoadRequested):
        data = replace(data, policy=UNSET)
    if isinstance(data, VersionApproved):
        data = ApprovalWithdrawn(data.digest, data.reason, data.credential)
    if isinstance(data, PolicyInForce):
        data = replace(data, policy=LoadPolicy())
    if isinstance(data, UnloadRequested):
        data = UnloadRequested(data.force, draw(IDS), data.cause)
    if isinstance(data, ModelLoaded):
        data = model_loaded(*draw(st.lists(IDS, max_size=2, unique=True)))
    return Draft(
        event_id,
        data,
        draw(st.sampled_from([SYSTEM, "alice", "é\U0001f600"])),
        job_id,
        draw(st.one_of(MODELS, MODELS, MODELS, st.none())),
        draw(st.integers(1, 2) | st.none()),
        draw(IDS | st.none()),
    )


@st.composite
def histories(draw: st.DrawFn) -> History:
    """Return a history of up to 25 steps of `support.history`."""
    history = History()
    for step in draw(st.lists(st.sampled_from(sorted(STEPS)), max_size=25)):
        STEPS[step](history)
    return history


def _load_copies(history: History, node: str, cause: Cause, version: int) -> None:
    job = f"{cause}-{len(history.facts)}"
    history.load_at(node, job, cause=cause, version=version, instances=2, copies=3)


def _add_copy(history: History, node: str) -> None:
    first, version = history.model().serving, history.model().version
    if version is not None and (first is None or first.server != node):
        _load_copies(history, node, Cause.COPY, version)


def _end_copy(history: History, node: str, cause: Cause = Cause.COPY) -> None:
    """A copy is taken from the model, and drained at its node; a person's unload ends the first like this."""
    own = next((each for each in history.model().servings if each.server == node), None)
    if own is not None:
        job = f"U{len(history.facts)}"
        history.ask_unload(job, own.load_job_id, version=own.version, cause=cause, node_id=node)


def _unload_all(history: History, _: str) -> None:
    if (first := history.model().serving) is None:
        return
    job = f"U{len(history.facts)}"
    history.ask_unload(job, first.load_job_id, version=first.version)
    for copy in history.model().copies or ():
        _end_copy(history, copy.server or "")
    history.start_unload(job, version=first.version)
    history.end_unload(job, version=first.version)


def _kill_worker(history: History, node: str) -> None:
    for each in history.model().servings:
        if each.server == node:
            history.kill_worker(each.worker_ids[-1], version=each.version)


def _lose(history: History, node: str) -> None:
    history.lose(node)
    history.join(node)


def _change_settings(history: History, _: str) -> None:
    if (first := history.model().serving) is not None:
        job = f"S{len(history.facts)}"
        history.ask_load(job, version=first.version, pinned=True, copies=2)
        changed = ModelSettingsChanged(first.load_job_id, 60, pinned=True, copies=2)
        history.add(changed, job, version=first.version)


PLACES = ("n1", "n2", "n3")
COPY_STEPS: dict[str, Callable[[History, str], None]] = {
    "load": lambda history, node: _load_copies(history, node, Cause.REQUEST, 1),
    "swap": lambda history, node: _load_copies(history, node, Cause.REQUEST, 2),
    **{f"copy_{number}": _add_copy for number in (1, 2, 3)},
    "end_copy": _end_copy,
    "replace_copy": lambda history, node: _end_copy(history, node, Cause.SWAP),
    "unload": _unload_all,
    "kill_worker": _kill_worker,
    "lose": _lose,
    "change_settings": _change_settings,
}


@st.composite
def copied_histories(draw: st.DrawFn) -> History:
    """Return a history of a model with copies at two of three nodes at first, of up to 15 steps more."""
    history = History()
    for node in PLACES:
        history.join(node)
    COPY_STEPS["load"](history, PLACES[0])
    COPY_STEPS["copy_1"](history, PLACES[1])
    steps = st.tuples(st.sampled_from(sorted(COPY_STEPS)), st.sampled_from(PLACES))
    for step, node in draw(st.lists(steps, max_size=15)):
        COPY_STEPS[step](history, node)
    return history
