"""`verify`: of a ledger with its archives, and of files by themselves."""

import gzip
import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key
from support.events import START
from support.ledgers import rows_of, told_history, write_ledger

from events.archivefile import audit_file
from events.signing import key_id
from loadledger.cli.main import main
from server.app import LEDGER
from server.auth.keys import ensure_data_dir
from server.ledger.key import open_signer

ROUNDS = 2
HEAD = len(told_history(ROUNDS)) + 1


def run(*arguments: object, data: Path | None = None) -> Result:
    """Run the command, with the data directory in the environment if one is given."""
    environment = {"LOADLEDGER_DATA": None if data is None else str(data)}
    return CliRunner().invoke(main, [str(each) for each in arguments], env=environment)


def lines(*arguments: object, code: int = 0, data: Path | None = None) -> list[str]:
    """Run `verify`, which must end with this code; return what it printed."""
    result = run("verify", *arguments, data=data)
    assert (result.exit_code, result.stderr) == (code, ""), result.output
    return result.stdout.splitlines()


def told(*arguments: object, code: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads("\n".join(lines(*arguments, "--json", code=code)))
    return found


def refused(*arguments: object, data: Path | None = None) -> str:
    """Run `verify`, which must end with 2 and words on stderr alone; return them."""
    result = run("verify", *arguments, data=data)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
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
    """The archives of that ledger."""
    files = [data.parent / name for name in ("first.gz", "second.gz")]
    for file, before in zip(files, (8, 20), strict=True):
        assert run("archive", "--data", data, "--before", before, file).exit_code == 0
    return files


@pytest.fixture
def files(data: Path) -> list[Path]:
    """Two exports of that ledger."""
    found = [data.parent / name for name in ("one.jsonl", "other.jsonl")]
    for file in found:
        assert run("export", "--data", data, file).exit_code == 0
    return found


def key_of(data: Path) -> str:
    return key_id(open_signer(data).public_key)


def with_each(archives: list[Path]) -> list[object]:
    return [each for file in archives for each in ("--archive", file)]


# A ledger and its archives


def test_a_ledger_names_the_archives_that_a_whole_proof_takes_and_with_them_it_is_whole(
    data: Path, archives: list[Path]
) -> None:
    head = f"{HEAD}:{rows_of(data / LEDGER)[-1][2].hex()}"
    assert lines("--data", data) == [
        f"verified: {HEAD - 19} events after position 19",
        f"head: {head}",
        "for a whole proof: positions 1 to 7, 'first.gz'",
        "for a whole proof: positions 8 to 19, 'second.gz'",
    ]
    assert lines("--data", data, *with_each(archives[::-1])) == [
        f"verified: {HEAD - 19} events after position 19",
        f"head: {head}",
        f"archive: positions 1 to 7, {archives[0]}",
        f"archive: positions 8 to 19, {archives[1]}",
        f"the archives are signed by the key {key_of(data)}; whose that is, only --key can say",
        "from the first event on: the archives come to the state with which the log begins",
    ]
    assert lines("--data", data, *with_each(archives), "--key", key_of(data))[4] == (
        f"the archives are signed by the expected key {key_of(data)}"
    )


def test_a_part_of_the_archives_says_from_where_on_they_prove(data: Path, archives: list[Path]) -> None:
    assert "up to position 7" in lines("--data", data, "--archive", archives[1])[-1]
    found = told("--data", data, "--archive", archives[1])
    assert (found["verified"], found["proved_after"], found["base_state_proved"]) == (True, 7, False)
    assert "positions 8 to 19, 'second.gz'" in refused("--data", data, "--archive", archives[0])


def test_a_ledger_and_its_archives_in_json(data: Path, archives: list[Path]) -> None:
    found = told("--data", data, *with_each(archives), "--key", key_of(data))
    assert (found["verified"], found["finding"]) == (True, None)
    assert (found["proved_after"], found["base_state_proved"]) == (0, True)
    assert found["base"]["position"] == 19
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
    assert [each["events"] for each in found["files"]] == [7, 12]


def test_a_damaged_archive_is_named_with_its_first_bad_position(data: Path, archives: list[Path]) -> None:
    content = gzip.decompress(archives[1].read_bytes()).replace(b"alice", b"mallo")
    archives[1].write_bytes(gzip.compress(content))
    first = lines("--data", data, *with_each(archives), code=1)[0]
    finding = audit_file(archives[1]).finding
    assert finding is not None
    assert first.startswith(f"NOT verified: {archives[1]}: position {finding.position}: ")
    found = told("--data", data, *with_each(archives), code=1)
    assert (found["verified"], found["finding"]["file"]) == (False, str(archives[1]))
    assert found["files"][1]["finding"] == found["finding"]
    archives[1].write_bytes(b"")
    assert lines("--data", data, *with_each(archives), code=1)


def test_an_expected_head_may_be_in_an_archive(data: Path, archives: list[Path]) -> None:
    first = audit_file(archives[0])
    kept = f"7:{first.proved.hash.hex()}"
    assert "were archived" in refused("--data", data, "--expect", kept)
    assert lines("--data", data, *with_each(archives), "--expect", kept)
    assert "(expectation)" in lines(
        "--data", data, *with_each(archives), "--expect", f"7:{'ab' * 32}", code=1
    )[0]  # fmt: skip


# Files by themselves


def test_files_are_verified_by_themselves_and_say_who_signed(data: Path, files: list[Path]) -> None:
    head = f"{HEAD}:{rows_of(data / LEDGER)[-1][2].hex()}"
    expected = [
        line
        for file in files
        for line in (
            f"{file}: verified: {HEAD} events after position 0",
            f"{file}: head: {head}",
            f"{file}: signed by the key {key_of(data)}; whose that is, only --key can say",
        )
    ]
    assert lines(*files) == expected
    assert lines(*files, data=data) == expected  # what the environment says is not meant
    found = told(*files)
    assert (found["verified"], set(found)) == (True, {"verified", "files"})
    assert [each["key_expected"] for each in found["files"]] == [None, None]


def test_the_key_may_be_given_by_its_id_or_as_it_is_printed_or_as_openssl_has_it(
    data: Path, files: list[Path], tmp_path: Path
) -> None:
    printed = run("key", "ledger", "--data", data).stdout
    public = open_signer(data).public_key
    pem = load_der_public_key(public).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    for name, content in (("printed", printed.encode()), ("key.pem", pem), ("key.der", public)):
        (tmp_path / name).write_bytes(content)
        assert lines(*files, "--key", tmp_path / name)[2].endswith(
            f"signed by the expected key {key_of(data)}"
        )
    assert lines(*files, "--key", key_of(data).upper())
    other = tmp_path / "other"
    ensure_data_dir(other)
    for key in (key_of(other), "0" * 32):
        found = lines(*files, "--key", key, code=1)
        assert found[0].startswith(
            f"{files[0]}: NOT verified: position {HEAD}: the head is signed by the key"
        )
        assert told(*files, "--key", key, code=1)["files"][0]["key_expected"] is False


def test_what_is_no_public_key_is_told(data: Path, files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "nonsense").write_bytes(b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n")
    for key in (
        "0" * 31,
        data / "ledger.key",
        tmp_path / "nonsense",
        tmp_path,
        tmp_path / "nowhere",
        "/dev/zero",
    ):
        assert "neither a key id" in refused(*files, "--key", key)


def test_each_file_that_does_not_verify_is_named(files: list[Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(files[0].read_bytes().replace(b"alice", b"mallory", 1))
    found = lines(bad, *files, code=1)
    assert found[0].startswith(f"{bad}: NOT verified: position 2: ")
    assert found[1].startswith(f"{bad}: proved up to: 1:")
    assert found[2].startswith(f"{files[0]}: verified: ")
    assert [each["verified"] for each in told(bad, *files, code=1)["files"]] == [False, True, True]


def test_an_expected_head_has_to_be_in_a_file(data: Path, files: list[Path]) -> None:
    digest = rows_of(data / LEDGER)[4][2].hex()
    assert lines(*files, "--expect", f"5:{digest}")
    assert "5 " not in lines(*files, "--expect", f"5:{'ab' * 32}", code=1)[1]
    assert f"none of these files has position {HEAD + 1}" in refused(
        *files, "--expect", f"{HEAD + 1}:{digest}"
    )


def test_files_beside_a_ledger_have_to_have_the_same_events(
    data: Path, files: list[Path], tmp_path: Path
) -> None:
    found = lines(*files, "--data", data)
    assert found[2:4] == [f"the same as in the ledger: {file}" for file in files]
    assert len(told(*files, "--data", data)["files"]) == 2
    other = tmp_path / "other"
    ensure_data_dir(other)
    run("token", "--data", other, "--role", "admin", "--subject", "alice")
    (other / LEDGER).write_bytes((data / LEDGER).read_bytes())
    assert run("archive", "--data", other, "--before", 9, tmp_path / "a.gz").exit_code == 0
    assert lines(tmp_path / "a.gz", "--data", other)[2] == f"the same as in the ledger: {tmp_path / 'a.gz'}"


async def test_a_file_that_ends_before_the_ledger_begins_takes_its_archive(
    data: Path, archives: list[Path], tmp_path: Path
) -> None:
    assert "positions 1 to 7, 'first.gz'" in refused(archives[0], "--data", data)
    found = lines(archives[0], "--data", data, *with_each(archives))
    assert f"the same as in the ledger: {archives[0]}" in found
    other = tmp_path / "other"
    ensure_data_dir(other)
    await write_ledger(other / LEDGER, 1, now=lambda: START + timedelta(seconds=1))
    assert run("export", "--data", other, "--until", 5, tmp_path / "other.jsonl").exit_code == 0
    assert "first.gz" in refused(tmp_path / "other.jsonl", "--data", data)
    found = lines(tmp_path / "other.jsonl", "--data", data, *with_each(archives), code=1)
    assert found[0].startswith(f"NOT verified: {tmp_path / 'other.jsonl'}: position 5: the hash is ")


def test_a_schema_that_is_not_ours_is_named(data: Path) -> None:
    with closing(sqlite3.connect(data / LEDGER)) as connection:
        connection.execute("DROP TRIGGER events_never_change")
    assert lines("--data", data, code=1)[0] == (
        f"NOT verified: position {HEAD}: the database's schema: the trigger 'events_never_change' is missing "
        "(schema)"
    )
    assert told("--data", data, code=1)["finding"]["kind"] == "schema"


def test_a_name_that_is_no_text_is_told(archives: list[Path]) -> None:
    odd = archives[0].with_name(os.fsdecode(b"\xff.gz"))
    odd.write_bytes(archives[0].read_bytes()[:-20])
    command = (sys.executable, "-m", "loadledger", "verify", str(odd))
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (1, b"")
    assert b"NOT verified" in done.stdout
    assert done.stdout.decode().count("\N{REPLACEMENT CHARACTER}.gz") == 3


# What has no meaning


def test_what_cannot_be_is_told_with_what_to_do(data: Path, files: list[Path], tmp_path: Path) -> None:
    assert "--data DIR of a ledger, or FILE" in refused()
    assert "name it as FILE" in refused("--archive", files[0])
    assert "name it as FILE" in refused(files[1], "--archive", files[0])
    assert "--key is of signed files" in refused("--data", data, "--key", "0" * 32)
    assert "nothing was archived" in refused("--data", data, "--archive", files[0])
    assert "POSITION:HASH" in refused(files[0], "--expect", "5")
    assert "no regular file" in refused("/dev/null")
    assert "nowhere" in refused(tmp_path / "nowhere")
    assert "ledger.db" in refused(files[0], "--data", tmp_path)
    for name in ("nowhere.gz", "data"):
        assert refused("--data", data, "--archive", tmp_path / name)


def test_a_database_is_no_file_with_events_and_is_told(data: Path) -> None:
    assert "name the data directory of a ledger with --data" in lines(data / LEDGER, code=1)[0]
