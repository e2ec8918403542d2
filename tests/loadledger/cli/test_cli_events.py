"""`loadledger events`: lists and follows a file or a server, and says what is wrong."""

import asyncio
import hashlib
import json
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from support import models
from support.history import opened, write
from support.http import LIMIT_S
from support.ledgers import SIGN, body_of, sample_history, write_ledger
from support.models import save
from support.servers import APART, MODULE, clean_environment, serving

from events.audit.archive import archive
from events.clock import utc_now
from events.datalock import LEDGER
from loadledger.cli.main import main
from server.config import Config

UNSET = {f"LOADLEDGER_{name}": None for name in ("DATA", "TOKEN", "URL", "PROFILE", "CA")}


def run(*arguments: str, **environment: str) -> Result:
    """Run the command with this environment and nothing of ours beside it."""
    return CliRunner().invoke(main, ["events", *arguments], env={**UNSET, "HOME": "/nowhere", **environment})


def refused(*arguments: str, **environment: str) -> str:
    """Return the reason of a command that must end with 2 and print nothing else."""
    result = run(*arguments, **environment)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert "Traceback" not in result.stderr
    return result.stderr


def fill(data: Path, number: int) -> None:
    """Make a ledger with so many events."""

    async def make() -> None:
        async with opened(data / LEDGER) as log:
            await write(log, number)

    asyncio.run(make())


# A file


def test_file_is_listed_for_people_and_exactly(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    people = run(LOADLEDGER_DATA=str(tmp_path)).stdout.splitlines()
    assert len(people) == 3
    for word in ("LoadStarted", "digits/1", "system", "attempt 2"):
        assert word in people[1]
    before = bytes(32)
    for line in run(f"--data={tmp_path}", "--json").stdout_bytes.splitlines():
        before = hashlib.sha256(before + body_of(line)).digest()
        assert json.loads(line)["hash"] == before.hex()


def test_filters_apply_across_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadledger.cli.localledger.PAGE", 3)
    fill(tmp_path, 10)
    every = list(range(1, 11))
    for arguments, positions in (
        ("", every),
        ("--after=4 --until=8", [5, 6, 7, 8]),
        ("--tail=2", [9, 10]),
        ("--tail=20", every),
        ("--since=9", [9, 10]),
        ("--since=2099-01-01T00:00:00Z", []),
        ("--type=LoadStarted --model=digits --job=job --actor=system", every),
        ("--type=LoadFailed --type=ModelLoaded", []),
        ("digits --tail=2", [9, 10]),
        ("other", []),
    ):
        result = run(f"--data={tmp_path}", *arguments.split(), "--json")
        assert (result.exit_code, result.stderr) == (0, ""), result.output
        assert [json.loads(line)["position"] for line in result.stdout.splitlines()] == positions, arguments


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--data={data} --url=http://127.0.0.1:1", "not both"),
        ("--data={data} --follow --until=3", "--until"),
        ("--data={data} --tail=1 --after=0", "--tail"),
        ("--data={data} --type=Load", "none of LoadRequested"),
        ("--data={data} --after=2", "position 1"),
        ("--data={data} --since=yesterday", "2026-01-31T14:02:00Z"),
        ("--data={data}/keys", "there is no ledger in"),
        ("--url=localhost:8080", "http://"),
        ("--url=http://127.0.0.1:1", "is the server running"),
        ("--url=http://127.0.0.1:1 -f", "cannot be reached"),
    ],
)
def test_events_refuses(tmp_path: Path, arguments: str, words: str) -> None:
    (tmp_path / "keys").mkdir()
    fill(tmp_path, 1)
    assert words in refused(*arguments.format(data=tmp_path).split(), LOADLEDGER_TOKEN="x")


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


async def positions(process: asyncio.subprocess.Process, count: int) -> list[int]:
    """Read so many events."""
    found = []
    assert process.stdout is not None
    for _ in range(count):
        async with asyncio.timeout(LIMIT_S):
            line = await process.stdout.readline()
        assert line, await process.stderr.read() if process.stderr else b""
        found.append(json.loads(line)["position"])
    return found


async def interrupted(process: asyncio.subprocess.Process) -> tuple[int | None, bytes, bytes]:
    process.send_signal(signal.SIGINT)
    async with asyncio.timeout(LIMIT_S):
        out, err = await process.communicate()
    return process.returncode, out, err


@pytest.mark.parametrize("begin", ["--after=1", "--since=2"])
async def test_follow_file_until_interrupt(tmp_path: Path, begin: str) -> None:
    async with opened(tmp_path / LEDGER) as log:
        await write(log, 3)
        async with command(f"--data={tmp_path}", "--follow", begin) as process:
            assert await positions(process, 2) == [2, 3]
            await write(log, 2, first=4)
            assert await positions(process, 2) == [4, 5]
            assert await interrupted(process) == (130, b"", b"")


async def test_follow_server_across_restart(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    save(models.add(1), repository, "m")
    config = Config(repository=repository, data=tmp_path / "data")
    async with serving(config, APART) as server:
        port = server.url.rpartition(":")[2]
        environment = {"LOADLEDGER_TOKEN": server.api.token("audit"), "HOME": str(tmp_path)}
        await server.api.load("m")
        async with command(f"--url={server.url}", "-f", "--after=2", environment=environment) as process:
            assert await positions(process, 2) == [3, 4]
            assert await server.stop() == 0
            async with serving(config, APART, f"--port={port}") as again:
                await again.api.load("m")
                assert await positions(process, 4) == [5, 6, 7, 8]
                code, _, err = await interrupted(process)
                assert (code, err.count(b"retrying") <= 1) == (130, True)


async def test_archived_events_are_refused_with_position_to_begin_at(tmp_path: Path) -> None:
    (tmp_path / "repository").mkdir()
    config = Config(repository=tmp_path / "repository", data=tmp_path / "data")
    config.data.mkdir(mode=0o700)
    await write_ledger(config.data / LEDGER)
    archive(config.data / LEDGER, "9", tmp_path / "archive.gz", SIGN, utc_now())
    head = len(sample_history()) + 1
    async with serving(config) as server:
        token = server.api.token("audit")
        for source in (f"--url={server.url}", f"--data={config.data}"):
            for flags in (("--after=3",), ("--follow", "--after=3")):
                reason = await asyncio.to_thread(refused, source, *flags, LOADLEDGER_TOKEN=token)
                assert "events up to 8 are archived: begin again with after=8" in reason
                assert ("answered 410" in reason) == source.startswith("--url")
            listed = await asyncio.to_thread(run, source, "--after=8", "--json", LOADLEDGER_TOKEN=token)
            found = [json.loads(line)["position"] for line in listed.stdout.splitlines()]
            assert found == list(range(9, found[-1] + 1))
            assert found[-1] > head
