"""What a load may take of the memory budget until it is loaded: the rule, and loads that take more."""

import resource
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import models
from support.history import PLAIN
from support.running import Run, error_of

from events.jobs import JobStatus
from events.types import LoadParameters
from runtime.scheduler.view import PEAK_VARIATION, Policy, load_allowance

MB = 1_000_000


@dataclass
class Growing:
    """A load that was admitted with a reservation, and what its workers have taken."""

    reserved: int
    taken: int = 0

    @property
    def counted(self) -> int:
        return max(self.reserved, self.taken)


@PLAIN
@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 500)), max_size=30),
)
def test_loads_stay_within_the_budget_however_they_grow(
    reservations: list[int], samples: list[tuple[int, int]]
) -> None:
    budget = max(1000, sum(reservations))
    loads = [Growing(reserved) for reserved in reservations]
    for number, taken in samples:
        if number >= len(loads):
            continue
        load, others = loads[number], sum(each.counted for each in loads if each is not loads[number])
        allowance = load_allowance(budget, others, load.reserved)
        assert allowance >= load.reserved
        if taken > allowance:
            loads.remove(load)
        else:
            load.taken = taken
        margin = sum(each.reserved // PEAK_VARIATION for each in loads)
        assert sum(each.counted for each in loads) <= budget + margin


def save_ballast(root: Path) -> None:
    """Save a model that takes 216 MB in many steps, and less than its limit, which counts a large file."""
    folder = models.save(models.slow_to_fold(300, 600), root, "big")
    with (folder / "weights.bin").open("wb") as file:
        file.truncate(100 * MB)


@pytest.mark.parametrize(
    ("by", "budget_mb", "words"),
    [
        pytest.param("its limit", 400, "it may take, the memory budget leaves it no more: ", id="limit"),
        pytest.param("the server", 160, "the load took ", id="measured"),
    ],
)
async def test_load_that_takes_more_than_is_free_fails(
    folder: Path, run: Run, by: str, budget_mb: int, words: str
) -> None:
    root = folder / "models"
    if by == "the server":
        save_ballast(root)
    else:
        models.save(models.memory_bomb_on_load(250 * MB), root, "big")  # a file of 300 bytes
    async with run(policy=Policy(loads_at_once=2, budget_bytes=budget_mb * MB)) as engine:
        await engine.load("adder")
        one_thread = LoadParameters(threads=1)  # several wait for each other, on a busy machine for minutes
        error = error_of(await engine.load("big", parameters=one_thread))
        assert error.code == "out_of_memory"
        assert words in error.message
        assert "; it may take " in error.message
        assert error.message.endswith("and what is free of the memory budget")
        assert await engine.story(of="big") == ["LoadRequested", "LoadStarted", "LoadFailed"]
        assert await engine.ask("adder", 1) == 3


async def test_load_beyond_its_own_limit_names_that_alone(folder: Path, run: Run) -> None:
    models.save(models.memory_bomb_on_load(), folder / "models", "big")
    async with run(policy=Policy(loads_at_once=1, budget_bytes=1000 * MB)) as engine:
        limited = LoadParameters(threads=1, memory_limit_bytes=200 * MB)
        message = error_of(await engine.load("big", parameters=limited)).message
        assert "than it may take, its memory_limit_bytes are 200000000: " in message
        assert "memory budget" not in message


async def test_limit_of_a_load_ends_with_it_and_known_peaks_suffice(folder: Path, run: Run) -> None:
    models.save(models.weights(20), folder / "models", "m")
    async with run(policy=Policy(loads_at_once=1, budget_bytes=1000 * MB)) as engine:
        await engine.load("m")
        [first] = engine.model("m").footprints
        await engine.unload("m")
        engine.consumer.policy = Policy(loads_at_once=1, budget_bytes=first.peak_memory_bytes)
        assert (await engine.load("m")).status is JobStatus.COMPLETED
        pid = engine.worker("m").pid
        soft, hard = resource.prlimit(pid, resource.RLIMIT_DATA)
        assert soft == hard > first.peak_memory_bytes  # for good: the budget, and what is mapped
