"""A model that an earlier release batched may lose its batches, and never its service."""

from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

from msgspec import UNSET
from msgspec.structs import replace
from support import models
from support.ledgers import store_events
from support.running import Engine, Run, code_of

from events.models import ModelState
from events.sqlite.schema import connect
from events.types import Event, LoadParameters, LoadRequested, ModelLoaded

BATCHED = LoadParameters(max_batch_size=8)
ALLOWED = LoadParameters(max_batch_size=8, dependent_rows="allow")


def write_as_earlier_release(folder: Path, events: Iterable[Event], **said: Any) -> None:
    """Write a ledger anew, as a release recorded it that read no graph.

    Its loads allow nothing. `said` are further changes of its `ModelLoaded`.
    """

    def change(event: Event) -> Event:
        match event.data:
            case LoadRequested() as data:
                return replace(event, data=replace(data, dependent_rows=UNSET))
            case ModelLoaded() as data:
                return replace(event, data=replace(data, rows=UNSET, **said))
        return event

    (folder / "ledger.db").unlink()
    with closing(connect(folder / "ledger.db")) as connection:
        store_events(connection, map(change, events))


async def said_of(engine: Engine) -> tuple[Any, bool]:
    """Return what the last load of `m` found, and whether it joins requests."""
    loaded, serving = (await engine.facts(ModelLoaded, of="m"))[-1], engine.model("m").serving
    assert serving is not None
    assert "ReduceMean" in (loaded.rows_depend or "")
    return loaded.rows, serving.joins_requests


async def test_version_that_was_batched_before_is_not_refused(run: Run, folder: Path) -> None:
    for model_id in ("m", "new"):
        models.save(models.less_their_mean(), folder / "models", model_id)
    async with run(stops_cleanly=True) as engine:
        assert code_of(await engine.load("m", parameters=ALLOWED)) is None
        await engine.unload("m")
        events = await engine.events()
    write_as_earlier_release(folder, events, rows_depend=UNSET)  # it took the rows for independent
    async with run() as engine:
        assert code_of(await engine.load("m", parameters=BATCHED)) is None
        assert await said_of(engine) == ("dependent", False)
        assert code_of(await engine.load("new", parameters=BATCHED)) == "rows_depend"
        await engine.unload("m")
        assert code_of(await engine.load("m", parameters=BATCHED)) is None


async def test_reload_of_dependent_rows_is_not_refused(run: Run, folder: Path) -> None:
    """Nor is a later load, though an earlier release knew that they depend: it had batched them, too."""
    models.save(models.less_their_mean(), folder / "models", "m")
    async with run() as engine:
        assert code_of(await engine.load("m", parameters=ALLOWED)) is None
        events = await engine.events()
    write_as_earlier_release(folder, events)
    async with run() as engine:
        await engine.recorded(lambda: engine.model("m").state is ModelState.LOADED)
        assert await said_of(engine) == ("dependent", False)
        await engine.unload("m")
        assert code_of(await engine.load("m", parameters=BATCHED)) is None
