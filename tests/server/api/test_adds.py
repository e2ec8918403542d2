"""`PUT …/versions/{version}` with a source: a job fetches the version, once, and records what came."""

import asyncio
import base64
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Start
from support import models
from support.http import ONE, Answer, LocalApi, application, when
from support.origins import COMMIT, HANG, Asked, Hub, RangedFile, Site, answer, serving_site, write_authority
from support.uploads import FILES, MODEL, staged

from events.types import AddedFile, AddFailed, JobCancelled, Provenance, VersionAdded
from runtime.memory import list_descendants
from server.config import Config

WAIT = {"Prefer": "wait=60"}
PINNED = f"sha256:{hashlib.sha256(MODEL).hexdigest()}"
REVISION = f"hf://org/repo@{COMMIT}"


@pytest.fixture(autouse=True)
def trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", write_authority(tmp_path))


async def put(api: LocalApi, source: str, *, version: int = 1, of: str = "m", **options: Any) -> Answer:
    headers = {**WAIT, **options.pop("headers", {})}
    path = f"/api/v1/models/{of}/versions/{version}"
    asked: dict[str, Any] = {"roles": options.pop("roles", ("admin",))}
    return await api.send("PUT", path, json={"source": source, **options}, headers=headers, **asked)


async def test_added_file_of_the_web_loads_and_says_where_it_came_from(start: Start) -> None:
    async with serving_site(RangedFile(MODEL)) as site:
        api = await start(sources=f"https://{site.host}")
        job = (await put(api, site.url(), digest=PINNED)).json
        assert (job["kind"], job["status"], job["error"]) == ("add", "completed", None)
        assert job["parameters"] == {"source": site.url(), "digest": PINNED, "timeout_s": 3600}
        requests = len(site.asked)
        await api.load("m")
        assert (await api.infer("m", ONE)).json["outputs"][0]["data"] == [2]
        assert len(site.asked) == requests  # no load fetches
    resolved = f"{site.url()}#{PINNED.replace(':', '=')}"
    (added,) = await api.data_of(VersionAdded)
    file = AddedFile("model.onnx", len(MODEL), hashlib.sha256(MODEL).hexdigest())
    assert added == VersionAdded((file,), Provenance(site.url(), resolved))
    assert await api.types("m") == [
        *("AddRequested", "AddStarted", "VersionAdded", "LoadRequested", "LoadStarted", "ModelLoaded")
    ]
    (source,) = (await api.model("m"))["sources"]
    assert source == {
        "version": 1,
        "source": site.url(),
        "resolved": resolved,
        "added_by": "alice",
        "added_at": job["finished_at"],
        "position": job["position"],
    }


REFUSALS: list[tuple[str, dict[str, Any], tuple[int, str]]] = [
    ("oci://registry.example/m", {}, (403, "source_not_allowed")),
    ("https://other.example/m", {"digest": PINNED}, (403, "source_not_allowed")),
    ("https://allowed.example/m", {}, (400, "invalid_source")),
    ("https://me:secret@allowed.example/m", {"digest": PINNED}, (400, "invalid_source")),
    ("https://allowed.example/m?Signature=x", {"digest": PINNED}, (400, "invalid_source")),
    ("ftp://allowed.example/m", {}, (400, "invalid_source")),
    ("hf://org/repo", {"digest": "md5:1"}, (400, "invalid_body")),
    ("hf://org/repo", {"timeout_s": 0}, (400, "invalid_body")),
    ("hf://org/repo", {"branch": "main"}, (400, "invalid_body")),
    ("hf://org/repo", {"roles": ("predict",)}, (403, "forbidden")),
    ("hf://org/repo", {"of": "there"}, (409, "version_exists")),
    ("hf://org/repo", {"of": "there", "headers": {"If-None-Match": "*"}}, (412, "precondition_failed")),
]


@pytest.mark.parametrize(("source", "options", "expected"), REFUSALS)
async def test_refused_source_makes_no_job(
    start: Start, source: str, options: dict[str, Any], expected: tuple[int, str]
) -> None:
    api = await start(sources="https://allowed.example hf")
    api.save(models.add(1), "there")
    assert (await put(api, source, **options)).refusal == expected
    assert not await api.jobs()


async def test_server_fetches_nothing_by_default(api: LocalApi) -> None:
    refused = await put(api, "hf://org/repo")
    assert refused.refusal == (403, "source_not_allowed")
    assert "--sources" in refused.json["detail"]


FAILURES: list[tuple[bytes, str]] = [
    (answer(404), "source_not_found"),
    (answer(403), "source_denied"),
    (answer(200, b"<html>"), "digest_mismatch"),
    (answer(200, MODEL, content_encoding="gzip"), "source_invalid"),
    (answer(302, location="https://elsewhere.example/m"), "source_not_allowed"),
]


@pytest.mark.parametrize(("reply", "code"), FAILURES, ids=[code for _, code in FAILURES])
async def test_failed_add_leaves_nothing(start: Start, reply: bytes, code: str) -> None:
    async with serving_site(lambda _: reply) as site:
        api = await start(sources=f"https://{site.host}")
        job = (await put(api, site.url(), digest=PINNED)).json
        assert (job["status"], job["error"]["code"]) == ("failed", code)
        (failed,) = await api.data_of(AddFailed)
        assert failed.code == code
        assert staged(api.config.repository) == []
        assert not (api.config.repository / "m").exists()
        assert (await api.get("/api/v1/models/m")).status == 404


async def hanging(site: Site, api: LocalApi, version: int = 1, **options: Any) -> str:
    """Begin an add whose file does not end; return its job once some of it is there."""
    accepted = await put(
        api, site.url(), version=version, digest=PINNED, headers={"Prefer": "wait=0"}, **options
    )
    assert accepted.status == 202
    job_id: str = accepted.json["id"]
    await has_bytes(api, job_id)
    return job_id


async def has_bytes(api: LocalApi, job_id: str) -> None:
    await when(lambda: api.job(job_id), lambda job: bool(job["progress"] and job["progress"]["bytes"]))


def half(_: object) -> bytes:
    return answer(200, MODEL[:50], content_length=len(MODEL)) + HANG


async def test_cancelled_add_ends_its_process_and_leaves_nothing(start: Start) -> None:
    async with serving_site(half) as site:
        api = await start(sources=f"https://{site.host}")
        job_id = await hanging(site, api)
        assert fetch_processes()
        job = await api.job(job_id)
        assert (job["status"], job["stage"]) == ("in_progress", "fetching")
        assert job["progress"] == {"bytes": 50, "total_bytes": len(MODEL)}
        assert (await put(api, "hf://org/repo")).refusal == (403, "source_not_allowed")
        await api.post(f"/api/v1/jobs/{job_id}/cancel")
        assert (await api.ended(job_id))["status"] == "cancelled"
        assert await api.data_of(JobCancelled)
        assert staged(api.config.repository) == []
        assert not fetch_processes()
        again = await put(api, site.url(), digest=PINNED, timeout_s=1)
        assert again.json["error"]["code"] == "timeout"
        assert "fetching" in again.json["error"]["message"]
        assert staged(api.config.repository) == []


def fetch_processes() -> list[int]:
    """Return the process ids of the fetch processes that run."""
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in list_descendants(os.getpid())}
    return [pid for pid, command in commands.items() if b"runtime.fetch" in command]


async def test_third_add_waits_and_the_same_version_is_refused(start: Start) -> None:
    async with serving_site(half) as site:
        api = await start(sources=f"https://{site.host}")
        running = [await hanging(site, api, version) for version in (1, 2)]
        third = await put(api, site.url(), version=3, digest=PINNED, headers={"Prefer": "wait=0"})
        job = await api.job_when(third.json["id"], status="pending")
        assert job["waiting_for"] == "its turn: 2 adds run at once"
        assert (await put(api, site.url(), digest=PINNED)).refusal == (409, "version_exists")
        await api.post(f"/api/v1/jobs/{running[0]}/cancel")
        await api.job_when(third.json["id"], stage="fetching")


async def test_repeated_key_is_one_add(start: Start) -> None:
    async with serving_site(RangedFile(MODEL)) as site:
        api = await start(sources=f"https://{site.host}")
        key = {"Idempotency-Key": '"one"'}
        first, again = [await put(api, site.url(), digest=PINNED, headers=key) for _ in range(2)]
        assert first.json["id"] == again.json["id"]
        other = await put(api, site.url("/other"), digest=PINNED, headers=key)
        assert other.refusal == (422, "idempotency_mismatch")


async def test_bytes_that_are_there_are_not_fetched_again(start: Start) -> None:
    async with serving_site(RangedFile(MODEL)) as site:
        api = await start(sources=f"https://{site.host}")
        await put(api, site.url(), digest=PINNED)
        requests = len(site.asked)
        assert (await put(api, site.url(), version=2, digest=PINNED)).json["status"] == "completed"
        assert len(site.asked) == requests
        for version in ("1", "2"):
            (api.config.repository / "m" / version / "model.onnx").write_bytes(b"damaged")
        assert (await put(api, site.url(), version=3, digest=PINNED, of="n")).json["status"] == "completed"
        assert len(site.asked) > requests


async def test_fetch_without_a_known_digest_begins_anew_after_a_restart(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub({"model.onnx": MODEL})
    hanging_paths = ["/resolve/"]

    def reply(asked: Asked) -> bytes:
        return half(asked) if any(part in asked.path for part in hanging_paths) else hub(asked)

    async with serving_site(reply) as site:
        monkeypatch.setenv("HF_ENDPOINT", f"https://{site.host}")
        hub.cdn = f"https://{site.host}"
        allowing = replace(config, sources="hf")
        async with application(allowing) as api:
            job_id = (await put(api, "hf://org/repo", headers={"Prefer": "wait=0"})).json["id"]
            await has_bytes(api, job_id)
        hanging_paths.clear()
        async with application(allowing) as api:
            ended = await api.ended(job_id)
            assert (ended["status"], ended["attempt"], ended["error"]) == ("completed", 2, None)
            await api.load("m")
            assert staged(config.repository) == []


async def test_long_signature_is_read_in_part(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"model.onnx": MODEL, "model.sig": b"[" * 2**20}
    async with serving_site(Hub(files)) as site:
        monkeypatch.setenv("HF_ENDPOINT", f"https://{site.host}")
        api = await start(sources="hf")
        assert (await put(api, "hf://org/repo")).json["error"] is None


def signature(*names: str) -> bytes:
    """Return what OpenSSF Model Signing writes beside a model, as far as its list of files."""
    statement = {"predicate": {"resources": [{"name": name, "digest": "ab"} for name in names]}}
    payload = base64.b64encode(json.dumps(statement).encode()).decode()
    return json.dumps({"dsseEnvelope": {"payload": payload}}).encode()


async def test_hugging_face_gives_files_that_model_and_signature_name(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        **{f"onnx/{path}": content for path, content in FILES.items()},
        "onnx/model.sig": signature("net.onnx", "data/w.bin", "labels.txt"),
        "onnx/labels.txt": b"cat",
        "onnx/README.md": b"not for a server",
        "pytorch_model.bin": bytes(1000),
    }
    hub = Hub(files, large=frozenset({"onnx/data/w.bin"}), token="hf_secret")
    async with serving_site(hub) as site:
        monkeypatch.setenv("HF_ENDPOINT", f"https://{site.host}")
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        hub.cdn = f"https://{site.host}"
        api = await start(sources="hf://org")
        job = (await put(api, "hf://org/repo@main")).json
        assert (job["status"], job["error"]) == ("completed", None)
        (added,) = await api.data_of(VersionAdded)
        assert isinstance(added.source, Provenance)
        assert added.source.resolved.startswith(REVISION)
        assert [file.path for file in added.files] == ["data/w.bin", "labels.txt", "model.sig", "net.onnx"]
        await api.load("m")
        denied = await put(api, "hf://org/missing@main", version=2)
        assert denied.json["error"]["code"] == "source_not_found"
    ledger = api.ledger.read_bytes()
    assert b"hf_secret" not in ledger
    assert b"Signature=secret" not in ledger


async def test_stream_tells_stage_and_progress_of_an_add(start: Start) -> None:
    async with serving_site(half) as site:
        api = await start(sources=f"https://{site.host}")
        await hanging(site, api)
        async with (
            asyncio.timeout(60),
            api.session.get(
                f"{api.url}/api/v1/events/stream?type=stage",
                headers={"Authorization": f"Bearer {api.token('admin')}", "Accept": "application/x-ndjson"},
            ) as stream,
        ):
            line = await stream.content.readline()
            while b'"bytes":50' not in line.replace(b" ", b""):
                line = await stream.content.readline()
                assert line
