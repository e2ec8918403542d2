"""`prepared list` and `prepared clear`: what they print, what they remove, and what they refuse."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from support.keptforms import halves, keep, key, made, written

from events.lock import hold
from loadledger.cli.main import main
from runtime.prepared.store import FOLDER, PreparedStore


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["prepared", *map(str, arguments)], env={"LOADLEDGER_DATA": None})


def printed(*arguments: object) -> str:
    result = run(*arguments)
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    return result.stdout


def refused(*arguments: object) -> str:
    """Run the command, which must end with 2 and words on stderr alone; return them."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data directory."""
    return tmp_path


@pytest.fixture
def store(data: Path) -> PreparedStore:
    """Two forms and one model without, as a server has kept them."""
    store = PreparedStore(data / FOLDER, 10**9, now_ns=lambda: 1_800_000_000 * 10**9)
    store.open()
    keep(store, "a", 3_000_000, model_id="detector")
    keep(store, "b", 250_000, model_id="digits", form="optimised")
    why = "slower:\n\x1b[31m1.2 times"
    store.settle_none(key("c"), {"prepacked": why}, model_id="small", version=7, took_ms=440)
    return store


def test_what_was_prepared_is_listed_the_last_used_first(store: PreparedStore, data: Path) -> None:
    prepared = store.use(key("a"))
    other = store.use(key("b"))
    assert prepared is not None
    assert other is not None
    at = "2027-01-15 08:00:00Z"
    assert printed("list", "--data", data).splitlines() == [
        "model     version  form       size    took   made                  last used             sha256",
        f"digits    1        optimised  0.2 MB  2.5 s  {at}  {at}  {other.sha256[:12]}",
        "  not prepacked: the worker ended: signal 11",
        f"detector  1        prepacked  3.0 MB  2.5 s  {at}  {at}  {prepared.sha256[:12]}",
        f"small     7        bare               0.4 s  {at}  {at}",
        "  not prepacked: slower:\ufffd\ufffd[31m1.2 times",
        "3 entries, 3.2 MB",
    ]


def test_what_was_prepared_in_json(store: PreparedStore, data: Path) -> None:
    told = json.loads(printed("list", "--data", data, "--json"))
    assert told["bytes"] == 3_250_000
    bare, optimised, prepacked = told["prepared"]
    assert [each["model_id"] for each in told["prepared"]] == ["small", "digits", "detector"]
    entry = store.find(key("a"))
    assert entry is not None
    assert prepacked == {
        "model_id": "detector",
        "version": 1,
        "form": "prepacked",
        "sha256": entry.sha256,
        "bytes": 3_000_000,
        "made_at": "2027-01-15T08:00:00.000000Z",
        "last_used_at": "2027-01-15T08:00:00.000000Z",
        "took_ms": 2_500,
        "figures": {"loading_us": 1_000, "ratio": 0.5, "tolerance": "bit-equal"},
        "tried": {},
        "key": key("a"),
    }
    assert optimised["tried"] == {"prepacked": "the worker ended: signal 11"}
    assert (bare["form"], bare["sha256"], bare["bytes"], bare["took_ms"]) == (None, None, 0, 440)


def test_where_nothing_was_prepared_nothing_is_listed_and_nothing_is_made(data: Path) -> None:
    assert printed("list", "--data", data) == "nothing is prepared\n"
    assert json.loads(printed("list", "--data", data, "--json")) == {"bytes": 0, "prepared": []}
    assert printed("clear", "--data", data) == "cleared: 0 entries, 0 bytes\n"
    assert list(data.iterdir()) == []


def test_all_or_one_model_is_cleared(store: PreparedStore, data: Path) -> None:
    assert printed("clear", "--data", data, "--model", "digits") == "cleared: 1 entry, 250000 bytes\n"
    assert printed("clear", "--data", data, "--model", "unheard") == "cleared: 0 entries, 0 bytes\n"
    assert [entry.model_id for entry in store.entries()] == ["small", "detector"]
    assert printed("clear", "--data", data) == "cleared: 2 entries, 3000000 bytes\n"
    assert list((data / FOLDER).iterdir()) == []


def test_what_was_cleared_in_json(store: PreparedStore, data: Path) -> None:
    told = printed("clear", "--data", data, "--model", "digits", "--json")
    assert json.loads(told) == {"entries": 1, "bytes": 250_000}
    assert [entry.model_id for entry in store.entries()] == ["small", "detector"]


def test_both_work_beside_a_server_and_leave_what_it_is_making(store: PreparedStore, data: Path) -> None:
    with hold(data):
        draft = store.draft(key("d"))
        files = written(draft, halves(10, "d"))
        assert printed("list", "--data", data).endswith("3 entries, 3.2 MB\n")
        assert printed("clear", "--data", data) == "cleared: 3 entries, 3250000 bytes\n"
        assert store.use(key("a")) is None
        assert store.keep(key("d"), draft, made(files)) is not None
    assert printed("list", "--data", data).endswith("1 entry, 0.0 MB\n")


@pytest.mark.usefixtures("store")
def test_what_a_dead_server_was_making_is_cleared(data: Path) -> None:
    left = data / FOLDER / f"draft-{'0' * 16}-{'1' * 8}"
    left.mkdir()
    (left / "weights.bin").write_bytes(b"x")
    assert printed("list", "--data", data).endswith("3 entries, 3.2 MB\n")
    printed("clear", "--data", data)
    assert not left.exists()


@pytest.mark.parametrize("command", ["list", "clear"])
def test_a_folder_that_is_a_link_is_refused(data: Path, command: str) -> None:
    (data / FOLDER).symlink_to(data)
    assert "symbolic link" in refused(command, "--data", data)


@pytest.mark.parametrize("command", ["list", "clear"])
def test_a_data_directory_that_there_is_not_is_refused(data: Path, command: str) -> None:
    assert "--data" in refused(command, "--data", data / "nowhere")
    assert "--data" in refused(command)
