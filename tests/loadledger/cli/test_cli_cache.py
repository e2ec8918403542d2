"""`loadledger prepared list` and `clear`: what they print, remove and refuse."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from support.cache import halves, keep, key, made_of, written

from events.datalock import lock_data
from loadledger.cli.main import main
from runtime.cache.store import FOLDER, ModelCache


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["prepared", *map(str, arguments)], env={"LOADLEDGER_DATA": None})


def printed(*arguments: object) -> str:
    result = run(*arguments)
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    return result.stdout


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data directory."""
    return tmp_path


@pytest.fixture
def store(data: Path) -> ModelCache:
    """Two cached models and one without, as a server has kept them."""
    store = ModelCache(data / FOLDER, 10**9, now_ns=lambda: 1_800_000_000 * 10**9)
    store.open()
    keep(store, "a", 3_000_000, model_id="detector")
    keep(store, "b", 250_000, model_id="digits", form="optimised")
    why = "slower:\n\x1b[31m1.2 times"
    store.record_useless(key("c"), {"prepacked": why}, model_id="small", version=7, took_ms=440)
    return store


def test_list_prints_latest_used_first(store: ModelCache, data: Path) -> None:
    prepared, other = store.use(key("a")), store.use(key("b"))
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


def test_list_in_json(store: ModelCache, data: Path) -> None:
    found = json.loads(printed("list", "--data", data, "--json"))
    assert found["bytes"] == 3_250_000
    bare, optimised, prepacked = found["prepared"]
    assert [each["model_id"] for each in found["prepared"]] == ["small", "digits", "detector"]
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


def test_empty_cache_is_listed_and_cleared_without_a_trace(data: Path) -> None:
    assert printed("list", "--data", data) == "nothing is prepared\n"
    assert json.loads(printed("list", "--data", data, "--json")) == {"bytes": 0, "prepared": []}
    assert printed("clear", "--data", data) == "cleared: 0 entries, 0 bytes\n"
    assert list(data.iterdir()) == []


def test_clear_removes_one_model_or_all(store: ModelCache, data: Path) -> None:
    assert printed("clear", "--data", data, "--model", "digits") == "cleared: 1 entry, 250000 bytes\n"
    unknown = printed("clear", "--data", data, "--model", "unheard", "--json")
    assert json.loads(unknown) == {"entries": 0, "bytes": 0}
    assert [entry.model_id for entry in store.entries()] == ["small", "detector"]
    left = data / FOLDER / f"draft-{'0' * 16}-{'1' * 8}"  # of a server that was killed
    left.mkdir()
    (left / "weights.bin").write_bytes(b"x")
    assert printed("clear", "--data", data) == "cleared: 2 entries, 3000000 bytes\n"
    assert list((data / FOLDER).iterdir()) == []


def test_clear_beside_server_leaves_its_drafts(store: ModelCache, data: Path) -> None:
    with lock_data(data):
        draft = store.draft(key("d"))
        files = written(draft, halves(10, "d"))
        assert printed("list", "--data", data).endswith("3 entries, 3.2 MB\n")
        assert printed("clear", "--data", data) == "cleared: 3 entries, 3250000 bytes\n"
        assert store.use(key("a")) is None
        assert store.keep(key("d"), draft, made_of(files)) is not None
    assert printed("list", "--data", data).endswith("1 entry, 0.0 MB\n")


@pytest.mark.parametrize("command", ["list", "clear"])
def test_unusable_data_directory_is_refused(data: Path, command: str) -> None:
    (data / FOLDER).symlink_to(data)
    for arguments, words in (
        (("--data", data), "symbolic link"),
        (("--data", data / "nowhere"), "--data"),
        ((), "--data"),
    ):
        result = run(command, *arguments)
        assert (result.exit_code, result.stdout) == (2, ""), result.output
        assert words in result.stderr
        assert "Traceback" not in result.stderr
