"""`loadledger export`, `archive`, `backup` and `key ledger`: output, exit codes, refused files."""

import fcntl
import json
import os
import signal
import sqlite3
import stat
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from support.clients import printed, printed_json, refused, run_command
from support.history import child
from support.ledgers import change_ledger, sample_history, sound_ledger

from events.audit.exportreader import audit_file
from events.audit.signing import as_signed_head, key_id
from events.sqlite.datalock import LEDGER, lock_data
from events.sqlite.storage import FOLDS
from server.auth.keys import ensure_data_dir, open_signer

HEAD = len(sample_history()) + 1
Arguments = Callable[[Path, Path], tuple[object, ...]]
WRITERS: dict[str, Arguments] = {
    "export": lambda data, file: ("export", "--data", data, file),
    "backup": lambda data, file: ("backup", "--data", data, file),
    "archive": lambda data, file: ("archive", "--data", data, "--before", 5, file),
}
each_writer = pytest.mark.parametrize("command", WRITERS.values(), ids=WRITERS)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data directory with keys and a ledger that ended in order."""
    folder = tmp_path / "data"
    ensure_data_dir(folder)
    (folder / LEDGER).write_bytes(sound_ledger())
    return folder


# export


def test_export_file_is_private_and_ends_with_signed_head(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "export"
    for form, member in (("jsonl", "head"), ("cloudevents", "data")):  # the second replaces the first
        assert not printed("export", "--data", data, "--format", form, "--after", 3, "--until", 9, file)
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        head = as_signed_head(json.loads(file.read_bytes().splitlines()[-1])[member])
        assert head.holds()
        assert head.statement.position == 9


def test_export_to_stdout_or_pipe_verifies(data: Path, tmp_path: Path) -> None:
    pipe, file = tmp_path / "pipe", tmp_path / "export"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as thread:
        read = thread.submit(pipe.read_bytes)
        assert not printed("export", "--data", data, pipe)
    assert pipe.is_fifo()
    for content in (run_command("export", "--data", data).stdout_bytes, read.result()):
        file.write_bytes(content)
        head = audit_file(file).head
        assert head is not None
        assert (head.statement.position, head.public_key) == (HEAD, open_signer(data).public_key)


def test_failed_export_leaves_previous_file(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "export"
    file.write_text("before")
    change_ledger(data / LEDGER, "UPDATE events SET hash = zeroblob(32) WHERE position = 4")
    assert "position 4" in refused("export", "--data", data, file)
    assert file.read_text() == "before"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["data", "export"]


# archive


def test_archive_prints_positions_and_hash(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "archive.gz"
    told = printed("archive", "--data", data, "--before", 9, file)
    check = audit_file(file)
    assert check.head is not None
    assert told.splitlines() == [
        "archived: positions 1 to 8, 1 ended jobs",
        f"sha256 of archive.gz: {check.sha256.hex()}",
    ]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert check.head.public_key == open_signer(data).public_key
    assert printed_json("verify", "--data", data)["archives"] == [
        {"first_position": 1, "last_position": 8, "file": "archive.gz", "folds": FOLDS}
    ]
    assert "archived" in refused("export", "--data", data, "--after", 3, tmp_path / "export")
    done = printed_json("archive", "--data", data, "--before", 12, tmp_path / "b.gz")
    assert (done["first_position"], done["last_position"]) == (9, 11)


def test_archive_refuses_impossible_bound_and_name(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "archive.gz"
    for before in ("0", "999", "yesterday", "2026-01-01T00:00:00"):
        assert refused("archive", "--data", data, "--before", before, file)
    odd = tmp_path / os.fsdecode(b"archive-\xff.gz")
    assert "not UTF-8" in refused("archive", "--data", data, "--before", 5, odd)
    assert [each.name for each in tmp_path.iterdir()] == ["data"]


def test_archive_beside_reader_warns_of_write_ahead_log(data: Path, tmp_path: Path) -> None:
    with closing(sqlite3.connect(data / LEDGER, isolation_level=None)) as reader:
        reader.execute("PRAGMA journal_mode = WAL")
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM events").fetchone()
        result = run_command("archive", "--data", data, "--before", 9, tmp_path / "a.gz")
        assert result.exit_code == 0, result.output
        assert "ledger.db-wal belongs to it" in result.stderr
        assert run_command("verify", "--data", data).exit_code == 0
    printed("archive", "--data", data, "--before", 12, tmp_path / "b.gz")


# backup


def test_backup_is_verified_and_prints_head(data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "backup" / LEDGER
    copy.parent.mkdir()
    told = printed("backup", "--data", data, copy)
    assert told == printed("verify", "--data", copy.parent) == printed("verify", "--data", data)
    made = printed_json("backup", "--data", data, copy)
    assert (made["verified"], made["events"]) == (True, HEAD)


def test_backup_refuses_leftovers_of_other_database(data: Path, tmp_path: Path) -> None:
    for suffix in ("-wal", "-journal", "-shm"):
        left = tmp_path / f"backup.db{suffix}"
        left.touch()
        assert f"{left} exists" in refused("backup", "--data", data, tmp_path / "backup.db")
        left.unlink()
    assert not (tmp_path / "backup.db").exists()


def test_running_server_refuses_archive_and_backup_into_it(data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with lock_data(data), lock_data(other):
        assert "in use by process" in refused("archive", "--data", data, "--before", 9, tmp_path / "a.gz")
        assert "a server is running on" in refused("backup", "--data", data, other / LEDGER)
    assert not (tmp_path / "a.gz").exists()
    printed("backup", "--data", data, other / LEDGER)
    assert sorted(each.name for each in other.iterdir()) == [LEDGER, "lock"]


# All three


@each_writer
def test_file_is_refused_where_it_may_not_be_written(data: Path, tmp_path: Path, command: Arguments) -> None:
    before = (data / LEDGER).read_bytes(), (data / "ledger.key").read_bytes()
    for name in (LEDGER, "ledger.key", "lock", "new", "../data/new"):
        assert "data directory" in refused(*command(data, data / name))
    assert before == ((data / LEDGER).read_bytes(), (data / "ledger.key").read_bytes())
    assert "nowhere" in refused(*command(data, tmp_path / "nowhere" / "file"))
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    assert "not a regular file" in refused(*command(data, tmp_path / "link"))
    os.mkfifo(tmp_path / "pipe")
    if command is not WRITERS["export"]:
        assert "not a regular file" in refused(*command(data, tmp_path / "pipe"))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["data", "link", "pipe"]


@each_writer
def test_drafts_of_killed_commands_are_removed(data: Path, tmp_path: Path, command: Arguments) -> None:
    left = [tmp_path / f".file.0123abcd{suffix}" for suffix in ("", "-journal")]
    others = [tmp_path / name for name in (".file.0123abcx", ".file.01", ".other.0123abcd")]
    being_written = tmp_path / ".file.89abcdef"
    for each in (*left, *others, being_written):
        each.touch()
    with being_written.open() as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)
        assert run_command(*command(data, tmp_path / "file")).exit_code == 0
    found = {each.name for each in tmp_path.iterdir()}
    assert found == {"data", "file", being_written.name, *(each.name for each in others)}


def test_sigterm_removes_draft(data: Path, tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from events.audit import export\n"
        "def stop(*_):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return b''\n"
        "export.JSONL = export.ExportFormat(stop, stop, stop)\n"
        "from loadledger.cli.main import main\n"
        "main(sys.argv[1:])"
    )
    done = subprocess.run(child(script, *WRITERS["export"](data, tmp_path / "file")), check=False, timeout=60)
    assert done.returncode == 128 + signal.SIGTERM
    assert [each.name for each in tmp_path.iterdir()] == ["data"]


# key ledger


def test_key_ledger_prints_public_key_and_id(data: Path) -> None:
    pem, _, name = printed("key", "ledger", "--data", data).rpartition("key id: ")
    load_pem_public_key(pem.encode())
    assert name.strip() == key_id(open_signer(data).public_key)
    found = printed_json("key", "ledger", "--data", data)
    assert found == {"public_key": pem, "key_id": name.strip()}


def test_lost_ledger_key_is_refused_until_made_anew(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (data / "ledger.key").unlink()
    for command in (WRITERS["export"], WRITERS["archive"], lambda data, _: ("key", "ledger", "--data", data)):
        reason = refused(*command(data, tmp_path / "file"))
        assert "ledger.key: restore it from your backup" in reason
    assert not (data / "ledger.key").exists()
    warned = "ledger.key was missing: from now on heads are signed with another key"
    for _ in range(2):
        ensure_data_dir(data)
    assert caplog.messages.count(warned) == 1
    printed("key", "ledger", "--data", data)
