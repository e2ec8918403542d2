"""Files of records: how lines are written, files are closed and completed, and old ones chosen."""

import hashlib
import json
import math
import resource
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.candidates import DIGESTS, make_candidate
from support.disks import small_disk
from support.history import PLAIN
from support.ledgers import FAST_FOLDER

from features.records.files import (
    CLOSED,
    OLD_S,
    OPEN,
    ClosedFile,
    RecordFile,
    RecordFiles,
    choose_expired,
    list_files,
)
from features.records.lines import MAX_LINE_BYTES, encode_inference
from features.records.recorder import Entry
from features.records.rules import RecordRule
from runtime.wire import Tensor

LOST = "loadledger.dropped"
NOW_S = 1_000_000.0


def make_line(request_id: str = "r", model_id: str = "digits", *, size: int = 0) -> bytes:
    """Return a line, of at least this size."""
    name = Tensor("n" * size, "UINT8", (0,), b"")
    line = encode_inference(make_candidate(name, request_id=request_id, model_id=model_id), "")
    assert line is not None
    return line


def entry(*request_ids: str, model_id: str = "digits", size: int = 0) -> Entry:
    lines = b"".join([make_line(each, model_id, size=size) for each in request_ids])
    return Entry(model_id, lines, len(request_ids), len(lines))


def new_files(folder: Path, *, rules: Sequence[RecordRule] = (DIGESTS,), source: str = "") -> RecordFiles:
    return RecordFiles(folder / "records", rules, source)


def read_lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_bytes()
    assert not text or text.endswith(b"\n")
    return [json.loads(line) for line in text.splitlines()]


def problem_of(files: RecordFiles) -> str | None:
    """Return why nothing can be written now."""
    return files.problem


def close_all(files: RecordFiles) -> dict[str, ClosedFile]:
    """Close all files, and return them by model, once their facts are compared with their bytes."""
    closed = {each.model_id: each for each in files.close_old(math.inf)}
    for each in closed.values():
        compare(each)
    return closed


def compare(closed: ClosedFile) -> None:
    """Compare the fact about a file with its bytes."""
    lines, fact = read_lines(closed.path), closed.fact
    said = [line["dropped"] for line in lines if line["type"] == LOST]
    assert (closed.id, closed.model_id) == (closed.path.stem, closed.path.parent.name)
    assert (fact.records, fact.lines) == (len(lines) - len(said), len(lines))
    assert fact.dropped == sum(filter(None, said))
    assert fact.bytes == closed.path.stat().st_size
    assert fact.sha256 == hashlib.sha256(closed.path.read_bytes()).hexdigest()
    assert fact.begin <= fact.end


def summarise_lines(lines: Iterable[dict[str, Any]]) -> list[Any]:
    """Return ids of inferences, and the number and reason of those that are missing."""
    return [(line["dropped"], line["reason"]) if line["type"] == LOST else line["id"] for line in lines]


def test_lines_are_appended_by_model_and_announced_with_digest(tmp_path: Path) -> None:
    files = new_files(tmp_path, source="node-a")
    done = files.write([entry("1", "2"), entry("3", model_id="other"), entry("4")], {}, NOW_S)
    assert (done.records, done.dropped, done.closed) == (4, {}, [])
    assert {each.path.suffix for each in list_files(files.folder)} == {OPEN}
    assert files.find_left() == []
    long = Entry("digits", make_candidate(request_id="5"), 1, 0)  # the thread makes its line
    assert files.write([long], {}, NOW_S).records == 1
    closed = close_all(files)
    assert summarise_lines(read_lines(closed["digits"].path)) == ["1", "2", "4", "5"]
    assert summarise_lines(read_lines(closed["other"].path)) == ["3"]
    assert {each.fact.server for each in closed.values()} == {"node-a"}
    assert not any(each.fact.interrupted for each in closed.values())
    for each in closed.values():
        files.give_name(each.path)
    assert [(each.model_id, each.id, each.path.suffix) for each in list_files(files.folder)] == [
        (each.model_id, each.id, CLOSED) for _, each in sorted(closed.items())
    ]
    assert {path.stat().st_mode & 0o077 for path in files.folder.rglob("*")} == {0}


def test_file_is_closed_at_a_quarter_of_its_rule(tmp_path: Path) -> None:
    files = new_files(tmp_path, rules=(RecordRule(models=("*",), max_bytes=10**7),))
    closed = list[ClosedFile]()
    for number in range(8):
        closed += files.write([entry(str(number), size=10**6)], {}, NOW_S).closed
    closed += close_all(files).values()
    assert [summarise_lines(read_lines(each.path)) for each in closed] == [
        ["0", "1", "2"],
        ["3", "4", "5"],
        ["6", "7"],
    ]
    for each in closed:
        compare(each)


def test_file_is_closed_when_old(tmp_path: Path) -> None:
    files = new_files(tmp_path)
    files.write([entry("1")], {}, NOW_S)
    files.write([entry("2", model_id="other")], {}, NOW_S + 1)
    assert files.close_old(NOW_S + OLD_S - 1) == []
    [closed] = files.close_old(NOW_S + OLD_S)
    assert closed.model_id == "digits"
    files.write([entry("3")], {}, NOW_S + OLD_S)
    assert len(list_files(files.folder)) == 3


def test_missing_inferences_stand_before_next_line_of_model(tmp_path: Path) -> None:
    files = new_files(tmp_path, source="node-a")
    files.write([entry("1"), entry("a", model_id="other")], {}, NOW_S)
    names = [Tensor("n" * 4096, "UINT8", (0,), b"")] * (MAX_LINE_BYTES // 4096)
    too_long = Entry("digits", make_candidate(outputs=names), 1, 0)
    done = files.write([entry("2"), too_long], {("digits", "queue_full"): 3}, NOW_S)
    assert (done.records, done.dropped) == (1, {"too_long": 1})
    files.write([], {("silent", "queue_full"): 4}, NOW_S)
    closed = close_all(files)
    assert summarise_lines(read_lines(closed["digits"].path)) == [
        "1",
        (3, "queue_full"),
        (1, "too_long"),
        "2",
    ]
    assert summarise_lines(read_lines(closed["other"].path)) == ["a"]
    [said] = read_lines(closed["silent"].path)
    assert (said["model"], said["source"], said["dropped"]) == ("silent", "node-a", 4)


# Disks that take no more.


@contextmanager
def limited_size(size: int) -> Iterator[None]:
    """Let no file of this process become longer: a write beyond ends in its middle, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_write_that_ends_in_its_middle_leaves_whole_lines(tmp_path: Path) -> None:
    files = new_files(tmp_path)
    files.write([entry("1")], {}, NOW_S)
    [stored] = list_files(files.folder)
    with limited_size(stored.bytes + 10):
        done = files.write([entry("2", "3")], {}, NOW_S)
        assert stored.path.stat().st_size == stored.bytes
        assert problem_of(files) == f"{files.folder}: File too large"
        assert (done.records, done.dropped) == (0, {"not_writable": 2})
        done = files.write([entry("4")], {("digits", "queue_full"): 1}, NOW_S)
        assert done.dropped == {"not_writable": 1}  # the recorder has counted the other one
    assert files.write([], {}, NOW_S).records == 0  # without an inference, too
    assert problem_of(files) is None
    files.write([entry("5")], {}, NOW_S)
    lines = summarise_lines(read_lines(close_all(files)["digits"].path))
    assert Counter(lines) == Counter(["1", (3, "not_writable"), (1, "queue_full"), "5"])
    assert (lines[0], lines[-1]) == ("1", "5")


def test_file_without_lines_is_deleted_at_its_end(tmp_path: Path) -> None:
    files = new_files(tmp_path)
    with limited_size(0):
        files.write([entry("1")], {}, NOW_S)
        assert [each.bytes for each in list_files(files.folder)] == [0]
        assert files.close_old(math.inf) == []
        assert list_files(files.folder) == []
    files.write([], {}, NOW_S)
    assert summarise_lines(read_lines(close_all(files)["digits"].path)) == [(1, "not_writable")]


def test_file_in_place_of_folder_stops_recording_until_gone(tmp_path: Path) -> None:
    files = new_files(tmp_path)
    files.folder.touch()
    assert files.write([entry("1", "2")], {}, NOW_S).dropped == {"not_writable": 2}
    assert problem_of(files) == f"{files.folder}: Not a directory"
    files.folder.unlink()
    files.write([entry("3")], {}, NOW_S)
    assert problem_of(files) is None
    assert summarise_lines(read_lines(close_all(files)["digits"].path)) == [(2, "not_writable"), "3"]


def test_file_whose_folder_was_deleted_is_not_announced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = new_files(tmp_path)
    files.write([entry("1")], {}, NOW_S)
    shutil.rmtree(files.folder)
    assert files.close_old(math.inf) == []
    assert "cannot be closed" in caplog.text
    files.write([entry("2")], {}, NOW_S)
    assert problem_of(files) is None
    assert summarise_lines(read_lines(close_all(files)["digits"].path)) == ["2"]


def test_full_disk_keeps_room_and_whole_lines(tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", 16 * 2**20) as disk:
        files = new_files(disk.folder)
        assert files.write([entry("1")], {}, NOW_S).records == 1
        disk.fill(2**19)  # less than a twentieth
        assert files.write([entry("2")], {}, NOW_S).dropped == {"not_writable": 1}
        text = "the disk has 0 MiB left, and 0 MiB are left free for the ledger"
        assert problem_of(files) == f"{files.folder}: {text}"
        disk.fill(900_000)
        assert files.write([entry("3", size=10**6)], {}, NOW_S).dropped == {"not_writable": 1}
        assert problem_of(files) == f"{files.folder}: No space left on device"
        assert summarise_lines(read_lines(list_files(files.folder)[0].path)) == ["1"]
        disk.drain()
        files.write([entry("4")], {}, NOW_S)
        assert problem_of(files) is None
        assert summarise_lines(read_lines(close_all(files)["digits"].path)) == ["1", (2, "not_writable"), "4"]


# Files that a dead server left.


def test_file_left_at_any_byte_is_completed_once() -> None:
    with TemporaryDirectory(dir=FAST_FOLDER) as temporary:
        dead = new_files(Path(temporary))
        dead.write([entry("1")], {}, NOW_S)
        dead.write([entry("2")], {("digits", "queue_full"): 3}, NOW_S)
        [stored] = list_files(dead.folder)
        text = stored.path.read_bytes()
        close_all(dead)["digits"].path.unlink()
        files = new_files(Path(temporary), source="node-a")
        for end in range(1, len(text) + 1):
            stored.path.write_bytes(text[:end])
            assert files.find_left() == [stored.path]
            first = files.complete(stored.path)
            assert first is not None
            compare(first)
            whole = text[: text.rfind(b"\n", 0, end) + 1]
            completed = stored.path.read_bytes()
            assert completed.startswith(whole)
            [said] = map(json.loads, completed.removeprefix(whole).splitlines())
            assert (said["type"], said["reason"], said["dropped"]) == (LOST, "interrupted", None)
            assert (said["model"], said["source"], first.fact.interrupted) == ("digits", "node-a", True)
            second = files.complete(stored.path)  # the server died again before the ledger had it
            assert second is not None
            assert stored.path.read_bytes() == completed
            assert (second.id, second.fact.sha256) == (first.id, first.fact.sha256)
            compare(second)


def test_empty_file_that_was_left_is_deleted(tmp_path: Path) -> None:
    files = new_files(tmp_path)
    with limited_size(0):
        files.write([entry("1")], {}, NOW_S)
    [path] = new_files(tmp_path).find_left()
    assert new_files(tmp_path).complete(path) is None
    assert list_files(files.folder) == []
    files.close_old(math.inf)


def test_file_that_cannot_be_completed_stays_for_next_time(tmp_path: Path) -> None:
    dead = new_files(tmp_path)
    dead.write([entry("1")], {}, NOW_S)
    [stored] = list_files(dead.folder)
    with stored.path.open("ab") as file:
        file.write(b"{")
    files = new_files(tmp_path)
    with limited_size(stored.bytes + 10), pytest.raises(OSError, match="File too large"):
        files.complete(stored.path)
    assert files.find_left() == [stored.path]
    completed = files.complete(stored.path)
    assert completed is not None
    compare(completed)
    assert summarise_lines(read_lines(stored.path)) == ["1", (None, "interrupted")]
    dead.close_old(math.inf)


# Old files.

RULES = (
    RecordRule(models=("a*",), max_bytes=100, keep_s=50),
    RecordRule(models=("b",), max_bytes=300, keep_s=1000),
)
AT_S = 1000.0


@st.composite
def stored_files(draw: st.DrawFn) -> list[RecordFile]:
    """Return files in any order, with ids in the order of their beginnings."""
    found = [
        RecordFile(model, f"{number:03}", Path(f"{model}/{number:03}{suffix}"), size, written_at_s)
        for number, (model, suffix, size, written_at_s) in enumerate(
            draw(
                st.lists(
                    st.tuples(
                        st.sampled_from(["a1", "a2", "b", "other"]),
                        st.sampled_from([OPEN, CLOSED, CLOSED]),
                        st.integers(0, 120),
                        st.floats(0, AT_S) | st.sampled_from([AT_S - 50, AT_S - 49, AT_S]),
                    ),
                    max_size=20,
                )
            )
        )
    ]
    return draw(st.permutations(found))


@PLAIN
@given(stored_files())
def test_expired_files_are_closed_ones_oldest_first(files: list[RecordFile]) -> None:
    expired = list(choose_expired(files, RULES, AT_S))
    chosen = [file for file, _ in expired]
    assert not any(file.is_open or file.model_id == "other" for file in chosen)
    for rule, models in zip(RULES, (("a1", "a2"), ("b",)), strict=True):
        of_rule = sorted((file for file in files if file.model_id in models), key=lambda file: file.id)
        erased = [file for file in chosen if file.model_id in models]
        left = [file for file in of_rule if file not in erased]
        assert erased == [file for file in of_rule if file in erased]
        assert not any(AT_S - file.written_at_s >= rule.keep_s for file in left if not file.is_open)
        assert sum(file.bytes for file in left) <= rule.max_bytes or all(file.is_open for file in left)
        for file, reason in expired:
            if file in erased and "room" in reason:  # what is needed, and no more
                later = [each for each in erased if each.id >= file.id]
                assert sum(each.bytes for each in [*left, *later]) > rule.max_bytes
                assert AT_S - file.written_at_s < rule.keep_s
