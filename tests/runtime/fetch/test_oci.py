import base64
import hashlib
import json
import os
import tarfile
from asyncio import to_thread
from collections.abc import AsyncIterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import msgspec
import pytest
from multidict import CIMultiDict
from support import frames, registries
from support.registries import EMPTY, IMAGE_INDEX, TITLE, Registry, running_registry

from runtime.fetch.messages import Order, RemoteFile
from runtime.fetch.oci import (
    Descriptor,
    Oci,
    OciManifest,
    choose_manifest,
    find_credentials,
    list_files,
    parse_challenges,
)
from runtime.fetch.origin import SourceDenied, SourceInvalid, SourceNotFound, SourceProblem
from runtime.fetch.sources import InvalidSource, SourceNotAllowed, parse_source

MODEL, WEIGHTS = b"model", os.urandom(3 * 2**20)
RAW = "application/vnd.cncf.model.weight.v1.raw"
PATH = "org.cncf.model.filepath"
HEX = "0" * 64


def order(registry: Registry, path: str, *, digest: str | None = None, with_login: bool = True) -> Order:
    allowed = f"oci://{registry.host} {' '.join(registry.allowed)}"
    environment = registry.environment(with_login=with_login)
    return Order(f"oci://{registry.host}/{path}", digest, allowed, environment)


def create(asked: Order) -> Oci:
    return Oci(parse_source(asked.source), asked)


async def fetch(asked: Order) -> tuple[str, dict[str, bytes]]:
    """Return what a source means, and its files."""
    origin, found = create(asked), dict[str, bytes]()
    async with origin.client:
        resolved = await origin.resolve()
        for index, file in enumerate(resolved.files):
            async with origin.open(index, 0) as download:
                found[file.path] = b"".join([piece async for piece in download.pieces])
            assert hashlib.sha256(found[file.path]).hexdigest() == file.sha256
            assert len(found[file.path]) == file.bytes
    return resolved.name, found


async def push(registry: Registry, repository: str = "team/model", tag: str = "v1") -> str:
    """Push a ModelPack artifact of a model and its weights; return its digest."""
    layers = [
        await registry.push_blob(repository, content, RAW, **{PATH: f"models/{name}"})
        for name, content in (("model.onnx", MODEL), ("weights", WEIGHTS))
    ]
    return await registry.push(repository, tag, layers)


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncIterator[Registry]:
    async with running_registry(tmp_path) as running:
        yield running


async def test_artifact_is_resolved_to_its_digest_and_files(registry: Registry) -> None:
    digest = await push(registry, tag="latest")
    pinned = f"oci://{registry.host}/team/model@{digest}"
    expected = pinned, {"model.onnx": MODEL, "weights": WEIGHTS}
    assert await fetch(order(registry, "team/model")) == expected
    assert await fetch(order(registry, f"team/model@{digest}")) == expected
    assert await fetch(order(registry, "team/model:latest", digest=digest[7:])) == expected


async def test_blob_is_read_from_an_offset(registry: Registry) -> None:
    await push(registry)
    origin = create(order(registry, "team/model:v1"))
    async with origin.client:
        await origin.resolve()
        async with origin.open(1, 1000) as download:
            assert (download.offset, download.bytes) == (1000, len(WEIGHTS))
            assert b"".join([piece async for piece in download.pieces]) == WEIGHTS[1000:]


async def test_other_manifests_are_refused(registry: Registry) -> None:
    digest = await push(registry)
    with pytest.raises(SourceInvalid, match=f"has the digest {digest}"):
        await fetch(order(registry, "team/model:v1", digest=HEX))
    with pytest.raises(SourceNotFound):
        await fetch(order(registry, "team/model:v2"))
    with pytest.raises(SourceNotFound):
        await fetch(order(registry, f"team/model@sha256:{HEX}"))


async def test_manifest_whose_bytes_were_changed_is_refused(registry: Registry) -> None:
    digest = await push(registry)
    stored = registry.folder / "blobs/docker/registry/v2/blobs/sha256" / digest[7:9] / digest[7:] / "data"
    stored.write_bytes(stored.read_bytes() + b" ")
    with pytest.raises(SourceProblem):
        await fetch(order(registry, f"team/model@{digest}"))


async def test_index_is_resolved_to_the_manifest_of_this_machine(registry: Registry) -> None:
    digest = await push(registry)
    one = {"mediaType": registries.IMAGE_MANIFEST, "digest": digest, "size": 1}
    other = one | {"platform": {"os": "unknown", "architecture": "unknown"}}
    for tag, listed in {"one": [one], "attested": [other, one]}.items():
        index = {"schemaVersion": 2, "mediaType": IMAGE_INDEX, "manifests": listed}
        await registry.push_manifest("team/model", tag, index, IMAGE_INDEX)
        name, _ = await fetch(order(registry, f"team/model:{tag}"))
        assert name == f"oci://{registry.host}/team/model@{digest}"


async def test_layer_of_image_is_an_archive(registry: Registry) -> None:
    packed = BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        member = tarfile.TarInfo("models/model.onnx")
        member.size = len(MODEL)
        archive.addfile(member, BytesIO(MODEL))
    kind = "application/vnd.oci.image.layer.v1.tar+gzip"
    layer = await registry.push_blob("team/image", packed.getvalue(), kind)
    await registry.push("team/image", "v1", [layer])
    origin = create(order(registry, "team/image:v1"))
    async with origin.client:
        (file,) = (await origin.resolve()).files
    assert file == RemoteFile(
        layer["digest"], len(packed.getvalue()), layer["digest"][7:], is_needed=True, is_archive=True
    )


async def test_login_gets_a_token_for_each_request(tmp_path: Path) -> None:
    async with running_registry(tmp_path, "token") as registry:
        await push(registry)
        await fetch(order(registry, "team/model:v1"))
        auth = "Basic " + base64.b64encode(b"user:secret").decode()
        assert registry.tokens == [("repository:team/model:pull", auth)] * 3


async def test_confined_process_fetches(tmp_path: Path) -> None:
    async with running_registry(tmp_path, "token") as registry:
        digest = await push(registry)
        found = await to_thread(frames.fetch, order(registry, "team/model:v1"))
    assert found == (
        f"oci://{registry.host}/team/model@{digest}",
        {"model.onnx": MODEL, "weights": WEIGHTS},
    )


async def test_public_repository_takes_an_anonymous_token(tmp_path: Path) -> None:
    async with running_registry(tmp_path, "token") as registry:
        await push(registry, "public/model")
        await fetch(order(registry, "public/model:v1", with_login=False))
        assert set(registry.tokens) == {("repository:public/model:pull", None)}
        await push(registry)
        with pytest.raises(SourceDenied, match="run `docker login"):
            await fetch(order(registry, "team/model:v1", with_login=False))


async def test_credentials_do_not_go_to_a_host_that_is_not_allowed(tmp_path: Path) -> None:
    async with running_registry(tmp_path, "token") as registry:
        await push(registry)
        registry.allowed.clear()
        with pytest.raises(SourceNotAllowed, match="add https://127"):
            await fetch(order(registry, "team/model:v1"))
        assert not registry.tokens


async def test_basic_challenge_is_answered_with_the_login(tmp_path: Path) -> None:
    async with running_registry(tmp_path, "basic") as registry:
        await push(registry)
        _, files = await fetch(order(registry, "team/model:v1"))
        assert files["model.onnx"] == MODEL
        (tmp_path / "config.json").unlink()
        with pytest.raises(SourceDenied, match="docker login"):
            await fetch(order(registry, "team/model:v1", with_login=False))


@pytest.mark.parametrize("path", ["Team/model", "model:", "model@sha256:12", "model:a:b", "-a"])
def test_invalid_reference_is_refused(path: str) -> None:
    with pytest.raises(InvalidSource, match="repository:tag"):
        create(Order(f"oci://ghcr.io/{path}", None, "oci", {}))


@pytest.mark.parametrize(
    ("source", "url"),
    [
        ("oci://docker.io/model", "https://registry-1.docker.io/v2/library/model"),
        ("oci://docker.io/team/model:v1", "https://registry-1.docker.io/v2/team/model"),
        ("oci://ghcr.io/team/model", "https://ghcr.io/v2/team/model"),
    ],
)
def test_docker_hub_has_another_host_and_a_library(source: str, url: str) -> None:
    assert create(Order(source, None, "oci", {}))._url == url


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        (
            ['Bearer realm="https://a/token?x=1,2",service="r",scope="repository:a/b:pull,push"'],
            {
                "bearer": {
                    "realm": "https://a/token?x=1,2",
                    "service": "r",
                    "scope": "repository:a/b:pull,push",
                }
            },
        ),
        (['BASIC Realm="a"'], {"basic": {"realm": "a"}}),
        (['Basic realm="x"', 'Bearer realm = "y"'], {"basic": {"realm": "x"}, "bearer": {"realm": "y"}}),
        (["Negotiate"], {"negotiate": {}}),
    ],
)
def test_parse_challenges(headers: Sequence[str], expected: Mapping[str, Any]) -> None:
    assert parse_challenges(CIMultiDict(("WWW-Authenticate", each) for each in headers)) == expected


AUTH = base64.b64encode(b"user:secret").decode()


@pytest.mark.parametrize(
    ("registry", "config", "credentials", "hint"),
    [
        ("ghcr.io", {"auths": {"ghcr.io": {"auth": AUTH}}}, AUTH, "the login that"),
        ("ghcr.io", {"auths": {"https://ghcr.io/v2/": {"auth": AUTH}}}, AUTH, "the login that"),
        ("docker.io", {"auths": {"https://index.docker.io/v1/": {"auth": AUTH}}}, AUTH, "the login that"),
        ("ghcr.io", {"auths": {"quay.io": {"auth": AUTH}}}, None, "run `docker login ghcr.io`"),
        ("ghcr.io", {"auths": {"ghcr.io": {}}, "credsStore": "desktop"}, None, "credential helper"),
        ("ghcr.io", {"auths": {"ghcr.io": {"auth": AUTH, "identitytoken": "x"}}}, None, "identity token"),
        ("ghcr.io", {"auths": 1}, None, "cannot be read"),
    ],
)
def test_find_credentials(
    registry: str, config: Mapping[str, Any], credentials: str | None, hint: str, tmp_path: Path
) -> None:
    folder = tmp_path / ".docker"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for environment in ({"HOME": str(tmp_path)}, {"DOCKER_CONFIG": str(folder)}):
        found, said = find_credentials(registry, environment)
        assert found == credentials
        assert hint in said
        assert AUTH not in said


def layer(media_type: str, **annotations: str) -> Descriptor:
    return Descriptor(media_type, f"sha256:{HEX}", 1, annotations)


TAR, GZIP = "application/vnd.oci.image.layer.v1.tar", "application/vnd.oci.image.layer.v1.tar+gzip"
DOCKER = "application/vnd.docker.image.rootfs.diff.tar.gzip"
CNCF = "application/vnd.cncf.model"


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([layer("application/octet-stream")], ["model.onnx"]),
        ([layer(TAR, **{TITLE: "model.onnx"}), layer(TAR, **{TITLE: "a/b"})], ["model.onnx", "a/b"]),
        ([layer(RAW, **{PATH: "m/model.onnx"}), layer(RAW, **{PATH: "m/w/1"})], ["model.onnx", "w/1"]),
        ([layer(RAW, **{PATH: "m/model.onnx"}), layer(RAW, **{PATH: "README"})], ["model.onnx"]),
        ([layer(RAW, **{PATH: "a/1.onnx"}), layer(RAW, **{PATH: "b/2.onnx"})], ["a/1.onnx", "b/2.onnx"]),
        ([layer(RAW, **{PATH: "../model.onnx"})], ["model.onnx"]),
        ([layer(RAW, **{PATH: "model.onnx"}), layer(RAW, **{PATH: "../w"})], ["model.onnx", "../w"]),
        ([layer(GZIP), layer(TAR), layer(DOCKER)], [f"archive sha256:{HEX}"] * 3),
        ([layer(GZIP, **{TITLE: "m", "io.deis.oras.content.unpack": "true"})], ["archive m"]),
        ([layer(f"{CNCF}.weight.v1.tar", **{PATH: "m/model.onnx"})], ["archive m/model.onnx"]),
        ([layer(f"{CNCF}.weight.v1.tar+gzip", **{PATH: "m"})], ["archive m"]),
        ([layer("application/vnd.kitops.modelkit.model.v1.tar+gzip")], [f"archive sha256:{HEX}"]),
        (
            [layer(RAW), *(layer(f"{CNCF}.{kind}.v1.tar") for kind in ("doc", "code", "dataset"))],
            ["model.onnx"],
        ),
        ([layer(RAW), layer("application/vnd.kitops.modelkit.docs.v1.tar"), layer(EMPTY)], ["model.onnx"]),
        ([layer(RAW, **{PATH: "model.onnx"}), layer(GZIP)], ["model.onnx", f"archive sha256:{HEX}"]),
    ],
)
def test_list_files(layers: Sequence[Descriptor], expected: Sequence[str]) -> None:
    found = list_files(layers)
    assert [f"{'archive ' if file.is_archive else ''}{file.path}" for file in found] == expected
    assert all(file.sha256 == HEX and file.bytes == 1 for file in found)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "no files"),
        ([layer(EMPTY)], "no files"),
        ([layer(f"{CNCF}.doc.v1.raw", **{PATH: "README"})], "no files"),
        ([layer(RAW), layer(RAW)], "has no path"),
    ],
)
def test_list_files_refuses(layers: Sequence[Descriptor], message: str) -> None:
    with pytest.raises(SourceInvalid, match=message):
        list_files(layers)


@pytest.mark.parametrize("digest", ["v1", "sha512:00", f"sha256:{HEX}/", f"sha256:{HEX}\n", f"SHA256:{HEX}"])
@pytest.mark.parametrize("kind", ["layers", "manifests"])
def test_digest_that_would_not_be_verified_is_refused(kind: str, digest: str) -> None:
    manifest = json.dumps({kind: [{"mediaType": RAW, "digest": digest, "size": 1}]})
    with pytest.raises(msgspec.ValidationError, match="sha256"):
        msgspec.json.decode(manifest, type=OciManifest)


def test_choose_manifest_names_the_digests_to_choose_from() -> None:
    manifests = [layer(registries.IMAGE_MANIFEST), layer(registries.IMAGE_MANIFEST)]
    with pytest.raises(SourceInvalid, match=f"write @ and the digest of one of them: sha256:{HEX}"):
        choose_manifest(manifests)
