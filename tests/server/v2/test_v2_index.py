"""The index, from plain states: which versions it has, and what it says of each."""

import pytest
from msgspec.structs import replace

from events.jobs import Failure, LoadParameters
from events.models import Model, ModelState, PendingLoad, Serving
from server.v2.repository import index

SERVING = Serving("job", 2, 9, "", "alice", ("worker",), (), 1, 1, LoadParameters())
LOADED = Model("m", ModelState.LOADED, SERVING, last_version=2)
BROKEN = Failure("invalid_model", "broken")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Model("m"), []),
        (Model("m", loads=(PendingLoad("j", 1),)), [(1, "LOADING", None)]),
        (Model("m", last_version=1), [(1, "UNAVAILABLE", "unloaded")]),
        (Model("m", ModelState.FAILED, last_version=1, error=BROKEN), [(1, "UNAVAILABLE", "broken")]),
        (LOADED, [(2, "READY", None)]),
        (replace(LOADED, phase=ModelState.UNLOADING), [(2, "UNLOADING", None)]),
        (replace(LOADED, loads=(PendingLoad("j", 3),)), [(2, "READY", None), (3, "LOADING", None)]),
        (replace(LOADED, loads=(PendingLoad("j", 2),)), [(2, "READY", None)]),
        (
            replace(LOADED, last_version=3, error=BROKEN),
            [(2, "READY", None), (3, "UNAVAILABLE", "broken")],
        ),
        (
            replace(LOADED, phase=ModelState.LOST, error=BROKEN),
            [(2, "UNAVAILABLE", "lost, and to be loaded again: broken")],
        ),
        (
            replace(LOADED, phase=ModelState.LOST),
            [(2, "UNAVAILABLE", "lost, and to be loaded again: the server was started again")],
        ),
        (
            replace(LOADED, phase=ModelState.LOST, loads=(PendingLoad("j", 2),)),
            [(2, "LOADING", None)],
        ),
        (
            Model("m", last_version=2, previous=SERVING, loads=(PendingLoad("j", 3),)),
            [(2, "UNAVAILABLE", "it made way for another version"), (3, "LOADING", None)],
        ),
    ],
)
def test_a_version_s_state_is_that_of_its_model(
    model: Model, expected: list[tuple[int, str, str | None]]
) -> None:
    told = [(int(entry["version"]), entry["state"], entry.get("reason")) for entry in _of(model)]
    assert told == expected
    ready = index({"m": model}, ["m"], only_ready=True)
    assert ready == [entry for entry in index({"m": model}, ["m"]) if entry.get("state") == "READY"]


def _of(model: Model) -> list[dict[str, str]]:
    entries = index({"m": model}, ["m"])
    return [] if entries == [{"name": "m"}] else entries


def test_a_model_that_is_neither_in_the_repository_nor_loaded_is_not_told_of() -> None:
    over = Model("m", last_version=1)
    assert index({"m": over}, []) == []
    assert index({"m": LOADED}, []) == index({"m": LOADED}, [], only_ready=True)


def test_entries_come_by_name_and_then_by_number() -> None:
    loads = tuple(PendingLoad("j", number) for number in (10, 9))
    entries = index({"b": Model("b", loads=loads)}, ["c", "b", "a"])
    assert [(entry["name"], entry.get("version")) for entry in entries] == [
        ("a", None),
        ("b", "9"),
        ("b", "10"),
        ("c", None),
    ]
