"""`loadledger replay`: the state from the log alone, and the stored projections made anew."""

import asyncio
import json
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from support import models
from support.events import History, opened
from support.http import LocalApi

from events.commands import Record
from events.lock import hold
from events.types import Draft, Unknown
from events.verify import verify
from loadledger.cli.main import main
from server.app import LEDGER


def replay(data: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["replay", "--data", str(data), *arguments])


def replayed(data: Path, *arguments: str) -> str:
    result = replay(data, *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


async def write(path: Path, history: History) -> None:
    async with opened(path) as log:
        for fact in history.facts:
            assert not isinstance(fact.data, Unknown)
            draft = Draft(
                fact.id, fact.data, fact.actor, fact.job_id, fact.model_id, fact.version, fact.worker_id
            )
            await log.submit(Record((draft,)))


@pytest.fixture
def data(tmp_path: Path) -> Iterator[Path]:
    """A data directory whose ledger has two models and a load under way."""
    history = History()
    history.restart()  # 1
    history.load("L")  # 2 to 4
    history.load("O", of="other")  # 5 to 7
    history.ask_load("L2", version=2)  # 8
    history.start_load("L2", version=2)  # 9
    asyncio.run(write(tmp_path / LEDGER, history))
    yield tmp_path
    assert verify(tmp_path / LEDGER).verified


def test_the_state_is_printed_for_people(data: Path) -> None:
    assert re.sub(r"2\d{3}-\d\d-\d\dT[\d:.]+Z", "TIME", replayed(data)) == (
        "as of position 9, recorded TIME\n"
        "models: 2\n"
        "  digits: loaded version 1\n"
        "    loaded TIME by alice, position 4, job L\n"
        f"    model.onnx: 4096 bytes, sha256 {'ab' * 32}\n"
        "  other: loaded version 1, active\n"
        "    loaded TIME by alice, position 7, job O\n"
        f"    model.onnx: 4096 bytes, sha256 {'ab' * 32}\n"
        "jobs that had not ended: 1\n"
        "  L2: load of digits version 2, in_progress\n"
        "    requested TIME by alice, cause request\n"
    )


def test_the_state_of_then_is_printed_and_one_model_of_it(data: Path) -> None:
    assert "models: 1\n" in replayed(data, "--until", "4")
    assert replayed(data, "--until", "0") == "as of position 0\nmodels: 0\njobs that had not ended: 0\n"
    assert "other" not in replayed(data, "--model", "digits")
    told = json.loads(replayed(data, "--until", "8", "--model", "digits", "--json"))
    assert [job["status"] for job in told["jobs"]] == ["pending"]
    time = told["as_of_time"]
    assert json.loads(replayed(data, "--until", time, "--json"))["as_of"] == 8
    assert json.loads(replayed(data, "--model", "none", "--json"))["models"] == []


@pytest.mark.parametrize(
    ("until", "said"), [("10", "the log's head is at position 9"), ("noon", "is neither a position")]
)
def test_what_is_no_moment_is_told(data: Path, until: str, said: str) -> None:
    result = replay(data, "--until", until)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr


def test_a_directory_without_a_ledger_is_told_and_stays_without_one(tmp_path: Path) -> None:
    for arguments in ([], ["--rebuild"]):
        result = replay(tmp_path, *arguments)
        assert result.exit_code == 2
        assert "there is no ledger.db" in result.stderr
    assert not list(tmp_path.iterdir())


async def test_what_a_running_server_knows_is_what_is_replayed_beside_it(
    api: LocalApi, repository: Path
) -> None:
    models.save(models.add(), repository, "digits")
    await api.load("digits")
    told = json.loads(await asyncio.to_thread(replayed, api.config.data, "--json"))
    assert told["models"] == [await api.model("digits") | {"versions": None}]
    assert told["jobs"] == []
    at = (await api.get(f"/api/v1/models?at={told['as_of']}")).json
    assert (told["as_of"], told["as_of_time"]) == (at["as_of"], at["as_of_time"])
    assert told["models"] == at["models"]


def test_projections_that_are_as_they_should_be_are_made_anew_and_said_to_be(data: Path) -> None:
    told = "the stored projections are what the log gives, up to position 9\n"
    assert replayed(data, "--rebuild") == told
    assert json.loads(replayed(data, "--rebuild", "--json")) == {
        "position": 9,
        "differ": False,
        "differences": [],
    }


def test_projections_that_somebody_changed_are_made_anew_and_told(data: Path) -> None:
    with closing(sqlite3.connect(data / LEDGER, isolation_level=None)) as connection:
        connection.execute("UPDATE jobs SET body = replace(body, 'alice', 'mallory') WHERE id = 'L'")
        connection.execute("DELETE FROM jobs WHERE id = 'L2'")
        connection.execute("DELETE FROM models WHERE id = 'digits'")
        connection.execute("INSERT INTO models (id, body) VALUES ('zoo', '{}')")
    assert not verify(data / LEDGER).verified
    result = replay(data, "--rebuild")
    assert result.exit_code == 1
    assert result.stdout == (
        "the stored projections differed from the log, and were made anew:\n"
        "  the stored models lacked 'digits'\n"
        "  the stored models had, and the log does not give, 'zoo'\n"
        "  the stored jobs differed at 'L'\n"
        "  the stored jobs lacked 'L2'\n"
    )
    assert replay(data, "--rebuild").exit_code == 0


def test_projections_are_made_anew_while_somebody_has_the_ledger_open(data: Path) -> None:
    with closing(sqlite3.connect(data / LEDGER, isolation_level=None)) as follower:
        follower.execute("PRAGMA journal_mode = WAL")
        follower.execute("SELECT count(*) FROM events").fetchone()
        assert replay(data, "--rebuild").exit_code == 0


def test_a_file_that_cannot_be_rebuilt_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / LEDGER).write_text("this is no database, it is a sentence\n" * 100)
    result = replay(tmp_path, "--rebuild")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert "cannot be rebuilt: file is not a database" in result.stderr


def test_nothing_is_made_anew_under_a_running_server_and_its_holder_is_named(data: Path) -> None:
    with hold(data):
        result = replay(data, "--rebuild")
        assert replay(data).exit_code == 0
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.search(r"is in use by process \d+", result.stderr)


def test_a_rebuild_is_of_the_whole_log(data: Path) -> None:
    for arguments in (["--until", "4"], ["--model", "digits"]):
        result = replay(data, "--rebuild", *arguments)
        assert result.exit_code == 2
        assert "leave --until and --model out" in result.stderr
