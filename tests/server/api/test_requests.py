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


async def test_unknown_name_is_404(api: LocalApi, repository: Path, tmp_path: Path) -> None:
    save(models.identity(), repository, "m")
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
    assert [model["id"] for model in (await api.get("/api/v1/models")).json["models"]] == ["m"]


MALFORMED = (
    "..", ".", "%2e%2e", "%2E", "..%2foutside", "%2e%2e%2Foutside", "a%2Fb", "a%2f1", "m%2f..%2fm", "%00",
    "m%00", "a" * 129, ".m", "-m", "_m", "m%20", "%20m", "m%0a", "m%0A1", "%2A", "*", "m;1", "m:1", "m~1",
    "%ff", "%ed%a0%80", "%C3%A9", "m%5c1", "%25", "%2525", "m'", "m%22", "a%252fb",
)  # fmt: skip


async def test_malformed_name_is_refused_without_file_access(
    api: LocalApi, repository: Path, tmp_path: Path
) -> None:
    save(models.identity(), tmp_path, "outside")
    save(models.identity(), repository, "m")
    save(models.identity(), repository / "a", "b")
    head = api.position
    for model_id in MALFORMED:
        with accesses(tmp_path) as seen:
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
    with accesses(tmp_path) as seen:
        await api.model("m")
    assert str(repository / "m") in seen  # the watch works


async def test_model_may_have_the_name_of_a_route(api: LocalApi, repository: Path) -> None:
    for model_id in ("unload", "jobs"):
        save(models.identity(), repository, model_id)
        await api.load(model_id)
    assert (await api.unload("unload"))["model_id"] == "unload"
    assert (await api.post("/api/v1/models/unload", wait=60)).json["model_id"] == "jobs"


# Bodies and queries


async def test_invalid_body_or_query_is_refused_on_each_route(api: LocalApi, repository: Path) -> None:
    save(models.identity(), repository, "m")
    head = api.position
    for path in ("m/load", "m/unload", "unload"):
        for body, code in ((b"[]", "invalid_body"), (b"{", "invalid_body"), (b'{"x": 1}', "invalid_body")):
            answer = await api.post(f"/api/v1/models/{path}", data=body, headers=JSON)
            assert answer.refusal == (400, code)
        for headers in (
            {"Content-Type": "text/plain"},
            {"Content-Type": "application/json; charset=latin-1"},
            {**JSON, "Content-Encoding": "gzip"},
        ):
            answer = await api.post(f"/api/v1/models/{path}", data=gzip.compress(b"{}"), headers=headers)
            assert answer.refusal == (415, "unsupported_media_type")
        large = io.BytesIO(b"{}" + b" " * MIB)
        answer = await api.post(f"/api/v1/models/{path}", data=large, headers=JSON)
        assert answer.refusal == (413, "body_too_large")
        for query in ("force", "force=", "force=1", "force=True", "force=true&force=true", "x=1", "at=1"):
            answer = await api.post(f"/api/v1/models/{path}?{query}")
            assert answer.refusal == (400, "invalid_parameter"), query
    for path in ("m/unload", "unload"):
        assert (await api.post(f"/api/v1/models/{path}", json={"force": True})).refusal == (
            400,
            "invalid_body",
        )
    assert api.position == head


async def test_empty_body_is_an_empty_object(api: LocalApi, repository: Path) -> None:
    save(models.identity(), repository, "m")
    for headers in ({}, JSON, {"Content-Type": "text/plain"}):
        for path in ("m/load", "m/unload", "m/load", "unload"):
            answer = await api.post(f"/api/v1/models/{path}", data=b"", headers=headers, wait=60)
            assert (answer.status, answer.json["status"]) == (200, "completed")


async def test_invalid_query_of_a_list_is_400(api: LocalApi) -> None:
    head = api.position
    for query in (
        "limit=0", "limit=1001", "limit=-1", "limit=", "limit=1.5", "limit=%2B1", "limit=1&limit=2",
        "limit=x", "limit=99999999999999999999", "at=x", "x=1",
    ):  # fmt: skip
        for path in ("models", "jobs"):
            answer = await api.get(f"/api/v1/{path}?{query}")
            assert answer.refusal == (400, "invalid_parameter"), query
    for query in ("cursor=x", "cursor=0", "cursor=-1", "status=done", "status="):
        assert (await api.get(f"/api/v1/jobs?{query}")).refusal == (400, "invalid_parameter"), query
    assert api.position == head
