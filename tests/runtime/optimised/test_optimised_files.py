"""Files of optimised models: damaged, foreign, or refused by the file system."""

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
from support.history import PLAIN
from support.ledgers import FAST_FOLDER
from support.optimised import (
    check_whole,
    drop,
    files_of,
    halves,
    keep,
    key,
    manifest_of,
    opened,
    record,
    write,
)

from runtime.errors import DiskFull
from runtime.optimised.store import STORE_PROBLEMS, OptimisedStore, Useless

A, B, C = map(key, "abc")
LIMIT = 1_000


def entry_of(folder: Path, name: str = A) -> Path:
    return folder / "forms" / name


def keys_in(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "forms").iterdir())


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Have the file system refuse longer files of this process: EFBIG stands for ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Drafts


def spoil(draft: Path, how: str) -> None:
    """Leave in a draft what is no optimised model."""
    write(draft, halves(10, "a"))
    match how:
        case "nothing":
            shutil.rmtree(draft)
            draft.mkdir()
        case "no model":
            (draft / "model.onnx").unlink()
        case "another file":
            (draft / "log").mkdir()
            (draft / "log" / "deep").write_bytes(b"x")
        case "a link":
            (draft / "weights.bin").rename(draft.parent.parent / "elsewhere")
            (draft / "weights.bin").symlink_to(draft.parent.parent / "elsewhere")
        case "a FIFO":
            (draft / "weights.bin").unlink()
            os.mkfifo(draft / "weights.bin")


@pytest.mark.parametrize("how", ["nothing", "no model", "another file"])
def test_draft_with_other_files_is_useless(store: OptimisedStore, folder: Path, how: str) -> None:
    draft = store.draft()
    spoil(draft, how)
    with pytest.raises(Useless, match="its files are not those"):
        store.seal(manifest_of("a"), draft)
    store.discard(draft)
    assert list(folder.glob("*/*")) == []


@pytest.mark.parametrize("how", ["a link", "a FIFO"])
def test_draft_with_irregular_files_is_refused(store: OptimisedStore, folder: Path, how: str) -> None:
    draft = store.draft()
    spoil(draft, how)
    with pytest.raises(STORE_PROBLEMS):
        store.seal(manifest_of("a"), draft)
    assert keys_in(folder) == []


# Damage


def test_restored_copy_with_the_same_content_is_used(
    store: OptimisedStore, folder: Path, tmp_path: Path
) -> None:
    before = keep(store, "a")
    assert before is not None
    moved = shutil.copytree(folder, tmp_path / "restored" / "store")
    after = opened(moved, LIMIT).use(A)
    assert after is not None
    assert (after.sha256, after.folder) == (before.sha256, str(entry_of(moved) / "files"))
    assert {file.inode for file in files_of(after)}.isdisjoint(file.inode for file in files_of(before))
    check_whole(opened(moved, LIMIT), after)


def test_files_with_recorded_identities_are_not_hashed(store: OptimisedStore, folder: Path) -> None:
    keep(store, "a", 64)
    file = entry_of(folder) / "files" / "weights.bin"
    seen, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    assert store.use(A) is not None
    os.utime(file, ns=(1, 1))
    assert store.use(A) is None


@pytest.mark.parametrize("change", ["same size", "other size", "gone", "link", "folder", "FIFO", "another"])
def test_model_with_changed_content_is_removed(
    store: OptimisedStore, folder: Path, tmp_path: Path, change: str
) -> None:
    keep(store, "a", 64)
    file = entry_of(folder) / "files" / "weights.bin"
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
        case "another":
            file.write_bytes(content)
            (file.parent / "more").write_bytes(b"x")
    assert store.use(A) is None
    assert not entry_of(folder).exists()
    assert keep(store, "a", 64) is not None


UNREADABLE: list[bytes | tuple[str, object]] = [
    b"", b"{", b"null", b"[]", b"\xff\xfe", b"{}" * 9, b"[" * 100_000, b'{"layout": 1}',
    b'{"layout": 5, "key": 1}',
    ("layout", 4), ("key", B), ("reason", "slower"), ("sha256", "ab" * 32), ("sha256", None),
    ("files", []), ("took_ms", -1), ("version", 2**70), ("model_id", 7), ("new", 1), ("figures", [1]),
    ("figures", {"rate": "fast"}), ("path", "../model.onnx"), ("path", "manifest.json"), ("bytes", 2**63),
]  # fmt: skip


@pytest.mark.parametrize("change", UNREADABLE, ids=lambda change: str(change)[:30])
def test_invalid_manifest_is_none(
    store: OptimisedStore, folder: Path, change: bytes | tuple[str, object]
) -> None:
    """Not JSON, or a field with an impossible value."""
    keep(store, "a")
    keep(store, "b")
    file = entry_of(folder) / "manifest.json"
    if isinstance(change, bytes):
        file.write_bytes(change)
    else:
        fields, (field, value) = msgspec.json.decode(file.read_bytes()), change
        (fields["files"][0] if field in {"path", "bytes"} else fields)[field] = value
        file.write_bytes(msgspec.json.encode(fields))
    assert store.find(A) is None
    assert store.use(A) is None
    assert [entry.key for entry in store.entries()] == [B]
    store.open()
    assert keys_in(folder) == [B]


@PLAIN
@given(position=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_any_byte_of_a_manifest_may_be_wrong(position: int, byte: int) -> None:
    with tempfile.TemporaryDirectory(dir=FAST_FOLDER) as scratch:
        store = opened(Path(scratch) / "store", LIMIT)
        before = keep(store, "a")
        file = entry_of(Path(scratch) / "store") / "manifest.json"
        text = bytearray(file.read_bytes())
        text[position % len(text)] = byte
        file.write_bytes(text)
        store.find(A)
        used = store.use(A)
        assert used is None or (before is not None and used.sha256 == before.sha256)
        store.entries()
        store.open()


def test_manifest_of_an_impossible_date_is_listed(store: OptimisedStore, folder: Path) -> None:
    keep(store, "a")
    for time_ns in (-(10**18), 2**62):
        os.utime(entry_of(folder) / "manifest.json", ns=(time_ns, time_ns))
        assert len(store.entries()) == 1
        store.open()


# The folder


def test_open_removes_leftovers_and_spares_foreign_files(store: OptimisedStore, folder: Path) -> None:
    keep(store, "a")
    write(store.draft(), halves(10, "a"))
    (entry_of(folder, B)).mkdir()
    (entry_of(folder, C)).symlink_to(entry_of(folder))
    entry_of(folder, key("file")).write_text("no folder")
    for name in ("lost+found", B[:-1], B.upper()):
        (folder / "forms" / name).mkdir()
    store = opened(folder, LIMIT)
    assert set(keys_in(folder)) == {A, "lost+found", B[:-1], B.upper()}
    assert list((folder / "incoming").iterdir()) == []
    assert store.use(A) is not None


@pytest.mark.parametrize("part", ["", "forms", "incoming"])
@pytest.mark.parametrize("kind", ["link", "broken link", "file", "writable"])
def test_folder_that_others_can_fill_is_refused(folder: Path, kind: str, part: str) -> None:
    elsewhere, path = folder.parent / "elsewhere", folder / part
    (elsewhere / A).mkdir(parents=True)
    path.parent.mkdir(exist_ok=True)
    match kind:
        case "link":
            path.symlink_to(elsewhere)
        case "broken link":
            path.symlink_to(folder.parent / "nowhere")
        case "file":
            path.write_text("mine")
        case "writable":
            path.mkdir()
            path.chmod(0o777)
    with pytest.raises(STORE_PROBLEMS, match=str(path)):
        OptimisedStore(folder, LIMIT).open()
    assert OptimisedStore(folder, LIMIT).use(A) is None
    assert (elsewhere / A).exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_folder_of_another_user_is_refused(store: OptimisedStore, folder: Path) -> None:
    os.chown(folder, 12_345, -1)
    with pytest.raises(STORE_PROBLEMS, match="user 12345"):
        store.open()


@pytest.mark.parametrize("part", ["", "forms"])
def test_models_in_a_group_writable_folder_are_removed(
    store: OptimisedStore, folder: Path, part: str
) -> None:
    """Nothing but their manifest says what they were made of."""
    keep(store, "a")
    (folder / part).chmod(0o755)
    opened(folder, LIMIT)
    assert store.use(A) is not None  # a reader has changed nothing
    assert stat.S_IMODE((folder / part).stat().st_mode) == 0o700
    (folder / part).chmod(0o2770)
    assert opened(folder, LIMIT).entries() == []
    assert stat.S_IMODE((folder / part).stat().st_mode) & 0o777 == 0o700


# Disk space


def test_full_disk_is_reported_and_spares_the_rest(store: OptimisedStore, folder: Path) -> None:
    old = keep(store, "a", seed="old")
    calls: list[Callable[[], object]] = [
        lambda: keep(store, "a", seed="new"),
        lambda: record(store, "b"),
        lambda: drop(store, "a"),
    ]
    for call in calls:
        with file_size_limit(100), pytest.raises(DiskFull):
            call()
        assert list((folder / "incoming").iterdir()) == []
        assert store.use(A) == (old if call is not calls[-1] else None)
    assert keys_in(folder) == []
    assert keep(store, "b") is not None


def with_room(folder: Path, monkeypatch: pytest.MonkeyPatch, room: Callable[[Path], int]) -> OptimisedStore:
    """Open a store on a disk with this room, with three optimised models of 300 bytes."""
    monkeypatch.setattr("runtime.optimised.store.free_disk_bytes", room)
    store = opened(folder, LIMIT)
    for name in "abc":
        keep(store, name, 300)
    return store


def test_draft_evicts_the_least_recently_used_for_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = with_room(
        folder,
        monkeypatch,
        lambda of: 500 - sum(file.stat().st_size for file in of.glob("forms/*/files/weights.bin")),
    )
    assert store.use(A) is not None
    assert store.draft(50).is_dir()
    assert {entry.key for entry in store.entries()} == {A, B, C}
    assert store.draft(200).is_dir()
    assert {entry.key for entry in store.entries()} == {A, C}


def test_eviction_without_effect_stops_after_the_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = with_room(folder, monkeypatch, lambda _: 100)  # the others are mapped as well
    with pytest.raises(DiskFull, match="100 bytes are missing"):
        store.draft(200)
    assert {entry.key for entry in store.entries()} == {B, C}
    assert list((folder / "incoming").iterdir()) == []


def test_draft_larger_than_the_disk_evicts_nothing(store: OptimisedStore, folder: Path) -> None:
    keep(store, "a")
    with pytest.raises(DiskFull, match=f"{10**18} bytes"):
        store.draft(10**18)
    assert keys_in(folder) == [A]
    assert store.draft(10).is_dir()
