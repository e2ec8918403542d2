"""When models may be optimised: in spare time and memory; that ends before anything is evicted for a load.

A row is what happens and, after `->`, what the scheduler decides then: see `Scene.play`.
"""

import pytest
from support.decisions import Scene, read_table

SCENES = """
# In spare time and spare memory.
load a 60; observe optimisable_bytes=40 -> optimises
load a 61; observe optimisable_bytes=40 -> does not optimise
load a 60 -> does not optimise
set budget_bytes=none; load a 60; observe optimisable_bytes=1000000000000 -> optimises
load a 60; observe optimisable_bytes=40; start b 1 -> does not optimise
load a 60; observe optimisable_bytes=40; load b 1; unload b begun=true -> does not optimise
load a 60; observe optimisable_bytes=40; observe under_pressure=true -> does not optimise; -> wakes in 10
load a 60; observe optimisable_bytes=40; observe fork_server_up=false -> does not optimise

# Once begun it goes on, also beside loads, until its memory is needed, or a load waits under pressure.
load a 60; optimise 40; observe under_pressure=true -> optimises
load a 60; load b 0; optimise 40; unload b begun=true -> optimises
load a 61; optimise 40 -> does not optimise
load a 20; optimise 40; request b unknown -> optimises
load a 20; optimise 40; request b 40 -> optimises; begin b -> optimises
load a 20; optimise 40; request b 41 -> does not optimise
load a 20; optimise 40; request b 20; request c 21 -> does not optimise
load a 20; optimise 40; request b 1 priority=low; observe under_pressure=true -> does not optimise

# A load waits for the room, unless it needs none of it; models are evicted for the rest.
load a 20; optimise 40; request b 40 -> start b1
load a 20; optimise 40; wait 60; request b 41 -> b1 waits for it is being released; optimise 0 -> start b1
load a 20; optimise 40; wait 60; request b 81 -> unload a, eviction for b1
set max_loaded=1; load a 20; optimise 40; wait 10; request b 10 -> unload a, eviction for b1
load a 20; optimise 40; request b 1 priority=low; observe under_pressure=true
  -> b1 waits for the machine, which is under pressure

# So does a swap that may be beside. One in place uses the old room.
load a 20; optimise 40; request a 60 version=2 strategy=auto -> a2 waits for it is being released;
  optimise 0 -> start a2
load a 20; optimise 40; request a 60 version=2 strategy=in_place -> replace a1 by a2
"""


@pytest.mark.parametrize("script", read_table(SCENES))
def test_optimising_gives_way(script: str) -> None:
    Scene(script)
