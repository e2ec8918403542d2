"""Files of recorded inferences, held to the ledger, and servers that die at a given step of their writing."""

import json
import os
import sys
from collections.abc import Collection
from hashlib import sha256
from pathlib import Path

from events.types import Event
from features.records.facts import RecordsClosed, RecordsErased
from features.records.files import FOLDER, OPEN
from server.config import Config
from support.clients import run_command
from support.http import Api, Json, when
from support.servers import events, verified

RULE = '[[record]]\nmodels = ["*"]\n'


def write_rule(folder: Path, *members: str) -> tuple[str, str]:
    """Write a configuration that records every model; return the arguments of a server with it.

    Args:
        folder: of the file.
        members: of the rule, beside `models`.
    """
    file = folder / "record.toml"
    file.write_text("\n".join((RULE, *members, "")))
    file.chmod(0o600)
    return "--config", str(file)


def patched(script: str) -> tuple[str, ...]:
    """Return the command `loadledger`, which runs some lines before it begins."""
    return (sys.executable, "-P", "-c", f"{script}\nfrom loadledger.cli.main import main\nmain()\n")


def killed(step: str, *, before: bool) -> tuple[str, ...]:
    """Return the command `loadledger`, whose server kills itself at a step: a method of `RecordFiles`.

    After a step it does so only if that has returned anything but an empty list.
    """
    return patched(
        "import os, signal\n"
        "from features.records.files import RecordFiles\n"
        f"real = RecordFiles.{step}\n"
        "def die(*arguments):\n"
        f"    if {before} or real(*arguments) != []:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return []\n"
        f"RecordFiles.{step} = die"
    )


async def list_lines(api: Api, query: str = "") -> list[Json]:
    """Return the first page of a server's lines."""
    answer = await api.get(f"/api/v1/records?limit=1000{query}")
    assert answer.status == 200, answer.body
    lines: list[Json] = answer.json["records"]
    return lines


async def list_files(api: Api) -> list[Json]:
    answer = await api.get("/api/v1/records/files?limit=1000")
    assert answer.status == 200, answer.body
    files: list[Json] = answer.json["files"]
    return files


async def files_are_closed(api: Api, *, but: Collection[str] = ()) -> list[Json]:
    """Wait until a server's files are closed and announced, but for some models, and return them all."""
    return await when(
        lambda: list_files(api),
        lambda files: all(file["state"] == "closed" for file in files if file["model_id"] not in but),
    )


def find_files(config: Config) -> dict[str, Path]:
    """Return the files of a data directory, by name."""
    found = {path.stem: path for path in (config.data / FOLDER).glob("*/*")}
    assert len(found) == len(list((config.data / FOLDER).glob("*/*")))
    return found


def read_lines(path: Path) -> list[Json]:
    content = path.read_bytes()
    assert content.endswith(b"\n"), content[-200:]
    return [json.loads(line) for line in content.splitlines()]


def check_file(event: Event, path: Path) -> list[Json]:
    """Check that the ledger says of a file what it is, and return its lines."""
    said = event.data
    assert isinstance(said, RecordsClosed)
    content, lines = path.read_bytes(), read_lines(path)
    assert (path.stem, path.parent.name) == (event.id, event.model_id)
    assert said.sha256 == sha256(content).hexdigest()
    assert (said.bytes, said.lines) == (len(content), len(lines))
    records = [line for line in lines if line["type"] == "loadledger.inference"]
    drops = [line for line in lines if line["type"] == "loadledger.dropped"]
    assert len(records) + len(drops) == len(lines)
    assert said.records == len(records)
    assert said.dropped == sum(line["dropped"] or 0 for line in drops)
    interruptions = [line for line in drops if line["reason"] == "interrupted"]
    assert len(interruptions) == said.interrupted
    assert interruptions in ([], [lines[-1]])
    assert said.begin <= said.end
    assert all(line["model"] == event.model_id for line in lines)
    return lines


async def check_records(config: Config) -> dict[str, list[Json]]:
    """Check files and ledger of a server that has stopped; return the lines of each file.

    Each announced file is there, with its digest, unless it was erased; each file there is announced.
    """
    log = await events(config)
    closed = {event.id: event for event in log if isinstance(event.data, RecordsClosed)}
    erased = {event.data.file for event in log if isinstance(event.data, RecordsErased)}
    files = find_files(config)
    assert files.keys() == closed.keys() - erased
    assert not [path for path in files.values() if path.suffix == OPEN]
    assert len(closed) == sum(isinstance(event.data, RecordsClosed) for event in log)
    found = {name: check_file(closed[name], path) for name, path in files.items()}
    verified(config)
    assert verify(config)[0] == 0
    return found


def verify(config: Config, *arguments: object) -> tuple[int, str]:
    """Return exit code and output of `loadledger records verify`."""
    done = run_command("records", "verify", "--data", config.data, *arguments)
    return done.exit_code, done.output


def change_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def age(path: Path, seconds: float) -> None:
    """Let a file have been written so long before."""
    written = path.stat().st_mtime - seconds
    os.utime(path, (written, written))
