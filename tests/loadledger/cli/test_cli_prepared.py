"""`loadledger prepared list` and `clear`: what they print, remove and refuse."""

from pathlib import Path

import pytest
from support.clients import printed, printed_json, refused
from support.optimised import keep, key, record

from runtime.optimised.store import OptimisedStore
from runtime.store.folder import STORE


@pytest.fixture
def store(tmp_path: Path) -> OptimisedStore:
    """Two optimised models and a useless one, as a server has kept them."""
    store = OptimisedStore(tmp_path / STORE, 10**9, now_ns=lambda: 1_800_000_000 * 10**9)
    store.open()
    keep(store, "a", 3_000_000, model_id="detector")
    keep(store, "b", 250_000, model_id="digits")
    why = "slower:\n\x1b[31m1.2 times"
    record(store, "c", why, model_id="small", version=7)
    return store


def test_list_prints_latest_used_first(store: OptimisedStore, tmp_path: Path) -> None:
    prepared, other = store.use(key("a")), store.use(key("b"))
    assert prepared is not None
    assert other is not None
    at = "2027-01-15 08:00:00Z"
    assert printed("prepared", "list", "--data", tmp_path).splitlines() == [
        "model     version  device  size    took   made                  last used             sha256",
        f"digits    1        cpu     0.2 MB  2.5 s  {at}  {at}  {other.sha256[:12]}",
        f"detector  1        cpu     3.0 MB  2.5 s  {at}  {at}  {prepared.sha256[:12]}",
        f"small     7        cpu     bare    2.5 s  {at}  {at}",
        "  slower:\ufffd\ufffd[31m1.2 times",
        "3 entries, 3.2 MB",
    ]


def test_list_in_json(store: OptimisedStore, tmp_path: Path) -> None:
    found = printed_json("prepared", "list", "--data", tmp_path)
    assert found["bytes"] == 3_250_000
    bare, _, detector = found["prepared"]
    assert [each["model_id"] for each in found["prepared"]] == ["small", "digits", "detector"]
    entry = store.find(key("a"))
    assert entry is not None
    assert detector == {
        "model_id": "detector",
        "version": 1,
        "sha256": entry.sha256,
        "bytes": 3_000_000,
        "made_at": "2027-01-15T08:00:00.000000Z",
        "last_used_at": "2027-01-15T08:00:00.000000Z",
        "took_ms": 2_500,
        "figures": {"load_us": 1_000, "bare_load_us": 2_000},
        "reason": None,
        "key": key("a"),
        "device": "cpu",
    }
    assert (bare["reason"] or "").startswith("slower")
    assert (bare["sha256"], bare["bytes"], bare["took_ms"]) == (None, 0, 2_500)


def test_empty_cache_is_listed_and_cleared_without_a_trace(tmp_path: Path) -> None:
    assert printed("prepared", "list", "--data", tmp_path) == "nothing is prepared\n"
    assert printed_json("prepared", "list", "--data", tmp_path) == {"bytes": 0, "prepared": []}
    assert printed("prepared", "clear", "--data", tmp_path) == "cleared: 0 entries, 0 bytes\n"
    assert list(tmp_path.iterdir()) == []


def test_clear_removes_one_model_or_all(store: OptimisedStore, tmp_path: Path) -> None:
    assert (
        printed("prepared", "clear", "--data", tmp_path, "--model", "digits")
        == "cleared: 1 entry, 250000 bytes\n"
    )
    cleared = printed_json("prepared", "clear", "--data", tmp_path, "--model", "unheard")
    assert cleared == {"entries": 0, "bytes": 0}
    assert [entry.model_id for entry in store.entries()] == ["small", "detector"]
    assert printed("prepared", "clear", "--data", tmp_path) == "cleared: 2 entries, 3000000 bytes\n"
    assert list((tmp_path / STORE).glob("*/*")) == []


@pytest.mark.parametrize("command", ["list", "clear"])
def test_unusable_data_directory_is_refused(tmp_path: Path, command: str) -> None:
    (tmp_path / STORE).symlink_to(tmp_path)
    assert "symbolic link" in refused("prepared", command, "--data", tmp_path)
    for arguments in (("--data", tmp_path / "nowhere"), ()):
        assert "--data" in refused("prepared", command, *arguments)
