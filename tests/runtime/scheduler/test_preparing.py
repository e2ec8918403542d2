"""When cached models are made: in spare time and memory, one at a time, stopped before anything is evicted.

A row is what happens and, after `->`, what the scheduler decides then: see `Scene.play`.
"""

import pytest
from support.decisions import Scene, read_table

SCENES = """
# In spare time and spare memory, one at a time.
load a 60; offer a1 40 -> prepare a1
load a 61; offer a1 40 -> nothing
load a 70; offer a1 40; offer b1 30 -> prepare b1
set budget_bytes=none; load a 60; offer a1 1000000000000 -> prepare a1
load a 20; prepare a1 40; offer b1 1 -> nothing
load a 60; offer a1 40; start b 1 -> nothing
load a 60; offer a1 40; observe under_pressure=true -> nothing; -> wakes in 10
load a 60; offer a1 40; observe fork_server_up=false -> nothing

# A load that needs the room, or waits for pressure, stops the preparation; models are evicted for the rest.
load a 20; prepare a1 40; request b 40 -> start b1
load a 20; prepare a1 40; wait 60; request b 41 -> stop preparing; prepare a1 40 stopping=true
  -> b1 waits for it is being released; observe preparation=none -> start b1
load a 20; prepare a1 40 stopping=true; wait 60; request b 81 -> unload a, eviction for b1
set max_loaded=1; load a 20; prepare a1 40; wait 10; request b 10 -> unload a, eviction for b1
load a 20; prepare a1 40 stopping=true; request b 41 -> b1 waits for it is being released
load a 20; prepare a1 40; request b 1 priority=low; observe under_pressure=true -> stop preparing;
  prepare a1 40 stopping=true -> b1 waits for the machine, which is under pressure

# So do models that outgrow the budget, and a swap that may be beside. One in place uses the old room.
load a 70; prepare a1 40 -> stop preparing
load a 70; prepare a1 40 stopping=true; wait 60 -> nothing
load a 20; prepare a1 40; request a 60 version=2 strategy=auto -> stop preparing; prepare a1 40 stopping=true
  -> a2 waits for it is being released; observe preparation=none -> start a2
load a 20; prepare a1 40; request a 60 version=2 strategy=in_place -> replace a1 by a2
"""


@pytest.mark.parametrize("script", read_table(SCENES))
def test_preparing_gives_way(script: str) -> None:
    Scene(script)
