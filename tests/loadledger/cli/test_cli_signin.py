"""The profile that `serve` writes on a terminal: which one, and when its token is a new one."""

from pathlib import Path

import pytest
from support.http import LocalApi

from events.types import TokenIssued
from loadledger import AsyncClient
from loadledger.cli.chosenmodel import GENERIC_NAMES, name_model, name_source
from loadledger.cli.startup import SignedIn, sign_in_user
from loadledger.profiles import ServerTarget, read_profile, write_profile
from server.auth.tokens import TOKENS
from server.serve import RunningServer


@pytest.fixture
def server(shared: LocalApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunningServer:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("XDG_CONFIG_HOME", "LOADLEDGER_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    return RunningServer(shared.app, shared.url.rstrip("/"), lambda: None)


async def sign_in(server: RunningServer) -> SignedIn:
    found = await sign_in_user(server)
    assert found is not None
    assert read_profile(found.path) == ServerTarget(server.url, found.token)
    return found


async def test_profile_has_an_admins_token_until_that_stops_working(
    server: RunningServer, shared: LocalApi
) -> None:
    first = await sign_in(server)
    async with AsyncClient(server.url, token=first.token) as client:
        await client.resources()
    assert (await sign_in(server)).token == first.token
    [issued] = await shared.data_of(TokenIssued)
    assert (issued.roles, issued.via) == (("admin",), "serve")
    await server.app[TOKENS].revoke(issued.jti, actor="alice")
    assert (await sign_in(server)).token != first.token


async def test_profile_of_another_server_stays(server: RunningServer) -> None:
    first = await sign_in(server)
    write_profile(first.path, ServerTarget("http://127.0.0.1:1", first.token))
    assert (await sign_in(server)).name == "profile"  # this server wrote it, on another port
    other = ServerTarget("https://models.example.org", "a.b.c")
    write_profile(first.path, other)
    local = await sign_in(server)
    assert (local.name, local.options) == ("local", ["--profile", "local"])
    assert read_profile(first.path) == other


async def test_profile_that_cannot_be_read_is_a_warning(
    server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    first = await sign_in(server)
    first.path.chmod(0o644)
    assert await sign_in_user(server) is None
    assert f"chmod 600 {first.path}" in caplog.text


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("silero_vad.onnx", "silero_vad"),
        ("My Model (v2).onnx", "My-Model-v2"),
        ("resnet/model.onnx", "resnet"),
        ("bert/onnx/model.onnx", "bert"),
        ("digits/1/model.onnx", "digits"),
        ("x" * 200 + ".onnx", "x" * 128),
    ],
)
def test_model_has_the_name_of_its_file_or_folder(tmp_path: Path, path: str, name: str) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    assert name_model(file) == name


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("hf://org/repo", "repo"),
        ("hf://org/repo.v2@main/onnx/encoder.onnx", "repo.v2"),
        ("oci://ghcr.io/org/net:v1", "net"),
        (f"oci://ghcr.io/org/net@sha256:{'0' * 64}", "net"),
        ("https://host/a/my%20net.onnx", "my-net"),
        ("https://host/resnet/model.onnx", "resnet"),
        ("s3://bucket/models/bert/3/", "bert"),
    ],
)
def test_model_has_the_name_of_its_source(source: str, name: str) -> None:
    assert name_source(source) == name
    assert name not in GENERIC_NAMES
