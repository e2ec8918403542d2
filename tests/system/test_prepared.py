"""Prepared models of the installed server: used, listed, cleared, and killed while they are made."""

import asyncio
import hashlib
import json

import pytest
from click.testing import CliRunner
from support import models
from support.fleet import new_dice, of_both, tell
from support.http import Json
from support.servers import PREPARING, UNHURRIED, Server, events, serving, verified

from events.types import ModelLoaded
from loadledger.cli.main import main
from server.config import Config

SLOW = models.slow_to_fold(side=300, depth=20)
IN_SPARE_TIME_S = 600.0
TRIALS = 6
"""On a busy machine one trial in fourteen finds inferences slow (measured), whatever the model."""
X: Json = {"name": "x", "shape": [2], "datatype": "FP32", "data": [1.0, 2.0]}


@pytest.fixture
def config(config: Config) -> Config:
    models.save(SLOW, config.repository, "slow")
    return config


def printed(config: Config, *command: str) -> str:
    """Return what `loadledger prepared` prints."""
    result = CliRunner().invoke(main, ["prepared", *command, f"--data={config.data}"])
    assert result.exit_code == 0, result.output
    return result.stdout


def listed(config: Config) -> list[Json]:
    """Return what is prepared, as the command lists it."""
    entries: list[Json] = json.loads(printed(config, "list", "--json"))["prepared"]
    return entries


async def prepared(config: Config) -> Json:
    """Wait until the loaded model is prepared, or known to be best as it is."""
    async with asyncio.timeout(IN_SPARE_TIME_S):
        while not (entries := await asyncio.to_thread(listed, config)):  # noqa: ASYNC110 - nobody announces it
            await asyncio.sleep(0.05)
    return entries[0]


async def kept(config: Config, server: Server) -> Json:
    """Load until it is prepared: on a busy machine one trial may not be enough."""
    for _ in range(TRIALS):
        await server.api.load("slow")
        entry = await prepared(config)
        if entry["reason"] is None:
            return entry
        assert "slower" in entry["reason"], entry
        await server.api.unload("slow")
        printed(config, "clear")
    raise AssertionError(f"inferences are slower, in each of {TRIALS} trials")


async def loads_of(config: Config) -> list[ModelLoaded]:
    """Return the loads in the ledger."""
    return [event.data for event in await events(config) if isinstance(event.data, ModelLoaded)]


async def answered(server: Server) -> Json:
    """Return what the model answers."""
    answer = await server.api.infer("slow", X)
    assert answer.status == 200, answer
    return answer.json["outputs"]


def check_models(config: Config) -> None:
    """Check that all files are those that their manifests name, and nothing else is there."""
    for folder in (config.data / "store" / "forms").iterdir():
        manifest = json.loads((folder / "manifest.json").read_bytes())
        names = {path.name for path in (folder / "files").iterdir()}
        assert names == {file["path"] for file in manifest["files"]}
        for file in manifest["files"]:
            content = (folder / "files" / file["path"]).read_bytes()
            assert hashlib.sha256(content).hexdigest() == file["sha256"]


async def test_later_load_uses_the_prepared_model_until_cleared(config: Config) -> None:
    async with serving(config, command=UNHURRIED, environment=PREPARING) as server:
        entry = await kept(config, server)
        assert entry["model_id"] == "slow"
        bare = await answered(server)
        await server.api.unload("slow")
        await server.api.load("slow")
        assert await answered(server) == bare
        check_models(config)
        *before, last = await loads_of(config)
        assert [load.prepared for load in before] == [None] * len(before)
        assert last.prepared is not None
        assert last.prepared.sha256 == entry["sha256"]
        assert last.files == before[0].files
        assert printed(config, "clear").startswith("cleared: 1 ")
        assert listed(config) == []
        assert await answered(server) == bare  # from the files that it has open
        assert await server.stop() == 0


KILLS = of_both(short=1, long=100)
MOMENTS_S = (0.0, 1.5)
"""After a load: a preparation takes about a second."""


async def test_kill_during_preparation_leaves_nothing_half_made(config: Config) -> None:
    dice, answers, entries = new_dice(), [], 0
    for _ in range(KILLS):
        async with serving(config, "--restore=none", command=UNHURRIED, environment=PREPARING) as server:
            printed(config, "clear")
            await server.api.load("slow")
            answers.append(await answered(server))
            await asyncio.sleep(dice.uniform(*MOMENTS_S))
            await server.kill()
        async with serving(config, "--restore=none", command=UNHURRIED, environment=PREPARING) as server:
            check_models(config)
            entries += len(listed(config))
            await server.api.load("slow")
            answers.append(await answered(server))
            assert await server.stop() == 0
    verified(config)
    assert all(answer == answers[0] for answer in answers)
    tell(f"{KILLS} kills, after {entries} of which a model was prepared")
