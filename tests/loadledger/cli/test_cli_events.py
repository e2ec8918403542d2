"""`loadledger events`: lists and follows a file or a server, and says what is wrong."""

import asyncio
import hashlib
import json
import signal
import threading
from asyncio.subprocess import PIPE
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.clients import printed, refused, run_command
from support.history import opened, write
from support.http import LIMIT_S
from support.ledgers import body_of
from support.servers import MODULE, clean_environment

from events.sqlite.datalock import LEDGER
from events.sqlite.listing import EventFilter
from loadledger.cli.events import show_events


def fill(data: Path, number: int) -> None:
    """Write a ledger with so many events."""

    async def fill_log() -> None:
        async with opened(data / LEDGER) as log:
            await write(log, number)

    asyncio.run(fill_log())


def listed(*arguments: object, **environment: Any) -> list[int]:
    """Return the positions that the command lists."""
    lines = printed("events", *arguments, "--json", **environment).splitlines()
    return [json.loads(line)["position"] for line in lines]


# A file


def test_file_is_listed_for_people_and_exactly(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    people = printed("events", LOADLEDGER_DATA=str(tmp_path)).splitlines()
    assert len(people) == 3
    for word in ("LoadStarted", "digits/1", "system", "attempt 2"):
        assert word in people[1]
    before = bytes(32)
    for line in run_command("events", f"--data={tmp_path}", "--json").stdout_bytes.splitlines():
        before = hashlib.sha256(before + body_of(line)).digest()
        assert json.loads(line)["hash"] == before.hex()


def test_filters_apply_across_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadledger.cli.events.EVENTS_PER_READ", 3)
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
        assert listed(f"--data={tmp_path}", *arguments.split()) == positions, arguments


def test_events_refuses(tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    fill(tmp_path, 1)
    data = f"--data={tmp_path}"
    for arguments, words in (
        (f"{data} --url=http://127.0.0.1:1", "not both"),
        (f"{data} --follow --until=3", "--until"),
        (f"{data} --tail=1 --after=0", "--tail"),
        (f"{data} --type=Load", "none of LoadRequested"),
        (f"{data} --after=2", "position 1"),
        (f"{data} --since=noon", "2026-01-31T14:02:00Z"),
        (f"{data}/keys", "there is no ledger in"),
        ("--url=http://127.0.0.1:1 -f", "cannot be reached"),
    ):
        assert words in refused("events", *arguments.split(), LOADLEDGER_TOKEN="x"), arguments


async def test_follow_file_until_interrupt(tmp_path: Path) -> None:
    command = (*MODULE, "events", "--json", "--follow", f"--data={tmp_path}", "--tail=2")
    async with opened(tmp_path / LEDGER) as log:
        await write(log, 3)
        process = await asyncio.create_subprocess_exec(
            *command, env=clean_environment(), stdout=PIPE, stderr=PIPE
        )
        assert process.stdout is not None
        try:
            async with asyncio.timeout(LIMIT_S):
                lines = [await process.stdout.readline() for _ in range(2)]
                await write(log, 2, first=4)
                lines += [await process.stdout.readline() for _ in range(2)]
                process.send_signal(signal.SIGINT)
                assert await process.communicate() == (b"", b"")
        finally:
            if process.returncode is None:
                process.kill()
                await process.communicate()
    assert [json.loads(line)["position"] for line in lines] == [2, 3, 4, 5]
    assert process.returncode == 130


@pytest.mark.parametrize(
    ("begin", "expected"), [({}, [4]), ({"after": 1}, [2, 3, 4]), ({"since": "2"}, [2, 3, 4])]
)
async def test_follow_file_begins_at_head_or_as_told(
    begin: dict[str, Any], expected: list[int], tmp_path: Path
) -> None:
    positions, first = list[int](), threading.Event()

    def show(lines: Sequence[bytes]) -> None:
        positions.extend(json.loads(line)["position"] for line in lines)
        first.set()
        if positions[-1:] == [4]:
            raise KeyboardInterrupt

    def follow() -> None:
        options: dict[str, Any] = dict.fromkeys(("after", "since", "until", "tail")) | begin
        with pytest.raises(KeyboardInterrupt):
            show_events(tmp_path / LEDGER, show, EventFilter(), follow=True, **options)

    async with opened(tmp_path / LEDGER) as log, asyncio.timeout(LIMIT_S):
        await write(log, 3)
        following = asyncio.create_task(asyncio.to_thread(follow))
        assert await asyncio.to_thread(first.wait, LIMIT_S)
        await write(log, 1, first=4)
        await following
    assert positions == expected
