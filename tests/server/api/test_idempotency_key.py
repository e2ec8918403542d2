"""`Idempotency-Key`, and joins: a repeated request is answered with the job of the first."""

import asyncio
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from marshmallow import ValidationError
from support import models
from support.history import PLAIN
from support.http import Answer, LocalApi

from events.types import LoadRequested, UnloadRequested
from server.api.jobs import MAX_KEY_CHARACTERS, IdempotencySchema, unquote_key

MISMATCH = (422, "idempotency_mismatch")
PRINTABLE = st.characters(min_codepoint=0x20, max_codepoint=0x7E)


def read(field: str) -> str:
    """Return the key in a header field, which must be valid."""
    loaded = IdempotencySchema().load({"Idempotency-Key": field})
    return unquote_key(loaded["idempotency_key"])


async def send(
    api: LocalApi, path: str, key: str, body: bytes = b"", *, wait: int = 60, subject: str = "alice"
) -> Answer:
    """Send a request of the management API with a key, and wait for its job's end."""
    headers = {"Idempotency-Key": key, **({"Content-Type": "application/json"} if body else {})}
    return await api.post(f"/api/v1/{path}", headers=headers, data=body, wait=wait, subject=subject)


def job_of(answer: Answer) -> str:
    assert answer.status == 200, answer.body
    assert answer.headers["Location"] == f"/api/v1/jobs/{answer.json['id']}"
    job_id: str = answer.json["id"]
    return job_id


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


async def test_malformed_key_is_400_on_each_route(shared: LocalApi) -> None:
    head = shared.position
    for path in ("models/m/load", "models/m/unload", "models/unload", "jobs/j/cancel"):
        answer = await send(shared, path, '"a", "b"')
        assert answer.refusal == (400, "invalid_parameter")
        assert "Idempotency-Key" in answer.json["detail"]
    bearer = ("Authorization", f"Bearer {shared.token('admin')}")
    twice = [bearer, ("Idempotency-Key", "a"), ("Idempotency-Key", "a")]
    assert (await shared.client.post("/api/v1/models/m/load", headers=twice)).status == 400
    assert shared.position == head


# The same request again


async def test_repeated_load_returns_first_job_whatever_changed(shared: LocalApi) -> None:
    model, path = shared.save(models.add(1), "repeated").parent, "models/repeated/load"
    [first] = {
        job_of(answer) for answer in await asyncio.gather(*(send(shared, path, "r") for _ in range(5)))
    }
    await shared.unload("repeated")
    shared.save(models.add(2), "repeated", 2)
    (model / "loadledger.toml").write_text("instances = 2")
    head = shared.position
    again = await send(shared, path, "r", wait=0)
    assert (job_of(again), again.json["status"]) == (first, "completed")
    assert shared.position == head
    assert (await shared.model("repeated"))["state"] == "unloaded"
    shutil.rmtree(model)
    assert (await send(shared, path, "r")).refusal == (404, "unknown_model")


async def test_fingerprint_ignores_form_and_heeds_content(shared: LocalApi) -> None:
    shared.save(models.add(1), "m")
    body = b'{"timeout_s": 50, "priority": "high"}'
    load = job_of(await send(shared, "models/m/load", '"l"', body))
    same = b'{ "priority" : "high",\n"timeout_s":50}'
    assert job_of(await send(shared, "models/m/load", "l", same)) == load
    for other in (b"", b"{}", b'{"timeout_s": 50}', b'{"timeout_s": 50, "priority": "normal"}'):
        assert (await send(shared, "models/m/load", "l", other)).refusal == MISMATCH
    unload = job_of(await send(shared, "models/m/unload", '"u"'))
    for other, query in ((b" {} ", ""), (b"", "?force=false")):
        assert job_of(await send(shared, f"models/m/unload{query}", '"u"', other)) == unload
    assert (await send(shared, "models/m/unload?force=true", '"u"')).refusal == MISMATCH


async def test_key_of_another_request_is_422(shared: LocalApi) -> None:
    for model_id in ("one", "other"):
        shared.save(models.identity(), model_id)
    job_id = job_of(await send(shared, "models/one/load", "k", subject="Ann"))
    head = shared.position
    for path in (
        "models/other/load", "models/one/unload", "models/one/unload?force=true", "models/unload",
        f"jobs/{job_id}/cancel",
    ):  # fmt: skip
        assert (await send(shared, path, "k", subject="Ann")).refusal == MISMATCH, path
    assert shared.position == head
    job = (await send(shared, "models/other/load", "k", subject="Bob")).json
    assert (job["model_id"], job["requested_by"], job["status"]) == ("other", "Bob", "completed")


async def test_refused_request_does_not_use_key(shared: LocalApi) -> None:
    shared.save(models.add(1), "unused")
    for path, body, refusal in (
        ("unload", b"", (409, "not_loaded")),
        ("load", b'{"version": 2}', (404, "unknown_version")),
        ("load", b'{"version": 0}', (400, "invalid_body")),
    ):
        assert (await send(shared, f"models/unused/{path}", "n", body)).refusal == refusal
    await shared.load("unused")
    assert (await send(shared, "models/unused/unload", "n")).json["kind"] == "unload"


async def test_ledger_keeps_hash_of_key_and_fingerprint(shared: LocalApi) -> None:
    shared.save(models.add(1), "hashed")
    for path in ("load", "unload"):
        job = (await send(shared, f"models/hashed/{path}", f'"secret {path}"')).json
        assert "idempotency" not in {*job, *job["parameters"]}
    data = [event.data for event in await shared.events("hashed")]
    keys = [each.idempotency for each in data if isinstance(each, LoadRequested | UnloadRequested)]
    assert len({text for key in keys if key for text in (key.key_hash, key.fingerprint)}) == 4
    assert "secret" not in repr(data)


async def test_load_of_loaded_model_records_each_actor_and_key_once(shared: LocalApi) -> None:
    shared.save(models.add(1), "held")
    path, job = "models/held/load", (await shared.load("held"))["id"]
    for subject in ("alice", "Bob", "Bob", "alice", "Bob"):
        answer = await shared.post(f"/api/v1/{path}", subject=subject)
        assert (answer.status, answer.json["id"]) == (200, job)
    for _ in range(2):
        assert (await shared.post("/v2/repository/models/held/load", subject="Carol")).status == 200
    for key in ("one", "one", "two"):
        assert job_of(await send(shared, path, key)) == job
    joined = [event for event in await shared.events("held") if event.type == "LoadJoined"]
    assert [(event.actor, event.job_id) for event in joined] == [
        ("Bob", job), ("Carol", job), ("alice", job), ("alice", job),
    ]  # fmt: skip
    await shared.unload("held")
    head = shared.position
    assert (job_of(await send(shared, path, "two")), shared.position) == (job, head)
    assert (await send(shared, path, "two", b'{"pinned": true}')).refusal == MISMATCH


async def test_repeated_cancel_returns_the_cancelled_job(shared: LocalApi) -> None:
    shared.save(models.endless_load(), "slow")
    job = await shared.accepted_load("slow")
    path = f"jobs/{job['id']}/cancel"
    cancelled = await send(shared, path, "c")
    assert (job_of(cancelled), cancelled.json["status"]) == (job["id"], "cancelled")
    assert (await send(shared, path, "another")).refusal == (409, "already_finished")
    assert (await send(shared, path, "c")).json == cancelled.json
    assert (await shared.types("slow")).count("CancelRequested") == 1


async def test_key_is_ignored_under_v2(shared: LocalApi) -> None:
    shared.save(models.add(1), "v2")
    for key in ("v", "v", '"malformed'):
        for verb in ("load", "unload"):
            path, headers = f"/v2/repository/models/v2/{verb}", {"Idempotency-Key": key}
            assert (await shared.post(path, headers=headers, data=b"")).status == 200
    assert (await shared.types("v2")).count("LoadRequested") == 3
