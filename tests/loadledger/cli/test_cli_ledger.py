"""`loadledger verify` and `replay`: output, JSON and exit code; what is proved is tested in tests/events."""

import asyncio
import json
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key
from support import models
from support.history import History, opened
from support.http import LocalApi
from support.ledgers import append_events, rows_of, sample_history, write_ledger

from events.audit.exportreader import audit_file
from events.audit.signing import key_id
from events.audit.verify import verify
from events.datalock import LEDGER, lock_data
from loadledger.cli.main import main
from server.auth.keys import ensure_data_dir, open_signer

TRIGGERS = "SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'"
ROUNDS = 2
HEAD = len(sample_history(ROUNDS)) + 1


def run(*arguments: object, data: Path | None = None) -> Result:
    """Run the command with the data directory in the environment, if one is given."""
    environment = {"LOADLEDGER_DATA": None if data is None else str(data)}
    return CliRunner().invoke(main, [str(each) for each in arguments], env=environment)


def lines(command: str, *arguments: object, code: int = 0, data: Path | None = None) -> list[str]:
    """Return the output of a command that must end with this code and say nothing on stderr."""
    result = run(command, *arguments, data=data)
    assert (result.exit_code, result.stderr) == (code, ""), result.output
    return result.stdout.splitlines()


def members(command: str, *arguments: object, code: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads("\n".join(lines(command, *arguments, "--json", code=code)))
    return found


def refused(*arguments: object) -> str:
    """Return the reason of a command that must end with 2 and print nothing else."""
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.fixture
async def data(tmp_path: Path) -> Path:
    """A data directory with keys and a ledger that ended in order."""
    folder = tmp_path / "data"
    ensure_data_dir(folder)
    await write_ledger(folder / LEDGER, ROUNDS)
    return folder


@pytest.fixture
def archives(data: Path) -> list[Path]:
    """Two archives of that ledger, up to positions 7 and 19."""
    files = [data.parent / name for name in ("first.gz", "second.gz")]
    for file, before in zip(files, (8, 20), strict=True):
        assert run("archive", "--data", data, "--before", before, file).exit_code == 0
    return files


@pytest.fixture
def exports(data: Path) -> list[Path]:
    """Two exports of that ledger."""
    files = [data.parent / name for name in ("one.jsonl", "other.jsonl")]
    for file in files:
        assert run("export", "--data", data, file).exit_code == 0
    return files


def key_of(data: Path) -> str:
    return key_id(open_signer(data).public_key)


def head_of(data: Path) -> str:
    return f"{HEAD}:{rows_of(data / LEDGER)[-1][2].hex()}"


def with_each(archives: Sequence[Path]) -> list[object]:
    return [each for file in archives for each in ("--archive", file)]


# verify, of a ledger


def test_verify_prints_head_that_can_be_expected(data: Path) -> None:
    head = head_of(data)
    assert lines("verify", "--data", data) == [f"verified: {HEAD} events after position 0", f"head: {head}"]
    assert members("verify", "--data", data, "--expect", head) == {
        "verified": True,
        "events": HEAD,
        "position": HEAD,
        "hash": head.partition(":")[2],
        "base": {"position": 0, "hash": "00" * 32},
        "integrity": "ok",
        "projections_compared": True,
        "finding": None,
        "archives": [],
        "proved_after": 0,
        "base_state_proved": True,
        "files": [],
    }
    [beyond] = lines("verify", "--data", data, "--expect", f"{HEAD + 1}:{'ab' * 32}", code=1)[:1]
    assert beyond.startswith(f"NOT verified: position {HEAD + 1}: the log ends at position {HEAD}")


@pytest.mark.parametrize(
    ("statement", "position", "kind"),
    [
        ("UPDATE events SET hash = zeroblob(32) WHERE position = 4", 4, "hash"),
        ("DELETE FROM events WHERE position = 6", 6, "missing"),
        ("UPDATE jobs SET body = replace(body, 'alice', 'mallory')", HEAD, "projections"),
    ],
    ids=["hash", "missing", "projections"],
)
def test_verify_names_first_finding(data: Path, statement: str, position: int, kind: str) -> None:
    with closing(sqlite3.connect(data / LEDGER, isolation_level=None)) as connection:
        triggers = dict(connection.execute(TRIGGERS))
        for name in triggers:
            connection.execute(f"DROP TRIGGER {name}")
        connection.execute(statement)
        for sql in triggers.values():
            connection.execute(sql)
    first = lines("verify", "--data", data, code=1)[0]
    assert first.startswith(f"NOT verified: position {position}: ")
    assert f"({kind})" in first
    found = members("verify", "--data", data, code=1)
    assert (found["verified"], found["finding"]["position"]) == (False, position)


async def test_verify_runs_beside_open_log_and_refuses_plain_copy(data: Path, tmp_path: Path) -> None:
    async with opened(data / LEDGER) as log:
        await log.server_started()
        assert run("verify", "--data", data).exit_code == 0
        (tmp_path / LEDGER).write_bytes((data / LEDGER).read_bytes())
        assert "loadledger backup" in refused("verify", "--data", tmp_path)
        head = f"{log.head.position}:{log.head.hash.hex()}"
        assert run("verify", "--data", tmp_path, "--expect", head).exit_code == 0


# verify, with archives


def test_verify_names_archives_that_whole_proof_needs(data: Path, archives: list[Path]) -> None:
    verified = [f"verified: {HEAD - 19} events after position 19", f"head: {head_of(data)}"]
    assert lines("verify", "--data", data) == [
        *verified,
        "for a whole proof, add: positions 1 to 7, 'first.gz'",
        "for a whole proof, add: positions 8 to 19, 'second.gz'",
    ]
    whole = lines("verify", "--data", data, *with_each(archives[::-1]))
    assert whole == [
        *verified,
        f"archive: positions 1 to 7, {archives[0]}",
        f"archive: positions 8 to 19, {archives[1]}",
        f"the archives are signed by the key {key_of(data)}; use --key to check who owns it",
        "proved from the first event: the archives lead to the state at the log's base",
    ]
    assert lines("verify", "--data", data, *with_each(archives), "--key", key_of(data))[4] == (
        f"the archives are signed by the expected key {key_of(data)}"
    )
    assert "up to position 7" in lines("verify", "--data", data, "--archive", archives[1])[-1]
    found = members("verify", "--data", data, "--archive", archives[1])
    assert (found["verified"], found["proved_after"], found["base_state_proved"]) == (True, 7, False)
    assert "positions 8 to 19, 'second.gz'" in refused("verify", "--data", data, "--archive", archives[0])


def test_verify_of_archives_in_json(data: Path, archives: list[Path]) -> None:
    found = members("verify", "--data", data, *with_each(archives), "--key", key_of(data))
    assert (found["verified"], found["finding"], found["base"]["position"]) == (True, None, 19)
    assert (found["proved_after"], found["base_state_proved"]) == (0, True)
    first = audit_file(archives[0])
    assert first.head is not None
    assert first.sha256 is not None
    assert found["files"][0] == {
        "file": str(archives[0]),
        "verified": True,
        "events": 7,
        "after": {"position": 0, "hash": "00" * 32},
        "position": 7,
        "hash": first.proved.hash.hex(),
        "recorded_at": first.head.statement.recorded_at,
        "key_id": key_of(data),
        "key_expected": True,
        "sha256": first.sha256.hex(),
        "finding": None,
    }


# verify, of files


def test_verify_of_files_names_their_signer(data: Path, exports: list[Path]) -> None:
    expected = [
        f"{file}: {words}"
        for file in exports
        for words in (
            f"verified: {HEAD} events after position 0",
            f"head: {head_of(data)}",
            f"signed by the key {key_of(data)}; use --key to check who owns it",
        )
    ]
    assert lines("verify", *exports) == expected
    assert lines("verify", *exports, data=data) == expected  # LOADLEDGER_DATA is not meant
    found = members("verify", *exports)
    assert (found["verified"], set(found)) == (True, {"verified", "files"})
    assert [each["key_expected"] for each in found["files"]] == [None, None]


def test_key_may_be_id_or_file_in_any_encoding(data: Path, exports: list[Path], tmp_path: Path) -> None:
    printed = run("key", "ledger", "--data", data).stdout
    public = open_signer(data).public_key
    pem = load_der_public_key(public).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    keys: list[object] = [key_of(data).upper()]
    for name, content in (("printed", printed.encode()), ("key.pem", pem), ("key.der", public)):
        (tmp_path / name).write_bytes(content)
        keys.append(tmp_path / name)
    for key in keys:
        assert lines("verify", *exports, "--key", key)[2].endswith(f"by the expected key {key_of(data)}")
    other = "0" * 32
    first = lines("verify", *exports, "--key", other, code=1)[0]
    assert first.startswith(f"{exports[0]}: NOT verified: position {HEAD}: the head is signed by the key")
    assert members("verify", *exports, "--key", other, code=1)["files"][0]["key_expected"] is False


def test_verify_names_each_damaged_file(exports: list[Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(exports[0].read_bytes().replace(b"alice", b"mallory", 1))
    found = lines("verify", bad, *exports, code=1)
    assert found[0].startswith(f"{bad}: NOT verified: position 2: ")
    assert found[1].startswith(f"{bad}: proved up to: 1:")
    assert found[2].startswith(f"{exports[0]}: verified: ")
    judged = members("verify", bad, *exports, code=1)["files"]
    assert [each["verified"] for each in judged] == [False, True, True]


def test_verify_compares_files_with_ledger(data: Path, exports: list[Path]) -> None:
    found = lines("verify", *exports, "--data", data)
    assert found[2:4] == [f"matches the ledger: {file}" for file in exports]
    assert len(members("verify", *exports, "--data", data)["files"]) == 2


def test_verify_prints_names_that_are_not_utf_8(archives: list[Path]) -> None:
    odd = archives[0].with_name(os.fsdecode(b"\xff.gz"))
    odd.write_bytes(archives[0].read_bytes()[:-20])
    command = (sys.executable, "-m", "loadledger", "verify", str(odd))
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (1, b"")
    assert b"NOT verified" in done.stdout
    assert done.stdout.decode().count("\N{REPLACEMENT CHARACTER}.gz") == 3


Arguments = Callable[[Path, Path], tuple[object, ...]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (lambda _data, _file: (), "--data DIR of a ledger, or FILE"),
        (lambda _data, file: ("--archive", file), "name it as FILE"),
        (lambda _data, file: (file, "--archive", file), "name it as FILE"),
        (lambda data, _file: ("--data", data, "--key", "0" * 32), "--key is for signed files"),
        (lambda data, file: ("--data", data, "--archive", file), "has no archived events"),
        (lambda data, _file: ("--data", data, "--archive", data), "is a directory"),
        (lambda _data, file: (file, "--expect", "5"), "POSITION:HASH"),
        (lambda _data, file: (file, "--expect", f"{HEAD + 1}:{'0' * 64}"), f"has position {HEAD + 1}"),
        (lambda _data, _file: ("/dev/null",), "not a regular file"),
        (lambda data, _file: (data / "nowhere",), "nowhere"),
        (lambda data, file: (file, "--data", data.parent), "ledger.db"),
        (lambda _data, file: (file, "--key", "0" * 31), "neither a key id"),
        (lambda data, file: (file, "--key", data / "ledger.key"), "neither a key id"),
        (lambda data, file: (file, "--key", data), "neither a key id"),
        (lambda _data, file: (file, "--key", "/dev/zero"), "neither a key id"),
    ],
)
def test_verify_refuses_what_it_cannot_judge(
    data: Path, exports: list[Path], arguments: Arguments, words: str
) -> None:
    assert words in refused("verify", *arguments(data, exports[0]))


def test_verify_tells_database_from_export(data: Path) -> None:
    assert "name the data directory of a ledger with --data" in lines("verify", data / LEDGER, code=1)[0]


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
    printed = "\n".join(lines("replay", "--data", two_models))
    assert re.sub(r"2\d{3}-\d\d-\d\dT[\d:.]+Z", "TIME", printed).splitlines() == [
        "as of position 9, recorded TIME",
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
        "models: 0",
        "unended jobs: 0",
    ]


def test_replay_until_moment_of_one_model(two_models: Path) -> None:
    found = members("replay", "--data", two_models, "--until", 8, "--model", "digits")
    assert [model["id"] for model in found["models"]] == ["digits"]
    assert [job["status"] for job in found["jobs"]] == ["pending"]
    assert members("replay", "--data", two_models, "--until", found["as_of_time"])["as_of"] == 8
    assert members("replay", "--data", two_models, "--model", "none")["models"] == []


async def test_replay_agrees_with_running_server(api: LocalApi) -> None:
    models.save(models.add(), api.config.repository, "digits")
    await api.load("digits")
    found = await asyncio.to_thread(members, "replay", "--data", api.config.data)
    assert found["models"] == [await api.model("digits") | {"versions": None}]
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
        assert members(*rebuild) == {"position": 9, "differ": False, "differences": []}
    assert verify(two_models / LEDGER).verified


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--until", "10"), "the log's head is at position 9"),
        (("--until", "noon"), "is neither a position"),
        (("--rebuild", "--until", "4"), "leave out --until, --model"),
        (("--rebuild", "--model", "digits"), "leave out --until, --model"),
    ],
)
def test_replay_refuses(two_models: Path, arguments: tuple[str, ...], words: str) -> None:
    assert words in refused("replay", "--data", two_models, *arguments)


def test_rebuild_beside_server_names_its_process(two_models: Path) -> None:
    with lock_data(two_models):
        assert re.search(r"is in use by process \d+", refused("replay", "--data", two_models, "--rebuild"))
        assert lines("replay", "--data", two_models)


def test_replay_without_ledger_is_refused(tmp_path: Path) -> None:
    for arguments in ((), ("--rebuild",)):
        assert "there is no ledger.db" in refused("replay", "--data", tmp_path, *arguments)
    assert not list(tmp_path.iterdir())
    (tmp_path / LEDGER).write_text("this is no database, it is a sentence\n" * 100)
    for command, words in (
        (("replay", "--rebuild"), "cannot be rebuilt: file is not a database"),
        (("verify",), "not a database"),
    ):
        reason = refused(*command, "--data", tmp_path)
        assert words in reason
        assert reason.count("\n") == 1
