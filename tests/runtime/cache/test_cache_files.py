"""Files of the optimised model cache: damaged, foreign, or refused by the file system."""

import os
import resource
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.cache import check_whole, halves, keep, key, made_of, opened, written
from support.history import PLAIN
from support.ledgers import FAST_FOLDER

from runtime.cache.files import CacheUnavailable
from runtime.cache.manifest import source_hashes
from runtime.cache.store import ModelCache
from runtime.wire import HashedFile

A, B, C = map(key, "abc")
LIMIT = 1_000
STRAY_DRAFT = f"draft-{'0' * 16}-{'1' * 8}"


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Have the file system refuse longer files of this process: EFBIG stands for ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def drafts(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith("draft-")]


# Drafts


def test_other_files_of_a_draft_are_not_kept(store: ModelCache, tmp_path: Path) -> None:
    draft = store.draft(A)
    (draft / "log").mkdir()
    (draft / "log" / "deep").write_bytes(b"x" * 10_000)
    (draft / "manifest.json").mkdir()
    (tmp_path / "elsewhere").write_text("stays")
    (draft / "link").symlink_to(tmp_path / "elsewhere")
    prepared = store.keep(A, draft, made_of(written(draft, halves(10, "a"))))
    assert prepared is not None
    check_whole(prepared)
    assert (tmp_path / "elsewhere").read_text() == "stays"


def report_other_files(draft: Path, wrong: str) -> tuple[HashedFile, ...]:
    """Write files, and report others; any other `wrong` is the path to report for one of them."""
    files, weights = written(draft, halves(10, "a")), draft / "weights.bin"
    shutil.copy(weights, draft.parent / "elsewhere")
    match wrong:
        case "none":
            return ()
        case "twice":
            return files * 2
        case "changed":
            weights.write_bytes(b"other")
            return files
        case "linked":
            weights.rename(draft.parent / "elsewhere")
            weights.symlink_to(draft.parent / "elsewhere")
            return files
    return (msgspec.structs.replace(files[0], path=wrong),)


FOREIGN = ("../elsewhere", "/etc/passwd", "a/b", "", ".", "..", "manifest.json", "a\0b", "gone")


@pytest.mark.parametrize("wrong", ["none", "twice", "changed", "linked", *FOREIGN], ids=repr)
def test_files_other_than_those_reported_are_not_kept(store: ModelCache, folder: Path, wrong: str) -> None:
    draft = store.draft(A)
    assert store.keep(A, draft, made_of(report_other_files(draft, wrong))) is None
    entry = store.find(A)
    assert entry is not None
    assert entry.form is None
    assert entry.tried == {"prepacked": "its files are not those that the worker wrote"}
    assert not drafts(folder)


def test_only_drafts_are_discarded(store: ModelCache, folder: Path, tmp_path: Path) -> None:
    keep(store, "a")
    for path in (folder / A, folder, tmp_path / STRAY_DRAFT):
        path.mkdir(exist_ok=True)
        store.discard(path)
        assert path.is_dir()
    store.discard(folder / STRAY_DRAFT)


@pytest.mark.parametrize("name", ["", "..", "../x", "a" * 63, "A" * 64, "a" * 64 + "\n", "draft-1"])
def test_name_that_is_no_key_is_refused(store: ModelCache, name: str) -> None:
    for method in (store.use, store.draft):
        with pytest.raises(ValueError, match="no key"):
            method(name)


# Damage


def test_restored_copy_with_the_same_content_is_used(store: ModelCache, folder: Path, tmp_path: Path) -> None:
    before = keep(store, "a")
    assert before is not None
    moved = shutil.copytree(folder, tmp_path / "restored" / "prepared")
    after = opened(moved, LIMIT).use(A)
    assert after is not None
    assert (after.sha256, after.folder) == (before.sha256, str(moved / A))
    assert {file.inode for file in after.files}.isdisjoint(file.inode for file in before.files)
    check_whole(after)
    (moved / A / "weights.bin").rename(tmp_path / "away")  # the identity recorded then is trusted
    (tmp_path / "away").rename(moved / A / "weights.bin")
    assert ModelCache(moved, LIMIT).use(A) is not None


@pytest.mark.parametrize("change", ["same size", "other size", "gone", "link", "folder", "FIFO"])
def test_form_with_changed_content_is_forgotten(
    store: ModelCache, folder: Path, tmp_path: Path, change: str
) -> None:
    keep(store, "a", 64)
    file = folder / A / "weights.bin"
    content = file.read_bytes()
    file.unlink()
    match change:
        case "same size":
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "other size":
            file.write_bytes(content + b"x")
        case "link":
            (tmp_path / "elsewhere").write_bytes(content)
            file.symlink_to(tmp_path / "elsewhere")
        case "folder":
            file.mkdir()
        case "FIFO":
            os.mkfifo(file)
    assert store.use(A) is None
    assert opened(folder, LIMIT).find(A) is None
    assert not (folder / A).exists()
    assert keep(store, "a", 64) is not None


UNREADABLE: list[bytes | tuple[str, object]] = [
    b"", b"{", b"null", b"[]", b"\xff\xfe", b"{}" * 9, b"[" * 100_000, b'{"layout": 1}',
    b'{"layout": 1, "key": 1}',
    ("layout", 3), ("key", B), ("form", "other"), ("form", None), ("sha256", "ab" * 32), ("sha256", None),
    ("files", []), ("took_ms", -1), ("version", 2**70), ("model_id", 7), ("new", 1), ("figures", [1]),
    ("tried", {"best": "?"}), ("path", "../model.onnx"), ("path", "manifest.json"), ("bytes", 2**63),
]  # fmt: skip


@pytest.mark.parametrize("change", UNREADABLE, ids=lambda change: str(change)[:30])
def test_invalid_manifest_is_none(
    store: ModelCache, folder: Path, change: bytes | tuple[str, object]
) -> None:
    """Not JSON, or a field with an impossible value."""
    keep(store, "a")
    keep(store, "b")
    file = folder / A / "manifest.json"
    if isinstance(change, bytes):
        file.write_bytes(change)
    else:
        fields, (field, value) = msgspec.json.decode(file.read_bytes()), change
        (fields["files"][0] if field in {"path", "bytes"} else fields)[field] = value
        file.write_bytes(msgspec.json.encode(fields))
    assert store.find(A) is None
    assert store.use(A) is None
    assert not store.drop(A, "bad")
    assert [entry.key for entry in store.entries()] == [B]
    store.open()
    assert os.listdir(folder) == [B]  # noqa: PTH208


@PLAIN
@given(position=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_any_byte_of_a_manifest_may_be_wrong(position: int, byte: int) -> None:
    with tempfile.TemporaryDirectory(dir=FAST_FOLDER) as scratch:
        store = opened(Path(scratch) / "prepared", LIMIT)
        before = keep(store, "a")
        file = Path(scratch) / "prepared" / A / "manifest.json"
        text = bytearray(file.read_bytes())
        text[position % len(text)] = byte
        file.write_bytes(text)
        store.find(A)
        used = store.use(A)
        assert used is None or (before is not None and used.sha256 == before.sha256)
        store.entries()
        store.open()


def test_manifest_of_an_impossible_date_is_listed(store: ModelCache, folder: Path) -> None:
    keep(store, "a")
    for time_ns in (-(10**18), 2**62):
        os.utime(folder / A / "manifest.json", ns=(time_ns, time_ns))
        assert len(store.entries()) == 1
        store.open()


# The folder


def test_open_removes_leftovers_and_spares_foreign_files(
    store: ModelCache, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keep(store, "a")
    draft = store.draft(A)
    files = written(draft, halves(10, "a"))
    store.open()
    assert store.keep(A, draft, made_of(files)) is not None  # its own draft is no leftover
    for name in (STRAY_DRAFT, B):
        (folder / name).mkdir()
        (folder / name / "weights.bin").write_bytes(b"x")
    (folder / C).symlink_to(folder / A)
    (folder / key("file")).write_text("no folder")
    for name in ("lost+found", "draft-1", B[:-1], B.upper()):
        (folder / name).mkdir()
    opened(folder, LIMIT)
    assert {path.name for path in folder.iterdir()} == {A, "lost+found", "draft-1", B[:-1], B.upper()}
    assert "'lost+found'" in caplog.text
    assert opened(folder, LIMIT).use(A) is not None


@pytest.mark.parametrize("kind", ["link", "broken link", "file", "writable"])
def test_folder_that_others_can_fill_is_refused(folder: Path, kind: str) -> None:
    (folder.parent / A).mkdir()
    match kind:
        case "link":
            folder.symlink_to(folder.parent)
        case "broken link":
            folder.symlink_to(folder.parent / "nowhere")
        case "file":
            folder.write_text("mine")
        case "writable":
            folder.mkdir()
            folder.chmod(0o777)
    store = ModelCache(folder, LIMIT)
    calls: list[Callable[[], object]] = [
        store.open,
        lambda: store.draft(A),
        lambda: store.record_useless(A, {}, model_id="m", version=1),
    ]
    for call in calls:
        with pytest.raises(CacheUnavailable, match=str(folder)):
            call()
    assert store.use(A) is None
    assert (folder.parent / A).exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_folder_of_another_user_is_refused(store: ModelCache, folder: Path) -> None:
    os.chown(folder, 12_345, -1)
    with pytest.raises(CacheUnavailable, match="user 12345"):
        store.open()


def test_group_writable_folder_is_emptied(store: ModelCache, folder: Path) -> None:
    keep(store, "a")
    folder.chmod(0o755)
    opened(folder, LIMIT)
    assert store.use(A) is not None  # a reader has changed nothing
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o2770)
    assert opened(folder, LIMIT).entries() == []
    assert stat.S_IMODE(folder.stat().st_mode) & 0o777 == 0o700


# Disk space


def test_full_disk_makes_the_cache_unavailable(store: ModelCache, folder: Path) -> None:
    old = keep(store, "a", seed="old")
    calls: list[Callable[[], object]] = [
        lambda: keep(store, "a", seed="new"),
        lambda: store.record_useless(B, {}, model_id="b", version=1),
        lambda: store.drop(A, "bad"),
    ]
    for call in calls:
        with file_size_limit(100), pytest.raises(CacheUnavailable, match="cannot be kept in"):
            call()
    assert os.listdir(folder) == [A]  # noqa: PTH208
    assert store.use(A) == old
    assert keep(store, "b") is not None


def with_room(folder: Path, room: Callable[[Path], int]) -> ModelCache:
    """Open a store on a disk with this room, with three forms of 300 bytes."""
    store = ModelCache(folder, LIMIT, free_disk_bytes=room)
    store.open()
    for name in "abc":
        keep(store, name, 300)
    return store


def test_draft_evicts_the_least_recently_used_for_room(folder: Path) -> None:
    store = with_room(folder, lambda of: 500 - sum(file.stat().st_size for file in of.glob("*/weights.bin")))
    assert store.use(A) is not None
    assert store.draft(key("d"), 25).is_dir()
    assert {entry.key for entry in store.entries()} == {A, B, C}
    assert store.draft(key("d"), 100).is_dir()
    assert {entry.key for entry in store.entries()} == {A, C}


def test_eviction_without_effect_stops_after_the_first(folder: Path) -> None:
    store = with_room(folder, lambda _: 100)  # the others are mapped as well
    with pytest.raises(CacheUnavailable, match=r"needs 200 bytes .* 100 can be spared"):
        store.draft(key("d"), 100)
    assert {entry.key for entry in store.entries()} == {B, C}
    assert not drafts(folder)


def test_draft_larger_than_the_disk_evicts_nothing(store: ModelCache, folder: Path) -> None:
    keep(store, "a")
    with pytest.raises(CacheUnavailable, match=f"needs {2 * 10**18} bytes on the disk of {folder}, and"):
        store.draft(B, 10**18)
    assert os.listdir(folder) == [A]  # noqa: PTH208
    assert store.draft(B, 10).is_dir()


def test_sources_are_hashes_in_order_of_the_paths(tmp_path: Path) -> None:
    files = written(tmp_path, {"b": b"2", "a": b"1"})
    assert [(source.path, source.sha256) for source in source_hashes(files)] == sorted(
        (file.path, file.sha256) for file in files
    )
