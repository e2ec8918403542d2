"""Files of records compared with a ledger: what is changed, unknown, missing, erased or open."""

import math
from pathlib import Path

import pytest
from msgspec import UNSET
from support.candidates import DIGESTS, make_candidate
from support.history import opened

from events.clock import uuid7
from events.commands import Record
from events.errors import LogUnavailable
from events.log import Log
from events.types import SYSTEM, Draft
from features.records.facts import RecordsErased
from features.records.files import CLOSED, ClosedFile, RecordFiles, list_files
from features.records.recorder import Entry
from features.records.verification import (
    EVENTS_PER_READ,
    FileFinding,
    compare_files,
    find_missing,
    read_announced,
)


def write_files(folder: Path, models: str, source: str = "") -> dict[str, ClosedFile]:
    """Write and close a file of two inferences for each model, and return them by model."""
    files = RecordFiles(folder, (DIGESTS,), source)
    queue = [Entry(model, make_candidate(model_id=model), 1, 0) for model in models * 2]
    files.write(queue, {}, 0.0)
    return {each.model_id: each for each in files.close_old(math.inf)}


async def announce(log: Log, folder: Path, closed: dict[str, ClosedFile], source: str = "") -> None:
    for each in closed.values():
        await log.submit(Record((Draft(each.id, each.fact, SYSTEM, None, each.model_id),)))
        RecordFiles(folder, (), source).give_name(each.path)


async def erase(log: Log, closed: ClosedFile, source: str = "") -> None:
    data = RecordsErased(file=closed.id, reason="a subject's request", server=source or UNSET)
    await log.submit(Record((Draft(uuid7(), data, "alice", None, closed.model_id),)))
    closed.path.with_suffix(CLOSED).unlink()


def verify(folder: Path, ledger: Path) -> dict[str, FileFinding]:
    """Return the findings for a folder of one node, by model."""
    announced, stored = read_announced(ledger), list_files(folder)
    names = [each.id for each in stored]
    nodes = announced.list_nodes(names) or {None}
    findings = [*compare_files(stored, announced), *find_missing(names, announced, nodes)]
    return {each.model_id: each for each in findings}


async def test_each_file_is_compared_with_its_announcement(tmp_path: Path) -> None:
    folder, ledger = tmp_path / "records", tmp_path / "ledger.db"
    async with opened(ledger) as log:
        closed = write_files(folder, "abcdef")
        unannounced = closed.pop("f")
        await announce(log, folder, closed)
        await erase(log, closed["d"])
        paths = {model: each.path.with_suffix(CLOSED) for model, each in closed.items()}
        text = bytearray(paths["b"].read_bytes())
        text[10] ^= 1
        paths["b"].write_bytes(text)
        paths["c"].unlink()
        stranger = folder / "x" / f"{uuid7()}{CLOSED}"
        stranger.parent.mkdir()
        stranger.write_bytes(paths["a"].read_bytes())
        moved = paths["e"].rename(paths["e"].with_suffix(unannounced.path.suffix))  # its name came too late
        found = verify(folder, ledger)  # while the server writes
    assert {model: each.state for model, each in found.items()} == {
        "a": "as_announced",
        "b": "changed",
        "c": "missing",
        "d": "erased",
        "e": "as_announced",
        "f": "open",
        "x": "unknown",
    }
    assert {model for model, each in found.items() if not each.is_sound} == {"b", "c", "x"}
    assert found["e"].file == moved.stem
    digest = closed["b"].fact.sha256
    assert found["b"].detail.startswith("its SHA-256 is ")
    assert f"and it was 2 inferences, {closed['b'].fact.begin} to" in found["b"].detail
    assert f"sha256 {digest}, position " in found["b"].detail
    assert "by alice: a subject's request; it was 2 inferences" in found["d"].detail
    assert closed["d"].fact.sha256 in found["d"].detail
    assert closed["c"].fact.sha256 in found["c"].detail


async def test_each_node_is_compared_with_its_own_announcements(tmp_path: Path) -> None:
    ledger, nodes = tmp_path / "ledger.db", ("node-a", "node-b")
    async with opened(ledger) as log:
        for node in nodes:
            closed = write_files(tmp_path / node, "abc", node)
            await announce(log, tmp_path / node, closed, node)
            await erase(log, closed["b"], node)
            if node == "node-b":
                closed["c"].path.with_suffix(CLOSED).unlink()
    states = [{each.state for each in verify(tmp_path / node, ledger).values()} for node in nodes]
    assert states == [{"as_announced", "erased"}, {"as_announced", "erased", "missing"}]
    announced = read_announced(ledger)
    for owners, number in (({"node-a"}, 3), ({"node-b"}, 3), ({*nodes}, 6), ({None}, 0)):
        assert len(list(find_missing((), announced, owners))) == number


async def test_announcements_of_several_pages_are_read(tmp_path: Path) -> None:
    ledger, ids = tmp_path / "ledger.db", [uuid7() for _ in range(2 * EVENTS_PER_READ + 1)]
    [closed] = write_files(tmp_path / "records", "a").values()
    async with opened(ledger) as log:
        await log.submit(Record(tuple(Draft(each, closed.fact, SYSTEM, None, "a") for each in ids)))
    assert list(read_announced(ledger).closed) == ids


def test_folder_without_ledger_cannot_be_verified(tmp_path: Path) -> None:
    with pytest.raises(LogUnavailable):
        read_announced(tmp_path / "ledger.db")
