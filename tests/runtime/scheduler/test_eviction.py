"""Which models the system unloads: victims of a load that needs room, idle ones, what is not restored.

A row is what happens and, after `->`, what the scheduler decides then: see `Scene.play`.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.decisions import Scene, decide_on, describe, read_table
from support.history import PLAIN, at

from events.models import LoadedModel, Model
from events.serving import Serving
from events.types import LoadParameters
from runtime.scheduler.eviction import (
    IDLE_POLL_S,
    LOADS_PER_TURN,
    TURN_S,
    Victim,
    choose_enough,
    value_step,
)
from runtime.scheduler.view import MIN_RESIDENCY_S, Policy

SCENES = """
# The victim is the idle model whose next use is expected last, by its rate of requests and last use. A load
# by somebody counts as a use, a reload does not. Of models that differ by less than two, it is the newest.
load old 50; wait 60; load new 50; wait 10; request x 50 -> unload old, eviction for x1
load old 50; wait 60; load new 50; wait 60; request x 50; use old1 -> unload new, eviction for x1
load a 50; load b 50; wait 60; request x 50 -> unload b, eviction for x1
load a 50; wait 60; load b 50; wait 60; rate a 0.1; rate b 0.001; request x 50 -> unload b, eviction for x1
load a 50; wait 60; load b 50; wait 60; rate a 10; rate b 0.1; request x 50 -> unload a, eviction for x1
load a 50; wait 60; load b 50 requests=60; wait 60; rate a 0.1; request x 50 -> unload a, eviction for x1
set max_loaded=2 budget_bytes=none; load a used_s_ago=0; wait 60; load b used_s_ago=5; wait 10; request x
  -> unload a, eviction for x1
restart a b; wait 60; load b 50 cause=restart; load a 50 cause=restart; wait 10; request x 50
  -> unload a, eviction for x1
set evicts=false; load old 50; load new 50; wait 10; request x 50 -> nothing
load old 50; wait 60; load new 50; wait 10; request x 50 cause=swap -> unload old, eviction for x1

# A load that took long counts for it, and bytes against it, if bytes are missing.
load a 50 load_s=8; load b 50 load_s=1; load c 0; wait 10; request x 50 -> unload b, eviction for x1
load a 80 load_s=2; load b 20 load_s=2; wait 10; request x 20 -> unload a, eviction for x1
load a 60 load_s=40; load b 20 load_s=1; load c 20 load_s=1; wait 60; request x 40
  -> unload c, eviction for x1; unload c cause=eviction -> unload b, eviction for x1
set max_loaded=2 budget_bytes=none; load a 80 load_s=2; load b 20 load_s=1; wait 10; request x
  -> unload b, eviction for x1

# No victim is busy, pinned, loading, being unloaded, with a job, or within its minimum residency.
load old 50 busy=true; load new 50; wait 10; request x 50 -> unload new, eviction for x1
load old 50 pinned=true; load new 50; wait 10; request x 50 -> unload new, eviction for x1
load old 50; load new 50; wait 10; request x 50; request old none version=2 -> unload new, eviction for x1
load old 50; load new 50; wait 10; request x 50; unload old -> x1 waits for it is being released
start a 100; wait 10; request x 50 -> nothing
load a 90 cause=demand busy=true; wait 10; request b 50 priority=high -> nothing
load a 80; request x 50 -> nothing; -> wakes in 9; wait 9 -> unload a, eviction for x1
load a 80 pinned=true; request x 50 -> wakes in 300
restart y; load a 80; wait 10; request y 50 cause=restart -> fail y1: insufficient_memory

# Those that are enough, one at a time; nobody in vain.
load a 20; load b 20; load c 50; wait 10; request x 45 -> unload c, eviction for x1
load a 10 load_s=1; load b 20 load_s=20; load c 60 load_s=60; wait 10; request x 65
  -> unload c, eviction for x1; unload c cause=eviction -> x1 waits for it is being released
load a 25; load b 25; load c 25; load d 25; wait 60; request x 60 -> unload d, eviction for x1;
  unload d cause=eviction -> unload c, eviction for x1; unload c cause=eviction -> unload b, eviction for x1;
  unload b cause=eviction -> x1 waits for it is being released
load a 25; load b 25; load c 25; load d 25; wait 60; request x 20 -> unload d, eviction for x1;
  unload d cause=eviction -> x1 waits for it is being released
load a 50; load b 50 busy=true; wait 10; request x 60
  -> x1 waits for the others are busy, pinned, or were loaded just now; -> wakes in 0.25

# Where inferences bring models back, a busy model gives way after its turn to a load that has waited for one.
set takes_turns=true; load a 90 busy=true; wait 60; request b 50; wait 9.9 -> nothing; -> wakes in 0.25;
  wait 0.1 -> unload a, eviction for b1; unload a cause=eviction -> b1 waits for it is being released
set takes_turns=true; load a 90 busy=true load_s=8; request b 50; wait 13
  -> b1 waits for the others are pinned, or their turn is not over; wait 3 -> unload a, eviction for b1
set takes_turns=true min_residency_s=30; load a 90 busy=true; wait 60; request b 50; wait 29.9 -> nothing;
  wait 0.1 -> unload a, eviction for b1
load a 90 busy=true; request b 50; wait 60 -> b1 waits for busy ones take turns where inferences load models
set takes_turns=true; load a 90 busy=true pinned=true; request b 50; wait 60 -> nothing
set takes_turns=true evicts=false; load a 90 busy=true; request b 50; wait 60 -> nothing
set takes_turns=true; load a 50 busy=true; load b 50; wait 20; request c 50; wait 20
  -> unload b, eviction for c1
set takes_turns=true; load a 50 busy=true; wait 5; load b 50 busy=true; wait 20; request c 50; wait 20
  -> unload a, eviction for c1
set takes_turns=true; load a 50; load b 50 busy=true; wait 20; request c 60; wait 20
  -> unload a, eviction for c1; unload a cause=eviction -> unload b, eviction for c1

# Not to a load that would start after its own next one: that would take the room again.
set takes_turns=true; load a 90 busy=true priority=high; wait 60; request b 50; wait 59.9 -> nothing; wait 0.1
  -> unload a, eviction for b1
set takes_turns=true; load a 90 busy=true priority=low; wait 60; request b 50; wait 10
  -> unload a, eviction for b1

# On another device an idle model goes before a busy one.
set takes_turns=true; device cuda:0 100; device cuda:1 100; load a 10 on=cuda:0 there=90 busy=true;
  load b 10 on=cuda:1 there=90; wait 10; request x 10 on=cuda:0,cuda:1 there=50; wait 60
  -> unload b, eviction for x1

# Workers that outgrew the budget: idle models make up for it, even if they are not enough.
load a 60; load b 30; load c 30; wait 10 -> unload a, eviction; unload a cause=eviction -> nothing
set evicts=false; load a 60; load b 30; load c 30; wait 10 -> nothing; -> wakes in inf
set budget_bytes=120; load a 60; load b 30; load c 30; wait 10 -> nothing; -> wakes in inf
load a 150 busy=true; load b 10; wait 10 -> unload b, eviction; unload b cause=eviction -> nothing;
  -> wakes in 0.25

# On a device: idle models there, then of the machine's memory what is still missing; none in vain.
device cuda:0 100; load a 10 on=cuda:0 there=50; wait 60; load b 10 on=cuda:0 there=50; load c 10; wait 10;
  request x 10 on=cuda:0 there=50 -> unload a, eviction for x1;
  unload a cause=eviction -> x1 waits for it is being released
device cuda:0 100; load a 10 on=cuda:0 there=30; load b 10 on=cuda:0 there=70; load c 60; wait 10;
  request x 30 on=cuda:0 there=60 -> unload b, eviction for x1;
  unload b cause=eviction -> x1 waits for it is being released
device cuda:0 100; load a 10 on=cuda:0 there=50; wait 60; load b 10 on=cuda:0 there=50; load c 60; wait 10;
  request x 45 on=cuda:0 there=50 -> unload a, eviction for x1;
  unload a cause=eviction -> unload c, eviction for x1;
  unload c cause=eviction -> x1 waits for it is being released
device cuda:0 100; load a 10 on=cuda:0 there=50; load c 90 busy=true; wait 10;
  request x 20 on=cuda:0 there=60 -> nothing
device cuda:0 100; load a 10 on=cuda:0 there=50; load c 10; wait 10; request x 90 -> unload a, eviction for x1
device npu:0 50 own=false; load a 30; load b 30 on=npu:0; wait 10; request x 30 on=npu:0
  -> unload b, eviction for x1

# Of several devices the first where that is possible; what is being released is waited for instead.
device cuda:0 100; device cuda:1 100; load a 10 on=cuda:0 there=90 busy=true; load b 10 on=cuda:1 there=90;
  wait 10; request x 10 on=cuda:0,cuda:1 there=50 -> unload b, eviction for x1
device cuda:0 100; device cuda:1 100; load a 10 on=cuda:0 there=90; load b 10 on=cuda:1 there=90; wait 10;
  request x 10 on=cuda:1,cuda:0 there=50 -> unload b, eviction for x1
device cuda:0 100; device cuda:1 100; load a 10 on=cuda:0 there=90; load b 10 on=cuda:1 there=90; unload b;
  wait 10; request x 10 on=cuda:0,cuda:1 there=50 -> x1 waits for memory on cuda:1

# Nothing is evicted from a device where a load is running; its memory is being measured.
device cuda:0 100; load a 10 on=cuda:0 there=50; start z 10; begin z on=cuda:0 there=40; wait 10;
  request x 10 on=cuda:0 there=50 -> x1 waits for the device cuda:0, on which model 'z' is loading;
  complete z 10 -> unload a, eviction for x1

# Workers that outgrew the budget of their device.
device cuda:0 100; load a 10 on=cuda:0 there=60; wait 60; load b 10 on=cuda:0 there=50; load c 10; wait 10
  -> unload a, eviction; unload a cause=eviction -> nothing
device npu:0 50 own=false; load c 10; load a 40 on=npu:0; wait 60; load b 40 on=npu:0; wait 10
  -> unload a, eviction
set evicts=false; device cuda:0 100; load a 10 on=cuda:0 there=60; load b 10 on=cuda:0 there=50; wait 10
  -> nothing; -> wakes in inf

# The idle timeout runs from the end of the last request, else from the load, at least the minimum residency.
load a used_s_ago=0 keep_alive_s=0 -> unload a, idle
load a used_s_ago=0 keep_alive_s=30 -> wakes in 30; wait 29.9 -> nothing; wait 0.1 -> unload a, idle
load a keep_alive_s=5 -> wakes in 10; wait 10 -> unload a, idle
load a keep_alive_s=30 -> wakes in 30; wait 30 -> unload a, idle
load a used_s_ago=0 busy=true keep_alive_s=0; wait 1000 -> nothing; -> wakes in 0.25
load a used_s_ago=0 busy=true keep_alive_s=30; wait 1000 -> nothing; -> wakes in 30; use a1; wait 29.9
  -> nothing;
  wait 0.1 -> unload a, idle
load a used_s_ago=0; wait 1000000 -> nothing; -> wakes in inf
load a used_s_ago=0 keep_alive_s=-1; wait 1000000 -> nothing; -> wakes in inf
load a used_s_ago=0 keep_alive_s=0 pinned=true; wait 1000000 -> nothing
load a 10 used_s_ago=0 keep_alive_s=0; request a none version=2 -> nothing; unload a begun=false -> nothing
"""

SERVING = Serving("L", 1, 3, at(3), "alice", ("w",), (), 1, 1, LoadParameters())


@pytest.mark.parametrize("script", read_table(SCENES))
def test_eviction_decides(script: str) -> None:
    assert (MIN_RESIDENCY_S, IDLE_POLL_S, TURN_S, LOADS_PER_TURN) == (10, 0.25, 10, 2)  # as the rows have it
    Scene(script)


def test_reloaded_models_keep_their_last_use() -> None:
    scene = Scene("restart a b; load b 50 cause=restart; load a 50 cause=restart; wait 10; request x 50")
    scene.observe(last_used={"a": at(1), "b": at(2)})
    assert scene.next_action() == "unload a, eviction for x1"


@PLAIN
@given(st.lists(st.integers(0, 6), max_size=6), st.integers(-3, 20), st.integers(-2, 7))
def test_chosen_victims_are_enough_and_none_is_superfluous(
    sizes: list[int], missing_bytes: int, missing_models: int
) -> None:
    candidates = [Victim(LoadedModel(Model(f"m{n}"), SERVING), size) for n, size in enumerate(sizes)]

    def is_enough(victims: list[Victim]) -> bool:
        released = sum(victim.memory_bytes for victim in victims)
        return released >= missing_bytes and len(victims) >= missing_models

    chosen = choose_enough(candidates, missing_bytes, missing_models)
    if chosen is None:
        assert not is_enough(candidates)
        return
    assert is_enough(chosen)
    for victim in chosen:
        assert not is_enough([each for each in chosen if each is not victim])
    if chosen:  # nobody of more value than necessary
        assert not is_enough(candidates[: candidates.index(chosen[-1])])


def test_value_is_the_time_of_loads_that_a_model_saves() -> None:
    usual = value_step(2.0, 10.0, 0.0, 1024)
    assert value_step(4.0, 10.0, 0.0, 1024) == value_step(2.0, 5.0, 0.0, 1024) == usual + 1
    assert value_step(2.0, 10.0, 0.0, 4096) == usual - 2
    assert value_step(2.0, 10.0, 1 / 160, 1024) == usual - 4  # asked every 160 s
    assert value_step(2.0, 160.0, 10.0, 1024) == usual - 4  # was asked often, and is not any more
    assert value_step(0.0, -1.0, 1e300, 0) == 0


@pytest.mark.parametrize(
    ("facts", "action"),
    [
        ("load restart", "unload digits, restart"),
        ("load crash restart", "unload digits, restart"),
        ("load crash", "reload digits, recovery"),
        ("load restart request_unload", "start U of L"),
        ("load restart request_unload start_unload", "finish U of L"),
        ("request restart", "start L"),
        ("load request_v2 restart", "start L2"),
        ("load crash request_recovery restart", "start R"),
    ],
)
def test_without_restore_only_lost_models_are_unloaded(facts: str, action: str) -> None:
    policy = Policy(loads_at_once=1, restores=False)
    assert describe(decide_on(facts, policy=policy, after_s=100).action) == action
