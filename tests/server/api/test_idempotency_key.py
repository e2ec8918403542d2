"""`Idempotency-Key`: a request that is sent again is answered with its job, over HTTP."""

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from marshmallow import ValidationError
from support import models
from support.events import PLAIN
from support.http import LIMIT_S, Answer, LocalApi
from support.models import save

from events.types import CancelRequested, LoadRequested, UnloadRequested
from server.api.jobs import MAX_KEY_CHARACTERS, IdempotencySchema, key_in

Start = Callable[..., Awaitable[LocalApi]]

KEY = '"8e03978e-40d5-43dd-bc93-6894a57f9324"'
JSON = {"Content-Type": "application/json"}
PRINTABLE = st.characters(min_codepoint=0x20, max_codepoint=0x7E)


def read(field: str) -> str:
    """Return the key in a header field, which must have the right form."""
    loaded = IdempotencySchema().load({"Idempotency-Key": field})
    return key_in(loaded["idempotency_key"])


async def send(
    api: LocalApi, path: str, key: str = KEY, body: bytes = b"", *, wait: int = 60, subject: str = "alice"
) -> Answer:
    """Send a request of the management API with a key, and wait for its job's end."""
    headers = {"Idempotency-Key": key, **(JSON if body else {})}
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


# The field


@PLAIN
@given(st.text(PRINTABLE, min_size=1, max_size=MAX_KEY_CHARACTERS))
def test_any_printable_text_is_a_key_when_it_is_quoted(key: str) -> None:
    escaped = key.replace("\\", "\\\\").replace('"', '\\"')
    assert read(f'"{escaped}"') == key


@pytest.mark.parametrize("key", ["a", "8e03978e-40d5", "user:1/load#2", "abc+/==", "x" * MAX_KEY_CHARACTERS])
def test_a_key_is_the_same_without_quotes(key: str) -> None:
    assert read(key) == read(f'"{key}"') == key


@pytest.mark.parametrize(
    "field",
    [
        "", " ", '""', '"', '"a', 'a"', '"a""b"', '"a"b', 'a"b', "a b", "a, b", "a,b", "a;b", '"a", "b"',
        '"a"; x=1', '"a\\b"', '"a\\"', "a\\b", "\u00e9", '"\u00e9"', '"\t"', '"\x7f"', '"a"\n', "a\n",
        "x" * (MAX_KEY_CHARACTERS + 1), f'"{"x" * (MAX_KEY_CHARACTERS + 1)}"', "(a)\x00",
    ],
)  # fmt: skip
def test_what_is_no_one_string_is_refused(field: str) -> None:
    with pytest.raises(ValidationError, match="double quotes"):
        read(field)


@pytest.mark.parametrize("path", ["models/m/load", "models/m/unload", "models/unload", "jobs/j/cancel"])
@pytest.mark.usefixtures("model")
async def test_a_malformed_key_is_400_and_appends_nothing(api: LocalApi, path: str) -> None:
    head = api.position
    for field in ('""', '"a', '"a", "b"', "x" * 256):
        answer = await send(api, path, field)
        assert answer.refusal == (400, "invalid_parameter")
        assert "Idempotency-Key" in answer.json["detail"]
    assert api.position == head


@pytest.mark.usefixtures("model")
async def test_two_keys_are_none(api: LocalApi) -> None:
    token = api.token("admin")
    answer = await api.client.post(
        "/api/v1/models/m/load",
        headers=[("Authorization", f"Bearer {token}"), ("Idempotency-Key", "a"), ("Idempotency-Key", "a")],
    )
    assert (answer.status, (await answer.json())["code"]) == (400, "invalid_parameter")


# The same request again


@pytest.mark.usefixtures("model")
async def test_a_load_that_is_sent_again_is_answered_with_its_job_whatever_came_after(api: LocalApi) -> None:
    first = job_of(await send(api, "models/m/load"))
    await api.unload("m")
    head = api.position
    again = await send(api, "models/m/load", wait=0)
    assert (job_of(again), again.json["status"]) == (first, "completed")
    assert api.position == head
    assert (await api.model("m"))["state"] == "unloaded"


async def test_a_load_that_is_sent_again_is_not_one_of_a_newer_version(
    api: LocalApi, repository: Path, model: Path
) -> None:
    first = job_of(await send(api, "models/m/load"))
    save(models.add(2), repository, "m", 2)
    (model / "loadledger.toml").write_text("instances = 2")
    assert job_of(await send(api, "models/m/load")) == first
    assert (await api.load("m"))["version"] == 2


async def test_a_load_of_what_is_gone_is_404_with_any_key(api: LocalApi, model: Path) -> None:
    job_of(await send(api, "models/m/load"))
    shutil.rmtree(model)
    assert (await send(api, "models/m/load")).refusal == (404, "unknown_model")


@pytest.mark.usefixtures("model")
async def test_who_sends_a_load_again_while_it_waits_gets_it_as_it_is(api: LocalApi) -> None:
    answers = await asyncio.gather(*(send(api, "models/m/load") for _ in range(5)))
    assert len({job_of(answer) for answer in answers}) == 1
    assert len(await api.data_of(LoadRequested)) == 1


@pytest.mark.usefixtures("model")
async def test_an_unload_that_is_sent_again_does_not_end_what_was_loaded_since(api: LocalApi) -> None:
    for path in ("models/m/unload", "models/unload", "models/m/unload?force=true"):
        await api.load("m")
        first = job_of(await send(api, path, f'"{path}"'))
        await api.load("m")
        assert job_of(await send(api, path, f'"{path}"')) == first
        assert (await api.model("m"))["state"] == "loaded"


@pytest.mark.usefixtures("model")
async def test_the_form_of_a_request_does_not_matter_but_what_it_says(api: LocalApi) -> None:
    first = job_of(await send(api, "models/m/load", body=b'{"timeout_s": 50, "priority": "high"}'))
    same = b'{ "priority" : "high",\n"timeout_s":50}'
    assert job_of(await send(api, "models/m/load", KEY.strip('"'), same)) == first
    for body in (b"", b"{}", b'{"timeout_s": 50}', b'{"timeout_s": 50, "priority": "normal"}'):
        answer = await send(api, "models/m/load", body=body)
        assert answer.refusal == (422, "idempotency_mismatch")


@pytest.mark.usefixtures("model")
async def test_no_body_and_an_empty_object_are_the_same_request(api: LocalApi) -> None:
    first = job_of(await send(api, "models/m/load"))
    await api.unload("m")
    assert job_of(await send(api, "models/m/load", body=b" {} ")) == first
    await api.load("m")
    first = job_of(await send(api, "models/m/unload", '"u"'))
    for body, query in ((b"{}", ""), (b"", "?force=false")):
        assert job_of(await send(api, f"models/m/unload{query}", '"u"', body)) == first


@pytest.mark.usefixtures("model")
async def test_another_request_with_the_key_is_422_and_appends_nothing(
    api: LocalApi, repository: Path
) -> None:
    save(models.identity(), repository, "other")
    job_id = job_of(await send(api, "models/m/load"))
    head = api.position
    for path in (
        "models/other/load", "models/m/unload", "models/m/unload?force=true", "models/unload",
        f"jobs/{job_id}/cancel",
    ):  # fmt: skip
        assert (await send(api, path)).refusal == (422, "idempotency_mismatch"), path
    assert api.position == head


@pytest.mark.usefixtures("model")
async def test_a_key_is_its_subject_s_own(api: LocalApi, repository: Path) -> None:
    save(models.identity(), repository, "other")
    job_of(await send(api, "models/m/load", subject="Ann"))
    job = (await send(api, "models/other/load", subject="Bob")).json
    assert (job["model_id"], job["requested_by"], job["status"]) == ("other", "Bob", "completed")


# What does not use a key up


@pytest.mark.usefixtures("model")
async def test_a_refused_request_does_not_use_its_key_up(api: LocalApi) -> None:
    assert (await send(api, "models/m/unload")).refusal == (409, "not_loaded")
    assert (await send(api, "models/m/load", body=b'{"version": 2}')).refusal == (404, "unknown_version")
    assert (await send(api, "models/m/load", body=b'{"version": 0}')).refusal == (400, "invalid_body")
    assert (await send(api, "models/m/load")).json["status"] == "completed"


@pytest.mark.usefixtures("model")
async def test_a_request_that_changes_nothing_does_not_use_its_key_up(api: LocalApi) -> None:
    first = (await api.load("m"))["id"]
    assert job_of(await send(api, "models/m/load")) == first
    assert (await send(api, "models/m/unload")).json["kind"] == "unload"


# The ledger


@pytest.mark.usefixtures("model")
async def test_the_ledger_has_the_key_s_hash_and_the_job_shows_neither(api: LocalApi) -> None:
    jobs = [
        (await send(api, "models/m/load", '"secret one"')).json,
        (await send(api, "models/m/unload", '"secret two"')).json,
    ]
    [load], [unload] = await api.data_of(LoadRequested), await api.data_of(UnloadRequested)
    assert load.idempotency is not None
    assert unload.idempotency is not None
    assert load.idempotency.key_hash != unload.idempotency.key_hash
    assert load.idempotency.fingerprint != unload.idempotency.fingerprint
    assert "secret" not in repr(await api.events())
    assert not any("idempotency" in job or "idempotency" in job["parameters"] for job in jobs)


@pytest.mark.usefixtures("model")
async def test_a_key_is_known_after_a_start_of_the_server(api: LocalApi, start: Start) -> None:
    first = job_of(await send(api, "models/m/load"))
    async with asyncio.timeout(LIMIT_S):
        await api.client.server.close()
    again = await start()
    assert job_of(await send(again, "models/m/load")) == first
    assert (await send(again, "models/m/unload")).refusal == (422, "idempotency_mismatch")


# Other routes


@pytest.mark.usefixtures("model")
async def test_a_cancel_that_is_sent_again_is_answered_with_the_job_that_it_ended(
    start: Start, api: LocalApi, repository: Path
) -> None:
    await api.client.server.close()
    api = await start(loads_at_once=1)
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
async def test_under_v2_the_field_is_ignored_whatever_it_says(api: LocalApi) -> None:
    for field in (KEY, KEY, '"malformed'):
        for verb in ("load", "unload"):
            answer = await api.post(
                f"/v2/repository/models/m/{verb}", headers={"Idempotency-Key": field}, data=b""
            )
            assert answer.status == 200
    assert len(await api.data_of(LoadRequested)) == 3
