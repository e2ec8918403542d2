"""`PUT` and `DELETE …/versions/{version}`, and uploads: statuses and codes, and what loads make of them."""

import asyncio
import base64
import hashlib
import shutil
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from msgspec import UNSET, UnsetType
from support import models
from support.http import ONE, LocalApi, local_server
from support.uploads import FILES, MODEL, staged
from support.workers import until

from events.types import AddedFile, Provenance, VersionAdded, VersionRemoved
from server.appkeys import LOG, UPLOADS

FILE = {"Content-Type": "application/octet-stream"}
LIMIT = 100_000
"""Bytes of an upload."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalApi]:
    """One application that takes uploads of this many bytes."""
    async with local_server(tmp_path_factory.mktemp("shared"), max_upload_bytes=LIMIT) as api:
        yield api


def path(model_id: str, version: object = 1) -> str:
    return f"/api/v1/models/{model_id}/versions/{version}"


def digest(data: bytes, name: str = "sha-256") -> str:
    value = hashlib.new(name.replace("-", ""), data).digest()
    return f"{name}=:{base64.b64encode(value).decode()}:"


async def put(api: LocalApi, model_id: str, data: Any = MODEL, version: object = 1, **options: Any) -> Any:
    headers = {**FILE, **options.pop("headers", {})}
    return await api.send("PUT", path(model_id, version), data=data, headers=headers, **options)


async def test_added_version_loads_and_a_removed_one_does_not(shared: LocalApi) -> None:
    answer = await put(shared, "a", headers={"Repr-Digest": digest(MODEL)}, subject="Ann")
    assert answer.status == 201
    assert answer.headers["Location"] == "/api/v1/models/a"
    file = {"path": "model.onnx", "bytes": len(MODEL), "sha256": hashlib.sha256(MODEL).hexdigest()}
    assert answer.json == {"model_id": "a", "version": 1, "bytes": len(MODEL), "files": [file]}
    assert (await put(shared, "a", models.add(2).SerializeToString(), 2)).status == 201
    job = await shared.load("a")
    assert job["version"] == 2
    assert (await shared.infer("a", ONE)).json["outputs"][0]["data"] == [3]
    refused = await shared.send("DELETE", path("a", 2))
    assert refused.refusal == (409, "version_in_use")
    assert (await shared.send("DELETE", path("a", 1), subject="Bob")).status == 204
    assert (await shared.post("/api/v1/models/a/load", json={"version": 1})).refusal[0] == 404
    assert (await shared.model("a"))["versions"] == [2]
    events = [
        event for event in await shared.events("a") if isinstance(event.data, VersionAdded | VersionRemoved)
    ]
    assert [(event.type, event.version, event.actor) for event in events] == [
        ("VersionAdded", 1, "Ann"),
        ("VersionAdded", 2, "alice"),
        ("VersionRemoved", 1, "Bob"),
    ]


def headers(**fields: str) -> dict[str, Any]:
    return {"headers": {name.replace("_", "-"): text for name, text in fields.items()}}


TWO_DIGESTS = f"{digest(MODEL)}, {digest(b'', 'sha-512')}"
REFUSALS: list[tuple[dict[str, Any], tuple[int, str]]] = [
    ({"data": b"<html>"}, (400, "not_onnx")),
    (headers(Repr_Digest=digest(b"other")), (400, "digest_mismatch")),
    (headers(Content_Digest=TWO_DIGESTS), (400, "digest_mismatch")),
    (headers(Repr_Digest="sha-256=1"), (400, "invalid_parameter")),
    (headers(If_None_Match='"x"'), (400, "invalid_parameter")),
    (headers(Content_Range="bytes 0-9/20"), (400, "invalid_parameter")),
    ({"version": 0}, (400, "invalid_parameter")),
    (headers(Content_Type="application/x-tar"), (415, "unsupported_media_type")),
    (headers(Content_Encoding="gzip"), (415, "unsupported_media_type")),
    ({"roles": ("infer",)}, (403, "forbidden")),
]


async def test_refused_upload_leaves_nothing(shared: LocalApi) -> None:
    for options, refusal in REFUSALS:
        assert (await put(shared, "refused", **options)).refusal == refusal, options
        assert not (shared.config.repository / "refused").exists()
        assert staged(shared.config.repository) == []


async def begin(api: LocalApi, model_id: str, **options: Any) -> str:
    """Begin an upload of version 1, and return its path."""
    answer = await api.post(f"{path(model_id)}/uploads", **options)
    assert answer.status in {200, 201}
    assert answer.headers["Location"] == f"{path(model_id)}/uploads/{answer.json['id']}"
    return answer.headers["Location"]


async def send(api: LocalApi, upload: str, name: str, data: bytes = MODEL, **options: Any) -> Any:
    return await api.send("PUT", f"{upload}/files/{name}", data=data, **options)


async def test_files_of_an_upload_become_a_version(shared: LocalApi) -> None:
    once = {"Idempotency-Key": '"once"'}
    upload = await begin(shared, "uploaded", headers=once)
    shown = list[dict[str, Any]]()
    for name, data in FILES.items():
        answer = await send(shared, upload, name, data, headers={"Content-Digest": digest(data)})
        assert answer.status == 201
        shown.append({"path": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
        assert answer.json == shown[-1]
    assert (await send(shared, upload, name, data)).status == 200
    assert await begin(shared, "uploaded", headers=once) == upload
    answer = await shared.get(upload, roles=("admin",))
    assert answer.json["files"] == shown
    version = {"model_id": "uploaded", "version": 1, "bytes": sum(each["bytes"] for each in shown)}
    assert answer.json.items() >= version.items()
    assert (await shared.get("/api/v1/models/uploaded")).status == 404
    answer = await shared.post(f"{upload}/commit", subject="bob")
    assert answer.refusal == (404, "unknown_upload")
    answer = await shared.post(f"{upload}/commit")
    assert (answer.status, answer.headers["Location"]) == (201, "/api/v1/models/uploaded")
    assert answer.json == {**version, "files": sorted(shown, key=lambda each: str(each["path"]))}
    assert (await shared.load("uploaded"))["version"] == 1
    assert (await shared.post(f"{upload}/commit")).refusal == (404, "unknown_upload")
    assert (await shared.post(f"{path('uploaded')}/uploads")).refusal == (409, "version_exists")


FILE_REFUSALS: list[tuple[dict[str, Any], tuple[int, str]]] = [
    (headers(Repr_Digest=digest(b"other")), (400, "digest_mismatch")),
    (headers(Content_Type="application/x-tar"), (415, "unsupported_media_type")),
    ({"name": "a%2F%2E%2E/..%2Fa"}, (400, "invalid_parameter")),
    ({"name": "a%0A"}, (400, "invalid_parameter")),
    ({"subject": "bob"}, (404, "unknown_upload")),
]


async def test_refused_file_is_not_in_the_upload(shared: LocalApi) -> None:
    upload = await begin(shared, "refused")
    for options, refusal in FILE_REFUSALS:
        assert (await send(shared, upload, **{"name": "model.onnx", **options})).refusal == refusal, options
        assert (await shared.get(upload, roles=("admin",))).json["files"] == []
    assert (await shared.post(f"{upload}/commit")).refusal == (400, "not_onnx")
    assert (await shared.send("DELETE", upload)).status == 204
    assert staged(shared.config.repository) == []


async def complete_upload(api: LocalApi, model_id: str) -> str:
    """Begin an upload of version 1, send its model file, and return its path."""
    upload = await begin(api, model_id)
    assert (await send(api, upload, "model.onnx")).status == 201
    return upload


NAME, PINNED = "hf://org/repo@main", "https://host/m.onnx#sha256=4481"
STATEMENTS: list[tuple[dict[str, Any], Provenance | UnsetType]] = [
    ({}, UNSET),
    ({"json": {}}, UNSET),
    ({"json": {"source": NAME}}, Provenance(NAME, NAME)),
    (
        {"json": {"source": "https://host/m.onnx", "resolved": PINNED}},
        Provenance("https://host/m.onnx", PINNED),
    ),
]


async def test_added_version_has_what_its_sender_says_of_its_origin(shared: LocalApi) -> None:
    files = (AddedFile("model.onnx", len(MODEL), hashlib.sha256(MODEL).hexdigest()),)
    for number, (request, said) in enumerate(STATEMENTS):
        model_id = f"said-{number}"
        upload = await complete_upload(shared, model_id)
        assert (await shared.post(f"{upload}/commit", **request)).status == 201
        [added] = [event for event in await shared.events(model_id) if event.type == "VersionAdded"]
        assert (added.data, added.actor) == (VersionAdded(files, said), "alice")
        sources = (await shared.model(model_id)).get("sources", [])
        assert [(each["source"], each["resolved"], each["added_by"]) for each in sources] == (
            [] if said is UNSET else [(said.uri, said.resolved, "alice")]
        )


LONGEST = f"s3://{'a' * 2043}"
STATEMENT_REFUSALS: dict[str, tuple[Any, ...]] = {
    "the ledger keeps it, and would keep a secret in it": (
        *(
            {"source": name}
            for name in ("org/repo", "hf://", "", "hf://org/a b", f"{NAME}\n", "hf://org/müll")
        ),
        {"source": "https://alice@host/m.onnx"},
        {"source": "https://alice:secret@host/m.onnx"},
        {"source": NAME, "resolved": "https://alice:secret@host/m"},
        {"source": "https://host/m.onnx?signature=secret"},
        {"source": NAME, "resolved": "https://host/m?a=secret#sha256=1"},
        {"source": PINNED},
    ),
    "Longer than maximum length 2048": ({"source": f"{LONGEST}a"},),
    "Not a valid string": ({"source": 1},),
    "null": ({"source": None},),
    "source: Must be given with resolved": ({"resolved": NAME},),
    "known are resolved, source": ({"source": NAME, "digest": "0"},),
    "Must be a JSON object": ([NAME],),
}


async def test_statement_that_the_ledger_must_not_keep_is_refused(shared: LocalApi) -> None:
    upload = await complete_upload(shared, "said")
    for words, bodies in STATEMENT_REFUSALS.items():
        for body in bodies:
            answer = await shared.post(f"{upload}/commit", json=body)
            assert answer.refusal == (400, "invalid_body"), body
            assert words in answer.json["detail"], body
            assert "secret@" not in answer.json["detail"]
    answer = await shared.post(f"{upload}/commit", data=b"source=hf://org/repo")
    assert answer.refusal == (415, "unsupported_media_type")
    assert (await shared.post(f"{upload}/commit", json={"source": LONGEST})).status == 201


async def test_put_of_a_name_is_told_the_command(shared: LocalApi) -> None:
    answer = await shared.send("PUT", path("named"), json={"source": NAME})
    assert answer.refusal == (415, "unsupported_media_type")
    assert "`loadledger add MODEL SOURCE` downloads it" in answer.json["detail"]


async def test_version_is_shown_with_what_the_ledger_has(shared: LocalApi) -> None:
    origin = {"source": "hf://org/repo@main", "resolved": "hf://org/repo@0123456"}
    await shared.add_by_upload("shown", 1, MODEL, **origin)
    shared.save(MODEL, "shown", 2)
    [added] = [event for event in await shared.events("shown") if isinstance(event.data, VersionAdded)]
    file, sha256 = {"path": "model.onnx", "bytes": len(MODEL)}, hashlib.sha256(MODEL).hexdigest()
    unknown = dict.fromkeys(("digest", "added_by", "added_at", "position", "source", "resolved"))
    unknown |= {"model_id": "shown", "labels": [], "approvals": [], "in_repository": True, "loaded": False}
    of_added = {
        "version": 1, "added_by": "alice", "added_at": added.recorded_at, "position": added.position, **origin
    }  # fmt: skip
    for version, expected in ((1, of_added), (2, {"version": 2})):
        answer = await shared.get(path("shown", version), roles=("infer",))
        assert (answer.status, answer.json) == (
            200,
            unknown | expected | {"files": [file | {"sha256": None}]},
        )
    await shared.load("shown", version=1, label="champion")
    shutil.rmtree(shared.config.repository / "shown" / "1")
    digest = (await shared.model("shown"))["chosen"]["digest"]
    known = {"digest": digest, "loaded": True, "labels": ["champion"], "in_repository": False}
    shown = (await shared.get(path("shown"))).json
    assert shown == unknown | of_added | known | {"files": [file | {"sha256": sha256}]}


@pytest.mark.parametrize(
    ("place", "options", "refusal"),
    [
        (path("none"), {}, (404, "unknown_model")),
        (path("listed", 9), {}, (404, "unknown_version")),
        (path("listed", "champion"), {}, (400, "invalid_parameter")),
        (f"{path('listed')}?at=1", {}, (400, "invalid_parameter")),
        (path("listed"), {"roles": ()}, (401, "no_credentials")),
    ],
)
async def test_version_that_cannot_be_shown_is_refused(
    shared: LocalApi, place: str, options: dict[str, Any], refusal: tuple[int, str]
) -> None:
    shared.save(MODEL, "listed")
    assert (await shared.get(place, **options)).refusal == refusal


async def test_version_is_never_overwritten(shared: LocalApi) -> None:
    shared.save(b"by hand", "kept")
    assert (await put(shared, "kept")).refusal == (409, "version_exists")
    assert (await put(shared, "kept", headers={"If-None-Match": "*"})).refusal == (412, "precondition_failed")
    assert (await put(shared, "kept", version=2, headers={"If-None-Match": "*"})).status == 201
    assert (shared.config.repository / "kept/1/model.onnx").read_bytes() == b"by hand"


async def test_unknown_version_cannot_be_removed(shared: LocalApi) -> None:
    assert (await shared.send("DELETE", path("never-added"))).refusal == (404, "unknown_version")
    assert (await shared.send("DELETE", path("never-added"), roles=("audit",))).status == 403


async def test_client_that_leaves_leaves_nothing(shared: LocalApi) -> None:
    received = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield MODEL[:50]
        await received.wait()

    request = asyncio.create_task(put(shared, "left", body()))
    await until(lambda: staged(shared.config.repository) != [])
    second = await put(shared, "left")
    assert second.refusal == (409, "version_exists")
    assert (await shared.get("/api/v1/models/left")).status == 404
    request.cancel()
    await until(lambda: staged(shared.config.repository) == [])
    await until(lambda: not shared.app[UPLOADS].changes._changing)  # which ends a moment after its folder
    assert (await put(shared, "left")).status == 201


async def test_load_and_removal_at_once_have_one_winner(shared: LocalApi) -> None:
    for version in range(1, 6):
        await put(shared, "race", version=version)
        load, removal = await asyncio.gather(
            shared.post("/api/v1/models/race/load", json={"version": version}, wait=60),
            shared.send("DELETE", path("race", version)),
        )
        if removal.status == 204:
            assert load.status == 404 or load.json["status"] == "failed"
        else:
            assert removal.refusal == (409, "version_in_use")
            assert load.json["status"] == "completed"
    assert shared.app[LOG].healthy


async def test_setting_limits_uploads(shared: LocalApi) -> None:
    assert (await put(shared, "large", bytes(LIMIT + 1))).refusal == (413, "body_too_large")
    upload = await begin(shared, "large")
    assert (await send(shared, upload, "a", bytes(LIMIT - 40))).status == 201
    assert (await send(shared, upload, "b", bytes(41))).refusal == (413, "body_too_large")
    assert (await send(shared, upload, "b", bytes(40))).status == 201
    assert (await shared.send("DELETE", upload)).status == 204
