"""A load slot for files that loaded before: loads that never end delay only models that never loaded."""

import pytest
from support.history import CONTENTS
from support.worlds import World

from events.commands import RequestLoad, RequestUnload
from events.jobs import NO_PROGRESS
from events.models import ModelState
from events.types import LoadFailed
from runtime.scheduler.view import Policy


@pytest.mark.parametrize("loads_at_once", [1, 2, 3])
def test_proven_load_starts_at_once_beside_loads_that_never_end(loads_at_once: int) -> None:
    """More models than there are slots hang whenever they load, and are always loaded again."""
    world = World(Policy(loads_at_once, budget_bytes=10_000))
    world.submit(RequestLoad("c", 1, CONTENTS, "alice"))
    world.settle()
    world.progress("loaded")
    world.settle()
    for _ in range(5):
        world.submit(RequestUnload("c", "alice"))
        world.settle()
        world.end_all()
        for name, version in (("a", 1), ("b", 1), ("d", 1), ("e", 1)):
            world.submit(RequestLoad(name, version, CONTENTS, "mallory"))
        world.settle()
        for process in world.loading():
            process.hang(world.now)
        assert len(world.loading()) == loads_at_once
        asked_at = world.now
        world.submit(RequestLoad("c", 1, CONTENTS, "alice"))
        world.settle()
        (loading,) = (process for process in world.loading() if process.model_id == "c")
        assert world.now == asked_at
        loading.finish("loaded")
        world.settle()
        assert world.state.models["c"].state is ModelState.LOADED
        world.progress("loaded")
        world.settle()
    failed = {event.data.code for event in world.events if isinstance(event.data, LoadFailed)}
    assert NO_PROGRESS in failed
