"""`Idempotency-Key`: a repeated request is answered with the job of the first."""

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from marshmallow import ValidationError
from support import models
from support.history import PLAIN
from support.http import LIMIT_S, Answer, LocalApi
from support.models import save

from events.types import CancelRequested, LoadRequested, UnloadRequested
from server.api.jobs import MAX_KEY_CHARACTERS, IdempotencySchema, unquote_key

Start = Callable[..., Awaitable[LocalApi]]

KEY = '"8e03978e-40d5-43dd-bc93-6894a57f9324"'
MISMATCH = (422, "idempotency_mismatch")
PRINTABLE = st.characters(min_codepoint=0x20, max_codepoint=0x7E)


def read(field: str) -> str:
    """Return the key in a header field, which must be valid."""
    loaded = IdempotencySchema().load({"Idempotency-Key": field})
    return unquote_key(loaded["idempotency_key"])


async def send(
    api: LocalApi, path: str, key: str = KEY, body: bytes = b"", *, wait: int = 60, subject: str = "alice"
) -> Answer:
    """Send a request of the management API with a key, and wait for its job's end."""
    headers = {"Idempotency-Key": key, **({"Content-Type": "application/json"} if body else {})}
    return await api.post(f"/api/v1/{path}", headers=headers, data=body, wait=wait, subject=subject)


def job_of(answer: Answer) -> str:
    assert answer.status == 200, answer.body
    assert answer.headers["Location"] == f"/api/v1/jobs/{answer.json['id']}"
    job_id: str = answer.json["id"]
    return job_id


@pytest.fixture
async def model(api: LocalApi, repository: Path) -> Path:
    """A model `m` of one version; returns its folder."""
    assert api.position >= 0
    return save(models.add(1), repository, "m").parent


# The header field


@PLAIN
@given(st.text(PRINTABLE, min_size=1, max_size=MAX_KEY_CHARACTERS))
def test_quoted_key_may_hold_any_printable_text(key: str) -> None:
    escaped = key.replace("\\", "\\\\").replace('"', '\\"')
    assert read(f'"{escaped}"') == key


@pytest.mark.parametrize("key", ["a", "8e03978e-40d5", "user:1/load#2", "abc+/==", "x" * MAX_KEY_CHARACTERS])
def test_key_is_the_same_without_quotes(key: str) -> None:
    assert read(key) == read(f'"{key}"') == key


@pytest.mark.parametrize(
    "field",
    [
        "", " ", '""', '"', '"a', 'a"', '"a""b"', '"a"b', 'a"b', "a b", "a, b", "a,b", "a;b", '"a", "b"',
        '"a"; x=1', '"a\\b"', '"a\\"', "a\\b", "\u00e9", '"\u00e9"', '"\t"', '"\x7f"', '"a"\n', "a\n",
        "x" * (MAX_KEY_CHARACTERS + 1), f'"{"x" * (MAX_KEY_CHARACTERS + 1)}"', "(a)\x00",
    ],
)  # fmt: skip
def test_malformed_key_is_refused(field: str) -> None:
    with pytest.raises(ValidationError, match="double quotes"):
        read(field)


@pytest.mark.usefixtures("model")
async def test_malformed_key_is_400_on_each_route(api: LocalApi) -> None:
    head = api.position
    for path in ("models/m/load", "models/m/unload", "models/unload", "jobs/j/cancel"):
        answer = await send(api, path, '"a", "b"')
        assert answer.refusal == (400, "invalid_parameter")
        assert "Idempotency-Key" in answer.json["detail"]
    bearer = ("Authorization", f"Bearer {api.token('admin')}")
    twice = [bearer, ("Idempotency-Key", "a"), ("Idempotency-Key", "a")]
    assert (await api.client.post("/api/v1/models/m/load", headers=twice)).status == 400
    assert api.position == head


# The same request again


async def test_repeated_load_returns_first_job_whatever_changed(
    api: LocalApi, repository: Path, model: Path
) -> None:
    first = job_of(await send(api, "models/m/load"))
    await api.unload("m")
    save(models.add(2), repository, "m", 2)
    (model / "loadledger.toml").write_text("instances = 2")
    head = api.position
    again = await send(api, "models/m/load", wait=0)
    assert (job_of(again), again.json["status"]) == (first, "completed")
    assert api.position == head
    assert (await api.model("m"))["state"] == "unloaded"
    shutil.rmtree(model)
    assert (await send(api, "models/m/load")).refusal == (404, "unknown_model")


@pytest.mark.usefixtures("model")
async def test_simultaneous_loads_with_one_key_are_one_job(api: LocalApi) -> None:
    answers = await asyncio.gather(*(send(api, "models/m/load") for _ in range(5)))
    assert len({job_of(answer) for answer in answers}) == 1
    assert len(await api.data_of(LoadRequested)) == 1


@pytest.mark.usefixtures("model")
async def test_repeated_unload_leaves_later_load_alone(api: LocalApi) -> None:
    for path in ("models/m/unload", "models/unload", "models/m/unload?force=true"):
        await api.load("m")
        first = job_of(await send(api, path, f'"{path}"'))
        await api.load("m")
        assert job_of(await send(api, path, f'"{path}"')) == first
        assert (await api.model("m"))["state"] == "loaded"


@pytest.mark.usefixtures("model")
async def test_fingerprint_ignores_form_and_heeds_content(api: LocalApi) -> None:
    body = b'{"timeout_s": 50, "priority": "high"}'
    load = job_of(await send(api, "models/m/load", body=body))
    same = b'{ "priority" : "high",\n"timeout_s":50}'
    assert job_of(await send(api, "models/m/load", KEY.strip('"'), same)) == load
    for other in (b"", b"{}", b'{"timeout_s": 50}', b'{"timeout_s": 50, "priority": "normal"}'):
        assert (await send(api, "models/m/load", body=other)).refusal == MISMATCH
    unload = job_of(await send(api, "models/m/unload", '"u"'))
    for other, query in ((b" {} ", ""), (b"", "?force=false")):
        assert job_of(await send(api, f"models/m/unload{query}", '"u"', other)) == unload


@pytest.mark.usefixtures("model")
async def test_key_of_another_request_is_422(api: LocalApi, repository: Path) -> None:
    save(models.identity(), repository, "other")
    job_id = job_of(await send(api, "models/m/load", subject="Ann"))
    head = api.position
    for path in (
        "models/other/load", "models/m/unload", "models/m/unload?force=true", "models/unload",
        f"jobs/{job_id}/cancel",
    ):  # fmt: skip
        assert (await send(api, path, subject="Ann")).refusal == MISMATCH, path
    assert api.position == head
    job = (await send(api, "models/other/load", subject="Bob")).json
    assert (job["model_id"], job["requested_by"], job["status"]) == ("other", "Bob", "completed")


@pytest.mark.usefixtures("model")
async def test_refused_or_idle_request_does_not_use_key(api: LocalApi) -> None:
    assert (await send(api, "models/m/unload")).refusal == (409, "not_loaded")
    assert (await send(api, "models/m/load", body=b'{"version": 2}')).refusal == (404, "unknown_version")
    assert (await send(api, "models/m/load", body=b'{"version": 0}')).refusal == (400, "invalid_body")
    first = (await api.load("m"))["id"]
    assert job_of(await send(api, "models/m/load")) == first
    assert (await send(api, "models/m/unload")).json["kind"] == "unload"


# The ledger


@pytest.mark.usefixtures("model")
async def test_ledger_keeps_key_hash_across_restart(api: LocalApi, start: Start) -> None:
    load = (await send(api, "models/m/load", '"secret one"')).json
    unload = (await send(api, "models/m/unload", '"secret two"')).json
    requested: list[LoadRequested | UnloadRequested] = await api.data_of(LoadRequested)
    requested += await api.data_of(UnloadRequested)
    keys = [each.idempotency for each in requested if each.idempotency is not None]
    assert len({text for key in keys for text in (key.key_hash, key.fingerprint)}) == 4
    assert "secret" not in repr(await api.events())
    assert not any("idempotency" in job or "idempotency" in job["parameters"] for job in (load, unload))
    async with asyncio.timeout(LIMIT_S):
        await api.client.server.close()
    again = await start()
    assert job_of(await send(again, "models/m/load", '"secret one"')) == load["id"]
    assert (await send(again, "models/m/unload", '"secret one"')).refusal == MISMATCH


async def test_repeated_cancel_returns_the_cancelled_job(start: Start, repository: Path) -> None:
    api = await start(loads_at_once=1)
    save(models.add(1), repository, "m")
    save(models.slow_model(depth=2000), repository, "slow")
    await api.accepted_load("slow")
    job = await api.accepted_load("m")
    path = f"jobs/{job['id']}/cancel"
    cancelled = await send(api, path)
    assert (job_of(cancelled), cancelled.json["status"]) == (job["id"], "cancelled")
    assert (await send(api, path, '"another"')).refusal == (409, "already_finished")
    assert (await send(api, path)).json == cancelled.json
    assert len(await api.data_of(CancelRequested)) == 1


@pytest.mark.usefixtures("model")
async def test_key_is_ignored_under_v2(api: LocalApi) -> None:
    for field in (KEY, KEY, '"malformed'):
        for verb in ("load", "unload"):
            path = f"/v2/repository/models/m/{verb}"
            assert (await api.post(path, headers={"Idempotency-Key": field}, data=b"")).status == 200
    assert len(await api.data_of(LoadRequested)) == 3
