"""Parameters of a load: from the request, the model's loadledger.toml or the server's settings."""

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
from runtime.repository import DEFAULTS_FILE, Repository
from runtime.scheduler.view import Policy
from runtime.store.versions import Versions
from server.api.loads import make_load_command
from server.app import create_app
from server.appkeys import POLICY, POOL, VERSIONS
from server.config import Config

RECORDED: dict[str, Any] = {
    "priority": "normal", "timeout_s": 300, "keep_alive_s": None, "memory_limit_bytes": None,
    "strategy": "beside", "pinned": False, "instances": 1, "max_batch_size": 0, "max_queue_delay_us": 0,
    "progress_timeout_s": 120, "threads": None,
}  # fmt: skip
USUAL = RECORDED | {"node_attributes": UNSET}
NOTHING = "nothing"


def write(repository: Path, content: str) -> None:
    """Write the defaults file of a model `m`, and the model."""
    save(models.add(), repository, "m")
    (repository / "m" / "loadledger.toml").write_text(content, encoding="utf-8")


def application(repository: Path, **settings: Any) -> web.Application:
    """Return an application that is not started, since a command needs no worker."""
    write(repository, "")
    app = create_app(Config(repository=repository, data=repository / "data", **settings))
    app[VERSIONS] = Versions(Repository(repository), None)
    app[POOL], app[POLICY] = WorkerPool(threads=1), Policy(loads_at_once=1)
    return app


async def changes(app: web.Application, **body: Any) -> dict[str, Any]:
    """Return the parameters that a load is requested with and that differ from a plain load's."""
    parameters = (await make_load_command(app, "m", body, "Ann")).parameters
    return {name: getattr(parameters, name) for name in USUAL if getattr(parameters, name) != USUAL[name]}


async def refused(api: LocalApi, code: str, **body: Any) -> str:
    head = api.position
    answer = await api.post("/api/v1/models/m/load", json=body)
    assert answer.refusal == (400, code), answer.body
    assert api.position == head
    detail: str = answer.json["detail"]
    return detail


async def test_file_applies_where_request_says_nothing(tmp_path: Path) -> None:
    app = application(tmp_path)
    write(tmp_path, "timeout_s = 50\nmemory_limit_bytes = 1000000000\ninstances = 2\n")
    assert await changes(app) == {"timeout_s": 50, "memory_limit_bytes": 10**9, "instances": 2}
    assert await changes(app, instances=1, timeout_s=60) == {"timeout_s": 60, "memory_limit_bytes": 10**9}
    write(
        tmp_path, "\ufefftimeout_s = 50\nmemory_limit_bytes = 1000000000\ninstances = 2\n"
    )  # Windows editors
    assert await changes(app, memory_limit_bytes=None) == {"timeout_s": 50, "instances": 2}
    command = await make_load_command(app, "m", {"max_batch_size": 3, "priority": "low"}, "Ann")
    assert (command.model_id, command.version, command.actor) == ("m", 1, "Ann")
    save(models.add(), tmp_path, "m", 10)
    for body, version in (({}, 10), ({"version": 1}, 1)):
        assert (await make_load_command(app, "m", body, "Ann")).version == version
    assert command.asked == {"max_batch_size", "priority"}
    assert (command.parameters.instances, command.parameters.max_batch_size) == (2, 3)
    write(tmp_path, 'priority = "high"\nkeep_alive_s = 600\nstrategy = "auto"\npinned = true')
    assert await changes(app) == {
        "priority": "high", "keep_alive_s": 600, "strategy": "auto", "pinned": True,
    }  # fmt: skip
    over = {"priority": "normal", "keep_alive_s": -1, "strategy": "in_place", "pinned": False}
    assert await changes(app, **over) == {"keep_alive_s": -1, "strategy": "in_place"}
    write(tmp_path, "max_batch_size = 4\nmax_queue_delay_us = 5")
    assert await changes(app, max_batch_size=0) == {}
    assert await changes(app, max_queue_delay_us=0) == {"max_batch_size": 4}
    write(tmp_path, "max_batch_size = 4")
    assert await changes(app, max_queue_delay_us=5) == {"max_batch_size": 4, "max_queue_delay_us": 5}
    write(tmp_path, "threads = 3")
    assert await changes(app) == {"threads": 3}
    assert await changes(app, threads=1024) == {"threads": 1024}
    assert await changes(app, threads=None) == {}
    write(tmp_path, 'node_attributes = ["zone=a", "gpu=none", "zone=a"]')
    assert await changes(app) == {"node_attributes": ("gpu=none", "zone=a")}
    assert await changes(app, node_attributes=["disk=fast"]) == {"node_attributes": ("disk=fast",)}
    assert await changes(app, node_attributes=[]) == await changes(app, node_attributes=None) == {}


async def test_setting_applies_where_nobody_says(tmp_path: Path) -> None:
    app = application(tmp_path, timeout_s=12, progress_timeout_s=14)
    assert await changes(app) == {"timeout_s": 12, "progress_timeout_s": 14}
    assert await changes(app, progress_timeout_s=120) == {"timeout_s": 12}
    write(tmp_path, 'timeout_s = 13\nstrategy = "in_place"\nprogress_timeout_s = 15')
    assert await changes(app) == {"timeout_s": 13, "strategy": "in_place", "progress_timeout_s": 15}
    assert await changes(application(tmp_path, threads=5)) == {}  # the setting when the load starts


@pytest.mark.parametrize(
    ("setting", "file", "named", "recorded"),
    [
        (-1, NOTHING, NOTHING, None), (-1, NOTHING, None, None), (-1, NOTHING, -1, -1), (-1, 60, NOTHING, 60),
        (-1, 60, None, None), (-1, 60, 0, 0), (300, NOTHING, NOTHING, 300), (300, 60, NOTHING, 60),
        (300, 60, None, 300), (300, -1, NOTHING, -1), (300, 60, -1, -1), (0, NOTHING, NOTHING, 0),
    ],
)  # fmt: skip
async def test_null_keep_alive_means_the_setting(
    tmp_path: Path, setting: int, file: object, named: object, recorded: int | None
) -> None:
    app = application(tmp_path, keep_alive_s=setting)
    write(tmp_path, "" if file is NOTHING else f"keep_alive_s = {file}")
    body = {} if named is NOTHING else {"keep_alive_s": named}
    command = await make_load_command(app, "m", body, "Ann")
    assert (command.parameters.keep_alive_s, command.asked) == (recorded, frozenset(body))


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
    assert (error["code"], "one scale for all rows" in error["message"]) == ("rows_depend", True)
    (folder / DEFAULTS_FILE).write_text('max_batch_size = 8\ndependent_rows = "allow"\n')
    job = await shared.load("q")
    assert job["parameters"] == RECORDED | {"max_batch_size": 8, "dependent_rows": "allow"}
    loaded = (await shared.data_of(ModelLoaded))[-1]
    assert "one scale for all rows" in (loaded.rows_depend or "")
    await shared.unload("q")


WRONG_FILES: list[tuple[str, tuple[str, ...]]] = [
    ("instnces = 2", ("instnces: Unknown field", "known are", "instances")),
    ("version = 2", ("version: Unknown field",)),
    ("instances = 65", ("instances: Must be", "1", "64")),
    ('instances = "2"', ("instances: Must be an integer",)),
    ("threads = 0", ("threads: Must be", "1", "1024")),
    ("threads = 1025", ("threads: Must be", "1", "1024")),
    ('threads = "2"', ("threads: Must be an integer",)),
    ('node_attributes = "zone=a"', ("node_attributes: Not a valid list",)),
    ('node_attributes = ["zone=a", "gpu"]', ("node_attributes", "1", "Must be like zone=a")),
    (f"node_attributes = {[f'a={number}' for number in range(17)]}", ("node_attributes: Longer than", "16")),
    ("instances = true", ("instances: Must be an integer",)),
    ("instances = 2.0", ("instances: Must be an integer",)),
    ("instances = 99999999999999999999", ("instances: Must be an integer",)),
    ("instances.of = 2", ("instances: Must be an integer",)),
    ("timeout_s = 1979-05-27", ("timeout_s: Must be an integer",)),
    ("timeout_s = 0", ("timeout_s: Must be",)),
    ("progress_timeout_s = 3601", ("progress_timeout_s: Must be", "1", "3600")),
    ("memory_limit_bytes = 5", ("memory_limit_bytes: Must be",)),
    ("max_batch_size = -1", ("max_batch_size: Must be", "65536")),
    ('priority = "urgent"', ("priority: Must be one of", "normal")),
    ('strategy = "fast"', ("strategy: Must be one of", "in_place")),
    ("keep_alive_s = -2", ("keep_alive_s: Must be", "-1")),
    ("keep_alive_s = 31536001", ("keep_alive_s: Must be", "31536000")),
    ('pinned = "true"', ("pinned: Must be true or false",)),
    ("max_queue_delay_us = 5", ("max_queue_delay_us", "max_batch_size")),
    ('dependent_rows = "yes"', ("dependent_rows: Must be one of", "refuse", "allow")),
    ("x", ("TOML",)),
]


async def test_invalid_file_is_400_and_named(shared: LocalApi) -> None:
    for content, words in WRONG_FILES:
        write(shared.config.repository, content)
        detail = await refused(shared, "invalid_defaults")
        for word in ("m/loadledger.toml", *words):
            assert word in detail, content
    write(shared.config.repository, "".join(f"k{number} = 1\n" for number in range(4_000)))
    assert len(await refused(shared, "invalid_defaults")) < 1_000


OUT_OF_RANGE: list[dict[str, Any]] = [
    {"version": "1"}, {"version": 1.5}, {"version": True}, {"version": None}, {"version": 0},
    {"version": 10**20}, {"timeout_s": 0}, {"timeout_s": 3601}, {"progress_timeout_s": 0},
    {"progress_timeout_s": None}, {"memory_limit_bytes": 1}, {"pinned": 0},
    {"pinned": None}, {"priority": "urgent"}, {"priority": None}, {"strategy": "fast"}, {"keep_alive_s": -2},
    {"keep_alive_s": 1.5}, {"keep_alive_s": 31536001}, {"max_batch_size": 65_537}, {"max_batch_size": -1},
    {"max_batch_size": 1.0}, {"max_batch_size": None}, {"max_batch_size": 1, "max_queue_delay_us": 1_000_001},
    {"max_queue_delay_us": 5}, {"max_batch_size": 0, "max_queue_delay_us": 5}, {"instances": 0},
    {"instances": 65}, {"instances": "2"}, {"threads": 0}, {"threads": 1025}, {"threads": "2"},
    {"threads": 1.0}, {"threads": True}, {"node_attributes": "zone=a"}, {"node_attributes": ["zone"]},
    {"node_attributes": [f"{'a' * 64}=b"]}, {"node_attributes": ["a=b\n"]}, {"node_attributes": [1]},
    {"verson": 1},
]  # fmt: skip


async def test_parameter_out_of_range_is_400_and_named(shared: LocalApi) -> None:
    write(shared.config.repository, "")
    for body in OUT_OF_RANGE:
        assert next(reversed(body)) in await refused(shared, "invalid_body", **body), body
