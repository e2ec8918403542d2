"""`loadledger verify`, `replay`, `export`, `backup` and `key ledger`: output, codes, refusals.

What is proved is tested in tests/events.
"""

import asyncio
import fcntl
import gzip
import json
import os
import re
import signal
import sqlite3
import stat
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key
from support import models
from support.clients import NEW_HOME, printed, printed_json, refused, run_command
from support.history import History, child, opened
from support.http import LocalApi
from support.ledgers import DATA_ROUNDS, append_events, change_ledger, rows_of, sample_history
from support.store import files_of, opened_store, store_version, write_version

from events.audit.exportreader import audit_file
from events.audit.signing import as_signed_head, key_id
from events.audit.verify import verify
from events.sqlite.datalock import LEDGER, lock_data
from runtime.store.folder import StoredVersion
from server.auth.keys import ensure_data_dir, open_signer

HEAD = len(sample_history(DATA_ROUNDS)) + 1


def lines(*arguments: object, code: int = 0, **environment: Any) -> list[str]:
    return printed(*arguments, code=code, **environment).splitlines()


@pytest.fixture
def exported(data: Path) -> Path:
    """An export of that ledger."""
    file = data.parent / "export.jsonl"
    assert printed("export", "--data", data, file) == ""
    return file


def key_of(data: Path) -> str:
    return key_id(open_signer(data).public_key)


def head_of(data: Path) -> str:
    return f"{HEAD}:{rows_of(data / LEDGER)[-1][2].hex()}"


# verify, of a ledger


def test_verify_prints_head_or_first_finding(data: Path) -> None:
    head = head_of(data)
    assert lines("verify", "--data", data) == [f"verified: {HEAD} events", f"head: {head}"]
    assert printed_json("verify", "--data", data, "--expect", head) == {
        "verified": True,
        "position": HEAD,
        "hash": head.partition(":")[2],
        "integrity": "ok",
        "projections_compared": True,
        "finding": None,
        "remarks": [],
        "files": [],
    }
    [beyond] = lines("verify", "--data", data, "--expect", f"{HEAD + 1}:{'ab' * 32}", code=1)[:1]
    assert beyond.startswith(f"NOT verified: position {HEAD + 1}: the log ends at position {HEAD}")
    change_ledger(data / LEDGER, "DELETE FROM events WHERE position = 6")
    first = lines("verify", "--data", data, code=1)[0]
    assert first.startswith("NOT verified: position 6: ")
    assert "(missing)" in first
    found = printed_json("verify", "--data", data, code=1)
    assert (found["verified"], found["finding"]["position"]) == (False, 6)


# verify, of files


def test_verify_judges_each_file_and_names_its_signer(data: Path, exported: Path, tmp_path: Path) -> None:
    bad = tmp_path / os.fsdecode(b"\xff.jsonl")
    bad.write_bytes(exported.read_bytes().replace(b"alice", b"mallory", 1))
    sound = [
        f"{exported}: verified: {HEAD} events after position 0",
        f"{exported}: head: {head_of(data)}",
        f"{exported}: signed by the key {key_of(data)}; use --key to check who owns it",
    ]
    assert lines("verify", exported) == sound
    assert lines("verify", exported, LOADLEDGER_DATA=str(data)) == sound  # LOADLEDGER_DATA is not meant
    finding, proved, *others = lines("verify", bad, exported, code=1)
    shown = f"{tmp_path}/\N{REPLACEMENT CHARACTER}.jsonl"  # a name that is not UTF-8
    assert finding.startswith(f"{shown}: NOT verified: position 2: ")
    assert proved.startswith(f"{shown}: proved up to: 1:")
    assert others == sound
    found = printed_json("verify", bad, exported, code=1)
    assert (found["verified"], set(found)) == (False, {"verified", "files"})
    assert [(each["verified"], each["key_expected"]) for each in found["files"]] == [
        (False, None),
        (True, None),
    ]
    audited = audit_file(exported)
    assert audited.head is not None
    assert printed_json("verify", exported, "--key", key_of(data))["files"] == [
        {
            "file": str(exported),
            "verified": True,
            "events": HEAD,
            "after": {"position": 0, "hash": "00" * 32},
            "position": HEAD,
            "hash": audited.proved.hash.hex(),
            "recorded_at": audited.head.statement.recorded_at,
            "key_id": key_of(data),
            "key_expected": True,
            "finding": None,
        }
    ]
    assert lines("verify", exported, "--data", data)[2] == f"matches the ledger: {exported}"


def test_printed_key_is_expected_in_any_encoding(data: Path, exported: Path, tmp_path: Path) -> None:
    public = open_signer(data).public_key
    pem = load_der_public_key(public).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    keys: list[object] = [key_of(data).upper()]
    shown = printed("key", "ledger", "--data", data)
    assert shown == f"{pem.decode()}key id: {key_of(data)}\n"
    assert printed_json("key", "ledger", "--data", data) == {
        "public_key": pem.decode(),
        "key_id": key_of(data),
    }
    for name, content in (("printed", shown.encode()), ("key.pem", pem), ("key.der", public)):
        (tmp_path / name).write_bytes(content)
        keys.append(tmp_path / name)
    for key in keys:
        assert lines("verify", exported, "--key", key)[2].endswith(f"by the expected key {key_of(data)}")
    other = "0" * 32
    first = lines("verify", exported, "--key", other, code=1)[0]
    assert first.startswith(f"{exported}: NOT verified: position {HEAD}: the head is signed by the key")
    assert printed_json("verify", exported, "--key", other, code=1)["files"][0]["key_expected"] is False


# replay


@pytest.fixture
async def two_models(tmp_path: Path) -> Path:
    """A data directory whose ledger has two models and a load in progress."""
    history = History()
    history.restart()  # 1
    history.load("L")  # 2 to 4
    history.load("O", of="other")  # 5 to 7
    history.ask_load("L2", version=2)  # 8
    history.start_load("L2", version=2)  # 9
    async with opened(tmp_path / LEDGER) as log:
        await append_events(log, history.facts)
    return tmp_path


def test_replay_prints_state(two_models: Path) -> None:
    shown = printed("replay", "--data", two_models)
    assert re.sub(r"2\d{3}-\d\d-\d\dT[\d:.]+Z", "TIME", shown).splitlines() == [
        "as of position 9, recorded TIME",
        "server: running since TIME",
        "models: 2",
        "  digits: loaded version 1",
        "    loaded TIME by alice, position 4, job L",
        f"    model.onnx: 4096 bytes, sha256 {'ab' * 32}",
        "  other: loaded version 1, active",
        "    loaded TIME by alice, position 7, job O",
        f"    model.onnx: 4096 bytes, sha256 {'ab' * 32}",
        "unended jobs: 1",
        "  L2: load of digits version 2, in_progress",
        "    requested TIME by alice, cause request",
    ]
    assert lines("replay", "--data", two_models, "--until", 0) == [
        "as of position 0",
        "server: stopped",
        "models: 0",
        "unended jobs: 0",
    ]
    found = printed_json("replay", "--data", two_models, "--until", 8, "--model", "digits")
    assert [model["id"] for model in found["models"]] == ["digits"]
    assert [job["status"] for job in found["jobs"]] == ["pending"]
    assert printed_json("replay", "--data", two_models, "--until", found["as_of_time"])["as_of"] == 8
    assert printed_json("replay", "--data", two_models, "--model", "none")["models"] == []


async def test_replay_agrees_with_running_server(api: LocalApi) -> None:
    models.save(models.add(), api.config.repository, "digits")
    await api.load("digits")
    found = await asyncio.to_thread(printed_json, "replay", "--data", api.config.data)
    now = await api.model("digits")
    of_now = dict.fromkeys(("versions", "repository_changed", "memory_bytes"))
    assert found["models"] == [{name: now[name] for name in found["models"][0]} | of_now]
    assert found["jobs"] == []
    at = (await api.get(f"/api/v1/models?at={found['as_of']}")).json
    assert (found["as_of"], found["as_of_time"]) == (at["as_of"], at["as_of_time"])


def test_rebuild_prints_and_mends_differences(two_models: Path) -> None:
    rebuild = ("replay", "--data", two_models, "--rebuild")
    whole = "the stored projections match the log, up to position 9"
    assert lines(*rebuild) == [whole]
    with closing(sqlite3.connect(two_models / LEDGER, isolation_level=None)) as follower:
        follower.execute("UPDATE jobs SET body = replace(body, 'alice', 'mallory') WHERE id = 'L'")
        follower.execute("DELETE FROM jobs WHERE id = 'L2'")
        follower.execute("INSERT INTO models (id, body) VALUES ('zoo', '{}')")
        follower.execute("PRAGMA journal_mode = WAL")
        follower.execute("SELECT count(*) FROM events").fetchone()  # it stays open beside the command
        assert lines(*rebuild, code=1) == [
            "the stored projections differed from the log and were rebuilt:",
            "  the stored models had, and the log does not give, 'zoo'",
            "  the stored jobs differed at 'L'",
            "  the stored jobs lacked 'L2'",
        ]
        assert printed_json(*rebuild) == {"position": 9, "differ": False, "differences": []}
    assert verify(two_models / LEDGER).verified
    with lock_data(two_models):
        assert re.search(r"is in use by process \d+", refused(*rebuild))
        assert lines("replay", "--data", two_models)


def test_unreadable_ledger_is_refused_in_one_line(tmp_path: Path) -> None:
    assert "there is no ledger.db" in refused("replay", "--data", tmp_path)
    assert "there is no ledger.db" in refused("replay", "--data", tmp_path, "--rebuild")
    assert not list(tmp_path.iterdir())
    (tmp_path / LEDGER).write_text("this is no database, it is a sentence\n" * 100)
    assert refused("verify", "--data", tmp_path).count("\n") == 1
    reason = refused("replay", "--rebuild", "--data", tmp_path)
    assert "cannot be rebuilt: file is not a database" in reason
    assert reason.count("\n") == 1


# verify, of a store


@pytest.fixture
def stored(data: Path) -> StoredVersion:
    """A version in the store of that data directory."""
    folder = write_version(data.parent / "models", {"model.onnx": b"model"})
    return store_version(opened_store(data), data.parent / "models", folder)


def test_verify_store_hashes_everything(data: Path, stored: StoredVersion) -> None:
    assert lines("verify", "--store", "--data", data) == ["verified: 1 version, 5 bytes"]
    assert printed_json("verify", "--store", "--data", data) == {
        "verified": True,
        "versions": 1,
        "bytes": 5,
        "findings": [],
    }
    file = files_of(data, stored) / "model.onnx"
    seen = file.stat()
    file.chmod(0o600)
    file.write_bytes(b"MODEL")
    os.utime(file, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    (found,) = lines("verify", "--store", "--data", data, code=1)
    assert found.startswith(f"NOT verified: version {stored.digest}: 'model.onnx' has SHA-256 ")
    (finding,) = printed_json("verify", "--store", "--data", data, code=1)["findings"]
    assert finding["digest"] == stored.digest


# export, backup

Arguments = Callable[[Path, Path], tuple[object, ...]]
WRITERS: dict[str, Arguments] = {
    "export": lambda data, file: ("export", "--data", data, file),
    "backup": lambda data, file: ("backup", "--data", data, file),
}
LEFTOVERS = ("-wal", "-journal", "-shm")
"""Suffixes of files of another database, which would be taken for those of the copy."""
each_writer = pytest.mark.parametrize("command", WRITERS.values(), ids=WRITERS)


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


# backup


def test_backup_is_verified_and_prints_head(data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "backup" / LEDGER
    copy.parent.mkdir()
    told = printed("backup", "--data", data, copy)
    assert told == printed("verify", "--data", data)
    assert printed("verify", "--data", copy.parent).startswith(f"{told}not compared: a head that was kept")
    made = printed_json("backup", "--data", data, copy)
    assert (made["verified"], made["position"]) == (True, HEAD)


def test_verify_takes_a_copy_of_a_ledger_as_file(data: Path, exported: Path, tmp_path: Path) -> None:
    """A copy beside the keys is not compared with the kept head: it is older."""
    copy, packed = tmp_path / "COPY.db", tmp_path / "COPY.db.gz"
    told = printed("backup", "--data", data, copy).splitlines()
    head = told[1].removeprefix("head: ")
    assert printed("verify", copy).splitlines()[:-1] == told
    assert "not compared: a head that was kept" in printed("verify", copy)
    assert printed("verify", copy, "--expect", head).splitlines() == told
    assert f"matches the ledger: {exported}" in printed("verify", copy, exported)
    assert "is a second ledger" in refused("verify", "--data", data, copy)
    assert "--key is for signed files" in refused("verify", copy, "--key", key_of(data))
    change_ledger(copy, "UPDATE events SET hash = zeroblob(32) WHERE position = 4")
    assert "NOT verified: position 4" in printed("verify", copy, code=1)
    packed.write_bytes(gzip.compress(copy.read_bytes()))
    assert "is compressed: unpack it first" in refused("verify", packed)


def test_running_server_refuses_backup_into_it(data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with lock_data(other):
        assert "a server is running on" in refused("backup", "--data", data, other / LEDGER)
    printed("backup", "--data", data, other / LEDGER)
    assert sorted(each.name for each in other.iterdir()) == [LEDGER, "lock"]


# Both


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


# Refusals


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("verify", "name the data directory with --data"),
        (f"verify --data {{data}} --key {'0' * 32}", "--key is for signed files"),
        ("verify {file} --expect 5", "POSITION:HASH"),
        (f"verify {{file}} --expect {HEAD + 1}:{'0' * 64}", f"has position {HEAD + 1}"),
        ("verify /dev/null", "not a regular file"),
        ("verify {data}/nowhere", "nowhere"),
        ("verify {file} --data {data}/..", "ledger.db"),
        (f"verify {{file}} --key {'0' * 31}", "neither a key id"),
        ("verify {file} --key {data}/ledger.key", "neither a key id"),
        ("verify {file} --key {data}", "neither a key id"),
        ("verify {file} --key /dev/zero", "neither a key id"),
        ("verify --store", NEW_HOME),  # the user's own
        ("verify --store --data {data} {file}", "nothing else"),
        ("verify --store --data {data}/none", "no directory"),
        (f"replay --data {{data}} --until {HEAD + 1}", f"the log's head is at position {HEAD}"),
        ("replay --data {data} --until noon", "'noon' is refused. Must be 10m, 2h or 3d (ago)"),
        ("replay --data {data} --until 2020-01-01", "is before the first event, of "),
        ("replay --data {data} --rebuild --until 4", "leave out --until and --model"),
        ("replay --data {data} --rebuild --model digits", "leave out --until and --model"),
        *(
            (f"{command} --data {{data}} {{data}}/{name}", "data directory")
            for command in WRITERS
            for name in (LEDGER, "ledger.key", "lock", "new", "../data/new")
        ),
        *((f"{command} --data {{data}} {{data}}/../nowhere/file", "nowhere") for command in WRITERS),
        *((f"{command} --data {{data}} {{data}}/../link", "not a regular file") for command in WRITERS),
        ("backup --data {data} {data}/../pipe", "not a regular file"),
        *((f"backup --data {{data}} {{data}}/../db{left}", f"{left} exists") for left in LEFTOVERS),
    ],
)
def test_ledger_command_is_refused(data: Path, exported: Path, typed: str, words: str) -> None:
    folder = data.parent
    (folder / "link").symlink_to(folder / "elsewhere")
    os.mkfifo(folder / "pipe")
    for left in LEFTOVERS:
        (folder / f"db{left}{left}").touch()

    def files() -> list[tuple[Path, bytes]]:
        return [(each, each.read_bytes() if each.is_file() else b"") for each in sorted(folder.rglob("*"))]

    before = files()
    assert words in refused(*typed.format(data=data, file=exported).split())
    assert files() == before


# key ledger


def test_lost_ledger_key_is_refused_until_made_anew(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (data / "ledger.key").unlink()
    for command in (WRITERS["export"], lambda data, _: ("key", "ledger", "--data", data)):
        reason = refused(*command(data, tmp_path / "file"))
        assert "ledger.key: restore it from your backup" in reason
    assert not (data / "ledger.key").exists()
    warned = "ledger.key was missing: from now on heads are signed with another key"
    for _ in range(2):
        ensure_data_dir(data)
    assert caplog.messages.count(warned) == 1
    printed("key", "ledger", "--data", data)
