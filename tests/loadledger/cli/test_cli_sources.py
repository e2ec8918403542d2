"""`add` and `run` with the name of a source, on a real server, and a hub and a site here."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.clients import printed, refused, run_command
from support.http import LocalApi
from support.origins import HANG, Asked, RangedFile, Site, answer
from support.servers import CTRL_C, at_terminal
from support.sources import MODEL, NAMED, RESOLVED, SHA256, environment_of, standing_site

from loadledger.sources.terminal import print_upload_size


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with standing_site() as site:
        yield site


@pytest.fixture
def alice(server: LocalApi, site: Site, tmp_path: Path) -> dict[str, Any]:
    """The variables of an admin's commands."""
    own = {"LOADLEDGER_URL": server.url, "LOADLEDGER_TOKEN": server.token("admin")}
    return own | environment_of(site, tmp_path)


def test_add_that_fails_says_why_and_sends_nothing(alice: dict[str, Any], site: Site) -> None:
    assert "(source_not_found)" in refused("add", "m", site.url("/none.onnx"), **alice)
    wrong = ("add", "m", site.url("/files/m.onnx"), "--digest", f"sha256:{'0' * 64}")
    assert "they were deleted (digest_mismatch)" in refused(*wrong, **alice)
    assert "unknown_model" in refused("show", "m", **alice)
    asked = len(site.asked)
    away = alice | {"LOADLEDGER_URL": "http://127.0.0.1:9"}
    assert "cannot be reached" in refused("add", "m", site.url("/files/m.onnx"), **away)
    assert len(site.asked) == asked


def test_into_writes_a_folder_and_asks_no_server(alice: dict[str, Any], site: Site, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    away = alice | {"LOADLEDGER_URL": "http://127.0.0.1:9"}
    into = ("--into", str(tmp_path / "models"), "--json")
    done = run_command("add", "m", site.url("/files/m.onnx"), *into, **away)
    assert json.loads(done.stdout)["files"] == [{"path": "model.onnx", "bytes": len(MODEL), "sha256": SHA256}]
    assert (tmp_path / "models/m/1/model.onnx").read_bytes() == MODEL


async def test_add_at_terminal_shows_bytes_and_goes_on_after_ctrl_c(alice: dict[str, Any]) -> None:
    half, held = len(MODEL) // 2, [True]

    def reply(asked: Asked) -> bytes:
        if held[0]:
            return answer(200, MODEL[:half], content_length=len(MODEL)) + HANG
        return RangedFile(MODEL)(asked)

    with standing_site(reply) as slow:
        command = ("add", "hung", slow.url("/m.onnx"), "--digest", f"sha256:{SHA256}", "--version", "7")
        with at_terminal(*command, environment=alice) as terminal:
            await terminal.until(r"hung: downloading")
            await terminal.until(r"[12]\.\d/4\.\d MB")
            terminal.press(CTRL_C)
            assert await terminal.end() == 130
        assert "interrupted: the same command goes on where this one was" in terminal.plain
        held[0] = False
        assert "hung version 7: added" in printed(*command, **alice)
        [begun] = [each.headers["range"] for each in slow.asked if "range" in each.headers]
    assert 0 < int(begun.removeprefix("bytes=").removesuffix("-")) <= half


def test_run_downloads_what_is_not_there_for_certain(alice: dict[str, Any], site: Site) -> None:
    url, digest = site.url("/files/nets/net.onnx"), f"--digest=sha256:{SHA256}"
    for added in (True, False):
        asked = len(site.asked)
        ran = run_command("run", url, digest, **alice)
        assert ran.exit_code == 0, ran.output
        assert ("net version 1: added\n" in ran.stdout) is added
        assert "net version 1: loaded\n" in ran.stdout
        assert "curl " in ran.stdout
        assert (len(site.asked) > asked) is added
    assert "net version 1: loaded" in printed("run", url, **alice)  # the same bytes, which the server has


async def test_run_at_terminal_brings_the_model_to_its_own_server(site: Site, tmp_path: Path) -> None:
    environment: dict[str, Any] = environment_of(site, tmp_path) | {
        "HOME": str(tmp_path),
        "LOADLEDGER_PORT": "0",
    }
    with at_terminal("run", NAMED, environment=environment) as terminal:
        await terminal.until("Ctrl-C stops the server")
        assert "repo version 1: added" in terminal.plain
        assert "repo version 1: loaded" in terminal.plain
        terminal.press(CTRL_C)
        assert await terminal.end() == 0
    assert "source_not_found" in refused("run", f"{RESOLVED}/none.onnx", **environment)


@pytest.mark.parametrize(
    ("url", "is_far"),
    [
        *((f"http://{host}:8080", False) for host in ("localhost", "127.0.0.1", "127.1.2.3", "[::1]")),
        *((f"https://{host}", True) for host in ("models.example.com", "10.0.0.1", "[fd00::1]")),
    ],
)
def test_upload_to_another_machine_says_its_size(
    capsys: pytest.CaptureFixture[str], url: str, *, is_far: bool
) -> None:
    print_upload_size(url, 1_200_000_000)
    assert capsys.readouterr().err == (f"loadledger: sending 1.20 GB to {url}\n" if is_far else "")
