"""Objects of cloud stores: moto's S3, and a small server that answers as all three clouds do."""

import os
from collections.abc import AsyncIterator, Iterator, Mapping
from http import HTTPStatus
from pathlib import Path

import pytest
from support.clouds import S3, FakeCloud, make_server_certificate, running_fake_cloud, running_s3
from support.uploads import FILES, MODEL

from loadledger.errors import SourceProblem
from loadledger.sources import cloud
from loadledger.sources.fetch import resolve_source

from .conftest import Fetch

KEYS = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with running_s3() as running:
        yield running


@pytest.fixture
async def fake(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeCloud]:
    async with running_fake_cloud() as running:
        running.objects = {f"m/{path}": content for path, content in FILES.items()}
        set_variables(monkeypatch, running.url)
        yield running


def set_variables(monkeypatch: pytest.MonkeyPatch, url: str, **others: str) -> None:
    """Let the clients of all clouds go to a server, with no variables but these."""
    for name in [*os.environ]:
        if name.startswith(("AWS_", "GOOGLE_", "AZURE_")):
            monkeypatch.delenv(name)
    ours = {"AWS_ENDPOINT_URL": url, "GOOGLE_BASE_URL": url, "AZURE_STORAGE_ENDPOINT": url}
    ours |= {f"{prefix}_ALLOW_HTTP": "true" for prefix in ("AWS", "GOOGLE", "AZURE")}
    ours |= {"AZURE_STORAGE_ACCOUNT_NAME": "account"}
    for name, value in (ours | others).items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
async def test_object_comes_with_the_files_that_it_names(scheme: str, fake: FakeCloud, fetch: Fetch) -> None:
    for source in (f"{scheme}://models/m/net.onnx", f"{scheme}://models/m/"):
        resolved, files = await fetch(source)
        assert resolved.startswith(f"{scheme}://models/m/net.onnx#")
        assert files == FILES
    assert all(authorization is None for _, _, authorization in fake.requests)


async def test_folder_needs_the_model_and_its_signatures(
    s3: S3, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_variables(monkeypatch, s3.url, **KEYS)
    s3.create_bucket("folders", versioned=True)
    for name in ("model.onnx", "model.onnx.sig", "w/1", "w/2.sig", "README"):
        s3.put(f"folders/m%20x/{name}", MODEL if name == "model.onnx" else b"")
    resolved, files = await fetch("s3://folders/m%20x/")
    assert resolved.startswith("s3://folders/m%20x/model.onnx#versionId=")
    assert files == {"model.onnx": MODEL, "model.onnx.sig": b""}
    s3.put("folders/m%20x/model.onnx", MODEL)
    assert (await fetch("s3://folders/m%20x/"))[0] != resolved


async def test_object_that_changes_meanwhile_is_refused(fake: FakeCloud, fetch: Fetch) -> None:
    fake.changes_once_seen = True
    with pytest.raises(SourceProblem, match=r"\(source_changed\)$"):
        await fetch("s3://models/m/net.onnx")


@pytest.mark.parametrize(
    ("source", "code", "said"),
    [
        ("s3://models/m/nothing.onnx", "source_not_found", "(?i)not found"),
        ("s3://nothing/model.onnx", "source_not_found", "(?i)not found"),
        ("s3://models/nothing/", "source_invalid", "has none"),
        ("s3://models/two", "source_invalid", "s3://models/two is a folder.* write s3://models/two/"),
        ("gs://models/two", "source_invalid", "is a folder.* write gs://models/two/"),
        ("az://models/two", "source_invalid", "is a folder.* write az://models/two/"),
        ("s3://models/two/", "source_invalid", "has a.onnx, b.onnx"),
    ],
)
async def test_source_without_a_model(
    fake: FakeCloud, fetch: Fetch, source: str, code: str, said: str
) -> None:
    fake.objects |= {"two/a.onnx": b"", "two/b.onnx": b""}
    with pytest.raises(SourceProblem, match=said) as refused:
        await fetch(source)
    assert refused.value.code == code


async def test_denied_listing_leaves_the_object_alone(fake: FakeCloud, fetch: Fetch) -> None:
    fake.listing, fake.objects["one.onnx"] = HTTPStatus.FORBIDDEN, MODEL
    assert (await fetch("s3://models/one.onnx"))[1] == {"one.onnx": MODEL}
    with pytest.raises(SourceProblem, match=r"requests are anonymous \(source_denied\)"):
        await fetch("s3://models/m/")


async def test_listing_is_limited(fake: FakeCloud, fetch: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloud, "MAX_OBJECTS", 1)
    assert fake.objects
    with pytest.raises(SourceProblem, match="more than 1 objects"):
        await fetch("s3://models/m/net.onnx")


METADATA = [
    ("s3", {"AWS_METADATA_ENDPOINT": "{url}"}),
    ("az", {"AZURE_MSI_ENDPOINT": "{url}/msi", "AZURE_CLIENT_ID": "me"}),
    ("gs", {}),
]


@pytest.mark.parametrize(("scheme", "given"), METADATA)
async def test_no_metadata_service_is_asked(
    fake: FakeCloud, fetch: Fetch, monkeypatch: pytest.MonkeyPatch, scheme: str, given: Mapping[str, str]
) -> None:
    async with running_fake_cloud() as metadata:
        monkeypatch.setenv("GCE_METADATA_HOST", metadata.url.removeprefix("http://"))
        added = {name: value.format(url=metadata.url) for name, value in given.items()}
        set_variables(monkeypatch, fake.url, **added)
        await fetch(f"{scheme}://models/m/net.onnx")
        assert not metadata.requests


async def test_keys_sign_requests(fake: FakeCloud, fetch: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, fake.url, **KEYS)
    await fetch("s3://models/m/net.onnx")
    assert all("Credential=a/" in str(authorization) for _, _, authorization in fake.requests)


async def test_server_of_a_private_authority_is_trusted_if_named(
    fetch: Fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, tls = make_server_certificate(tmp_path)
    async with running_fake_cloud(tls) as fake:
        fake.objects = {"model.onnx": MODEL}
        set_variables(monkeypatch, fake.url, SSL_CERT_FILE=str(certificate))
        assert (await fetch("s3://models/model.onnx"))[1] == {"model.onnx": MODEL}


def test_invalid_variables_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    set_variables(monkeypatch, "http://127.0.0.1:9")
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME")
    with pytest.raises(SourceProblem, match="Account must be specified"):
        resolve_source("az://models/model.onnx")


def test_error_has_no_query_and_no_details() -> None:
    text = "failed GET https://host/path?sig=secret in 1s\n\nDebug source:\nsecret"
    assert cloud._shorten(ValueError(text)) == "failed GET https://host/path in 1s"
