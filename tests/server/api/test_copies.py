"""The copies of a model in the API: ready ones, where they are, and what other views say of them."""

import msgspec
from support.history import MODEL, History

from answers.models import ModelCopy, ModelInfo
from answers.nodes import NodeModel
from events.history import describe_model
from events.types import Cause, ModelSettingsChanged
from features.nodes.members import make_node_infos
from features.nodes.metrics import count_copies
from server.api.models import make_model_info
from server.v2 import repository

MEMBERS = {"copies", "copies_ready", "copies_at"}


def copied(*, version: int = 1) -> History:
    """A model that is to have three copies, with one at `a` and one at `b`."""
    history = History()
    for node in ("a", "b", "c"):
        history.join(node)
    history.load_at("a", "A", version=version, instances=2, copies=3)
    history.load_at("b", "B", version=version, instances=2, copies=3, cause=Cause.COPY)
    return history


def view(history: History) -> ModelInfo:
    return make_model_info(describe_model(history.state, MODEL), is_active=False)


def places(history: History) -> list[tuple[str, int, int]]:
    return [(each.node or "", each.version, each.workers) for each in view(history).copies_at]


def summary(history: History) -> tuple[int | None, int | None, list[str | None]]:
    shown = view(history)
    return shown.copies, shown.copies_ready, [each.node for each in shown.copies_at]


def test_view_of_model_has_its_copies() -> None:
    history = copied()
    shown = view(history)
    assert summary(history) == (3, 2, ["a", "b"])
    first, second = history.model().servings
    assert shown.copies_at[1] == ModelCopy(
        node="b",
        version=1,
        position=second.position,
        job_id="B",
        loaded_at=second.loaded_at,
        workers=2,
        memory_bytes=second.memory_bytes,
    )
    assert (shown.node, shown.job_id, shown.position) == ("a", "A", first.position)


def test_view_of_model_with_one_load_has_no_member_of_copies() -> None:
    history = History()
    history.join("a")
    history.load_at("a", "A")
    assert not MEMBERS & msgspec.to_builtins(view(history)).keys()


def test_copy_that_lost_a_worker_is_not_ready() -> None:
    history = copied()
    history.kill_worker("w-B-2")
    assert summary(history) == (3, 1, ["a", "b"])
    assert places(history) == [("a", 1, 2), ("b", 1, 1)]


def test_copy_is_shown_in_place_of_a_lost_load() -> None:
    history = copied()
    history.lose("a")
    shown = view(history)
    assert summary(history) == (3, 1, ["b"])
    assert (shown.state, shown.node, shown.brought_back) == ("loaded", "b", "copy")
    assert shown.loaded_by == "alice"
    history.lose("b")
    assert (view(history).state, *summary(history)) == ("lost", 3, 0, [])


def test_ended_copy_is_not_shown_while_it_drains() -> None:
    history = copied()
    history.ask_unload("U", "B", cause=Cause.COPY, node_id="b")
    assert summary(history) == (3, 1, ["a"])
    history.ask_load("S", copies=1)
    history.add(ModelSettingsChanged("A", None, pinned=False, copies=1), "S")
    assert not MEMBERS & msgspec.to_builtins(view(history)).keys()


def test_swap_shows_each_node_and_both_versions() -> None:
    history = copied()
    history.load_at("c", "C", version=2, instances=2, copies=3)
    assert summary(history) == (3, 1, ["c", "a", "b"])
    assert places(history) == [("c", 2, 2), ("a", 1, 2), ("b", 1, 2)]
    found = {node.id: node.models for node in make_node_infos(history.state)}
    assert found == {
        name: [NodeModel(id=MODEL, version=version, state="loaded")]
        for name, version in (("a", 1), ("b", 1), ("c", 2))
    }
    entries = repository.index(history.state.models, [])
    assert [(entry.version, entry.state) for entry in entries] == [("1", "READY"), ("2", "READY")]


def test_metric_counts_copies_of_models_that_want_several() -> None:
    history = copied()
    history.load("O", of="other")
    assert count_copies(history.state, str) == {(MODEL, "wanted"): 3, (MODEL, "ready"): 2}
