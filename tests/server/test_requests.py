"""What is no request: names, bodies, parameters and pages that are refused, over HTTP, and append nothing."""

import gzip
import io
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import models
from support.http import LocalApi
from support.models import save

Start = Callable[..., Awaitable[LocalApi]]

MIB = 2**20


@contextmanager
def looks_into(folder: Path) -> Iterator[list[str]]:
    """Collect what this process opens or lists beneath a folder, as the interpreter's audit events say."""
    seen: list[str] = []
    _watched.append((str(folder), seen))
    try:
        yield seen
    finally:
        _watched.remove((str(folder), seen))


_watched: list[tuple[str, list[str]]] = []


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    if _watched and event in {"open", "os.scandir", "os.listdir"}:
        for folder, seen in _watched:
            seen += [path for path in map(str, arguments) if path.startswith(folder)]


sys.addaudithook(_audit)


# What is not there, and what is no name


async def test_what_is_not_in_the_repository_is_404(api: LocalApi, repository: Path) -> None:
    save(models.identity(), repository, "m")
    (repository / "empty" / "1").mkdir(parents=True)
    unknown_model, unknown_version = (404, "unknown_model"), (404, "unknown_version")
    for path in ("nope", "empty", "M", "m.", "1"):
        assert (await api.post(f"/api/v1/models/{path}/load")).refusal == unknown_model
        assert (await api.post(f"/api/v1/models/{path}/unload")).refusal == unknown_model
        assert (await api.get(f"/api/v1/models/{path}")).refusal == unknown_model
    answer = await api.post("/api/v1/models/m/load", json={"version": 2})
    assert answer.refusal == unknown_version
    assert "'m' has no version 2" in answer.json["detail"]
    assert (await api.get("/api/v1/jobs/nope")).refusal == (404, "unknown_job")
    assert (await api.post("/api/v1/jobs/nope/cancel")).refusal == (404, "unknown_job")


MALFORMED = (
    "..", ".", "%2e%2e", "%2E", "..%2foutside", "%2e%2e%2Foutside", "a%2Fb", "a%2f1", "m%2f..%2fm", "%00",
    "m%00", "a" * 129, ".m", "-m", "_m", "m%20", "%20m", "m%0a", "m%0A1", "%2A", "*", "m;1", "m:1", "m~1",
    "%ff", "%ed%a0%80", "%C3%A9", "m%5c1", "%25", "%2525", "m'", "m%22", "a%252fb",
)  # fmt: skip


async def test_what_is_no_model_id_is_refused_without_a_look_at_the_file_system(
    api: LocalApi, repository: Path, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    save(models.identity(), tmp_path, "outside")
    save(models.identity(), repository, "m")
    save(models.identity(), repository / "a", "b")
    head = api.position
    for model_id in MALFORMED:
        with subtests.test(model_id), looks_into(tmp_path) as seen:
            for method, rest in (("POST", "/load"), ("POST", "/unload?force=true"), ("GET", "")):
                answer = await api.send(method, f"/api/v1/models/{model_id}{rest}")
                assert answer.refusal in {
                    (400, "invalid_parameter"),
                    (404, "not_found"),
                    (405, "method_not_allowed"),
                }
            for method, rest in (("POST", "/infer"), ("GET", ""), ("GET", "/ready"), ("GET", "/versions/1")):
                answer = await api.send(method, f"/v2/models/{model_id}{rest}", data=b"{}")
                assert answer.status in {400, 404}
            assert [path for path in seen if "ledger.db" not in path and "/keys" not in path] == []
    assert api.position == head


async def test_the_watch_on_the_file_system_sees_what_a_good_id_does(
    api: LocalApi, repository: Path, tmp_path: Path
) -> None:
    save(models.identity(), repository, "m")
    with looks_into(tmp_path) as seen:
        await api.model("m")
    assert str(repository / "m") in seen


async def test_a_link_out_of_the_repository_is_as_if_it_were_not_there(
    api: LocalApi, repository: Path, tmp_path: Path
) -> None:
    save(models.identity(), tmp_path, "outside")
    (repository / "link").symlink_to(tmp_path / "outside")
    assert (await api.post("/api/v1/models/link/load")).refusal == (404, "unknown_model")
    assert (await api.get("/api/v1/models")).json["models"] == []


async def test_what_is_no_job_id_is_refused(api: LocalApi) -> None:
    for job_id in ("..", "%2e%2e", "%00", "a%2fb", "x" * 65, "%ff", "%ed%a0%80", "'"):
        assert (await api.get(f"/api/v1/jobs/{job_id}")).status in {400, 404}, job_id
        assert (await api.post(f"/api/v1/jobs/{job_id}/cancel")).status in {400, 404}, job_id


async def test_a_model_may_be_called_like_a_word_of_the_api(api: LocalApi, repository: Path) -> None:
    for model_id in ("unload", "load", "models", "jobs"):
        save(models.identity(), repository, model_id)
        await api.load(model_id)
        assert (await api.model(model_id))["state"] == "loaded"
    assert (await api.unload("unload"))["model_id"] == "unload"
    assert (await api.post("/api/v1/models/unload", wait=60)).json["model_id"] == "jobs"


# Bodies


BAD_BODIES: tuple[tuple[bytes, str], ...] = (
    (b'{"version": "1"}', "version: Must be an integer"),
    (b'{"version": 1.5}', "version: Must be an integer"),
    (b'{"version": 1.0}', "version: Must be an integer"),
    (b'{"version": true}', "version: Must be an integer"),
    (b'{"version": null}', "version"),
    (b'{"version": 0}', "version: Must be greater"),
    (b'{"version": -1}', "version: Must be greater"),
    (b'{"version": 99999999999999999999}', "version"),
    (b'{"version": 1e400}', "out of range"),
    (b'{"timeout_s": 0}', "timeout_s: Must be greater"),
    (b'{"timeout_s": 3601}', "timeout_s: Must be greater"),
    (b'{"memory_limit_bytes": 1}', "memory_limit_bytes"),
    (b'{"pinned": "false"}', "pinned: Must be true or false"),
    (b'{"pinned": 0}', "pinned: Must be true or false"),
    (b'{"pinned": null}', "pinned"),
    (b'{"priority": "urgent"}', "priority: Must be one of"),
    (b'{"priority": null}', "priority"),
    (b'{"strategy": "fast"}', "strategy: Must be one of"),
    (b'{"keep_alive_s": -2}', "keep_alive_s: Must be greater"),
    (b'{"keep_alive_s": 1.5}', "keep_alive_s: Must be an integer"),
    (b'{"keep_alive_s": 31536001}', "keep_alive_s: Must be greater"),
    (b'{"verson": 1}', "verson: Unknown field"),
    (b'{"version": 1, "version": 1}', '"version" appears twice'),
    (b'{"version": NaN}', "NaN"),
    (b'{"version": Infinity}', "Infinity"),
    (b'{"a":' * 40 + b"1" + b"}" * 40, "nested deeper"),
    (b"[" * 100_000, "nested deeper"),
    (b"[" * 100_000 + b"]" * 100_000, "nested deeper"),
    (b"[]", "Must be a JSON object"),
    (b"null", "Must be a JSON object"),
    (b'"version"', "Must be a JSON object"),
    (b"{", "not JSON"),
    (b"version=1", "not JSON"),
    (b'{"version": 1}}', "not JSON"),
    (b"\xff\xfe{}", "not UTF-8"),
    (b"\xef\xbb\xbf{}", "BOM"),
    (b'{"priority": "\\ud800"}', "surrogate"),
    (b'{"version": ' + b"9" * 5000 + b"}", "out of range"),
)


async def test_a_body_that_is_not_what_a_load_takes_is_400_and_the_field_is_named(
    api: LocalApi, repository: Path, subtests: pytest.Subtests
) -> None:
    save(models.identity(), repository, "m")
    head = api.position
    for body, reason in BAD_BODIES:
        with subtests.test(repr(body[:40])):
            headers = {"Content-Type": "application/json"}
            answer = await api.post("/api/v1/models/m/load", data=body, headers=headers)
            assert answer.refusal == (400, "invalid_body")
            assert reason in answer.json["detail"]
            assert len(answer.body) < 10_000
    assert api.position == head
    await api.load("m")


async def test_an_empty_body_is_as_good_as_an_empty_object(api: LocalApi, repository: Path) -> None:
    save(models.identity(), repository, "m")
    for headers in ({}, {"Content-Type": "application/json"}, {"Content-Type": "text/plain"}):
        for path in ("m/load", "m/unload", "m/load", "unload"):
            answer = await api.post(f"/api/v1/models/{path}", data=b"", headers=headers, wait=60)
            assert (answer.status, answer.json["status"]) == (200, "completed")


@pytest.mark.parametrize("path", ["m/load", "m/unload", "unload"])
async def test_a_body_that_is_not_declared_as_json_in_utf_8_is_415(
    api: LocalApi, repository: Path, path: str
) -> None:
    save(models.identity(), repository, "m")
    for media_type in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "application/json; charset=latin-1",
    ):
        answer = await api.post(f"/api/v1/models/{path}", data=b"{}", headers={"Content-Type": media_type})
        assert answer.refusal == (415, "unsupported_media_type")


@pytest.mark.parametrize("path", ["m/unload", "unload"])
async def test_an_unload_takes_nothing_in_its_body_and_force_in_its_query(
    api: LocalApi, repository: Path, path: str
) -> None:
    save(models.identity(), repository, "m")
    await api.load("m")
    assert (await api.post(f"/api/v1/models/{path}", json={"force": True})).refusal == (400, "invalid_body")
    for query in (
        "force",
        "force=",
        "force=1",
        "force=True",
        "force=yes",
        "force=true&force=true",
        "x=1",
        "at=1",
    ):
        answer = await api.post(f"/api/v1/models/{path}?{query}")
        assert answer.refusal == (400, "invalid_parameter"), query
    assert (await api.post(f"/api/v1/models/{path}?force=true", json={}, wait=60)).status == 200


async def test_a_body_of_more_than_a_mebibyte_is_413_however_it_is_sent(
    api: LocalApi, repository: Path
) -> None:
    save(models.identity(), repository, "m")
    padding = b" " * (MIB - 2)

    async def chunks(count: int) -> AsyncIterator[bytes]:
        for _ in range(count):
            yield b" " * (MIB // 4)

    headers = {"Content-Type": "application/json"}
    answer = await api.post("/api/v1/models/m/load", data=b"{}" + padding, headers=headers, wait=60)
    assert answer.status == 200
    for body in (io.BytesIO(b"{}" + padding + b" "), chunks(40)):
        answer = await api.post("/api/v1/models/m/load", data=body, headers=headers)
        assert answer.refusal == (413, "body_too_large")
    assert (await api.get("/api/v1/models")).status == 200


async def test_a_compressed_body_is_415_whatever_is_in_it(api: LocalApi, repository: Path) -> None:
    save(models.identity(), repository, "m")
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    for body in (gzip.compress(b" " * 50 * MIB), gzip.compress(b"{}")):
        answer = await api.post("/api/v1/models/m/load", data=body, headers=headers)
        assert answer.refusal == (415, "unsupported_media_type")
        assert "Content-Encoding" in answer.json["detail"]


# What is not said


async def test_the_values_that_parameters_have_by_default_may_be_said(
    api: LocalApi, repository: Path
) -> None:
    save(models.identity(), repository, "m")
    body = {"priority": "normal", "keep_alive_s": None, "strategy": "beside", "pinned": False, "instances": 1}
    await api.load("m", **body)


async def test_the_time_that_a_load_has_is_the_server_s_setting_where_the_request_does_not_say(
    start: Start, repository: Path
) -> None:
    save(models.identity(), repository, "m")
    api = await start(timeout_s=12)
    assert (await api.load("m"))["parameters"]["timeout_s"] == 12


# Lists


async def test_a_page_that_cannot_be_is_400(api: LocalApi) -> None:
    for query in (
        "limit=0", "limit=1001", "limit=-1", "limit=", "limit=1.5", "limit=%2B1", "limit=1&limit=2",
        "limit=x", "limit=99999999999999999999", "at=x", "x=1",
    ):  # fmt: skip
        for path in ("models", "jobs"):
            answer = await api.get(f"/api/v1/{path}?{query}")
            assert answer.refusal == (400, "invalid_parameter"), query
    for query in ("cursor=x", "cursor=0", "cursor=-1", "status=done", "status="):
        assert (await api.get(f"/api/v1/jobs?{query}")).refusal == (400, "invalid_parameter"), query
