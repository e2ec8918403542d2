"""Copies of a model at real nodes: more and fewer of them, swaps, drains, and the end of a node."""

from contextlib import AsyncExitStack
from pathlib import Path

from support.http import Json, LocalApi, when
from support.models import add
from support.nodes import local_node
from support.postgres import Database

from events.types import UnloadRequested


def placed(model: Json) -> dict[str, int]:
    """Return the version at each node that has a copy."""
    return {each["node"]: each["version"] for each in model.get("copies_at", [])}


async def when_copied(api: LocalApi, number: int, version: int = 1) -> dict[str, int]:
    """Wait until a model has so many copies of a version, and none else."""

    def is_so(model: Json) -> bool:
        return list(placed(model).values()) == [version] * number

    return placed(await when(lambda: api.model("m"), is_so))


async def test_model_is_copied_up_and_down(ledger: Database, tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        nodes = {name: await stack.enter_async_context(local_node(ledger, tmp_path, name)) for name in "abc"}
        a = nodes["a"]
        a.save(add(), "m")
        first = await a.load("m", copies=2)
        at_first = await when_copied(a, 2)
        assert first["node"] in at_first
        shown = await nodes["c"].model_when("m", copies_ready=2)
        assert (shown["copies"], shown["job_id"]) == (2, first["id"])
        assert "copies_waiting_for" not in shown

        more = await a.load("m", copies=5)
        assert more["parameters"]["copies"] == 5
        assert (await when_copied(a, 3)).items() > at_first.items()
        waiting = await a.model_when("m", copies_ready=3)
        assert waiting["copies_waiting_for"] == "a further node that takes loads"

        await a.load("m", copies=1)
        alone = await when(lambda: a.model("m"), lambda model: "copies" not in model)
        assert alone["node"] == first["node"]
        assert {each.cause for each in await a.data_of(UnloadRequested)} == {"copy"}


async def test_swap_goes_copy_by_copy_and_unload_ends_all(ledger: Database, tmp_path: Path) -> None:
    async with local_node(ledger, tmp_path, "a") as a, local_node(ledger, tmp_path, "b"):
        a.save(add(), "m")
        a.save(add(), "m", version=2)
        await a.load("m", version=1, copies=2)
        await when_copied(a, 2)
        await a.load("m", version=2, copies=2)
        assert await when_copied(a, 2, version=2) == {"a": 2, "b": 2}
        await a.unload("m")
        await a.model_when("m", state="unloaded")
        jobs = await when(a.jobs, lambda jobs: all(job["status"] == "completed" for job in jobs))
        assert [job["cause"] for job in jobs if job["kind"] == "unload"] == [
            "copy",
            "request",
            "swap",
            "swap",
        ]


async def test_drained_node_gives_its_copy_away(ledger: Database, tmp_path: Path) -> None:
    async with (
        local_node(ledger, tmp_path, "a") as a,
        local_node(ledger, tmp_path, "b"),
        local_node(ledger, tmp_path, "c"),
    ):
        a.save(add(), "m")
        first = (await a.load("m", copies=2))["node"]
        before = await when_copied(a, 2)
        await a.post(f"/api/v1/nodes/{first}/drain")
        (free,) = {"a", "b", "c"} - before.keys()
        left = ({free} | before.keys()) - {first}
        after = await when(lambda: a.model("m"), lambda model: placed(model).keys() == left)
        assert after["state"] == "loaded"


async def test_model_stays_loaded_when_node_of_one_copy_leaves(ledger: Database, tmp_path: Path) -> None:
    async with local_node(ledger, tmp_path, "a") as a:
        a.save(add(), "m")
        await a.load("m", copies=2)
        async with local_node(ledger, tmp_path, "b") as b:
            await when_copied(b, 2)
        alone = await when(lambda: a.model("m"), lambda model: placed(model) == {"a": 1})
        assert (alone["state"], alone["copies"], alone["copies_ready"]) == ("loaded", 2, 1)
