"""Versions taken into the store: what is copied and refused, by which way, and within which limits."""

import ctypes
import os
import subprocess
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from support.history import child
from support.store import blobs, opened_store, store_version, take, write_version

from events.types import digest_of
from runtime.errors import CopyCancelled, DiskFull, LoadRefused, RuntimeProblem, StoreUnavailable
from runtime.store import folder as store_folder
from runtime.store.folder import OnPiece, hash_files, on_no_piece
from runtime.store.store import Store

FILES = {"model.onnx": b"model", "data/w.bin": b"weights"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An empty repository."""
    (tmp_path / "repository").mkdir()
    return tmp_path / "repository"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store without a limit."""
    return opened_store(tmp_path)


def hash_of(content: bytes) -> str:
    return sha256(content).hexdigest()


def test_taken_version_is_private_and_named_by_its_contents(store: Store, root: Path, tmp_path: Path) -> None:
    folder = write_version(root, FILES)
    version = store_version(store, root, folder)
    lines = f"{hash_of(b'weights')} data/w.bin\n{hash_of(b'model')} model.onnx\n"
    assert version.digest == hash_of(lines.encode())
    assert store.folder_of(version.digest) == store.path / "versions" / version.digest / "files"
    (folder / "model.onnx").write_bytes(b"MODEL")
    (folder / "data" / "w.bin").unlink()
    assert {path: (store.folder_of(version.digest) / path).read_bytes() for path in FILES} == FILES
    assert {(store.folder_of(version.digest) / path).stat().st_mode & 0o777 for path in FILES} == {0o400}
    assert {path.stat().st_mode & 0o777 for path in (store.path, store.path / "blobs")} == {0o700}
    assert blobs(tmp_path) == sorted(map(hash_of, FILES.values()))
    assert store.find(version.digest) == version


@pytest.mark.parametrize("path", ["a\nb", "a\\nb", "ü", " ", "-"])
def test_digest_tells_names_with_line_breaks_apart(store: Store, root: Path, path: str) -> None:
    version = store_version(store, root, write_version(root, {"model.onnx": b"1", path: b"2"}))
    assert digest_of(version.contents) == version.digest
    name = f"a\n{hash_of(b'x')} b"
    assert digest_of([(name, hash_of(b"1"))]) != digest_of([("a", hash_of(b"1")), ("b", hash_of(b"x"))])


def change_between_files(change: Callable[[], None]) -> OnPiece:
    """Give an `on_piece` that makes a change when the first file is about to be copied."""
    left = [change]

    def on_piece() -> None:
        if left:
            left.pop()()

    return on_piece


@pytest.mark.parametrize("name", ["model.onnx", "data/w.bin"])
@pytest.mark.parametrize(
    "how", ["unlinked", "truncated", "overwritten", "replaced", "grown", "made a folder"]
)
def test_file_that_changes_while_it_is_copied_is_refused(
    store: Store, root: Path, name: str, how: str
) -> None:
    folder = write_version(root, FILES)
    path = folder / name

    def change() -> None:
        match how:
            case "truncated":
                os.truncate(path, 1)
            case "overwritten":
                path.write_bytes(path.read_bytes().upper())
            case "grown":
                path.write_bytes(path.read_bytes() * 2)
            case "replaced":
                (folder / "new").write_bytes(path.read_bytes())
                (folder / "new").replace(path)
            case _:
                path.unlink()
        if how == "made a folder":
            path.mkdir()

    with pytest.raises(LoadRefused) as refusal:
        take(store, root, folder, on_piece=change_between_files(change))
    assert refusal.value.code == "model_changed"
    assert list((store.path / "incoming").iterdir()) == []


def test_page_dirty_through_a_shared_mapping_changes_nothing_taken(store: Store, root: Path) -> None:
    folder = write_version(root, {"model.onnx": bytes(10_000)})
    file = os.open(folder / "model.onnx", os.O_RDWR)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    address = libc.mmap(None, 10_000, 3, 1, file, 0)  # PROT_READ | PROT_WRITE, MAP_SHARED
    ctypes.memset(address, 1, 1)  # dirty from here on: later writes leave the times as they are
    copy = take(store, root, folder)
    ctypes.memset(address, 255, 1)
    version = store.settle(copy, hash_files(copy))
    ctypes.memset(address, 7, 10_000)
    assert (store.folder_of(version.digest) / "model.onnx").read_bytes() == b"\1" + bytes(9_999)
    assert version.files[0].sha256 == hash_of(b"\1" + bytes(9_999))
    os.close(file)
    libc.munmap(ctypes.c_void_p(address), 10_000)


def test_each_way_of_copying_gives_the_same_bytes(tmp_path: Path) -> None:
    content = os.urandom(store_folder.PIECE_BYTES + 12_345)
    (tmp_path / "source").write_bytes(content)
    ways: list[Callable[[int, int, int, OnPiece], int]] = [
        lambda source, target, size, piece: store_folder.copy_file(source, target, size, lambda: None, piece),
        store_folder.copy_ranges,
        store_folder.read_and_write,
    ]
    for number, copy in enumerate(ways):
        target = tmp_path / str(number)
        with (tmp_path / "source").open("rb") as source, target.open("wb") as written:
            assert copy(source.fileno(), written.fileno(), len(content), on_no_piece) == len(content)
        assert target.read_bytes() == content


def test_cancelled_copy_and_hash_leave_nothing(store: Store, root: Path) -> None:
    def cancel() -> None:
        raise CopyCancelled

    folder = write_version(root, FILES)
    copy = take(store, root, folder)
    with pytest.raises(CopyCancelled):
        hash_files(copy, cancel)
    store.discard(copy)
    with pytest.raises(CopyCancelled):
        take(store, root, folder, cancel)
    assert list((store.path / "incoming").iterdir()) == []
    assert store.bytes == 0


# Limits


def in_own_namespace() -> list[str]:
    """Return the beginning of a command that may mount file systems which nobody else sees."""
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*alone, "true"], check=False).returncode:
        pytest.skip("no namespace for a file system of its own")
    return alone


def test_full_disk_is_refused_before_anything_is_copied(store: Store, root: Path) -> None:
    folder = write_version(root, FILES)
    seen = os.statvfs(root)
    size = min(seen.f_blocks * seen.f_frsize * 2, 2**43)
    os.truncate(folder / "data" / "w.bin", size)
    with pytest.raises(DiskFull, match=f"takes {size + 5} bytes .* bytes are missing") as refusal:
        take(store, root, folder)
    assert refusal.value.needed_bytes == size + 5
    assert list((store.path / "incoming").iterdir()) == []


def test_disk_that_becomes_full_fails_with_what_is_missing(tmp_path: Path) -> None:
    """In a mount namespace of its own, on a file system of 4 MB that something else fills meanwhile."""
    script = """
import os, subprocess
from pathlib import Path
from support.store import opened_store, take, write_version
from runtime.errors import DiskFull
at = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", at / "data"], check=True)
store = opened_store(at / "data")
folder = write_version(at, {"model.onnx": bytes(2**20), "w.bin": bytes(2**20)})
calls = []
def fill():
    calls.append(1)
    if len(calls) == 1:
        try:
            (at / "data" / "other").write_bytes(bytes(4 * 2**20))
        except OSError:
            pass
try:
    store._make_disk_room = lambda *_: None
    take(store, at, folder, fill)
except DiskFull as full:
    print(full, os.listdir(at / "data" / "store" / "incoming"))
"""
    (tmp_path / "data").mkdir()
    command = [*in_own_namespace(), *child(script, tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert f"takes {2**21} bytes" in done.stdout
    assert done.stdout.endswith("[]\n")


def test_least_recently_used_version_is_swept_for_another(root: Path, tmp_path: Path) -> None:
    store = opened_store(tmp_path, 25)
    one, two, three = (
        store_version(store, root, write_version(root, {"model.onnx": name * 10}, "m", number))
        for number, name in ((1, b"1"), (2, b"2"), (3, b"3"))
    )
    assert [each.digest in store.stored_versions() for each in (one, two, three)] == [False, True, True]
    assert store.find(two.digest) is not None
    store_version(store, root, write_version(root, {"model.onnx": b"4" * 10}, "m", 4))
    assert [each.digest in store.stored_versions() for each in (two, three)] == [True, False]
    assert len(blobs(tmp_path)) == 2
    with pytest.raises(RuntimeProblem, match="the store may take 25, of which 10 are needed"):
        take(store, root, write_version(root, {"model.onnx": b"5" * 20}, "m", 5))
    assert list((store.path / "incoming").iterdir()) == []


@pytest.mark.parametrize("held", [True, False])
def test_needed_version_is_never_swept(root: Path, tmp_path: Path, *, held: bool) -> None:
    needed = set[str]()
    store = opened_store(tmp_path, 15, lambda _: needed)
    one = store_version(store, root, write_version(root, {"model.onnx": b"1" * 10}))
    if held:
        assert store.find(one.digest) is not None
    else:
        needed.add(one.digest)
    with pytest.raises(RuntimeProblem, match=r"takes 10 bytes.* 10 are needed") as refusal:
        take(store, root, write_version(root, {"model.onnx": b"2" * 10}, "m", 2))
    assert refusal.value.code == "store_full"
    if held:
        store.release(one.digest)
    else:
        needed.clear()
    store.discard(take(store, root, root / "m" / "2"))
    assert one.digest not in store.stored_versions()


def test_shared_file_counts_once_and_outlives_a_sweep(root: Path, tmp_path: Path) -> None:
    store = opened_store(tmp_path, 24)
    one = store_version(store, root, write_version(root, {"model.onnx": b"1", "w.bin": b"w" * 20}))
    two = store_version(store, root, write_version(root, {"model.onnx": b"2", "w.bin": b"w" * 20}, "m", 2))
    assert store.bytes == 21
    assert one.digest not in store.stored_versions()  # it had to go while the second copy was not shared yet
    assert (store.folder_of(two.digest) / "w.bin").read_bytes() == b"w" * 20


@pytest.mark.parametrize("what", ["file", "link", "writable"])
def test_store_that_others_can_write_to_is_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "store"
    if what == "file":
        path.write_bytes(b"")
    elif what == "link":
        path.symlink_to(tmp_path)
    else:
        path.mkdir()
        path.chmod(0o777)
    with pytest.raises(StoreUnavailable, match="remove it"):
        opened_store(tmp_path)
