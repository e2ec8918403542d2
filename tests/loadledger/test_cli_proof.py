"""`verify`, `export`, `archive`, `backup` and `key ledger`: what they print, and what they end with."""

import fcntl
import json
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from support.events import child, opened
from support.ledgers import rows_of, told_history, write_ledger

from events.archivefile import audit_file
from events.lock import hold
from events.signing import as_signed_head, key_id
from loadledger.cli.main import main
from server.app import LEDGER
from server.auth.keys import ensure_data_dir
from server.ledger.key import open_signer

HEAD = len(told_history()) + 1


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(each) for each in arguments], env={"LOADLEDGER_DATA": None})


def refused(*arguments: object) -> str:
    """Run the command, which must end with 2 and one line on stderr alone; return it."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.fixture
async def data(tmp_path: Path) -> Path:
    """A data directory with keys and a ledger that ended in order."""
    folder = tmp_path / "data"
    ensure_data_dir(folder)
    await write_ledger(folder / LEDGER)
    return folder


def change(data: Path, statement: str) -> None:
    with closing(sqlite3.connect(data / LEDGER, isolation_level=None)) as connection:
        for trigger in ("events_never_change", "events_never_go"):
            connection.execute(f"DROP TRIGGER {trigger}")
        connection.execute(statement)


def test_keys_backups_and_archives_are_told_in_json_too(data: Path, tmp_path: Path) -> None:
    key = json.loads(run("key", "ledger", "--data", data, "--json").stdout)
    assert run("key", "ledger", "--data", data).stdout == f"{key['public_key']}key id: {key['key_id']}\n"
    assert json.loads(run("key", "rotate", "--data", data, "--json").stdout)["kid"]
    made = json.loads(run("backup", "--data", data, tmp_path / LEDGER, "--json").stdout)
    assert (made["verified"], made["events"]) == (True, HEAD)
    done = json.loads(run("archive", "--data", data, "--before", 9, tmp_path / "a.gz", "--json").stdout)
    assert (done["first_position"], done["last_position"]) == (1, 8)


# verify


def test_a_sound_ledger_is_verified_and_its_head_is_told(data: Path) -> None:
    result = run("verify", "--data", data)
    head = rows_of(data / LEDGER)[-1]
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        f"verified: {HEAD} events after position 0",
        f"head: {HEAD}:{head[2].hex()}",
    ]


def test_what_is_told_can_be_expected(data: Path) -> None:
    told = run("verify", "--data", data).stdout.split()[-1]
    assert run("verify", "--data", data, "--expect", told).exit_code == 0
    result = run("verify", "--data", data, "--expect", f"{HEAD + 1}:{'ab' * 32}")
    assert result.exit_code == 1
    assert result.stdout.startswith(f"NOT verified: position {HEAD + 1}: the log ends at position {HEAD}")


@pytest.mark.parametrize(
    ("statement", "position", "kind"),
    [
        ("UPDATE events SET hash = zeroblob(32) WHERE position = 4", 4, "hash"),
        ("UPDATE events SET body = replace(body, 'alice', 'mallory') WHERE position = 2", 2, "hash"),
        ("DELETE FROM events WHERE position = 6", 6, "missing"),
        ("DELETE FROM events WHERE position > 8", 8, "projections"),
        ("UPDATE jobs SET body = replace(body, 'alice', 'mallory')", HEAD, "projections"),
    ],
)
def test_the_first_bad_position_and_its_kind_are_named(
    data: Path, statement: str, position: int, kind: str
) -> None:
    change(data, statement)
    result = run("verify", "--data", data)
    assert (result.exit_code, result.stderr) == (1, "")
    assert result.stdout.startswith(f"NOT verified: position {position}: ")
    assert f"({kind})" in result.stdout
    told = json.loads(run("verify", "--data", data, "--json").stdout)
    assert told["verified"] is False
    assert (told["finding"]["position"], told["finding"]["kind"]) == (position, kind)


def test_a_sound_ledger_in_json(data: Path) -> None:
    head = rows_of(data / LEDGER)[-1]
    assert json.loads(run("verify", "--data", data, "--json").stdout) == {
        "verified": True,
        "events": HEAD,
        "position": HEAD,
        "hash": head[2].hex(),
        "base": {"position": 0, "hash": "00" * 32},
        "integrity": "ok",
        "projections_compared": True,
        "finding": None,
        "archives": [],
        "proved_after": 0,
        "base_state_proved": True,
        "files": [],
    }


def test_what_cannot_be_verified_ends_with_2(data: Path, tmp_path: Path) -> None:
    assert "ledger.db" in refused("verify", "--data", tmp_path)
    assert "POSITION:HASH" in refused("verify", "--data", data, "--expect", "5")
    (data / LEDGER).write_bytes(b"this is no database, it is a sentence\n" * 100)
    assert "not a database" in refused("verify", "--data", data)


async def test_verify_works_beside_a_log_that_is_open_and_refuses_a_copy_of_its_file(
    data: Path, tmp_path: Path
) -> None:
    async with opened(data / LEDGER) as log:
        await log.server_started()
        assert run("verify", "--data", data).exit_code == 0
        (tmp_path / LEDGER).write_bytes((data / LEDGER).read_bytes())
        assert "loadledger backup" in refused("verify", "--data", tmp_path)
        kept = f"{log.head.position}:{log.head.hash.hex()}"
        assert run("verify", "--data", tmp_path, "--expect", kept).exit_code == 0


# export


def test_an_export_to_standard_output_verifies_by_itself(data: Path, tmp_path: Path) -> None:
    result = run("export", "--data", data)
    assert result.exit_code == 0
    (tmp_path / "export").write_bytes(result.stdout_bytes)
    head = audit_file(tmp_path / "export").head
    assert head is not None
    assert head.statement.position == HEAD
    assert head.public_key == open_signer(data).public_key


@pytest.mark.parametrize("form", ["jsonl", "cloudevents"])
def test_an_export_to_a_file_is_nobody_elses_to_read_and_ends_with_the_head(
    data: Path, tmp_path: Path, form: str
) -> None:
    file = tmp_path / "export"
    for _ in range(2):  # it is replaced
        result = run("export", "--data", data, "--format", form, "--after", 3, "--until", 9, file)
        assert (result.exit_code, result.output) == (0, "")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    last: Any = json.loads(file.read_bytes().splitlines()[-1])
    head = as_signed_head(last["head"] if form == "jsonl" else last["data"])
    assert head.holds()
    assert head.statement.position == 9


def test_an_export_that_fails_leaves_what_was_there(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "export"
    file.write_text("before")
    change(data, "UPDATE events SET hash = zeroblob(32) WHERE position = 4")
    assert "position 4" in refused("export", "--data", data, file)
    assert file.read_text() == "before"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["data", "export"]


def test_a_ledger_without_its_key_cannot_be_signed(data: Path, tmp_path: Path) -> None:
    (data / "ledger.key").unlink()
    for command in (
        *(each(data, tmp_path / "file") for each in COMMANDS[::2]),
        ("key", "ledger", "--data", data),
    ):
        assert "ledger.key: restore it from where it was backed up" in refused(*command)
    assert not (data / "ledger.key").exists()


def test_a_key_that_is_made_anew_for_a_ledger_is_told(data: Path) -> None:
    (data / "ledger.key").unlink()
    arguments = ("token", "--data", data, "--role", "admin", "--subject", "alice")
    script = "import sys\nfrom loadledger.cli.main import main\nmain(sys.argv[1:])"
    told = [
        subprocess.run(
            child(script, *arguments), capture_output=True, text=True, check=True, timeout=60
        ).stderr
        for _ in range(2)
    ]
    assert told == ["ledger.key was missing: from now on heads are signed with another key\n", ""]
    assert run("key", "ledger", "--data", data).exit_code == 0


# archive


def long_ago(data: Path) -> datetime:
    """Return when all that is in the ledger was recorded."""
    return datetime.fromisoformat(json.loads(rows_of(data / LEDGER)[0][1])["recorded_at"])


def test_an_archive_moves_what_is_before_and_says_so(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "archive.gz"
    assert datetime.now(UTC) - long_ago(data) > timedelta(days=1)
    result = run("archive", "--data", data, "--before", 9, file)
    assert result.exit_code == 0, result.output
    check = audit_file(file)
    assert check.head is not None
    assert result.stdout.splitlines() == [
        "archived: positions 1 to 8, 1 ended jobs",
        f"sha256 of archive.gz: {check.sha256.hex()}",
    ]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert check.head.public_key == open_signer(data).public_key
    verified = run("verify", "--data", data).stdout
    assert verified.startswith(f"verified: {HEAD - 8} events after position 8")
    assert verified.splitlines()[-1] == "for a whole proof: positions 1 to 8, 'archive.gz'"
    assert json.loads(run("verify", "--data", data, "--json").stdout)["archives"] == [
        {"first_position": 1, "last_position": 8, "file": "archive.gz"}
    ]
    assert "archived" in refused("export", "--data", data, "--after", 3, tmp_path / "export")
    kept = f"{check.head.statement.position}:{check.head.statement.hash.hex()}"
    assert run("verify", "--data", data, "--expect", kept).exit_code == 0


@pytest.mark.parametrize("before", ["0", "999", "yesterday", "2026-01-01T00:00:00"])
def test_what_cannot_be_archived_is_refused(data: Path, tmp_path: Path, before: str) -> None:
    assert refused("archive", "--data", data, "--before", before, tmp_path / "archive.gz")
    assert not (tmp_path / "archive.gz").exists()


def test_an_archive_beside_a_reader_says_that_the_write_ahead_log_stays(data: Path, tmp_path: Path) -> None:
    with closing(sqlite3.connect(data / LEDGER, isolation_level=None)) as reader:
        reader.execute("PRAGMA journal_mode = WAL")
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM events").fetchone()
        result = run("archive", "--data", data, "--before", 9, tmp_path / "a.gz")
        assert result.exit_code == 0, result.output
        assert "ledger.db-wal stays beside it and is a part of it" in result.stderr
        assert result.stdout.startswith("archived: positions 1 to 8")
        assert run("verify", "--data", data).exit_code == 0
    result = run("archive", "--data", data, "--before", 12, tmp_path / "b.gz")
    assert (result.exit_code, result.stderr) == (0, "")


def test_an_archive_that_was_written_before_the_command_was_killed_is_taken_and_drafts_go(
    data: Path, tmp_path: Path
) -> None:
    file, copy = tmp_path / "archive.gz", tmp_path / "copy"
    shutil.copytree(data, copy)
    assert run("archive", "--data", copy, "--before", 9, file).exit_code == 0
    for suffix in ("", "-journal"):
        (tmp_path / f".archive.gz.0123abcd{suffix}").touch()
    assert run("archive", "--data", data, "--before", 9, file).exit_code == 0
    assert sorted(each.name for each in tmp_path.iterdir()) == ["archive.gz", "copy", "data"]


def test_an_archive_beside_a_server_names_it(data: Path, tmp_path: Path) -> None:
    with hold(data):
        assert "in use by process" in refused("archive", "--data", data, "--before", 9, tmp_path / "a.gz")
    assert not (tmp_path / "a.gz").exists()


# backup


def test_a_backup_is_verified_and_its_head_is_told(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "backup"
    folder.mkdir()
    result = run("backup", "--data", data, folder / LEDGER)
    assert result.exit_code == 0, result.output
    assert result.stdout == run("verify", "--data", folder).stdout == run("verify", "--data", data).stdout


def test_a_backup_beside_what_another_database_left_is_refused(data: Path, tmp_path: Path) -> None:
    for suffix in ("-wal", "-journal", "-shm"):
        left = tmp_path / f"backup.db{suffix}"
        left.touch()
        assert f"{left} is there" in refused("backup", "--data", data, tmp_path / "backup.db")
        left.unlink()
    assert not (tmp_path / "backup.db").exists()


def test_a_backup_into_the_folder_of_a_running_server_is_refused(data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with hold(other):
        assert "a server is running on" in refused("backup", "--data", data, other / LEDGER)
    assert run("backup", "--data", data, other / LEDGER).exit_code == 0
    assert sorted(each.name for each in other.iterdir()) == [LEDGER, "lock"]


COMMANDS: list[Callable[[Path, Path], tuple[object, ...]]] = [
    lambda data, file: ("export", "--data", data, file),
    lambda data, file: ("backup", "--data", data, file),
    lambda data, file: ("archive", "--data", data, "--before", 5, file),
]


@pytest.mark.parametrize("command", COMMANDS, ids=["export", "backup", "archive"])
def test_nothing_is_written_into_the_data_directory(
    data: Path, command: Callable[[Path, Path], tuple[object, ...]]
) -> None:
    before = (data / LEDGER).read_bytes(), (data / "ledger.key").read_bytes()
    for name in (LEDGER, "ledger.key", "lock", "new", "../data/new"):
        assert "data directory" in refused(*command(data, data / name))
    assert before == ((data / LEDGER).read_bytes(), (data / "ledger.key").read_bytes())


@pytest.mark.parametrize("command", COMMANDS, ids=["export", "backup", "archive"])
def test_a_folder_that_is_not_there_is_named(
    data: Path, tmp_path: Path, command: Callable[[Path, Path], tuple[object, ...]]
) -> None:
    assert "nowhere" in refused(*command(data, tmp_path / "nowhere" / "file"))


@pytest.mark.parametrize("command", COMMANDS, ids=["export", "backup", "archive"])
def test_what_is_no_regular_file_is_never_replaced(
    data: Path, tmp_path: Path, command: Callable[[Path, Path], tuple[object, ...]]
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    assert "no regular file" in refused(*command(data, tmp_path / "link"))
    if command is not COMMANDS[0]:
        os.mkfifo(tmp_path / "pipe")
        assert "no regular file" in refused(*command(data, tmp_path / "pipe"))
    assert sorted(each.name for each in tmp_path.iterdir() if each.name != "pipe") == ["data", "link"]


def test_an_export_is_written_straight_into_a_pipe(data: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as thread:
        read = thread.submit(pipe.read_bytes)
        assert run("export", "--data", data, pipe).exit_code == 0
        assert b'"head"' in read.result().splitlines()[-1]
    assert pipe.is_fifo()


def test_an_archive_whose_name_is_no_text_is_refused(data: Path, tmp_path: Path) -> None:
    file = tmp_path / os.fsdecode(b"archive-\xff.gz")
    assert "not UTF-8" in refused("archive", "--data", data, "--before", 5, file)
    assert not file.exists()


@pytest.mark.parametrize("command", COMMANDS, ids=["export", "backup", "archive"])
def test_drafts_of_commands_that_were_killed_are_removed_and_nothing_else(
    data: Path, tmp_path: Path, command: Callable[[Path, Path], tuple[object, ...]]
) -> None:
    left = [tmp_path / f".file.0123abcd{suffix}" for suffix in ("", "-journal")]
    others = [tmp_path / name for name in (".file.0123abcx", ".file.01", ".other.0123abcd")]
    being_written = tmp_path / ".file.89abcdef"
    for each in (*left, *others, being_written):
        each.touch()
    with being_written.open() as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)
        assert run(*command(data, tmp_path / "file")).exit_code == 0
    found = {each.name for each in tmp_path.iterdir()}
    assert found == {"data", "file", being_written.name, *(each.name for each in others)}


def test_sigterm_removes_the_draft(data: Path, tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from events import export\n"
        "def stop(*_):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return b''\n"
        "export._event = stop\n"
        "from loadledger.cli.main import main\n"
        "main(sys.argv[1:])"
    )
    file = tmp_path / "export"
    done = subprocess.run(child(script, "export", "--data", data, file), check=False, timeout=60)
    assert done.returncode == 128 + signal.SIGTERM
    assert [each.name for each in tmp_path.iterdir()] == ["data"]


# key ledger


def test_the_public_key_of_the_ledger_is_shown(data: Path) -> None:
    result = run("key", "ledger", "--data", data)
    assert result.exit_code == 0
    pem, _, name = result.stdout.rpartition("key id: ")
    load_pem_public_key(pem.encode())
    assert name.strip() == key_id(open_signer(data).public_key)
    assert "PRIVATE" not in result.stdout
