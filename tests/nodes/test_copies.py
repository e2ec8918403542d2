"""Copies of a model at real nodes: more and fewer of them, swaps, drains, and the end of a node.

The tests share three nodes; the last one drains one of them and ends another.
"""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
import pytest_asyncio
from support.http import Json, LocalApi, when
from support.models import add
from support.nodes import local_node
from support.postgres import join_shared_server
from support.replicas import make_ledger

from events.types import UnloadRequested

pytestmark = pytest.mark.asyncio(loop_scope="module")

Nodes = dict[str, LocalApi]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def nodes(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Nodes]:
    postgres, folder = await join_shared_server(), tmp_path_factory.mktemp("nodes")
    async with postgres.database(make_ledger) as ledger, AsyncExitStack() as stack:
        yield {name: await stack.enter_async_context(local_node(ledger, folder, name)) for name in "abc"}


def placed(model: Json) -> dict[str, int]:
    """Return the version at each node that has a copy."""
    return {each["node"]: each["version"] for each in model.get("copies_at", [])}


async def when_copied(api: LocalApi, model_id: str, number: int, version: int = 1) -> dict[str, int]:
    """Wait until a model has so many copies of a version, and none else."""

    def is_so(model: Json) -> bool:
        return list(placed(model).values()) == [version] * number

    return placed(await when(lambda: api.model(model_id), is_so))


async def test_model_is_copied_up_and_down(nodes: Nodes) -> None:
    a = nodes["a"]
    a.save(add(), "m")
    first = await a.load("m", copies=2)
    at_first = await when_copied(a, "m", 2)
    assert first["node"] in at_first
    shown = await nodes["c"].model_when("m", copies_ready=2)
    assert (shown["copies"], shown["job_id"]) == (2, first["id"])
    assert "copies_waiting_for" not in shown

    more = await a.load("m", copies=5)
    assert more["parameters"]["copies"] == 5
    assert (await when_copied(a, "m", 3)).items() > at_first.items()
    waiting = await a.model_when("m", copies_ready=3)
    assert waiting["copies_waiting_for"] == "a further node that takes loads"

    await a.load("m", copies=1)
    alone = await when(lambda: a.model("m"), lambda model: "copies" not in model)
    assert alone["node"] == first["node"]
    assert {each.cause for each in await a.data_of(UnloadRequested)} == {"copy"}


async def test_swap_goes_copy_by_copy_and_unload_ends_all(nodes: Nodes) -> None:
    a = nodes["a"]
    for version in (1, 2):
        a.save(add(), "swapped", version=version)
    await a.load("swapped", version=1, copies=3)
    await when_copied(a, "swapped", 3)
    await a.load("swapped", version=2, copies=3)
    assert await when_copied(a, "swapped", 3, version=2) == {"a": 2, "b": 2, "c": 2}
    await a.unload("swapped")
    await a.model_when("swapped", state="unloaded")
    jobs = await when(
        lambda: a.jobs("?model=swapped"), lambda jobs: all(job["status"] == "completed" for job in jobs)
    )
    causes = [job["cause"] for job in jobs if job["kind"] == "unload"]
    assert causes == ["copy", "copy", "request", "swap", "swap", "swap"]


async def test_copies_of_nodes_that_drain_and_leave_go_elsewhere(nodes: Nodes) -> None:
    nodes["a"].save(add(), "moved")
    first = (await nodes["a"].load("moved", copies=2))["node"]
    assert first in await when_copied(nodes["a"], "moved", 2)
    await nodes["a"].post(f"/api/v1/nodes/{first}/drain")
    left = nodes.keys() - {first}
    after = await when(lambda: nodes["a"].model("moved"), lambda model: placed(model).keys() == left)
    assert after["state"] == "loaded"

    leaving, staying = sorted(left)
    await nodes[leaving].client.close()
    alone = await when(lambda: nodes[staying].model("moved"), lambda model: placed(model) == {staying: 1})
    assert (alone["state"], alone["copies"], alone["copies_ready"]) == ("loaded", 2, 1)
