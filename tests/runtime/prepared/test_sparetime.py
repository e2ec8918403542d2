"""Preparing: in spare time and spare memory, one at a time, and stopped before anything else gives way."""

from dataclasses import replace

from support.decisions import Scene

from runtime.scheduling.sight import Preparation


def scene(*, free_bytes: int = 100, preparing: bool = False, stopping: bool = False) -> Scene:
    """Return a scene in which one model serves that may be prepared, for 40 bytes, or is being prepared."""
    found = Scene()
    found.serves("a", 60 - preparing * 40 if free_bytes == 100 else 100 - free_bytes)
    preparation = Preparation("a1", 40, stopping) if preparing else None
    found.conditions = replace(
        found.conditions, preparable={} if preparing else {"a1": 40}, preparation=preparation
    )
    return found


def test_what_may_be_prepared_is_when_there_is_nothing_else_to_do() -> None:
    assert scene().says() == "prepare a1"


def test_one_is_prepared_at_a_time() -> None:
    found = scene(preparing=True)
    found.conditions = replace(found.conditions, preparable={"b1": 1})
    assert found.says() == "nothing"


def test_nothing_is_prepared_while_a_job_has_not_ended() -> None:
    found = scene()
    found.loads("b", 1)
    assert found.says() == "nothing"


def test_nothing_is_prepared_without_room_and_no_model_is_evicted_for_it() -> None:
    assert scene(free_bytes=39).says() == "nothing"
    assert scene(free_bytes=40).says() == "prepare a1"


def test_what_has_room_is_prepared_before_what_has_not() -> None:
    found = scene(free_bytes=30)
    found.conditions = replace(found.conditions, preparable={"a1": 40, "b1": 30})
    assert found.says() == "prepare b1"


def test_without_a_budget_there_is_room() -> None:
    found = Scene(budget_bytes=None)
    found.serves("a", 60)
    found.conditions = replace(found.conditions, preparable={"a1": 10**12})
    assert found.says() == "prepare a1"


def test_nothing_is_prepared_under_pressure_and_that_is_looked_at_again() -> None:
    found = scene()
    found.conditions = replace(found.conditions, under_pressure=True)
    assert found.says() == "nothing"
    assert found.next_look_s() == 10


def test_nothing_is_prepared_without_a_fork_server() -> None:
    found = scene()
    found.conditions = replace(found.conditions, fork_server_up=False)
    assert found.says() == "nothing"


def test_a_load_that_has_room_beside_what_is_prepared_begins() -> None:
    found = scene(preparing=True)  # 20 and 40 of 100
    found.asks("b", 40)
    assert found.says() == "start b1"


def test_a_load_that_needs_the_room_has_what_is_prepared_stopped_and_nothing_evicted() -> None:
    found = scene(preparing=True)
    found.passes(60)
    found.asks("b", 41)
    assert found.says() == "stop preparing"
    assert found.conditions.preparation is not None
    found.conditions = replace(found.conditions, preparation=Preparation("a1", 40, stopping=True))
    assert found.waiting_for("b1").endswith("it is being given back")
    found.conditions = replace(found.conditions, preparation=None)
    assert found.says() == "start b1"


def test_models_are_evicted_for_what_is_missing_beyond_that() -> None:
    found = scene(preparing=True, stopping=True)
    found.passes(60)
    found.asks("b", 81)
    assert found.says() == "unload a, eviction for b1"


def test_models_that_outgrow_the_budget_have_what_is_prepared_stopped() -> None:
    found = scene(free_bytes=30, preparing=True)
    assert found.says() == "stop preparing"
    found = scene(free_bytes=30, preparing=True, stopping=True)
    found.passes(60)
    assert found.says() == "nothing"


def test_a_swap_that_may_be_beside_is_beside_once_what_is_prepared_has_ended() -> None:
    found = scene(preparing=True)  # 20 and 40 of 100
    found.asks("a", 60, version=2, strategy="auto")
    assert found.says() == "stop preparing"
    found.conditions = replace(found.conditions, preparation=Preparation("a1", 40, stopping=True))
    assert found.waiting_for("a2").endswith("it is being given back")
    found.conditions = replace(found.conditions, preparation=None)
    assert found.says() == "start a2"


def test_a_swap_in_place_has_room_in_what_it_replaces() -> None:
    found = scene(preparing=True)
    found.asks("a", 60, version=2, strategy="in_place")
    assert found.says() == "end a1 for a2"


def test_a_load_that_waits_for_pressure_has_what_is_prepared_stopped() -> None:
    found = scene(preparing=True)
    found.asks("b", 1, priority="low")
    found.conditions = replace(found.conditions, under_pressure=True)
    assert found.says() == "stop preparing"
    found.conditions = replace(found.conditions, preparation=Preparation("a1", 40, stopping=True))
    assert found.waiting_for("b1") == "the machine, which is under pressure"


def test_what_comes_back_after_a_start_waits_for_what_is_being_stopped() -> None:
    found = scene(preparing=True, stopping=True)
    found.asks("b", 41)
    assert found.waiting_for("b1").endswith("it is being given back")
