"""Artifacts of a real registry, with each kind of authentication, and the rules for their layers."""

import json
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support import models, registries
from support.origins import Asked, answer, serving_site
from support.registries import BASIC, EMPTY, IMAGE_INDEX, TITLE, Auth, Registry, running_registry
from support.sources import in_thread

from loadledger.errors import SourceProblem
from loadledger.sources import oci
from loadledger.sources.names import parse_source
from loadledger.sources.oci import (
    Descriptor,
    Oci,
    OciManifest,
    choose_manifest,
    find_credentials,
    list_files,
    may_have_password,
    parse_challenges,
)

from .conftest import Fetch

MODEL, WEIGHTS = models.add(1).SerializeToString(), os.urandom(3 * 2**20)
FILES = {"model.onnx": MODEL, "weights": WEIGHTS}
RAW = "application/vnd.cncf.model.weight.v1.raw"
PATH = "org.cncf.model.filepath"
HEX = "0" * 64
AUTH = BASIC.removeprefix("Basic ")


Start = Callable[[Auth], Registry]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """A function that returns the module's registry with a kind of authentication."""
    with ExitStack() as registries:

        @cache
        def start(auth: Auth) -> Registry:
            return registries.enter_context(in_thread(running_registry(tmp_path_factory.mktemp(auth), auth)))

        yield start


@pytest.fixture
def auth() -> Auth:
    return "none"


@pytest.fixture
def registry(auth: Auth, running: Start, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry to which the user has logged in."""
    registry = running(auth)
    registry.tokens.clear()
    for name, value in registry.environment().items():
        monkeypatch.setenv(name, value)
    return registry


async def push(registry: Registry, repository: str = "team/model", tag: str = "v1", **others: bytes) -> str:
    """Push a ModelPack artifact of a model and its weights, or of others; return its digest."""
    layers = [
        await registry.push_blob(repository, content, RAW, **{PATH: f"models/{name}"})
        for name, content in (others or FILES).items()
    ]
    return await registry.push(repository, tag, layers)


def stored(registry: Registry, digest: str) -> Path:
    """Return where a registry keeps what has a digest."""
    return registry.folder / "blobs/docker/registry/v2/blobs/sha256" / digest[7:9] / digest[7:] / "data"


async def test_artifact_is_resolved_to_its_digest_and_files(registry: Registry, fetch: Fetch) -> None:
    digest = await push(registry, tag="latest")
    source = f"oci://{registry.host}/team/model"
    expected = f"{source}@{digest}", FILES
    assert await fetch(source) == expected
    assert await fetch(f"{source}@{digest}") == expected
    assert await fetch(f"{source}:latest", digest) == expected


async def test_other_bytes_than_those_of_a_digest_are_refused(registry: Registry, fetch: Fetch) -> None:
    digest, source = (
        await push(registry, "team/damaged", a=b"to be damaged"),
        f"oci://{registry.host}/team/damaged",
    )
    with pytest.raises(SourceProblem, match=rf"has the digest {digest}.*\(digest_mismatch\)"):
        await fetch(f"{source}:v1", f"sha256:{HEX}")
    for name in (f"{source}:v2", f"{source}@sha256:{HEX}"):
        with pytest.raises(SourceProblem, match="source_not_found"):
            await fetch(name)
    described = json.loads(stored(registry, digest).read_bytes())["layers"][0]
    stored(registry, described["digest"]).write_bytes(b"damaged bytes")
    with pytest.raises(SourceProblem, match="digest_mismatch"):
        await fetch(f"{source}:v1")


async def test_manifest_with_other_bytes_is_refused(fetch: Fetch) -> None:
    """A registry that says it has what it has not: the real one checks its own."""
    async with serving_site(lambda _: answer(200, b"{}")) as site:
        with pytest.raises(SourceProblem, match=rf"other bytes than those of sha256:{HEX} \(digest_mismatch"):
            await fetch(f"oci://{site.host}/team/model@sha256:{HEX}")


async def test_index_is_resolved_to_the_manifest_of_this_machine(registry: Registry, fetch: Fetch) -> None:
    digest = await push(registry)
    one = {"mediaType": registries.IMAGE_MANIFEST, "digest": digest, "size": 1}
    other = one | {"platform": {"os": "unknown", "architecture": "unknown"}}
    for tag, listed in {"one": [one], "attested": [other, one]}.items():
        index = {"schemaVersion": 2, "mediaType": IMAGE_INDEX, "manifests": listed}
        await registry.push_manifest("team/model", tag, index, IMAGE_INDEX)
        name, _ = await fetch(f"oci://{registry.host}/team/model:{tag}")
        assert name == f"oci://{registry.host}/team/model@{digest}"


async def test_layer_of_image_is_unpacked(registry: Registry, fetch: Fetch) -> None:
    packed = BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        member = tarfile.TarInfo("models/model.onnx")
        member.size = len(MODEL)
        archive.addfile(member, BytesIO(MODEL))
    kind = "application/vnd.oci.image.layer.v1.tar+gzip"
    await registry.push("team/image", "v1", [await registry.push_blob("team/image", packed.getvalue(), kind)])
    _, files = await fetch(f"oci://{registry.host}/team/image:v1")
    assert files == {"model.onnx": MODEL}


@pytest.mark.parametrize("auth", ["token"])
async def test_login_gets_a_token_for_each_file(registry: Registry, fetch: Fetch) -> None:
    await push(registry)
    await fetch(f"oci://{registry.host}/team/model:v1")
    assert registry.tokens == [("repository:team/model:pull", BASIC)] * 3


@pytest.mark.parametrize("auth", ["token"])
async def test_public_repository_takes_an_anonymous_token(registry: Registry, fetch: Fetch) -> None:
    await push(registry, "public/model")
    await push(registry)
    (registry.folder / "config.json").unlink()
    await fetch(f"oci://{registry.host}/public/model:v1")
    assert set(registry.tokens) == {("repository:public/model:pull", None)}
    with pytest.raises(SourceProblem, match=r"run `docker login.*\(source_denied\)"):
        await fetch(f"oci://{registry.host}/team/model:v1")


@pytest.mark.parametrize("auth", ["token"])
async def test_password_does_not_go_to_another_host(registry: Registry, fetch: Fetch) -> None:
    """The registry of localhost names a token server of 127.0.0.1."""
    await push(registry)
    source = f"oci://{registry.host.replace('127.0.0.1', 'localhost')}/team/model:v1"
    config = {"auths": {parse_source(source).host: {"auth": AUTH}}}
    (registry.folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(SourceProblem, match=r"another host: it is not sent.*\(source_denied\)"):
        await fetch(source)
    assert not registry.tokens


@pytest.mark.parametrize("auth", ["basic"])
async def test_basic_challenge_is_answered_with_the_login(registry: Registry, fetch: Fetch) -> None:
    await push(registry)
    _, files = await fetch(f"oci://{registry.host}/team/model:v1")
    assert files == FILES
    (registry.folder / "config.json").unlink()
    with pytest.raises(SourceProblem, match="docker login"):
        await fetch(f"oci://{registry.host}/team/model:v1")


@pytest.mark.parametrize(
    ("registry", "realm", "expected"),
    [
        ("registry-1.docker.io", "https://auth.docker.io/token", True),
        ("ghcr.io", "https://ghcr.io:8443/token", True),
        ("registry.example.com:5000", "https://example.com/jwt", True),
        ("127.0.0.1:5000", "https://127.0.0.1:5001/token", True),
        ("[::1]:5000", "https://[0::1]/token", True),
        ("localhost:5000", "https://localhost/token", True),
        ("ghcr.io", "http://ghcr.io/token", False),
        ("ghcr.io", "https://ghcr.io.example.com/token", False),
        ("ghcr.io", "https://ghcr.io@example.com/token", False),
        ("ghcr.io", "https://evilghcr.io/token", False),
        ("10.0.0.1", "https://20.0.0.1/token", False),
        ("localhost", "https://a.localhost/token", False),
        ("ghcr.io", "", False),
        ("ghcr.io", "https://[/token", False),
    ],
)
def test_may_have_password(registry: str, realm: str, *, expected: bool) -> None:
    assert may_have_password(registry, realm) is expected


@pytest.mark.parametrize("path", ["Team/model", "model:", "model@sha256:12", "model:a:b", "-a"])
def test_invalid_reference_is_refused(path: str) -> None:
    with pytest.raises(SourceProblem, match=r"repository:tag.*\(invalid_source\)"):
        Oci(parse_source(f"oci://ghcr.io/{path}"), None)


@pytest.mark.parametrize(
    ("source", "url"),
    [
        ("oci://docker.io/model", "https://registry-1.docker.io/v2/library/model"),
        ("oci://docker.io/team/model:v1", "https://registry-1.docker.io/v2/team/model"),
        ("oci://ghcr.io/team/model", "https://ghcr.io/v2/team/model"),
    ],
)
def test_docker_hub_has_another_host_and_a_library(source: str, url: str) -> None:
    assert Oci(parse_source(source), None)._url == url


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            ['Bearer realm="https://a/token?x=1,2",scope="repository:a/b:pull,push"'],
            {"bearer": {"realm": "https://a/token?x=1,2", "scope": "repository:a/b:pull,push"}},
        ),
        (['BASIC Realm="a"'], {"basic": {"realm": "a"}}),
        (['Basic realm="x"', 'Bearer realm = "y"'], {"basic": {"realm": "x"}, "bearer": {"realm": "y"}}),
        (
            ['Basic realm="a, b", Negotiate, Bearer realm="y",service="s"'],
            {"basic": {"realm": "a, b"}, "negotiate": {}, "bearer": {"realm": "y", "service": "s"}},
        ),
        (["Negotiate"], {"negotiate": {}}),
        (
            ["Bearer realm=https://a/token,service=a.example,scope=repository:a/b:pull"],
            {"bearer": {"realm": "https://a/token", "service": "a.example", "scope": "repository:a/b:pull"}},
        ),
        (['Bearer realm="https://a/t", service=s'], {"bearer": {"realm": "https://a/t", "service": "s"}}),
        (["Basic realm=x, Bearer realm=y"], {"basic": {"realm": "x"}, "bearer": {"realm": "y"}}),
        (
            [r'Bearer realm="https://a/token",error="\"a\", \\b",service=s'],
            {"bearer": {"realm": "https://a/token", "error": r'"a", \b', "service": "s"}},
        ),
        (["SCRAM-SHA-256 realm=x"], {"scram-sha-256": {"realm": "x"}}),
        (["Bearer realm="], {"bearer": {}}),
        (['Bearer realm="https://a'], {"bearer": {}}),
        (["Bearer " + "a" * 60_000], {"bearer": {}}),
        (["Bearer " + "a=" * 30_000 + "," * 9], {"bearer": {"a": "a=" * 29_999}}),
    ],
)
def test_parse_challenges(fields: Sequence[str], expected: Mapping[str, Any]) -> None:
    assert parse_challenges(fields) == expected


@pytest.mark.parametrize(
    "piece",
    [",", '"', "\\", '\\"', '",', "a", "a,", "a ", " ", "a=", '="', "a=a,", 'a="', "\t=", "\xff"],
)
def test_challenge_of_a_hostile_registry_is_parsed(piece: str) -> None:
    """The longest line of a header; time that grew with its square would be seen."""
    for begin in ("", "Bearer ", "Bearer realm=", 'Bearer realm="'):
        parse_challenges([begin + piece * (65_536 // len(piece))])


async def test_challenge_without_quotes_is_answered(fetch: Fetch) -> None:
    layer = {"mediaType": RAW, "digest": f"sha256:{sha256(MODEL).hexdigest()}", "size": len(MODEL)}

    def reply(asked: Asked) -> bytes:
        if asked.path.startswith("/token"):
            return answer(200, b'{"token": "short"}')
        if asked.headers.get("authorization") != "Bearer short":
            realm = f"https://{asked.headers['host']}/token"
            return answer(401, www_authenticate=f"Bearer realm={realm},service=x")
        return answer(200, json.dumps({"layers": [layer]}).encode() if "/manifests/" in asked.path else MODEL)

    async with serving_site(reply) as site:
        _, files = await fetch(f"oci://{site.host}/team/model")
        asked = [each.path for each in site.asked]
    assert files == {"model.onnx": MODEL}
    assert "/token?scope=repository%3Ateam%2Fmodel%3Apull&service=x" in asked


@pytest.mark.parametrize("has_login", [False, True])
@pytest.mark.parametrize(
    ("challenge", "defect"),
    [
        ("Negotiate", "has neither Bearer nor Basic: 'Negotiate'"),
        ("Bearer", "names no address that issues a token: 'Bearer'"),
        ("Bearer realm=a,service=b", "names no address that issues a token: 'Bearer realm=a,service=b'"),
    ],
)
async def test_challenge_that_cannot_be_answered_is_named(
    fetch: Fetch,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    challenge: str,
    defect: str,
    has_login: bool,
) -> None:
    async with serving_site(lambda _: answer(401, www_authenticate=challenge)) as site:
        config = {"auths": {site.host: {"auth": AUTH}} if has_login else {}}
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
        with pytest.raises(SourceProblem) as refused:
            await fetch(f"oci://{site.host}/team/model")
    assert refused.value.code == "source_denied"
    assert f"its header WWW-Authenticate {defect}; download the files" in str(refused.value)


HELPER = """#!/bin/sh
read -r registry
case $registry in
    ghcr.io) echo '{"ServerURL": "", "Username": "user", "Secret": "secret"}' ;;
    https://index.docker.io/v1/) echo '{"Username": "<token>", "Secret": "secret"}' ;;
    *) echo 'credentials not found in native keychain'; exit 1 ;;
esac
"""


@pytest.mark.parametrize(
    ("name", "config", "credentials", "hint"),
    [
        ("ghcr.io", {"auths": {"ghcr.io": {"auth": AUTH}}}, AUTH, "the login that"),
        ("ghcr.io", {"auths": {"https://ghcr.io/v2/": {"auth": AUTH}}}, AUTH, "the login that"),
        ("index.docker.io", {"auths": {"https://index.docker.io/v1/": {"auth": AUTH}}}, AUTH, "the login"),
        ("ghcr.io", {"auths": {"quay.io": {"auth": AUTH}}}, None, "run `docker login ghcr.io`"),
        ("ghcr.io", {"auths": {"ghcr.io": {"auth": AUTH, "identitytoken": "x"}}}, None, "identity token"),
        ("ghcr.io", {"auths": 1}, None, "cannot be read"),
        ("ghcr.io", {"auths": {"ghcr.io": {}}, "credsStore": "kept"}, AUTH, "the login that"),
        ("ghcr.io", {"credHelpers": {"ghcr.io": "kept"}, "credsStore": "missing"}, AUTH, "the login that"),
        ("ghcr.io", {"auths": {"ghcr.io": {"auth": "b2xk"}}, "credsStore": "kept"}, AUTH, "the login that"),
        ("quay.io", {"auths": {"quay.io": {"auth": AUTH}}, "credsStore": "kept"}, AUTH, "the login that"),
        ("ghcr.io", {"credHelpers": {"quay.io": "kept"}}, None, "no password for ghcr.io"),
        ("ghcr.io", {"credsStore": "missing"}, None, "docker-credential-missing gave none"),
        ("quay.io", {"credsStore": "kept"}, None, "gave none"),
        ("index.docker.io", {"credsStore": "kept"}, None, "identity token"),
    ],
)
def test_find_credentials(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    name: str,
    config: Mapping[str, Any],
    credentials: str | None,
    hint: str,
) -> None:
    folder, helper = tmp_path / ".docker", tmp_path / "docker-credential-kept"
    folder.mkdir()
    helper.write_text(HELPER, encoding="utf-8")
    helper.chmod(0o700)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("", str(folder)):
        monkeypatch.setenv("DOCKER_CONFIG", variable)
        found, said = find_credentials(name)
        assert found == credentials
        assert hint in said
        assert AUTH not in said


def test_helper_that_does_not_answer_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper = tmp_path / "docker-credential-kept"
    helper.write_text("#!/bin/sh\nexec sleep 1000\n", encoding="utf-8")
    helper.chmod(0o700)
    (tmp_path / "config.json").write_text('{"credsStore": "kept"}', encoding="utf-8")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setattr(oci, "HELPER_S", 0.1)
    assert find_credentials("ghcr.io")[0] is None


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
        ([layer(EMPTY), layer(f"{CNCF}.doc.v1.raw", **{PATH: "README"})], "no files"),
        ([layer(RAW), layer(RAW)], "has no path"),
    ],
)
def test_list_files_refuses(layers: Sequence[Descriptor], message: str) -> None:
    with pytest.raises(SourceProblem, match=message):
        list_files(layers)


@pytest.mark.parametrize("digest", ["v1", "sha512:00", f"sha256:{HEX}/", f"sha256:{HEX}\n", f"SHA256:{HEX}"])
@pytest.mark.parametrize("kind", ["layers", "manifests"])
def test_digest_that_would_not_be_verified_is_refused(kind: str, digest: str) -> None:
    manifest = json.dumps({kind: [{"mediaType": RAW, "digest": digest, "size": 1}]})
    with pytest.raises(msgspec.ValidationError, match="sha256"):
        msgspec.json.decode(manifest, type=OciManifest)


def test_choose_manifest_names_the_digests_to_choose_from() -> None:
    manifests = [layer(registries.IMAGE_MANIFEST), layer(registries.IMAGE_MANIFEST)]
    with pytest.raises(SourceProblem, match=f"write @ and the digest of one of them: sha256:{HEX}"):
        choose_manifest(manifests)
