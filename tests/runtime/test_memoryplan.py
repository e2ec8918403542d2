"""The plan of a container's memory: the sum of its parts, the default budget, and what is said about them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.history import PLAIN

from runtime.memory import MemoryLimit
from runtime.memoryplan import MemoryPlan, describe_plan, plan_memory

MIB, GIB = 2**20, 2**30
REQUEST = 64 * MIB


def plan_of(limit_bytes: int, budget_bytes: int | None = None, *, kills_together: bool = False) -> MemoryPlan:
    return plan_memory(MemoryLimit(limit_bytes, "cgroup v2", kills_together), budget_bytes, REQUEST)


@pytest.mark.parametrize(
    ("limit", "budget", "bodies", "tensors"),
    [
        pytest.param(512, 142, 128, 32, id="512 MiB"),
        pytest.param(1024, 568, 128, 64, id="1 GiB"),
        pytest.param(4096, 2787, 512, 256, id="4 GiB"),
        pytest.param(16 * 1024, 12572, 1024, 1024, id="16 GiB"),
        pytest.param(64 * 1024, 52428, 1024, 1024, id="64 GiB"),
    ],
)
def test_default_budget_leaves_room_for_all_else(limit: int, budget: int, bodies: int, tensors: int) -> None:
    plan = plan_of(limit * MIB)
    assert (plan.budget_bytes // MIB, plan.bodies_bytes // MIB, plan.shared_bytes // MIB) == (
        budget,
        bodies,
        tensors,
    )
    assert plan.fits


@PLAIN
@given(st.integers(512 * MIB, 2**45), st.integers(2**20, REQUEST))
def test_default_plan_never_passes_the_limit(limit_bytes: int, request_bytes: int) -> None:
    plan = plan_memory(MemoryLimit(limit_bytes, "cgroup v2"), None, request_bytes)
    assert plan.total_bytes <= limit_bytes
    assert plan.workers_bytes + plan.beside_bytes <= limit_bytes
    assert plan.bodies_bytes // 2 >= request_bytes  # of one subject


@PLAIN
@given(st.integers(512 * MIB, 2**45))
def test_fitting_budget_fits_and_no_larger_one(limit_bytes: int) -> None:
    fitting = plan_of(limit_bytes, limit_bytes).fitting_budget_bytes
    assert plan_of(limit_bytes, fitting).fits
    assert not plan_of(limit_bytes, fitting + 2).fits


def test_given_budget_beyond_the_limit_is_kept_and_told() -> None:
    plan = plan_of(4 * GIB, 4 * GIB * 80 // 100, kills_together=True)
    assert (plan.budget_bytes, plan.fits) == (4 * GIB * 80 // 100, False)
    assert plan.workers_bytes == plan.budget_bytes + plan.growth_bytes
    text = describe_plan(plan)
    assert "may kill all processes of the container at once" in text
    assert f"set --memory-budget to {plan.fitting_budget_bytes // MIB}MiB or less" in text
    assert "the kernel may kill the server" in describe_plan(plan_of(4 * GIB, 4 * GIB))


def test_container_too_small_for_the_server_is_told() -> None:
    plan = plan_of(256 * MIB)
    assert (plan.budget_bytes, plan.fits) == (256 * MIB // 3, False)
    text = describe_plan(plan)
    assert "--memory-budget" not in text
    assert text.endswith(": give the container more, or lower --max-request-size.")


def test_plan_of_a_machine_names_no_container() -> None:
    text = describe_plan(plan_memory(MemoryLimit(64 * GIB, "machine"), None, REQUEST))
    assert text.endswith("for the server.")
