"""What a load is asked for with: the request, the model's loadledger.toml, the server; over HTTP."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from support import models
from support.http import LocalApi
from support.models import save

from events.types import LoadRequested
from server.api.parameters import requested_load
from server.validation import InvalidBody

Start = Callable[..., Awaitable[LocalApi]]


@pytest.fixture
async def model(api: LocalApi, repository: Path) -> Path:
    """A model `m`; returns its defaults file, which is not there yet."""
    assert api.position >= 0
    return save(models.add(), repository, "m").parent / "loadledger.toml"


def say(model: Path, content: str) -> None:
    """Write the model's defaults."""
    model.write_text(content)


async def asked(api: LocalApi, **body: Any) -> dict[str, Any]:
    """Load the model and return the parameters that differ from a plain load's."""
    usual = {
        "priority": "normal", "timeout_s": 300, "keep_alive_s": None, "memory_limit_bytes": None,
        "strategy": "beside", "pinned": False, "instances": 1, "max_batch_size": 0, "max_queue_delay_us": 0,
    }  # fmt: skip
    parameters: dict[str, Any] = (await api.load("m", **body))["parameters"]
    await api.unload("m")
    assert parameters.keys() == usual.keys()
    return {name: value for name, value in parameters.items() if value != usual[name]}


async def refused(api: LocalApi, status: int, code: str, **body: Any) -> str:
    head = api.position
    answer = await api.post("/api/v1/models/m/load", json=body)
    assert answer.refusal == (status, code), answer.body
    assert api.position == head
    detail: str = answer.json["detail"]
    return detail


async def test_a_file_s_defaults_apply_where_the_request_does_not_say(api: LocalApi, model: Path) -> None:
    say(model, "timeout_s = 50\nmemory_limit_bytes = 1000000000\ninstances = 2\n")
    assert await asked(api) == {"timeout_s": 50, "memory_limit_bytes": 1_000_000_000, "instances": 2}
    assert await asked(api, instances=1, timeout_s=60) == {
        "timeout_s": 60,
        "memory_limit_bytes": 1_000_000_000,
    }
    assert await asked(api, memory_limit_bytes=None) == {"timeout_s": 50, "instances": 2}


async def test_what_applies_is_in_the_ledger_and_does_not_change_with_the_file(
    api: LocalApi, model: Path
) -> None:
    say(model, "max_batch_size = 8\nmax_queue_delay_us = 70\n")
    job = await api.load("m")
    say(model, "nothing that is TOML")
    [fact] = await api.data_of(LoadRequested)
    assert (fact.max_batch_size, fact.max_queue_delay_us) == (8, 70)
    assert (await api.job(job["id"]))["parameters"]["max_batch_size"] == 8


async def test_a_changed_file_changes_nothing_about_what_is_loaded(api: LocalApi, model: Path) -> None:
    job = await api.load("m")
    say(model, "timeout_s = 77")
    answer = await api.post("/api/v1/models/m/load")
    assert (answer.status, answer.json["id"]) == (200, job["id"])


async def test_the_server_s_setting_applies_where_nobody_says(start: Start, repository: Path) -> None:
    model = save(models.add(), repository, "m").parent / "loadledger.toml"
    api = await start(timeout_s=12)
    assert (await asked(api))["timeout_s"] == 12
    say(model, "timeout_s = 13")
    assert (await asked(api))["timeout_s"] == 13


WRONG_FILES: list[tuple[str, tuple[str, ...]]] = [
    ("instnces = 2", ("instnces: Unknown field", "known are", "instances")),
    ("version = 2", ("version: Unknown field",)),
    ("instances = 65", ("instances: Must be", "1", "64")),
    ('instances = "2"', ("instances: Must be an integer",)),
    ("instances = true", ("instances: Must be an integer",)),
    ("instances = 2.0", ("instances: Must be an integer",)),
    ("instances = 99999999999999999999", ("instances: Must be an integer",)),
    ("instances = [2]", ("instances: Must be an integer",)),
    ("instances.of = 2", ("instances: Must be an integer",)),
    ("timeout_s = 1979-05-27", ("timeout_s: Must be an integer",)),
    ("timeout_s = 0", ("timeout_s: Must be",)),
    ("memory_limit_bytes = 5", ("memory_limit_bytes: Must be",)),
    ("max_batch_size = -1", ("max_batch_size: Must be", "65536")),
    ('priority = "urgent"', ("priority: Must be one of", "normal")),
    ('strategy = "fast"', ("strategy: Must be one of", "in_place")),
    ("keep_alive_s = -2", ("keep_alive_s: Must be", "-1")),
    ("keep_alive_s = 0.5", ("keep_alive_s: Must be an integer",)),
    ("keep_alive_s = 31536001", ("keep_alive_s: Must be", "31536000")),
    ('pinned = "true"', ("pinned: Must be true or false",)),
    ("max_queue_delay_us = 5", ("max_queue_delay_us", "max_batch_size")),
    ("x", ("is no TOML",)),
]


async def test_a_file_that_is_not_what_it_has_to_be_is_refused_by_name(
    api: LocalApi, model: Path, subtests: pytest.Subtests
) -> None:
    for content, words in WRONG_FILES:
        with subtests.test(content):
            say(model, content)
            detail = await refused(api, 400, "invalid_defaults")
            for word in ("m/loadledger.toml", *words):
                assert word in detail


async def test_a_file_with_very_many_wrong_keys_is_refused_shortly(api: LocalApi, model: Path) -> None:
    say(model, "".join(f"k{number} = 1\n" for number in range(4_000)))
    assert len(await refused(api, 400, "invalid_defaults")) < 1_000


async def test_a_broken_file_does_not_keep_a_model_from_its_unload(api: LocalApi, model: Path) -> None:
    await api.load("m")
    say(model, "x")
    await api.unload("m")


# Order, stay and swap


async def test_what_a_file_says_of_order_stay_and_swap_is_recorded(api: LocalApi, model: Path) -> None:
    say(model, 'priority = "high"\nkeep_alive_s = 600\nstrategy = "auto"\npinned = true')
    assert await asked(api) == {"priority": "high", "keep_alive_s": 600, "strategy": "auto", "pinned": True}
    over = {"priority": "normal", "keep_alive_s": -1, "strategy": "in_place", "pinned": False}
    assert await asked(api, **over) == {"keep_alive_s": -1, "strategy": "in_place"}
    [fact, *_] = await api.data_of(LoadRequested)
    assert (fact.priority, fact.keep_alive_s, fact.strategy, fact.pinned) == ("high", 600, "auto", True)


@pytest.mark.parametrize("priority", ["high", "normal", "low"])
@pytest.mark.usefixtures("model")
async def test_every_priority_may_be_asked_for(api: LocalApi, priority: str) -> None:
    command = await requested_load(api.app, "m", {"priority": priority}, "Ann")
    assert (command.parameters.priority, command.asked) == (priority, frozenset({"priority"}))


async def test_the_server_s_strategy_applies_where_nobody_says(start: Start, repository: Path) -> None:
    model = save(models.add(), repository, "m").parent / "loadledger.toml"
    api = await start(strategy="auto")
    assert await asked(api) == {"strategy": "auto"}
    say(model, 'strategy = "in_place"')
    assert await asked(api) == {"strategy": "in_place"}
    assert await asked(api, strategy="beside") == {}


NOTHING = "nothing"


KEEP_ALIVES: dict[int, list[tuple[object, object, int | None]]] = {
    -1: [
        (NOTHING, NOTHING, None),
        (NOTHING, None, None),
        (NOTHING, -1, -1),
        (60, NOTHING, 60),
        (60, None, None),
        (60, 0, 0),
    ],
    300: [(NOTHING, NOTHING, 300), (60, NOTHING, 60), (60, None, 300), (-1, NOTHING, -1), (60, -1, -1)],
    0: [(NOTHING, NOTHING, 0)],
}
"""By the server's setting: what the file says, what the request says, and what is recorded."""


@pytest.mark.parametrize("setting", KEEP_ALIVES)
async def test_a_keep_alive_is_the_request_s_the_file_s_or_the_server_s_and_null_is_the_server_s(
    start: Start, repository: Path, subtests: pytest.Subtests, setting: int
) -> None:
    model = save(models.add(), repository, "m").parent / "loadledger.toml"
    api = await start(keep_alive_s=setting)
    for file, request, recorded in KEEP_ALIVES[setting]:
        with subtests.test(f"{file} {request}"):
            say(model, "" if file is NOTHING else f"keep_alive_s = {file}")
            body = {} if request is NOTHING else {"keep_alive_s": request}
            command = await requested_load(api.app, "m", body, "Ann")
            assert command.parameters.keep_alive_s == recorded
            assert command.asked == body.keys()


# Batching


async def test_a_delay_is_taken_with_a_batch_size_only(api: LocalApi, model: Path) -> None:
    detail = await refused(api, 400, "invalid_body", max_queue_delay_us=5)
    assert "max_queue_delay_us" in detail
    assert "max_batch_size" in detail
    await refused(api, 400, "invalid_body", max_queue_delay_us=5, max_batch_size=0)
    say(model, "max_batch_size = 4")
    assert await asked(api, max_queue_delay_us=5) == {"max_batch_size": 4, "max_queue_delay_us": 5}


async def test_who_turns_batching_off_turns_its_delay_off(api: LocalApi, model: Path) -> None:
    say(model, "max_batch_size = 4\nmax_queue_delay_us = 5")
    assert await asked(api, max_batch_size=0) == {}
    assert await asked(api, max_queue_delay_us=0) == {"max_batch_size": 4}


OUT_OF_RANGE: list[dict[str, Any]] = [
    {"max_batch_size": 65_537}, {"max_batch_size": -1}, {"max_batch_size": 1.0},
    {"max_batch_size": 1, "max_queue_delay_us": 1_000_001}, {"max_batch_size": None},
    {"instances": 0}, {"instances": 65}, {"instances": "2"},
]  # fmt: skip


@pytest.mark.usefixtures("model")
async def test_a_parameter_out_of_its_range_is_400(api: LocalApi, subtests: pytest.Subtests) -> None:
    for body in OUT_OF_RANGE:
        with subtests.test(str(body)):
            assert next(reversed(body)) in await refused(api, 400, "invalid_body", **body)


# What other routes call


async def test_a_load_is_checked_whoever_asks(api: LocalApi, model: Path) -> None:
    say(model, "instances = 2")
    command = await requested_load(api.app, "m", {"max_batch_size": 3}, "Ann")
    assert (command.model_id, command.version, command.actor) == ("m", 1, "Ann")
    assert (command.parameters.instances, command.parameters.max_batch_size) == (2, 3)
    with pytest.raises(InvalidBody, match="body: nonsense: Unknown field"):
        await requested_load(api.app, "m", {"nonsense": 3}, "Ann")
