"""Requests to the management API that are refused: names, bodies, queries; none appends an event."""

import gzip
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support import models
from support.http import LocalApi
from support.models import save

MIB = 2**20
JSON = {"Content-Type": "application/json"}


@contextmanager
def accesses(folder: Path) -> Iterator[list[str]]:
    """Collect what this process opens or lists beneath a folder, from the interpreter's audit events."""
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


# Names


async def test_unknown_name_is_404(shared: LocalApi, tmp_path: Path) -> None:
    api, repository = shared, shared.config.repository
    api.save(models.identity(), "m")
    save(models.identity(), tmp_path, "outside")
    (repository / "link").symlink_to(tmp_path / "outside")
    (repository / "empty" / "1").mkdir(parents=True)
    for model_id in ("nope", "empty", "link", "M", "m.", "1"):
        path = f"/api/v1/models/{model_id}"
        for answer in (await api.post(f"{path}/load"), await api.post(f"{path}/unload"), await api.get(path)):
            assert answer.refusal == (404, "unknown_model")
    answer = await api.post("/api/v1/models/m/load", json={"version": 2})
    assert answer.refusal == (404, "unknown_version")
    assert "'m' has no version 2" in answer.json["detail"]
    assert (await api.get("/api/v1/jobs/nope")).refusal == (404, "unknown_job")
    listed = {model["id"] for model in (await api.get("/api/v1/models")).json["models"]}
    assert listed & {"m", "link", "empty", "outside"} == {"m"}


MALFORMED = (
    "..", ".", "%2e%2e", "%2E", "..%2foutside", "%2e%2e%2Foutside", "a%2Fb", "a%2f1", "m%2f..%2fm", "%00",
    "m%00", "a" * 129, ".m", "-m", "_m", "m%20", "%20m", "m%0a", "m%0A1", "%2A", "*", "m;1", "m:1", "m~1",
    "%ff", "%ed%a0%80", "%C3%A9", "m%5c1", "%25", "%2525", "m'", "m%22", "a%252fb",
)  # fmt: skip


async def test_malformed_name_is_refused_without_file_access(shared: LocalApi) -> None:
    api, repository, folder = shared, shared.config.repository, shared.config.repository.parent
    for root, model_id in ((folder, "outside"), (repository, "m"), (repository / "a", "b")):
        save(models.identity(), root, model_id)
    head = api.position
    for model_id in MALFORMED:
        with accesses(folder) as seen:
            for method, rest in (("POST", "/load"), ("POST", "/unload?force=true"), ("GET", "")):
                answer = await api.send(method, f"/api/v1/models/{model_id}{rest}")
                assert answer.refusal in {
                    (400, "invalid_parameter"), (404, "not_found"), (405, "method_not_allowed"),
                }, model_id  # fmt: skip
            for method, rest in (("POST", "/infer"), ("GET", ""), ("GET", "/ready"), ("GET", "/versions/1")):
                answer = await api.send(method, f"/v2/models/{model_id}{rest}", data=b"{}")
                assert answer.status in {400, 404}, model_id
        assert [path for path in seen if "ledger.db" not in path and "/keys" not in path] == [], model_id
    for job_id in ("..", "%2e%2e", "%00", "a%2fb", "x" * 65, "%ff", "%ed%a0%80", "'"):
        assert (await api.get(f"/api/v1/jobs/{job_id}")).status in {400, 404}, job_id
        assert (await api.post(f"/api/v1/jobs/{job_id}/cancel")).status in {400, 404}, job_id
    assert api.position == head
    with accesses(folder) as seen:
        await api.model("m")
    assert str(repository / "m") in seen  # the watch works


async def test_model_may_have_the_name_of_a_route(shared: LocalApi) -> None:
    for model_id in ("unload", "jobs"):
        shared.save(models.identity(), model_id)
        await shared.load(model_id)
    assert (await shared.unload("unload"))["model_id"] == "unload"
    assert (await shared.post("/api/v1/models/unload", wait=60)).json["model_id"] == "jobs"


# Bodies and queries


async def test_invalid_body_or_query_is_refused_on_each_route(shared: LocalApi) -> None:
    shared.save(models.identity(), "m")
    head, packed = shared.position, gzip.compress(b"{}")
    large = b"{}" + b" " * MIB
    invalid, unsupported = (400, "invalid_body"), (415, "unsupported_media_type")
    queries = ("force", "force=", "force=1", "force=True", "force=true&force=true", "x=1", "at=1")
    for path in ("m/load", "m/unload", "unload"):
        for body, headers, query, refusal in (
            *((body, JSON, "", invalid) for body in (b"[]", b"{", b'{"x": 1}')),
            (packed, {"Content-Type": "text/plain"}, "", unsupported),
            (b"{}", {"Content-Type": "application/x-www-form-urlencoded"}, "", unsupported),
            (packed, {"Content-Type": "application/json; charset=latin-1"}, "", unsupported),
            (packed, {**JSON, "Content-Encoding": "gzip"}, "", unsupported),
            (large, JSON, "", (413, "body_too_large")),
            *((b"", {}, f"?{query}", (400, "invalid_parameter")) for query in queries),
            *([(b'{"force": true}', JSON, "", invalid)] if path != "m/load" else []),
        ):
            sent = {"data": io.BytesIO(body), "headers": headers}
            answer = await shared.post(f"/api/v1/models/{path}{query}", **sent)
            assert answer.refusal == refusal, (path, body[:20], headers, query)
            if refusal == unsupported and "Content-Encoding" not in headers:
                assert "curl: -H 'Content-Type: application/json'" in answer.json["detail"]
    assert shared.position == head


async def test_empty_body_is_an_empty_object(shared: LocalApi) -> None:
    shared.save(models.identity(), "m")
    for headers in ({}, JSON, {"Content-Type": "text/plain"}):
        for path in ("m/load", "m/unload", "m/load", "unload"):
            answer = await shared.post(f"/api/v1/models/{path}", data=b"", headers=headers, wait=60)
            assert (answer.status, answer.json["status"]) == (200, "completed")


async def test_invalid_query_of_a_list_is_400(shared: LocalApi) -> None:
    head = shared.position
    of_both = (
        "limit=0", "limit=1001", "limit=-1", "limit=", "limit=1.5", "limit=%2B1", "limit=1&limit=2",
        "limit=x", "limit=99999999999999999999", "at=x", "x=1",
    )  # fmt: skip
    of_jobs = ("cursor=x", "cursor=0", "cursor=-1", "status=done", "status=")
    for kind, queries in (("models", of_both), ("jobs", (*of_both, *of_jobs))):
        for query in queries:
            answer = await shared.get(f"/api/v1/{kind}?{query}")
            assert answer.refusal == (400, "invalid_parameter"), query
    assert shared.position == head
