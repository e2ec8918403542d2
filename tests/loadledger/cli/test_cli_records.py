"""`loadledger records list`, `read`, `erase` and `verify`, and both clients."""

import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from support.clients import KINDS, Shell, connected
from support.http import ONE, LocalApi, local_server
from support.models import add
from support.records import change_byte, find_files
from support.sources import in_thread

from features.records.app import RECORDING
from features.records.rules import RecordRule
from loadledger import NotFound, ServerError

MODELS = ("closed", "open")


@asynccontextmanager
async def recording_server(folder: Path) -> AsyncIterator[LocalApi]:
    """Serve models that have two recorded inferences each; the file of the first one is closed."""
    async with local_server(folder, tables={"record": (RecordRule(models=("*",)),)}) as api:
        for model_id in MODELS:
            api.save(add(1), model_id)
            await api.load(model_id)
            for number in range(2):
                answer = await api.infer(model_id, ONE, id=f"{model_id}-{number}")
                assert answer.status == 200
            if model_id == "closed":
                await api.app[RECORDING].close()
        await api.app[RECORDING].flush()
        yield api


@pytest.fixture
def recording(tmp_path: Path) -> Iterator[LocalApi]:
    with in_thread(recording_server(tmp_path)) as api:
        yield api


@pytest.fixture
def name(recording: LocalApi) -> str:
    """The name of the closed file."""
    [found] = [name for name, path in find_files(recording.config).items() if path.parent.name == "closed"]
    return found


@pytest.fixture
def alice(recording: LocalApi) -> Shell:
    """An administrator."""
    return Shell(recording, "admin")


@pytest.fixture
def bob(recording: LocalApi) -> Shell:
    """An auditor."""
    return Shell(recording, "audit", subject="bob")


def test_records_list_shows_files(bob: Shell, name: str) -> None:
    header, closed, opened = bob.prints("records list").splitlines()
    assert header.split() == ["MODEL", "FILE", "STATE", "RECORDS", "DROPPED", "SIZE", "WRITTEN", "POSITION"]
    assert re.match(rf"closed +{name} +closed +2 +0 ", closed)
    assert re.match(r"open +\S{36} +open +- +- ", opened)
    [file] = bob.json("records list --model closed")["files"]
    assert (file["file"], file["records"], file["state"]) == (name, 2, "closed")
    assert bob.prints("records list --model none") == "no files of records\n"


def test_records_read_prints_lines(bob: Shell) -> None:
    lines = [json.loads(line) for line in bob.prints("records read").splitlines()]
    assert [line["request"] for line in lines] == ["closed-0", "closed-1", "open-0", "open-1"]
    assert {line["subject"] for line in lines} == {"pia"}
    for chosen, wanted in (
        ("--model open", lines[2:]),
        (f"--id {lines[1]['id']}", lines[1:2]),
        ("--id open-1 --since 1h", lines[3:]),
        ("--id none", []),
    ):
        assert [json.loads(line) for line in bob.prints(f"records read {chosen}").splitlines()] == wanted


def test_records_erase_deletes_closed_file(recording: LocalApi, alice: Shell, bob: Shell, name: str) -> None:
    erase = f"records erase {name} --reason 'asked for by pia'"
    assert "(forbidden)" in bob.run(*f"records erase {name} --reason x".split()).stderr
    [opened] = bob.json("records list --model open")["files"]
    assert "(record_file_open)" in alice.refused(2, f"records erase {opened['file']} --reason x")
    assert alice.prints(erase) == f"{name}: erased\n"
    assert find_files(recording.config).keys() == {opened["file"]}
    assert "(unknown_record_file)" in alice.refused(2, erase)
    said = alice.prints("events --type RecordsErased")
    assert "asked for by pia" in said


def test_records_verify_names_changed_and_erased_files(recording: LocalApi, alice: Shell, name: str) -> None:
    verify = ("records", "verify", "--data", str(recording.config.data))
    done = alice.run(*verify)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == "verified: 2 files: 1 as announced, 0 erased, 1 open"
    path = find_files(recording.config)[name]
    change_byte(path)
    done = alice.run(*verify, "--json")
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert not found["verified"]
    assert [(each["model_id"], each["state"]) for each in found["files"]] == [
        ("closed", "changed"),
        ("open", "open"),
    ]
    alice.prints(f"records erase {name} --reason changed")
    done = alice.run(*verify)
    assert done.exit_code == 0, done.output
    erased = rf"^closed/{name}: erased \S+ by alice: changed; it was 2 inferences, "
    assert re.search(erased, done.stdout, re.MULTILINE)
    assert alice.run("records", "verify", "--data", str(path.parent)).exit_code == 2  # there is no ledger


@pytest.mark.parametrize("kind", KINDS)
def test_client_reads_and_erases_records(recording: LocalApi, name: str, kind: str) -> None:
    with connected(kind, recording.url, recording.token("admin")) as client:
        assert [line["request"] for line in client.records(model="open")] == ["open-0", "open-1"]
        [line] = client.records(request_id="closed-1", since="2026-01-31T14:02:00Z")
        assert line["model"] == "closed"
        closed, opened = client.record_files()
        assert (closed.file, closed.state, opened.state) == (name, "closed", "open")
        with pytest.raises(ServerError, match="record_file_open"):
            client.erase_record_file(opened.file, "a test")
        client.erase_record_file(name, "a test")
        with pytest.raises(NotFound):
            client.erase_record_file(name, "a test")
        assert [file.model_id for file in client.record_files()] == ["open"]
