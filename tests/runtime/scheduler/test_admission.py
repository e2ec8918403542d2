"""Which load begins next, and what the others wait for: priority, age, memory, the model limit, pressure.

A row is what happens and, after `->`, what the scheduler decides then: see `Scene.play`.
"""

import sys
from collections import Counter
from types import FrameType

import pytest
from support.decisions import Scene, need, read_table

from runtime.memory import format_megabytes
from runtime.scheduler.actions import FailLoad, StartLoad
from runtime.scheduler.admission import (
    OVERTAKING_LIMIT_S,
    PRESSURE_POLL_S,
    PRIORITY_AGING_S,
)
from runtime.scheduler.view import MemoryEstimate

SCENES = """
# Memory is estimated before a load begins. `estimate a1 none`: it is being found out.
request a unknown -> estimate a1
start a 10; run a1 a loading has_outcome=true; wait 400 -> nothing; -> wakes in inf
set budget_bytes=none; request a unknown -> estimate a1
start a 10; request a unknown version=2 -> nothing
request a none; observe estimating=a1+; request b 60
  -> b1 waits for the memory estimate of 'a', which comes first;
  estimate a1 60 -> start a1
request a none; observe estimating=a1+; estimate b1 101; request b 101 -> fail b1: insufficient_memory
request a none -> a1 waits for the estimate of its memory; request b 60 -> start b1

# What cannot be looked at has no estimate, and fails with the reason.
request a none; fail_estimate a1 unsafe_file -> fail a1: unsafe_file

# An attempt that found other files than were estimated ends, and its job is estimated and admitted anew.

# What never fits fails at once.
request a 100 -> start a1
request a 101 -> fail a1: insufficient_memory

# The estimate is reserved until the load has ended, then what its worker takes counts.
set evicts=false; start a 60; request b 41 -> nothing; request c 40 -> start c1
set evicts=false; start a 70; request b 50 -> nothing; complete a 30 -> start b1

# What is being unloaded or was killed counts until its process has exited.
load a 80; request b 50; unload a -> b1 waits for it is being released;
  run a1 a draining killed=true memory_bytes=80 -> b1 waits for it is being released; exit a -> start b1
kill x1 x 80; request b 50 -> b1 waits for it is being released
set max_loaded=1; kill x1 x 80; request b 50 -> b1 waits for it is being released

# What is being released is kept for the load that waits for it; others get the rest.
set evicts=false; load a 80; request b 50; request c 20; unload a -> start c1
set evicts=false; load a 80; request b 50; request c 21; unload a -> c1 waits for being released
set evicts=false; load a 80; request b 50; request c 50; unload a -> c1 waits for being released
set evicts=false; load a 80; request b 50; request c 51; unload a
  -> c1 waits for some reserved for model 'b', before it

# The model limit.
set max_loaded=2 evicts=false; load a; request c -> start c1
set max_loaded=1 evicts=false; load a; request c
  -> c1 waits for a place among the 1 models that may be loaded
set max_loaded=1 evicts=false; load a; request a version=2 -> start a2
set max_loaded=2; load a 10; load z 10; unload a; request b 10; request c 10
  -> b1 waits for it is being released;
  -> c1 waits for a place among the 2 models that may be loaded, some reserved
set max_loaded=1; load a version=2; kill a1 a 10; unload a version=2; request b
  -> b1 waits for it is being released; exit a version=2 -> nothing; forget a1 -> start b1
set max_loaded=2 evicts=false; load a 10; kill x1 b 10; request b 10 -> start b1
set max_loaded=2 evicts=false; load a 10; kill x1 b 10; request c 10; request b 10
  -> c1 waits for it is being released; -> b1 waits for room, which is reserved for model 'c', before it

# A load that waits for room is overtaken for a while; then its room is kept until it ends.
set evicts=false; load a 80; request b 50; wait 28; request c 10 -> start c1
set evicts=false; load a 80; request b 50; wait 30; request c 10
  -> c1 waits for room, which is reserved for model 'b'
set evicts=false; load a 80; request b 50 timeout_s=40; wait 38; request c 10; wait 1 -> fail b1: timeout;
  fail b timeout -> start c1
set evicts=false; load z 60; request big 90 timeout_s=3600; wait 30; request small 10 -> nothing; wait 90;
  request urgent 10 priority=high -> nothing; unload z; exit z -> start big1

# Reloads go first; a recovery neither waits for kept room nor keeps any.
request a 30 priority=high; request b 30 cause=recovery -> start b1
request a 30 priority=high; request b 30 cause=restart -> start b1
request a 30 priority=high; request b 30 cause=swap -> start b1
set evicts=false; load z 50; request a 60 timeout_s=3600; wait 300; request b 30 cause=recovery -> start b1
set evicts=false; load z 50; request a 60 cause=recovery; wait 200; request b 30 -> start b1

# One load more than usual may run at once to repair what served.
start a 10; start b 10; request c 10 -> c1 waits for a free load slot; request d 10 cause=recovery
  -> start d1;
  begin d; request e 10 cause=recovery -> e1 waits for a free load slot

# A load slot is kept for files that loaded before; one that then made no progress is as good as unknown.
start a 10; start b 10; request c 10; request d 10 proven=true -> start d1;
  begin d; request e 10 proven=true -> e1 waits for a free load slot; complete d 10 -> start e1
set loads_at_once=1; start a 10; request d 10 proven=true -> start d1
start a 10 proven=true; start b 10; request d 10 proven=true -> d1 waits for a free load slot
start a 10; start b 10; request d 10 cause=restart -> start d1;
  begin d; request e 10 cause=restart -> e1 waits for a free load slot
start d 10; fail d no_progress; start a 10; start b 10; request d 10 version=2 proven=true
  -> d2 waits for a free load slot

# An on-demand load without pending demand is cancelled unless it has begun.
set evicts=false; load z 80; request a 30 cause=demand -> cancel a1; observe pending_demand=a+ -> nothing
start a 30 cause=demand -> nothing

# Under pressure only low priority waits, for a minute at most, and keeps no room.
observe under_pressure=true; request a priority=normal -> start a1
observe under_pressure=true; request a priority=high -> start a1
observe under_pressure=true; request a priority=low -> a1 waits for the machine, which is under pressure;
  -> wakes in 1; wait 59.5 -> wakes in 0.5; wait 0.5 -> start a1
observe under_pressure=true; request a priority=low cause=recovery -> start a1
observe under_pressure=true; request a priority=low cause=restart -> start a1
observe under_pressure=true; request a priority=low cause=swap -> start a1
observe under_pressure=true; request a 100 priority=low; wait 31; request b 100 -> start b1

# Loads start by priority, then age; a waiting load rises by one priority per minute.
request a priority=low; request b; request c priority=high; request d priority=low; request e priority=high
  -> start c1; begin c; fail c -> start e1; begin e; fail e -> start b1; begin b; fail b -> start a1
request a; wait 57; request b priority=high -> start b1
request a; wait 60; request b priority=high -> start a1
request a priority=low; wait 57; request b -> start b1
request a priority=low; wait 60; request b -> start a1
set evicts=false; load z 60; request a 50 priority=low; wait 120; request b 1 priority=high
  -> b1 waits for room, which is reserved for model 'a', before it
set evicts=false; load z 60; request a 50 priority=high; wait 120; request b 1 priority=high
  -> b1 waits for room, which is reserved for model 'a', before it
request a priority=low; wait 117; request b priority=high -> start b1
request a priority=low; wait 120; request b priority=high -> start a1

# A clock that was set back delays no load; loads that serve do not notice one that waits.
request a; wait -86400 -> start a1
load a 80 busy=true; request b 50; wait 100 -> nothing
"""


DEVICES = """
# Two devices with 100 bytes of their own, and one that has the machine's memory, of which it may take 50.
# A load starts on the first of its devices with room there and of the machine; CPU rows are above.
request a 10 on=cuda:0,cuda:1 there=60 -> start a1 on cuda:0
load z 10 on=cuda:0 there=60; request a 10 on=cuda:0,cuda:1 there=40 -> start a1 on cuda:0
load z 10 on=cuda:0 there=60; request a 10 on=cuda:0,cuda:1 there=41 -> start a1 on cuda:1
load z 10 on=cuda:0 there=60; request a 10 on=cuda:0,cpu there=41 -> start a1
load z 10 on=cuda:0 there=60; request a 10 on=cpu,cuda:0 there=41 -> start a1
load z 95; request a 10 on=cuda:0 there=10 -> a1 waits for memory: needs 0.0 MB,
load z 95; request a 10 on=cuda:0,cuda:1 there=10 -> nothing
load z 10 on=cuda:0 there=60; request a 10 on=cuda:0 there=41
  -> a1 waits for memory on cuda:0: needs 0.0 MB, 0.0 of 0.0 MB are free
load z 30 on=npu:0; request a 20 on=npu:0 -> start a1 on npu:0
load z 30 on=npu:0; request a 21 on=npu:0 -> a1 waits for memory on npu:0: needs 0.0 MB
load z 60; request a 41 on=npu:0 -> a1 waits for memory: needs 0.0 MB,

# What runs on a device takes of the machine's memory, and nothing of another device.
load z 60 on=cuda:0 there=60; request a 41 -> a1 waits for memory: needs 0.0 MB,
load z 60 on=cuda:0 there=60; request a 40 -> start a1
load z 10 on=cuda:1 there=100; request a 10 on=cuda:0 there=100 -> start a1 on cuda:0

# What never fits on a device is loaded on another, and fails at once if it never fits on any.
request a 10 on=cuda:0,cpu there=101 -> start a1
request a 10 on=cuda:0,cuda:1 there=101 -> fail a1: insufficient_memory
request a 51 on=npu:0 -> fail a1: insufficient_memory
request a 101 on=cuda:0 there=10 -> fail a1: insufficient_memory
load z 95; request a 10 on=cuda:0,cpu there=101 -> a1 waits for memory: needs 0.0 MB,

# One load at a time runs on a device with memory of its own, until a killed one is gone.
start z 10; begin z on=cuda:0 there=10; request a 10 on=cuda:0 there=10
  -> a1 waits for the device cuda:0, on which model 'z' is loading; complete z 10 -> start a1 on cuda:0
start z 10; begin z on=cuda:0 there=10; request a 10 on=cuda:0,cuda:1 there=10 -> start a1 on cuda:1
start z 10; begin z on=cuda:0 there=10; request a 10 on=npu:0,cuda:0 there=10 -> start a1 on npu:0
start z 10; begin z on=cuda:0 there=10; request a 10 on=cpu,cuda:0 there=10 -> start a1
start z 10; begin z on=cuda:0 there=10; request a 10 -> start a1
start z 10; begin z on=npu:0; request a 10 on=npu:0 -> start a1 on npu:0
run z1 z draining killed=true on=cuda:0 there=10; request a 10 on=cuda:0 there=10
  -> a1 waits for the device cuda:0, whose memory is being released; forget z1 -> start a1 on cuda:0
run z1 z loading killed=true on=cuda:0 there=10; request a 10 on=cuda:0,cpu there=10
  -> a1 waits for the device cuda:0, whose memory is being released; forget z1 -> start a1 on cuda:0
load z 10 on=cuda:0 there=10; unload z; request a 10 on=cuda:0 there=10 -> start a1 on cuda:0

# A load that lacks only the end of that one waits for it: it starts on no device that it names later, but on
# another of the same provider. If it lacks room there, too, it starts on the next device.
run z1 z draining killed=true on=cuda:0 there=60; request a 10 on=cuda:0,cpu there=50 -> start a1
start z 10; begin z on=cuda:0 there=10; request a 10 on=cuda:0,cpu there=90
  -> a1 waits for the device cuda:0, on which model 'z' is loading; complete z 10 -> start a1 on cuda:0
start z 10; begin z on=cuda:0 there=10; request a 10 on=cuda:0,npu:0 there=10
  -> a1 waits for the device cuda:0, on which model 'z' is loading
start z 10; begin z on=cuda:0 there=10; request a 10 on=cuda:0,cpu there=91 -> start a1
start z 10; begin z on=cuda:0 there=10; request a 10 on=cuda:0,cpu,cuda:1 there=10 -> start a1 on cuda:1
start z 10; begin z on=cuda:0 there=10; load y 10 on=cuda:1 there=91;
  request a 10 on=cuda:0,cuda:1,cpu there=10 -> a1 waits for the device cuda:0, on which model 'z' is loading
start z 10; begin z on=cuda:0 there=10; load y 10 on=npu:0;
  request a 45 on=npu:0,cuda:0,cpu there=10 -> a1 waits for the device cuda:0, on which model 'z' is loading
set loads_at_once=4; request a 10 on=cuda:0,cuda:1,cpu there=10; request b 10 on=cuda:0,cuda:1,cpu there=10;
  request c 10 on=cuda:0,cuda:1,cpu there=10 -> start a1 on cuda:0; begin a on=cuda:0 there=10
  -> start b1 on cuda:1; begin b on=cuda:1 there=10 -> c1 waits for model 'a' is loading;
  complete b 10 -> start c1 on cuda:1
set evicts=true; load y 10 on=npu:0; start z 10; begin z on=cuda:0 there=10; wait 20;
  request a 45 on=npu:0,cuda:0 there=10 -> a1 waits for the device cuda:0, on which model 'z' is loading
start z 10; begin z on=cuda:0 there=10; request a 10 on=cuda:0,cpu there=60; wait 31;
  request b 10 on=cuda:0,cpu there=60 -> start b1

# What is being released on a device is kept for the load that waits for it, as on the machine.
load z 10 on=cuda:0 there=80; request b 10 on=cuda:0 there=50; request c 10 on=cuda:0 there=20; unload z
  -> start c1 on cuda:0
load z 10 on=cuda:0 there=80; request b 10 on=cuda:0 there=50; request c 10 on=cuda:0 there=51; unload z
  -> b1 waits for it is being released; -> c1 waits for some reserved for model 'b', before it
load z 10 on=cuda:0 there=80; request b 10 on=cuda:0,cuda:1 there=50; load y 10 on=cuda:1 there=90;
  unload z; request c 10 on=cuda:1 there=10 -> start c1 on cuda:1

# A load that has waited has room reserved wherever it may run, and nowhere else.
load z 10 on=cuda:0 there=80; request b 10 on=cuda:0 there=50; wait 28;
  request c 10 on=cuda:0 there=10 -> start c1 on cuda:0
load z 10 on=cuda:0 there=80; request b 10 on=cuda:0 there=50; wait 30;
  request c 10 on=cuda:0 there=10 -> c1 waits for room, which is reserved for model 'b'
load z 10 on=cuda:0 there=80; load y 10 on=cuda:1 there=80;
  request b 10 on=cuda:0,cuda:1 there=50; wait 30; request c 10 on=cuda:1 there=10
  -> c1 waits for room, which is reserved for model 'b'
load z 10 on=cuda:0 there=80; request b 10 on=cuda:0 there=50; wait 30;
  request c 10 on=cuda:1 there=10 -> start c1 on cuda:1
load z 10 on=cuda:0 there=80; request b 10 on=cuda:0 there=50; wait 30;
  request c 81 on=cuda:1 there=10 -> c1 waits for room, which is reserved for model 'b'
start z 10; begin z on=cuda:0 there=10; request b 60 on=cuda:0 there=10; wait 30; request c 40
  -> c1 waits for room, which is reserved for model 'b'
"""


@pytest.mark.parametrize("script", read_table(SCENES))
def test_admission_decides(script: str) -> None:
    assert (OVERTAKING_LIMIT_S, PRESSURE_POLL_S, PRIORITY_AGING_S) == (30, 1, 60)  # as the rows have it
    Scene(script)


@pytest.mark.parametrize("script", read_table(DEVICES))
def test_admission_decides_on_devices(script: str) -> None:
    Scene(f"device cuda:0 100; device cuda:1 100; device npu:0 50 own=false; set evicts=false; {script}")


def test_scheduler_wakes_when_waiting_load_rises() -> None:
    scene = Scene(
        "set evicts=false; load a 80; request c 10 priority=low; run y1 y loading; run z1 z loading; wait 40;"
        "request b 50 priority=high timeout_s=3600; wait 35; forget y1"
        " -> c1 waits for room, which is reserved"
    )
    waited_s = 40.0 + 35 + 1
    while scene.next_action() == "nothing":
        seconds = scene.wake_in_s()
        waited_s += seconds
        scene.wait(seconds)
    assert scene.next_action() == "start c1"
    assert waited_s == pytest.approx(2 * PRIORITY_AGING_S)


# Messages.


def message(scene: Scene) -> str:
    action = scene.decision().action
    assert isinstance(action, FailLoad)
    return action.message


def test_load_that_never_fits_reports_need_and_budget() -> None:
    scene = Scene("request a 2000000000", budget_bytes=1_500_000_000)
    assert message(scene) == "it needs 2,000 MB of memory, and the budget is 1,500 MB in all"
    scene.estimate("a1", 2_000_000_000, guess=True)
    assert "(estimated from its files)" in message(scene)
    assert "memory_limit_bytes" in message(scene)


def test_load_that_fits_on_no_device_reports_each() -> None:
    scene = Scene(
        "device cuda:0 90000000; device npu:0 50000000 own=false; request a unknown", budget_bytes=None
    )
    scene.estimate("a1", 60_000_000, guess=True, on="cuda:0,npu:0", there=100_000_000)
    assert message(scene) == (
        "it needs 100 MB (estimated from its files) of memory on cuda:0, and its budget is 90 MB in all;"
        " it needs 60 MB (estimated from its files) of memory on npu:0, and its budget is 50 MB in all;"
        " set memory_limit_bytes if it takes less"
    )


def test_load_without_memory_reports_free_bytes_and_advice() -> None:
    scene = Scene("load a 80000000; request b 30000000", budget_bytes=100_000_000, evicts=False)
    text = "memory: needs 30 MB, 20 of 100 MB are free: "
    assert scene.decision().waiting_for == {"b1": text + "unload a model, or start with --evict idle"}
    scene.wait(300)
    assert text in message(scene)  # of the timeout


def test_megabytes_are_rounded_for_people() -> None:
    numbers = (0, 9_940_000, 10_000_000, 12_345_678_901)
    assert [format_megabytes(number) for number in numbers] == ["0.0 MB", "9.9 MB", "10 MB", "12,346 MB"]


def test_load_needs_of_the_machine_what_its_device_takes_there() -> None:
    needs = need(30, "cuda:0", there=10), need(60)
    scene = Scene("device cuda:0 100; load z 50; request a unknown", evicts=False)
    scene.observe(estimates={"a1": MemoryEstimate(needs)})
    assert scene.decision().action == StartLoad(scene.history.job("a1"), needs[0])
    scene.observe(estimates={"a1": MemoryEstimate(needs[::-1])})
    assert scene.next_action() == "start a1 on cuda:0"
    scene.play("set budget_bytes=110 -> start a1")


# After a start of the server.

RESTARTED = (
    "restart a b c; request c 45 cause=restart; request b 45 cause=restart; request a 45 cause=restart;"
)


def test_restart_reloads_what_fits_and_fails_the_rest() -> None:
    scene = Scene(RESTARTED + "-> start c1; begin c -> start b1; begin b; set loads_at_once=3")
    scene.play("-> a1 waits for memory: needs 0.0 MB")  # the two may keep less than was reserved for them
    scene.play("complete c 45; complete b 45; wait 100 -> fail a1: insufficient_memory")


def test_restart_respects_the_model_limit() -> None:
    scene = Scene(RESTARTED + "begin c; complete c 45", max_loaded=1)
    scene.play("-> fail b1: too_many_loaded; fail b too_many_loaded; fail a insufficient_memory -> nothing")
    assert [scene.history.model(model).state for model in "abc"] == ["failed", "failed", "loaded"]


def test_restart_reloads_in_order_of_last_use() -> None:
    scene = Scene("restart a b c", loads_at_once=0)
    scene.observe(last_used={"a": "2026-01-01T00:00:30.000000Z", "b": "2026-01-01T00:00:20.000000Z"})
    for model in "abc":
        scene.play(f"-> reload {model}, restart; request {model} cause=restart")


def test_waiting_load_has_only_the_reason_on_one_device() -> None:
    names = [f"cuda:{number}" for number in range(4)]
    devices, loads = (
        "; ".join(f"device {name} 100" for name in names),
        "; ".join(f"load l{name[-1]} 10 on={name} there=90" for name in names),
    )
    scene = Scene(f"{devices}; {loads}; request a 10 on={','.join(names)} there=20", evicts=False)
    calls = Counter[str]()

    def count(frame: FrameType, event: str, _: object) -> None:
        calls[frame.f_code.co_name] += event == "call"

    sys.setprofile(count)
    try:
        scene.decision()
    finally:
        sys.setprofile(None)
    assert calls["format_megabytes"] == 3
    assert calls["shortage"] == len(names) * 4
