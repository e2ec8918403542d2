"""The command `events`: it lists and follows a file or a server, and says what is wrong."""

import asyncio
import hashlib
import json
import os
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from support import models
from support.events import body_of, opened, write
from support.http import LIMIT_S
from support.ledgers import SIGN, told_history, write_ledger
from support.models import save
from support.process import APART, MODULE, clean_environment, serving

from events.archive import archive
from events.clock import utc_now
from loadledger.cli.main import main
from server.app import LEDGER
from server.config import Config


def run(*arguments: str, **environment: str) -> Result:
    """Run the command with this environment and nothing of ours beside it."""
    ours = dict.fromkeys(("DATA", "TOKEN", "URL", "PROFILE", "CA"))
    nobody = {f"LOADLEDGER_{name}": value for name, value in ours.items()} | {"HOME": "/nowhere"}
    return CliRunner().invoke(main, ["events", *arguments], env={**nobody, **environment})


def listed(*arguments: str) -> list[int]:
    """Return the positions of what is listed; nothing else may be printed."""
    result = run(*arguments, "--json")
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    return [json.loads(line)["position"] for line in result.stdout.splitlines()]


def refused(*arguments: str, **environment: str) -> str:
    """Run the command, which must end with 2 and words on stderr alone; return them."""
    result = run(*arguments, **environment)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr


def fill(data: Path, number: int) -> None:
    """Make a ledger with so many events."""

    async def make() -> None:
        async with opened(data / LEDGER) as log:
            await write(log, number)

    asyncio.run(make())


# A file


def test_a_file_is_listed_by_lines_for_people_and_as_it_is_stored(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    people = run("--data", str(tmp_path)).stdout.splitlines()
    assert len(people) == 3
    for word in ("LoadStarted", "digits/1", "system", "attempt 2"):
        assert word in people[1]
    before = bytes(32)
    for line in run(f"--data={tmp_path}", "--json").stdout_bytes.splitlines():
        before = hashlib.sha256(before + body_of(line)).digest()
        assert json.loads(line)["hash"] == before.hex()


def test_a_list_of_many_pages_is_whole_and_filters_apply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.ledger.source.PAGE", 3)
    fill(tmp_path, 10)
    data = f"--data={tmp_path}"
    assert listed(data) == list(range(1, 11))
    assert listed(data, "--after=4", "--until=8") == [5, 6, 7, 8]
    assert listed(data, "--tail=2") == [9, 10]
    assert listed(data, "--tail=20") == list(range(1, 11))
    assert listed(data, "--since=9") == [9, 10]
    assert listed(data, "--since=2099-01-01T00:00:00Z") == []
    assert listed(data, "--type=LoadStarted", "--model=digits", "--job=job", "--actor=system") == list(
        range(1, 11)
    )
    assert listed(data, "--type=LoadFailed", "--type=ModelLoaded") == []
    assert listed(data, "digits", "--tail=2") == [9, 10]
    assert listed(data, "other") == []


def test_the_data_directory_may_come_from_the_environment(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    assert run(LOADLEDGER_DATA=str(tmp_path)).stdout.count("\n") == 1


def test_what_cannot_be_is_told_with_what_to_do(tmp_path: Path) -> None:
    data = f"--data={tmp_path}"
    assert "there is no ledger in" in refused(data)
    fill(tmp_path, 1)
    assert "is the server running" in refused(LOADLEDGER_URL="http://127.0.0.1:1")
    assert "not both" in refused(data, "--url=http://127.0.0.1:1")
    assert "--until" in refused(data, "--follow", "--until=3")
    assert "http://" in refused("--url=localhost:8080", LOADLEDGER_TOKEN="x")
    assert "--tail" in refused(data, "--tail=1", "--after=0")
    assert "none of LoadRequested" in refused(data, "--type=Load")
    assert "position 1" in refused(data, "--after=2")
    assert "2026-01-31T14:02:00Z" in refused(data, "--since=yesterday")
    assert "cannot be reached" in refused("--url=http://127.0.0.1:1", LOADLEDGER_TOKEN="x")
    assert "cannot be reached" in refused("--url=http://127.0.0.1:1", "-f", LOADLEDGER_TOKEN="x")


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_the_command_explains_itself(flag: str) -> None:
    result = run(flag)
    assert (result.exit_code, result.stderr) == (0, "")
    for word in ("--follow", "--since", "LOADLEDGER_URL", "LOADLEDGER_DATA"):
        assert word in result.stdout


# Following


@asynccontextmanager
async def command(
    *arguments: str, environment: Mapping[str, str] | None = None
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run the installed command as a process; it is killed in the end."""
    process = await asyncio.create_subprocess_exec(
        *(*MODULE, "events", "--json", *arguments),
        env=clean_environment() | dict(environment or {}),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=2**22,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def position(process: asyncio.subprocess.Process) -> int:
    assert process.stdout is not None
    async with asyncio.timeout(LIMIT_S):
        line = await process.stdout.readline()
    assert line, await process.stderr.read() if process.stderr else b""
    number: int = json.loads(line)["position"]
    return number


async def interrupted(process: asyncio.subprocess.Process) -> tuple[int, bytes, bytes]:
    process.send_signal(signal.SIGINT)
    async with asyncio.timeout(LIMIT_S):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out, err


async def test_a_file_is_followed_while_it_is_written_and_an_interrupt_ends_it_quietly(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path / LEDGER) as log:
        await write(log, 3)
        async with command(f"--data={tmp_path}", "--follow", "--after=1") as process:
            assert [await position(process) for _ in range(2)] == [2, 3]
            await write(log, 2, first=4)
            assert [await position(process) for _ in range(2)] == [4, 5]
            assert await interrupted(process) == (130, b"", b"")


async def test_following_since_a_moment_lists_first_and_then_goes_on(tmp_path: Path) -> None:
    async with opened(tmp_path / LEDGER) as log:
        await write(log, 4)
        async with command(f"--data={tmp_path}", "--follow", "--since=3") as process:
            assert [await position(process) for _ in range(2)] == [3, 4]
            await write(log, 1, first=5)
            assert await position(process) == 5


async def test_a_server_is_listed_and_followed_across_its_restart(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    save(models.add(1), repository, "m")
    config = Config(repository=repository, data=tmp_path / "data")
    async with serving(config, APART) as server:
        port = server.url.rpartition(":")[2]
        environment = {"LOADLEDGER_TOKEN": server.api.token("audit"), "HOME": str(tmp_path)}
        await server.api.load("m")
        async with command(f"--url={server.url}", environment=environment) as listing:
            out, err = await listing.communicate()
            events = [json.loads(line) for line in out.splitlines()]
            assert [event["position"] for event in events] == [1, 2, 3, 4]
            assert (listing.returncode, err) == (0, b"")
        async with command(f"--url={server.url}", "-f", "--after=2", environment=environment) as process:
            assert [await position(process) for _ in range(2)] == [3, 4]
            assert await server.stop() == 0
            async with serving(config, APART, f"--port={port}") as again:
                await again.api.load("m")
                found = [await position(process) for _ in range(4)]
                assert found == [5, 6, 7, 8]
                code, _, err = await interrupted(process)
                assert code == 130
                assert err.count(b"trying again") <= 1
    assert "LOADLEDGER_TOKEN" not in os.environ


async def test_a_token_that_may_not_is_told(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    config = Config(repository=repository, data=tmp_path / "data")
    async with serving(config) as server:
        for token, words in ((server.api.token("predict"), b"403"), ("nonsense", b"401")):
            environment = {"LOADLEDGER_TOKEN": token}
            for flags in ((), ("--follow",)):
                async with command(f"--url={server.url}", *flags, environment=environment) as process:
                    out, err = await process.communicate()
                    assert (process.returncode, out) == (2, b"")
                    assert words in err


async def test_what_was_archived_is_told_with_where_to_begin_again(tmp_path: Path) -> None:
    (tmp_path / "repository").mkdir()
    config = Config(repository=tmp_path / "repository", data=tmp_path / "data")
    config.data.mkdir(mode=0o700)
    await write_ledger(config.data / LEDGER)
    archive(config.data / LEDGER, "9", tmp_path / "archive.gz", SIGN, utc_now())
    head = len(told_history()) + 1
    async with serving(config) as server:
        environment = {"LOADLEDGER_TOKEN": server.api.token("audit")}
        for source in (f"--url={server.url}", f"--data={config.data}"):
            for flags in (("--after=3",), ("--follow", "--after=3")):
                async with command(source, *flags, environment=environment) as process:
                    out, err = await process.communicate()
                    assert (process.returncode, out) == (2, b"")
                    assert b"events up to 8 are archived: begin again with after=8" in err
                    assert (b"answered 410" in err) == source.startswith("--url")
            async with command(source, "--after=8", environment=environment) as process:
                out, _ = await process.communicate()
                found = [json.loads(line)["position"] for line in out.splitlines()]
                assert found == list(range(9, found[-1] + 1))
                assert found[-1] > head
