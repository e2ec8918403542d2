"""The store: what is taken into it and refused, its limits, and what it keeps, whole after any death."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest
from support.fleet import new_dice, of_both, tell
from support.history import child
from support.store import blobs, check_store, files_of, opened_store, store_version, take, write_version

from events.types import digest_of
from runtime.errors import CopyCancelled, DiskFull, LoadRefused, RuntimeProblem, StoreUnavailable
from runtime.repository import Repository
from runtime.store import folder as store_folder
from runtime.store.folder import OnPiece, StoredVersion, hash_files, on_no_piece
from runtime.store.store import Source, Store, verify_store
from runtime.store.versions import Versions

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


def change_between_files(change: Callable[[], object]) -> OnPiece:
    """Give an `on_piece` that makes a change when the first file is about to be copied."""
    left = [change]

    def on_piece() -> None:
        if left:
            left.pop()()

    return on_piece


def replace_file(path: Path, content: bytes) -> None:
    path.with_name("new").write_bytes(content)
    path.with_name("new").replace(path)


@pytest.mark.parametrize("name", ["model.onnx", "data/w.bin"])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(Path.unlink, id="unlinked"),
        pytest.param(lambda path: os.truncate(path, 1), id="truncated"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes().upper()), id="overwritten"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes() * 2), id="grown"),
        pytest.param(lambda path: replace_file(path, path.read_bytes()), id="replaced"),
        pytest.param(lambda path: [path.unlink(), path.mkdir()], id="made a folder"),
    ],
)
def test_file_that_changes_while_it_is_copied_is_refused(
    store: Store, root: Path, name: str, change: Callable[[Path], object]
) -> None:
    folder = write_version(root, FILES)
    with pytest.raises(LoadRefused) as refusal:
        take(store, root, folder, on_piece=change_between_files(lambda: change(folder / name)))
    assert refusal.value.code == "model_changed"
    assert list((store.path / "incoming").iterdir()) == []


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


def test_kept_version_is_swept_last(root: Path, tmp_path: Path) -> None:
    kept = set[str]()
    store = Store(tmp_path / "store", 25, find_kept=lambda: kept)
    store.open()

    def add(number: int) -> StoredVersion:
        content = str(number).encode() * 10
        return store_version(store, root, write_version(root, {"model.onnx": content}, "m", number))

    one = add(1)
    kept.add(one.digest)
    two, three = add(2), add(3)
    assert store.stored_versions().keys() == {one.digest, three.digest}
    kept.add(three.digest)
    four = add(4)  # there is no other: the least recently used one
    assert store.stored_versions().keys() == {three.digest, four.digest}
    assert two.digest not in store.stored_versions()


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


# Kept: found again, verified before use, shared, durable, and whole after any death


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """A repository with `FILES` as version 1 of `m`."""
    write_version(tmp_path / "repository", FILES)
    return tmp_path / "repository"


@pytest.fixture
def stored(filled: Path, tmp_path: Path) -> StoredVersion:
    """The version in the store of `tmp_path`."""
    store = opened_store(tmp_path)
    version = store_version(store, filled, filled / "m" / "1")
    store.record_source("m", 1, Source(version.contents, Repository(filled).stat_version("m", 1)))
    return version


def overwrite(path: Path, content: bytes, *, same_times: bool = False) -> None:
    """Write to a file of the store, as only its own user can."""
    seen = path.stat()
    path.chmod(0o600)
    path.write_bytes(content)
    if same_times:
        os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))


def test_version_is_found_by_digest_and_source_after_a_restart(
    filled: Path, stored: StoredVersion, tmp_path: Path
) -> None:
    store = opened_store(tmp_path)
    assert store.find(stored.digest) == stored
    source = Source(stored.contents, Repository(filled).stat_version("m", 1))
    assert store.read_source("m", 1) == source
    assert store.read_source("m", 2) is None
    assert store.find("0" * 64) is None


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda model: replace_file(model, b"MODEL"), id="cp -p"),  # the same size and mtime
        pytest.param(os.utime, id="touch"),
        pytest.param(lambda model: model.chmod(0o640), id="chmod"),
        pytest.param(lambda model: model.with_name("more").touch(), id="another file"),
        pytest.param(lambda model: model.with_name("data").rename(model.with_name("more")), id="renamed"),
    ],
)
def test_source_with_any_other_identity_is_not_the_same(
    filled: Path, stored: StoredVersion, tmp_path: Path, change: Callable[[Path], object]
) -> None:
    model, store = filled / "m" / "1" / "model.onnx", opened_store(tmp_path)
    seen = model.stat()
    change(model)
    if change is not os.utime:
        os.utime(model, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    assert Versions(Repository(filled), store).known_contents("m", 1) is None
    assert store.find(stored.digest) == stored


def test_copied_data_directory_is_hashed_and_used(stored: StoredVersion, tmp_path: Path) -> None:
    (tmp_path / "restored").mkdir()
    shutil.copytree(tmp_path / "store", tmp_path / "restored" / "store")
    for _ in range(2):  # with the identities of before, and with its own
        found = opened_store(tmp_path / "restored").find(stored.digest)
        assert found is not None
        assert (found.digest, found.contents) == (stored.digest, stored.contents)
        inodes = [(files_of(tmp_path / "restored", found) / file.path).stat().st_ino for file in found.files]
        assert [file.inode for file in found.files] == inodes


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda path: overwrite(path, b"WEIGHTS"), id="overwritten"),
        pytest.param(lambda path: overwrite(path, b"w"), id="truncated"),
        pytest.param(Path.unlink, id="missing"),
        pytest.param(lambda path: path.with_name("more.bin").write_bytes(b"not hashed"), id="more"),
        pytest.param(lambda path: [path.unlink(), path.symlink_to("/etc/hostname")], id="link"),
        pytest.param(lambda path: shutil.rmtree(path.parents[1]), id="folder gone"),
    ],
)
def test_version_that_was_changed_is_removed_and_absent(
    stored: StoredVersion, tmp_path: Path, change: Callable[[Path], object]
) -> None:
    store = opened_store(tmp_path)
    change(files_of(tmp_path, stored) / "data" / "w.bin")
    assert store.find(stored.digest) is None
    assert stored.digest not in store.stored_versions()
    assert not files_of(tmp_path, stored).parent.exists()
    assert check_store(tmp_path) == 0


def test_changed_blob_is_not_shared_with_another_version(
    filled: Path, stored: StoredVersion, tmp_path: Path
) -> None:
    store = opened_store(tmp_path)
    overwrite(files_of(tmp_path, stored) / "data" / "w.bin", b"WEIGHTS")
    folder = write_version(filled, {"model.onnx": b"other", "data/w.bin": b"weights"}, "m", 2)
    version = store_version(store, filled, folder)
    assert (files_of(tmp_path, version) / "data" / "w.bin").read_bytes() == b"weights"
    assert store.find(stored.digest) is None
    assert store.find(version.digest) == version


def test_same_files_of_two_versions_are_one_blob(filled: Path, stored: StoredVersion, tmp_path: Path) -> None:
    store = opened_store(tmp_path)
    folder = write_version(filled, {"model.onnx": b"other", "data/w.bin": b"weights"}, "m", 2)
    version = store_version(store, filled, folder)
    shared = files_of(tmp_path, version) / "data" / "w.bin"
    assert shared.samefile(files_of(tmp_path, stored) / "data" / "w.bin")
    assert len(blobs(tmp_path)) == 3
    assert check_store(tmp_path) == 2


def test_same_bytes_taken_at_once_are_stored_once(filled: Path, tmp_path: Path) -> None:
    store = opened_store(tmp_path)

    def take_once(_: int) -> StoredVersion:
        copy = take(store, filled, filled / "m" / "1")
        open_file = (copy / "model.onnx").open("rb")
        version = store.settle(copy, hash_files(copy))
        with open_file:
            assert open_file.read() == b"model"  # what is loaded stays with its worker
        store.make_durable(version.digest)
        return version

    with ThreadPoolExecutor(8) as threads:
        versions = list(threads.map(take_once, range(of_both(short=24, long=1_000))))
    assert len({version.digest for version in versions}) == 1
    assert store.find(versions[0].digest) == versions[0]
    assert check_store(tmp_path) == 1


def test_store_without_hard_links_keeps_files_in_versions(
    filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    version = store_version(opened_store(tmp_path), filled, filled / "m" / "1")
    assert blobs(tmp_path) == []
    assert opened_store(tmp_path).find(version.digest) == version


# Opening


def test_open_sweeps_what_a_dead_process_left(filled: Path, stored: StoredVersion, tmp_path: Path) -> None:
    store = opened_store(tmp_path)
    take(store, filled, filled / "m" / "1")
    copy = take(store, filled, write_version(filled, {"model.onnx": b"2"}, "m", 2))
    unsynced = store.settle(copy, hash_files(copy))
    store.record_source("m", 2, Source(unsynced.contents, Repository(filled).stat_version("m", 2)))
    assert store.read_source("m", 2) is not None
    (store.path / "blobs" / "ab").mkdir()
    (store.path / "blobs" / "ab" / ("ab" * 32)).write_bytes(b"nobody's")
    (store.path / "versions" / "notes.txt").write_bytes(b"somebody's")
    again = opened_store(tmp_path)
    (store.path / "versions" / "notes.txt").unlink()
    assert check_store(tmp_path) == 1
    assert again.find(stored.digest) == stored
    assert again.find(unsynced.digest) is None
    assert again.read_source("m", 2) is None


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"digest":"' + b"0" * 64 + b'","files":[]}'])
def test_damaged_manifest_counts_as_none(stored: StoredVersion, tmp_path: Path, content: bytes) -> None:
    (files_of(tmp_path, stored).parent / "manifest.json").write_bytes(content)
    assert opened_store(tmp_path).find(stored.digest) is None
    assert blobs(tmp_path) == []


def test_version_that_a_group_could_write_to_is_hashed_before_use(
    stored: StoredVersion, tmp_path: Path
) -> None:
    overwrite(files_of(tmp_path, stored) / "model.onnx", b"MODEL", same_times=True)
    assert opened_store(tmp_path).find(stored.digest) == stored  # its own user can deceive it
    (tmp_path / "store").chmod(0o770)
    store = opened_store(tmp_path)
    assert store.find(stored.digest) is None
    assert store.read_source("m", 1) is None
    assert (tmp_path / "store").stat().st_mode & 0o777 == 0o700


def test_death_at_any_line_leaves_nothing_half_made(filled: Path, tmp_path: Path) -> None:
    write_version(filled, {"model.onnx": b"other", "data/w.bin": b"weights"}, "m", 2)
    opened_store(tmp_path)
    step = of_both(short=31, long=1)
    script = (
        "from pathlib import Path; from support.store import die_at_lines; "
        "die_at_lines(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))"
    )
    command = child(script, filled, tmp_path, new_dice().randrange(1, step + 1), step)
    done = subprocess.run(command, capture_output=True, text=True, timeout=1_200, check=False)
    assert done.returncode == 0, done.stderr
    tell(done.stdout)
    seen = json.loads(done.stdout)
    assert seen["lives"] >= 20
    assert min(seen["left in incoming"], seen["without a manifest"], seen["versions"]) > 0


# Verification


def test_verification_hashes_everything(stored: StoredVersion, tmp_path: Path) -> None:
    assert [(each.digest, each.bytes, each.findings) for each in verify_store(tmp_path / "store")] == [
        (stored.digest, 12, ())
    ]
    overwrite(files_of(tmp_path, stored) / "model.onnx", b"MODEL", same_times=True)
    (files_of(tmp_path, stored) / "data" / "w.bin").unlink()
    (files_of(tmp_path, stored) / "more").touch()
    (found,) = verify_store(tmp_path / "store")
    assert [finding.partition(" has SHA-256")[0] for finding in found.findings] == [
        "'data/w.bin' is missing",
        "'model.onnx'",
        "'more' is not of this version",
    ]


def test_verification_of_a_missing_store_finds_nothing(tmp_path: Path) -> None:
    assert list(verify_store(tmp_path / "store")) == []


def test_store_removed_while_it_is_open_is_made_again(
    filled: Path, stored: StoredVersion, tmp_path: Path
) -> None:
    store = opened_store(tmp_path)
    shutil.rmtree(tmp_path / "store")
    assert store.find(stored.digest) is None
    version = store_version(store, filled, filled / "m" / "1")
    assert Store(tmp_path / "store").path == store.path
    assert store.find(version.digest) == version
