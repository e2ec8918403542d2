"""Parameters of a load: from the request, the model's loadledger.toml or the server's settings."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from msgspec import UNSET
from support import models
from support.http import LocalApi
from support.models import save

from events.types import LoadRequested, ModelLoaded
from runtime.process.pool import WorkerPool
from runtime.repository import DEFAULTS_FILE, InvalidDefaults, Repository
from runtime.scheduler.view import Policy
from runtime.store.versions import Versions
from server.api.loads import LoadBodySchema, make_load_command
from server.app import create_app
from server.appkeys import CONFIG, POLICY, POOL, VERSIONS
from server.config import Config

RECORDED: dict[str, Any] = {
    "priority": "normal", "timeout_s": 300, "keep_alive_s": None, "memory_limit_bytes": None,
    "strategy": "beside", "pinned": False, "instances": 1, "max_batch_size": 0, "max_queue_delay_us": 0,
    "progress_timeout_s": 120, "threads": None,
}  # fmt: skip
OF_QUEUE = dict.fromkeys(("max_queue", "priority_levels", "default_priority_level"), UNSET)
USUAL = RECORDED | {"node_attributes": UNSET, **OF_QUEUE}
BATCHES = "max_batch_size = 4\nmax_queue_delay_us = 5"
LEVELS = "priority_levels = 3\ndefault_priority_level = 2"
SIZES = "timeout_s = 50\nmemory_limit_bytes = 1000000000\ninstances = 2"


def write(repository: Path, content: str) -> None:
    """Write the defaults file of a model `m`, and the model."""
    save(models.add(), repository, "m")
    (repository / "m" / DEFAULTS_FILE).write_text(content, encoding="utf-8")


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> web.Application:
    """An application that is not started, since a command needs no worker."""
    folder = tmp_path_factory.mktemp("repository")
    app = create_app(Config(repository=folder, data=folder / "data"))
    app[VERSIONS] = Versions(Repository(folder), None)
    app[POOL], app[POLICY] = WorkerPool(threads=1), Policy(loads_at_once=1)
    return app


Row = tuple[dict[str, Any], str, dict[str, Any], dict[str, Any]]
ROWS: list[Row] = [
    # The settings, the file, the request, and how the load differs from a usual one.
    ({}, SIZES, {}, {"timeout_s": 50, "memory_limit_bytes": 10**9, "instances": 2}),
    ({}, SIZES, {"instances": 1, "timeout_s": 60}, {"timeout_s": 60, "memory_limit_bytes": 10**9}),
    ({}, f"\ufeff{SIZES}", {"memory_limit_bytes": None}, {"timeout_s": 50, "instances": 2}),
    ({}, 'priority = "high"\nstrategy = "auto"', {}, {"priority": "high", "strategy": "auto"}),
    ({}, 'priority = "high"\nstrategy = "auto"', {"priority": "normal", "strategy": "beside"}, {}),
    ({}, "pinned = true", {}, {"pinned": True}),
    ({}, "pinned = true", {"pinned": False}, {}),
    ({}, BATCHES, {}, {"max_batch_size": 4, "max_queue_delay_us": 5}),
    ({}, BATCHES, {"max_batch_size": 0}, {}),
    ({}, BATCHES, {"max_queue_delay_us": 0}, {"max_batch_size": 4}),
    ({}, "max_batch_size = 4", {"max_queue_delay_us": 5}, {"max_batch_size": 4, "max_queue_delay_us": 5}),
    ({}, LEVELS, {}, {"priority_levels": 3, "default_priority_level": 2}),
    ({}, LEVELS, {"default_priority_level": 0}, {"priority_levels": 3}),
    ({}, LEVELS, {"priority_levels": 0, "default_priority_level": 0}, {}),
    ({}, "max_queue = 5", {}, {"max_queue": 5}),
    ({}, "max_queue = 5", {"max_queue": 6}, {"max_queue": 6}),
    ({}, "max_queue = 5", {"max_queue": None}, {}),
    ({}, "threads = 3", {}, {"threads": 3}),
    ({}, "threads = 3", {"threads": 1024}, {"threads": 1024}),
    ({}, "threads = 3", {"threads": None}, {}),
    ({"threads": 5}, "", {}, {}),  # the setting when the load starts
    ({}, 'node_attributes = ["z=a", "g=n", "z=a"]', {}, {"node_attributes": ("g=n", "z=a")}),
    ({}, 'node_attributes = ["z=a"]', {"node_attributes": ["d=f"]}, {"node_attributes": ("d=f",)}),
    ({}, 'node_attributes = ["z=a"]', {"node_attributes": []}, {}),
    ({}, 'node_attributes = ["z=a"]', {"node_attributes": None}, {}),
    ({"timeout_s": 12, "progress_timeout_s": 14}, "", {}, {"timeout_s": 12, "progress_timeout_s": 14}),
    ({"timeout_s": 12, "progress_timeout_s": 14}, "", {"progress_timeout_s": 120}, {"timeout_s": 12}),
    ({"timeout_s": 12}, "timeout_s = 13\nthreads = 5", {}, {"timeout_s": 13, "threads": 5}),
    ({"progress_timeout_s": 14}, "progress_timeout_s = 15", {}, {"progress_timeout_s": 15}),
    # Null means the setting in each source, and never is recorded as null if that is the setting.
    ({"keep_alive_s": -1}, "", {"keep_alive_s": None}, {}),
    ({"keep_alive_s": -1}, "", {"keep_alive_s": -1}, {"keep_alive_s": -1}),
    ({"keep_alive_s": -1}, "keep_alive_s = 60", {}, {"keep_alive_s": 60}),
    ({"keep_alive_s": -1}, "keep_alive_s = 60", {"keep_alive_s": None}, {}),
    ({"keep_alive_s": -1}, "keep_alive_s = 60", {"keep_alive_s": 0}, {"keep_alive_s": 0}),
    ({"keep_alive_s": 300}, "", {}, {"keep_alive_s": 300}),
    ({"keep_alive_s": 300}, "keep_alive_s = 60", {}, {"keep_alive_s": 60}),
    ({"keep_alive_s": 300}, "keep_alive_s = 60", {"keep_alive_s": None}, {"keep_alive_s": 300}),
    ({"keep_alive_s": 300}, "keep_alive_s = -1", {}, {"keep_alive_s": -1}),
    ({"keep_alive_s": 0}, "", {}, {"keep_alive_s": 0}),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "file", "body", "expected"), ROWS)
async def test_request_goes_before_file_before_setting(
    app: web.Application,
    settings: dict[str, Any],
    file: str,
    body: dict[str, Any],
    expected: dict[str, Any],
) -> None:
    repository = app[CONFIG].repository
    app[CONFIG] = replace(Config(repository=repository, data=repository / "data"), **settings)
    write(repository, file)
    command = await make_load_command(app, "m", body, "Ann")
    recorded = {name: getattr(command.parameters, name) for name in USUAL}
    assert recorded == USUAL | expected
    assert (command.model_id, command.actor, command.asked) == ("m", "Ann", frozenset(body))


async def test_load_is_of_the_highest_version_unless_it_names_one(app: web.Application) -> None:
    write(app[CONFIG].repository, "")
    save(models.add(), app[CONFIG].repository, "m", 10)
    for body, version in (({}, 10), ({"version": 1}, 1)):
        command = await make_load_command(app, "m", body, "Ann")
        assert (command.version, command.asked) == (version, frozenset())


async def test_parameters_are_recorded_and_outlast_the_file(shared: LocalApi) -> None:
    write(shared.config.repository, "max_batch_size = 8\nmax_queue_delay_us = 70\n")
    job = await shared.load("m")
    [requested] = await shared.data_of(LoadRequested)
    assert (requested.max_batch_size, requested.max_queue_delay_us) == (8, 70)
    assert job["parameters"] == RECORDED | {"max_batch_size": 8, "max_queue_delay_us": 70}
    write(shared.config.repository, "x")
    assert await shared.job(job["id"]) == job
    await shared.unload("m")


async def test_dependent_rows_are_refused_or_recorded(shared: LocalApi) -> None:
    folder = save(models.quantised(), shared.config.repository, "q").parent
    error = (await shared.failed_load("q", max_batch_size=8))["error"]
    assert (error["code"], "DynamicQuantizeLinear" in error["message"]) == ("rows_depend", True)
    (folder / DEFAULTS_FILE).write_text('max_batch_size = 8\ndependent_rows = "allow"\n')
    job = await shared.load("q")
    assert job["parameters"] == RECORDED | {"max_batch_size": 8, "dependent_rows": "allow"}
    loaded = (await shared.data_of(ModelLoaded))[-1]
    assert (loaded.rows, "DynamicQuantizeLinear" in (loaded.rows_depend or "")) == ("dependent", True)
    shown = (await shared.get("/api/v1/models/q")).json["rows"]
    assert shown == {"verdict": "dependent", "reason": loaded.rows_depend, "joined": True}
    assert "dynamic_batching" in (await shared.get("/v2/models/q/config")).json
    assert "notices" not in (await shared.get("/api/v1/resources")).json
    await shared.unload("q")


async def test_unknown_rows_are_loaded_and_not_joined(shared: LocalApi) -> None:
    save(models.unfamiliar_rows(), shared.config.repository, "unknown")
    await shared.load("unknown", max_batch_size=8)
    loaded = (await shared.data_of(ModelLoaded))[-1]
    assert (loaded.rows, "MaxpoolWithMask" in (loaded.rows_depend or "")) == ("unknown", True)
    path = "/api/v1/models/unknown"
    for address in (path, f"{path}?at={shared.position}"):
        assert (await shared.get(address)).json["rows"] == {
            "verdict": "unknown", "reason": loaded.rows_depend, "joined": False
        }  # fmt: skip
    config = (await shared.get("/v2/models/unknown/config")).json
    assert (config["max_batch_size"], "dynamic_batching" in config) == (8, False)
    [notice] = (await shared.get("/api/v1/resources")).json["notices"]
    assert notice["title"] == "unknown: requests of several clients are not joined in batches"
    assert (notice["level"], "MaxpoolWithMask" in notice["why"]) == ("note", True)
    await shared.unload("unknown")
    await shared.load("unknown", max_batch_size=8, dependent_rows="allow")
    assert "notices" not in (await shared.get("/api/v1/resources")).json
    await shared.unload("unknown")


# Mistakes

TEXTS = ("", " ", "x" * 1001, None, 7)
REFUSED: dict[str, tuple[object, ...]] = {
    "version": ("1", 1.5, True, None, 0, 10**20),
    "timeout_s": (0, 3601, True, 2.0, 10**20, {"of": 2}),
    "progress_timeout_s": (0, 3601, None),
    "memory_limit_bytes": (1, 2**20 - 1),
    "pinned": (0, None, "true"),
    "priority": ("urgent", None),
    "strategy": ("fast",),
    "keep_alive_s": (-2, 1.5, 31536001),
    "max_batch_size": (65_537, -1, 1.0, None),
    "max_queue_delay_us": (1_000_001,),
    "max_queue": (0, 100_001, "5"),
    "priority_levels": (-1, 1001, None),
    "default_priority_level": (-1, None),
    "instances": (0, 65, "2"),
    "threads": (0, 1025, "2", 1.0, True),
    "node_attributes": (
        "zone=a", ["zone"], [f"{'a' * 64}=b"], ["a=b\n"], [1], [f"a={number}" for number in range(17)],
    ),
    "dependent_rows": ("yes",),
    "devices": ([], ["cuda"], ["CUDA:0"]),
    "fallback": ("gpu",),
    "label": ("", "1", "a" * 64, "a\n", None, 3),
    "reason": TEXTS,
    "emergency": TEXTS,
    "digest": ("x" * 64, "0" * 63, None),
    "verson": (1,),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_invalid_value_is_refused_by_its_name(name: str) -> None:
    for value in REFUSED[name]:
        assert list(LoadBodySchema().validate({name: value})) == [name], value


MISTAKES: dict[str, tuple[str, ...]] = {
    "max_queue_delay_us = 5": (": max_queue_delay_us", "max_batch_size"),
    "priority_levels = 2\ndefault_priority_level = 3": (": default_priority_level", "priority_levels"),
    "instnces = 2": (": instnces: Unknown field", "known are", "instances"),
    "version = 2": (": version: Unknown field",),
    "instances = 65": (": instances: Must be", "1", "64"),
    "timeout_s = 1979-05-27": (": timeout_s: Must be an integer",),
    'node_attributes = ["zone=a", "gpu"]': (": node_attributes", "1", "Must be like zone=a"),
    'priority = "urgent"': (": priority: Must be one of", "normal"),
    "x": ("TOML",),
}


@pytest.mark.parametrize("line", MISTAKES)
async def test_mistake_in_a_file_is_named_with_its_key(app: web.Application, line: str) -> None:
    write(app[CONFIG].repository, line)
    with pytest.raises(InvalidDefaults) as refused:
        await make_load_command(app, "m", {}, "Ann")
    assert str(refused.value).startswith("m/loadledger.toml")
    for word in MISTAKES[line]:
        assert word in str(refused.value)


async def test_invalid_body_or_file_is_400_and_records_nothing(shared: LocalApi) -> None:
    head, long = shared.position, "".join(f"k{number} = 1\n" for number in range(4_000))
    for file, body, code, words in (
        ("", {"verson": 1}, "invalid_body", "verson"),
        ("", {"max_queue_delay_us": 5}, "invalid_body", "max_queue_delay_us"),
        ("", {"max_batch_size": 0, "max_queue_delay_us": 5}, "invalid_body", "max_queue_delay_us"),
        ("", {"priority_levels": 2, "default_priority_level": 3}, "invalid_body", "default_priority_level"),
        ("x", {}, "invalid_defaults", "m/loadledger.toml"),
        (long, {}, "invalid_defaults", "m/loadledger.toml"),
    ):
        write(shared.config.repository, file)
        answer = await shared.post("/api/v1/models/m/load", json=body)
        assert answer.refusal == (400, code)
        assert words in answer.json["detail"]
        assert len(answer.json["detail"]) < 1_000
    assert shared.position == head
