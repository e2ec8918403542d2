import os
import subprocess
import sys
from asyncio import to_thread
from collections.abc import AsyncIterator, Iterator, Mapping
from http import HTTPStatus
from pathlib import Path

import pytest
from support.clouds import S3, FakeCloud, make_server_certificate, running_fake_cloud, running_s3
from support.frames import fetch, read_frames

from runtime.fetch import cloud as cloud_module
from runtime.fetch.cloud import Cloud, shorten
from runtime.fetch.messages import PIECE_BYTES, Failed, Order, RemoteFile, Resolved, encode_message
from runtime.fetch.origin import (
    SourceChanged,
    SourceDenied,
    SourceInvalid,
    SourceNotFound,
    SourceProblem,
    SourceUnreachable,
)
from runtime.fetch.sources import parse_source

MODEL, WEIGHTS = b"model", os.urandom(3 * PIECE_BYTES + 5)
KEYS = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """Undo what an origin does to the environment of its process."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with running_s3() as running:
        yield running


@pytest.fixture
async def fake() -> AsyncIterator[FakeCloud]:
    async with running_fake_cloud() as running:
        running.objects = {"m/model.onnx": MODEL, "m/w": WEIGHTS, "m/model.sig": b"s", "other": b""}
        yield running


def create(
    source: str, environment: Mapping[str, str], *, digest: str | None = None, allowed: str = "all"
) -> Cloud:
    return Cloud(parse_source(source), Order(source, digest, allowed, dict(environment)))


def variables(url: str, scheme: str = "s3") -> dict[str, str]:
    """Return the variables with which a scheme's client goes to a server."""
    return {
        "s3": {"AWS_ENDPOINT_URL": url, "AWS_ALLOW_HTTP": "true"},
        "gs": {"GOOGLE_BASE_URL": url, "GOOGLE_ALLOW_HTTP": "true"},
        "az": {
            "AZURE_STORAGE_ENDPOINT": url,
            "AZURE_ALLOW_HTTP": "true",
            "AZURE_STORAGE_ACCOUNT_NAME": "account",
        },
    }[scheme]


async def read(origin: Cloud, index: int, offset: int = 0) -> bytes:
    async with origin.open(index, offset) as download:
        assert download.offset == offset
        pieces = [piece async for piece in download.pieces]
    assert all(0 < len(piece) <= PIECE_BYTES for piece in pieces)
    return b"".join(pieces)


async def resolve(source: str, environment: Mapping[str, str]) -> Resolved:
    origin = create(source, environment)
    async with origin.client:
        return await origin.resolve()


@pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
async def test_object_and_what_lies_beside_it(scheme: str, fake: FakeCloud) -> None:
    origin = create(f"{scheme}://models/m/model.onnx", variables(fake.url, scheme), digest="0" * 64)
    resolved = await origin.resolve()
    assert set(resolved.files) == {
        RemoteFile("model.onnx", len(MODEL), "0" * 64, is_needed=True),
        RemoteFile("w", len(WEIGHTS), is_needed=False),
        RemoteFile("model.sig", 1, is_needed=False),
    }
    contents = {file.path: await read(origin, index) for index, file in enumerate(resolved.files)}
    assert contents == {"model.onnx": MODEL, "w": WEIGHTS, "model.sig": b"s"}
    (weights,) = (index for index, file in enumerate(resolved.files) if file.path == "w")
    assert await read(origin, weights, 1000) == WEIGHTS[1000:]
    fake.objects["m/w"] = b"other"
    with pytest.raises(SourceChanged):
        await read(origin, weights)
    assert all(authorization is None for _, _, authorization in fake.requests)


async def test_folder_needs_the_model_and_its_companions(s3: S3) -> None:
    s3.create_bucket("folders")
    for name in ("model.onnx", "model.onnx.sig", "w/1", "w/2.sig", "README", "empty"):
        s3.put(f"folders/m/{name}", b"" if name == "empty" else name.encode())
    origin = create("s3://folders/m/", variables(s3.url) | KEYS)
    resolved = await origin.resolve()
    assert resolved.name.startswith('s3://folders/m/model.onnx#etag="')
    assert {file.path: file.is_needed for file in resolved.files} == {
        **dict.fromkeys(("model.onnx", "model.onnx.sig"), True),
        **dict.fromkeys(("w/1", "w/2.sig", "README", "empty"), False),
    }
    for index, file in enumerate(resolved.files):
        assert await read(origin, index) == (b"" if file.path == "empty" else file.path.encode())


async def test_versioned_object_stays_what_it_was(s3: S3) -> None:
    s3.create_bucket("versions", versioned=True)
    s3.put("versions/model.onnx", MODEL)
    origin = create("s3://versions/model.onnx", variables(s3.url) | KEYS)
    resolved = await origin.resolve()
    assert resolved.name.startswith("s3://versions/model.onnx?versionId=")
    s3.put("versions/model.onnx", b"newer")
    assert await read(origin, 0) == MODEL
    assert (await resolve("s3://versions/model.onnx", variables(s3.url) | KEYS)).name != resolved.name


async def test_key_is_percent_decoded_once(s3: S3) -> None:
    s3.create_bucket("keys")
    s3.put("keys/a%20b/%C3%BC%2520.onnx", MODEL)
    origin = create("s3://keys/a%20b/%C3%BC%2520.onnx", variables(s3.url) | KEYS)
    resolved = await origin.resolve()
    assert [file.path for file in resolved.files] == ["ü%20.onnx"]
    assert await read(origin, 0) == MODEL


@pytest.mark.parametrize(
    ("source", "problem", "message"),
    [
        ("s3://models/m/nothing.onnx", SourceNotFound, "(?i)not found"),
        ("s3://nothing/model.onnx", SourceNotFound, "(?i)not found"),
        ("s3://models/nothing/", SourceInvalid, "has none"),
        ("s3://models/two/", SourceInvalid, "has a.onnx, b.onnx"),
    ],
)
async def test_source_without_a_model(
    source: str, problem: type[SourceProblem], message: str, fake: FakeCloud
) -> None:
    fake.objects |= {"two/a.onnx": b"", "two/b.onnx": b""}
    with pytest.raises(problem, match=message):
        await resolve(source, variables(fake.url))


async def test_denied_listing_leaves_the_object_alone(fake: FakeCloud) -> None:
    fake.listing = HTTPStatus.FORBIDDEN
    resolved = await resolve("s3://models/m/model.onnx", variables(fake.url))
    assert [file.path for file in resolved.files] == ["model.onnx"]
    with pytest.raises(SourceDenied, match="anonymous"):
        await resolve("s3://models/m/", variables(fake.url))


async def test_listing_is_limited(fake: FakeCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloud_module, "MAX_OBJECTS", 2)
    with pytest.raises(SourceInvalid, match="more than 2 objects"):
        await resolve("s3://models/m/model.onnx", variables(fake.url))


async def test_signature_is_made_with_the_orders_keys(fake: FakeCloud) -> None:
    await resolve("s3://models/m/model.onnx", variables(fake.url) | KEYS)
    assert all("Credential=a/" in str(authorization) for _, _, authorization in fake.requests)


METADATA = [
    ("s3", {"AWS_METADATA_ENDPOINT": "{url}"}),
    (
        "s3",
        {
            "AWS_CONTAINER_CREDENTIALS_FULL_URI": "{url}/ecs",
            "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": "{file}",
        },
    ),
    ("az", {"AZURE_MSI_ENDPOINT": "{url}/msi", "AZURE_CLIENT_ID": "me"}),
    ("az", {"AZURE_MSI_ENDPOINT": "{url}/msi", "AZURE_CREDENTIAL_TYPE": "managed_identity"}),
    ("gs", {}),
]


@pytest.mark.parametrize(("scheme", "given"), METADATA)
@pytest.mark.parametrize("allowed", ["all", "all cloud-metadata"])
async def test_metadata_service_is_asked_only_if_allowed(  # noqa: PLR0917 - fixtures
    scheme: str,
    given: Mapping[str, str],
    allowed: str,
    fake: FakeCloud,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    token = tmp_path / "token"
    token.write_text("token", encoding="utf-8")
    async with running_fake_cloud() as metadata:
        monkeypatch.setenv("GCE_METADATA_HOST", metadata.url.removeprefix("http://"))
        added = {name: value.format(url=metadata.url, file=token) for name, value in given.items()}
        source, environment = f"{scheme}://models/m/model.onnx", variables(fake.url, scheme) | added
        origin = create(source, environment, allowed=allowed)
        is_allowed = allowed != "all"
        if is_allowed:
            with pytest.raises(SourceProblem):
                await origin.resolve()
        else:
            await origin.resolve()
        assert bool(metadata.requests) == is_allowed
        assert bool(fake.requests) != is_allowed


async def test_proxies_of_the_order_are_not_used(fake: FakeCloud) -> None:
    proxies = dict.fromkeys(("http_proxy", "HTTP_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
    assert (await resolve("s3://models/m/model.onnx", variables(fake.url) | proxies)).files


async def test_server_of_a_private_authority_is_trusted_if_named(tmp_path: Path) -> None:
    certificate, tls = make_server_certificate(tmp_path)
    async with running_fake_cloud(tls) as fake:
        fake.objects = {"model.onnx": MODEL}
        named = variables(fake.url) | {"SSL_CERT_FILE": str(certificate)}
        assert (await resolve("s3://models/model.onnx", named)).files
        with pytest.raises(SourceUnreachable):
            await resolve("s3://models/model.onnx", variables(fake.url))


async def test_confined_process_fetches(s3: S3) -> None:
    s3.create_bucket("confined")
    s3.put("confined/m/model.onnx", MODEL)
    s3.put("confined/m/weights", WEIGHTS)
    order = Order("s3://confined/m/", None, "s3", variables(s3.url) | KEYS)
    found = await to_thread(fetch, order)
    assert not isinstance(found, Failed)
    assert found[1] == {"model.onnx": MODEL, "weights": WEIGHTS}


async def test_confined_process_reads_the_token_of_a_web_identity(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("the-token", encoding="utf-8")
    certificate, tls = make_server_certificate(tmp_path)
    async with running_fake_cloud(tls) as fake:
        environment = variables(fake.url) | {
            "AWS_WEB_IDENTITY_TOKEN_FILE": str(tmp_path / "token"),
            "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/models",
            "AWS_ENDPOINT_URL_STS": f"{fake.url}/sts/",
            "SSL_CERT_FILE": str(certificate),
        }
        failed = await to_thread(fetch, Order("s3://models/model.onnx", None, "s3", environment))
        assert isinstance(failed, Failed)
        assert [path for _, path, _ in fake.requests] == ["/sts/"]
        assert fake.queries[0]["WebIdentityToken"] == "the-token"
        assert "the-token" not in failed.message


def test_missing_package_is_named() -> None:
    script = "import sys; sys.modules['obstore'] = None; from runtime.fetch.main import main; main()"
    order = encode_message(Order("s3://models/model.onnx", None, "s3", {}))
    done = subprocess.run((sys.executable, "-c", script), input=order, stdout=subprocess.PIPE, check=True)
    (failed,) = read_frames(done.stdout)
    assert isinstance(failed, Failed)
    assert failed.code == "not_supported"
    assert "loadledger[cloud]" in failed.message


def test_invalid_variables_are_refused() -> None:
    with pytest.raises(SourceInvalid, match="Account must be specified"):
        create("az://models/model.onnx", {})


def test_error_has_no_query_and_no_details() -> None:
    text = "failed GET https://host/path?sig=secret in 1s\n\nDebug source:\nsecret"
    assert shorten(ValueError(text)) == "failed GET https://host/path in 1s"
