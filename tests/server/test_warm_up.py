"""The inference before a model is loaded, over HTTP: its setting, its failure, what is refused at once."""

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from support import models
from support.http import LocalApi
from support.models import save

from events.types import ModelLoaded

Start = Callable[..., Awaitable[LocalApi]]


def say(repository: Path, content: str) -> None:
    """Write what the model `m` says of its loads."""
    (repository / "m" / "loadledger.toml").write_text(content)


@pytest.mark.parametrize(
    ("setting", "is_run"), [({}, True), ({"warm_up": "on"}, True), ({"warm_up": "off"}, False)]
)
async def test_the_setting_says_whether_models_are_run_before_they_are_loaded(
    start: Start, repository: Path, setting: dict[str, str], *, is_run: bool
) -> None:
    save(models.add(), repository, "m")
    api = await start(**setting)
    await api.load("m")
    [loaded] = await api.data_of(ModelLoaded)
    assert (loaded.durations.warming_up_us is not None) is is_run


async def test_a_model_that_fails_its_warm_up_is_a_400_and_a_failed_job_that_says_what_to_do(
    api: LocalApi, repository: Path
) -> None:
    save(models.divide(), repository, "m")
    answer = await api.post("/v2/repository/models/m/load")
    assert answer.refusal == (400, "warm_up_failed")
    assert "[[warm_up.inputs]]" in answer.json["error"]
    [job] = await api.jobs()
    assert (job["status"], job["error"]["code"]) == ("failed", "warm_up_failed")
    assert "Integer division by zero" in job["error"]["message"]
    say(repository, "warm_up.enabled = false")
    await api.load("m")


async def test_a_warm_up_that_is_none_is_refused_before_anything_is_recorded(
    api: LocalApi, repository: Path
) -> None:
    save(models.add(), repository, "m")
    say(repository, "warm_up.enabled = 1")
    for path in ("/api/v1/models/m/load", "/v2/repository/models/m/load"):
        answer = await api.post(path)
        assert answer.refusal == (400, "invalid_defaults")
        assert "m/loadledger.toml: warm_up.enabled: Expected `bool`" in answer.json["detail"]
    assert await api.events("m") == []
