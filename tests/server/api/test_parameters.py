"""Parameters of a load: from the request, the model's loadledger.toml or the server's settings."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from support import models
from support.http import LocalApi
from support.models import save

from events.types import LoadRequested
from server.api.models import make_load_command

Start = Callable[..., Awaitable[LocalApi]]

USUAL: dict[str, Any] = {
    "priority": "normal", "timeout_s": 300, "keep_alive_s": None, "memory_limit_bytes": None,
    "strategy": "beside", "pinned": False, "instances": 1, "max_batch_size": 0, "max_queue_delay_us": 0,
}  # fmt: skip
NOTHING = "nothing"


@pytest.fixture
async def defaults(api: LocalApi, repository: Path) -> Path:
    """The defaults file of a model `m`, which is not there yet."""
    assert api.position >= 0
    return save(models.add(), repository, "m").parent / "loadledger.toml"


def write(defaults: Path, content: str) -> None:
    defaults.write_text(content)


async def changes(api: LocalApi, **body: Any) -> dict[str, Any]:
    """Return the parameters that a load is requested with and that differ from a plain load's."""
    parameters = (await make_load_command(api.app, "m", body, "Ann")).parameters
    return {name: getattr(parameters, name) for name in USUAL if getattr(parameters, name) != USUAL[name]}


async def refused(api: LocalApi, code: str, **body: Any) -> str:
    head = api.position
    answer = await api.post("/api/v1/models/m/load", json=body)
    assert answer.refusal == (400, code), answer.body
    assert api.position == head
    detail: str = answer.json["detail"]
    return detail


async def test_file_applies_where_request_says_nothing(api: LocalApi, defaults: Path) -> None:
    write(defaults, "timeout_s = 50\nmemory_limit_bytes = 1000000000\ninstances = 2\n")
    assert await changes(api) == {"timeout_s": 50, "memory_limit_bytes": 10**9, "instances": 2}
    assert await changes(api, instances=1, timeout_s=60) == {"timeout_s": 60, "memory_limit_bytes": 10**9}
    assert await changes(api, memory_limit_bytes=None) == {"timeout_s": 50, "instances": 2}
    write(defaults, 'priority = "high"\nkeep_alive_s = 600\nstrategy = "auto"\npinned = true')
    assert await changes(api) == {
        "priority": "high", "keep_alive_s": 600, "strategy": "auto", "pinned": True,
    }  # fmt: skip
    over = {"priority": "normal", "keep_alive_s": -1, "strategy": "in_place", "pinned": False}
    assert await changes(api, **over) == {"keep_alive_s": -1, "strategy": "in_place"}
    write(defaults, "max_batch_size = 4\nmax_queue_delay_us = 5")
    assert await changes(api, max_batch_size=0) == {}
    assert await changes(api, max_queue_delay_us=0) == {"max_batch_size": 4}


async def test_parameters_are_recorded_and_outlast_the_file(api: LocalApi, defaults: Path) -> None:
    write(defaults, "max_batch_size = 8\nmax_queue_delay_us = 70\n")
    job = await api.load("m")
    [requested] = await api.data_of(LoadRequested)
    assert (requested.max_batch_size, requested.max_queue_delay_us) == (8, 70)
    assert job["parameters"] == USUAL | {"max_batch_size": 8, "max_queue_delay_us": 70}
    write(defaults, "timeout_s = 77")
    assert (await api.load("m"))["id"] == job["id"]
    write(defaults, "x")
    assert await api.job(job["id"]) == job
    await api.unload("m")


async def test_setting_applies_where_nobody_says(start: Start, repository: Path) -> None:
    defaults = save(models.add(), repository, "m").parent / "loadledger.toml"
    api = await start(timeout_s=12, strategy="auto")
    assert await changes(api) == {"timeout_s": 12, "strategy": "auto"}
    assert await changes(api, strategy="beside") == {"timeout_s": 12}
    write(defaults, 'timeout_s = 13\nstrategy = "in_place"')
    assert await changes(api) == {"timeout_s": 13, "strategy": "in_place"}


@pytest.mark.parametrize(
    ("setting", "cases"),
    [
        (
            -1,
            [(NOTHING, NOTHING, None), (NOTHING, None, None), (NOTHING, -1, -1), (60, NOTHING, 60),
             (60, None, None), (60, 0, 0)],
        ),
        (300, [(NOTHING, NOTHING, 300), (60, NOTHING, 60), (60, None, 300), (-1, NOTHING, -1), (60, -1, -1)]),
        (0, [(NOTHING, NOTHING, 0)]),
    ],
)  # fmt: skip
async def test_null_keep_alive_means_the_setting(
    start: Start, repository: Path, setting: int, cases: list[tuple[object, object, int | None]]
) -> None:
    defaults = save(models.add(), repository, "m").parent / "loadledger.toml"
    api = await start(keep_alive_s=setting)
    for file, request, recorded in cases:
        write(defaults, "" if file is NOTHING else f"keep_alive_s = {file}")
        body = {} if request is NOTHING else {"keep_alive_s": request}
        command = await make_load_command(api.app, "m", body, "Ann")
        assert command.parameters.keep_alive_s == recorded, (file, request)
        assert command.asked == body.keys()


async def test_named_parameters_are_recorded_as_requested(api: LocalApi, defaults: Path) -> None:
    write(defaults, "instances = 2")
    command = await make_load_command(api.app, "m", {"max_batch_size": 3, "priority": "low"}, "Ann")
    assert (command.model_id, command.version, command.actor) == ("m", 1, "Ann")
    assert command.asked == {"max_batch_size", "priority"}
    assert (command.parameters.instances, command.parameters.max_batch_size) == (2, 3)


WRONG_FILES: list[tuple[str, tuple[str, ...]]] = [
    ("instnces = 2", ("instnces: Unknown field", "known are", "instances")),
    ("version = 2", ("version: Unknown field",)),
    ("instances = 65", ("instances: Must be", "1", "64")),
    ('instances = "2"', ("instances: Must be an integer",)),
    ("instances = true", ("instances: Must be an integer",)),
    ("instances = 2.0", ("instances: Must be an integer",)),
    ("instances = 99999999999999999999", ("instances: Must be an integer",)),
    ("instances.of = 2", ("instances: Must be an integer",)),
    ("timeout_s = 1979-05-27", ("timeout_s: Must be an integer",)),
    ("timeout_s = 0", ("timeout_s: Must be",)),
    ("memory_limit_bytes = 5", ("memory_limit_bytes: Must be",)),
    ("max_batch_size = -1", ("max_batch_size: Must be", "65536")),
    ('priority = "urgent"', ("priority: Must be one of", "normal")),
    ('strategy = "fast"', ("strategy: Must be one of", "in_place")),
    ("keep_alive_s = -2", ("keep_alive_s: Must be", "-1")),
    ("keep_alive_s = 31536001", ("keep_alive_s: Must be", "31536000")),
    ('pinned = "true"', ("pinned: Must be true or false",)),
    ("max_queue_delay_us = 5", ("max_queue_delay_us", "max_batch_size")),
    ("x", ("TOML",)),
]


async def test_invalid_file_is_400_and_named(api: LocalApi, defaults: Path) -> None:
    for content, words in WRONG_FILES:
        write(defaults, content)
        detail = await refused(api, "invalid_defaults")
        for word in ("m/loadledger.toml", *words):
            assert word in detail, content
    write(defaults, "".join(f"k{number} = 1\n" for number in range(4_000)))
    assert len(await refused(api, "invalid_defaults")) < 1_000


OUT_OF_RANGE: list[dict[str, Any]] = [
    {"version": "1"}, {"version": 1.5}, {"version": True}, {"version": None}, {"version": 0},
    {"version": 10**20}, {"timeout_s": 0}, {"timeout_s": 3601}, {"memory_limit_bytes": 1}, {"pinned": 0},
    {"pinned": None}, {"priority": "urgent"}, {"priority": None}, {"strategy": "fast"}, {"keep_alive_s": -2},
    {"keep_alive_s": 1.5}, {"keep_alive_s": 31536001}, {"max_batch_size": 65_537}, {"max_batch_size": -1},
    {"max_batch_size": 1.0}, {"max_batch_size": None}, {"max_batch_size": 1, "max_queue_delay_us": 1_000_001},
    {"max_queue_delay_us": 5}, {"max_batch_size": 0, "max_queue_delay_us": 5}, {"instances": 0},
    {"instances": 65}, {"instances": "2"}, {"verson": 1},
]  # fmt: skip


@pytest.mark.usefixtures("defaults")
async def test_parameter_out_of_range_is_400_and_named(api: LocalApi) -> None:
    for body in OUT_OF_RANGE:
        assert next(reversed(body)) in await refused(api, "invalid_body", **body), body


async def test_delay_is_taken_with_batch_size_of_file(api: LocalApi, defaults: Path) -> None:
    write(defaults, "max_batch_size = 4")
    assert await changes(api, max_queue_delay_us=5) == {"max_batch_size": 4, "max_queue_delay_us": 5}
