"""`add` and `run` with the name of a source, on a real server that fetches from a site here."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.clients import printed, printed_json, refused, run_command
from support.origins import Site
from support.servers import CTRL_C, Server, at_terminal
from support.sources import NAMED, RESOLVED, SHA256, SLOW, environment_of, standing_fetcher, standing_site


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with standing_site() as site:
        yield site


@pytest.fixture(scope="module")
def server(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that may fetch from the site."""
    with standing_fetcher(site, tmp_path_factory.mktemp("sources")) as server:
        yield server


@pytest.fixture(scope="module")
def alice(server: Server) -> dict[str, Any]:
    """The variables of an admin's commands."""
    return {"LOADLEDGER_URL": server.url, "LOADLEDGER_TOKEN": server.api.token("admin")}


def test_add_prints_what_came_and_show_where_from(alice: dict[str, Any]) -> None:
    added = run_command("add", "shown", NAMED, **alice)
    assert re.fullmatch(
        rf"shown version 1: added, 1 file, \d+ bytes\n  from {RESOLVED}\n"
        rf"  model\.onnx: \d+ bytes, sha256 {SHA256}\n"
        r"to load it: loadledger load shown --version 1\n",
        added.stdout,
    )
    assert added.exit_code == 0
    came = rf"^  version 1: from {RESOLVED} \(asked as {NAMED}\), added by alice, \d+\.\ds ago$"
    assert re.search(came, printed("show", "shown", **alice), re.MULTILINE)
    job = json.loads(run_command("add", "shown", NAMED, "--json", **alice).stdout)
    assert (job["kind"], job["status"], job["version"]) == ("add", "completed", 2)
    loaded = run_command("add", "shown", NAMED, "--version", "7", "--load", **alice)
    assert "shown version 7: load completed in " in loaded.stdout
    assert "add completed in" in printed("job", job["id"], "--wait", **alice)
    assert f"source {NAMED}" in printed("job", job["id"], **alice)
    assert re.search(r" add +shown/7 +completed ", printed("jobs", **alice))


def test_add_that_is_refused_or_fails_says_why(alice: dict[str, Any], site: Site) -> None:
    assert "loadledger add m FILE" in refused("add", "m", "hf://other/repo", **alice)
    assert "SHA-256" in refused("add", "m", site.url("/m.onnx"), **alice)
    assert "--digest sha256:0: Must be sha256:" in refused("add", "m", NAMED, "--digest=sha256:0", **alice)
    failed = run_command("add", "m", "hf://org/repo@nowhere", **alice)
    assert (failed.exit_code, failed.stdout) == (1, "")
    assert "the add of m version 1 failed: " in failed.stderr
    assert "(source_not_found)" in failed.stderr


async def test_add_at_terminal_shows_bytes_and_ctrl_c_detaches(alice: dict[str, Any]) -> None:
    with at_terminal("add", "slow", SLOW, environment=alice) as terminal:
        await terminal.until(r"fetching, 2\.0 MB of 4\.0 MB")
        terminal.press(CTRL_C)
        assert await terminal.end() == 130
    [job_id] = re.findall(r"the add of slow version 1 continues as job (\S+)", terminal.plain)
    assert f"loadledger cancel {job_id}" in terminal.plain
    assert "fetching, 2.0 MB of 4.0 MB" in printed("top", **alice)
    assert re.search(r"fetched: +2\.0 MB of 4\.0 MB\n", printed("job", job_id, **alice))
    printed("cancel", job_id, **alice)
    assert run_command("job", job_id, "--wait", **alice).exit_code == 1
    job = printed_json("add", "slow", SLOW, "--no-wait", **alice)
    assert (job["kind"], job["status"]) == ("add", "pending")
    printed("cancel", job["id"], **alice)


async def test_run_at_terminal_starts_server_that_may_fetch(site: Site, tmp_path: Path) -> None:
    environment = environment_of(site, tmp_path) | {"HOME": str(tmp_path), "LOADLEDGER_PORT": "0"}
    del environment["LOADLEDGER_SOURCES"]
    with at_terminal("run", NAMED, environment=environment) as terminal:
        await terminal.until("Ctrl-C stops the server")
        assert "sources: all may be fetched, as LOADLEDGER_SOURCES is not set" in terminal.plain
        assert "repo version 1: loaded" in terminal.plain
        terminal.press(CTRL_C)
        assert await terminal.end() == 0
    with at_terminal("run", NAMED, environment=environment | {"LOADLEDGER_SOURCES": "oci"}) as terminal:
        await terminal.until("source_not_allowed")
        assert await terminal.end() == 1
    assert "sources: all" not in terminal.plain


def test_run_fetches_what_is_not_there_for_certain(alice: dict[str, Any], site: Site) -> None:
    url = site.url("/nets/net.onnx")
    for source, name, version in ((url, "net", 1), (url, "net", 1), (NAMED, "repo", 1), (NAMED, "repo", 2)):
        digest = [f"--digest=sha256:{SHA256}"] if source == url else []
        ran = run_command("run", source, *digest, **alice)
        assert ran.exit_code == 0, ran.output
        assert f"{name} version {version}: loaded\n" in ran.stdout
        assert "curl " in ran.stdout
    pinned_once = [run_command("run", RESOLVED, "--name", "pinned", **alice).stdout for _ in range(2)]
    assert ["pinned version 1: added\n" in each for each in pinned_once] == [True, False]
    assert all("pinned version 1: loaded\n" in each for each in pinned_once)
    failed = run_command("run", f"{RESOLVED}/none.onnx", **alice)
    assert (failed.exit_code, "the add of repo/3 failed" in failed.stderr) == (1, True)
