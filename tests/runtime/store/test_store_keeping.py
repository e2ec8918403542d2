"""Stored versions: found again, verified before use, shared, durable, and whole after any death."""

import json
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.fleet import new_dice, of_both, tell
from support.history import child
from support.store import blobs, check_store, files_of, opened_store, store_version, take, write_version

from runtime.repository import Repository
from runtime.store.folder import StoredVersion, hash_files
from runtime.store.store import Source, Store, verify_store
from runtime.store.versions import Versions

FILES = {"model.onnx": b"model", "data/w.bin": b"weights"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with `FILES` as version 1 of `m`."""
    write_version(tmp_path / "repository", FILES)
    return tmp_path / "repository"


@pytest.fixture
def stored(root: Path, tmp_path: Path) -> StoredVersion:
    """The version in the store of `tmp_path`."""
    store = opened_store(tmp_path)
    version = store_version(store, root, root / "m" / "1")
    store.record_source("m", 1, Source(version.contents, Repository(root).stat_version("m", 1)))
    return version


def overwrite(path: Path, content: bytes, *, same_times: bool = False) -> None:
    """Write to a file of the store, as only its own user can."""
    seen = path.stat()
    path.chmod(0o600)
    path.write_bytes(content)
    if same_times:
        os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))


def test_version_is_found_by_digest_and_source_after_a_restart(
    root: Path, stored: StoredVersion, tmp_path: Path
) -> None:
    store = opened_store(tmp_path)
    assert store.find(stored.digest) == stored
    source = Source(stored.contents, Repository(root).stat_version("m", 1))
    assert store.read_source("m", 1) == source
    assert store.read_source("m", 2) is None
    assert store.find("0" * 64) is None


@pytest.mark.parametrize("how", ["cp -p", "touch", "chmod", "another file", "renamed"])
def test_source_with_any_other_identity_is_not_the_same(
    root: Path, stored: StoredVersion, tmp_path: Path, how: str
) -> None:
    folder, store = root / "m" / "1", opened_store(tmp_path)
    model = folder / "model.onnx"
    match how:
        case "cp -p":  # the same size and mtime
            seen = model.stat()
            (folder / "new").write_bytes(b"MODEL")
            (folder / "new").replace(model)
            os.utime(model, ns=(seen.st_atime_ns, seen.st_mtime_ns))
        case "touch":
            os.utime(model)
        case "chmod":
            model.chmod(0o640)
        case "another file":
            (folder / "more").touch()
        case _:
            (folder / "data" / "w.bin").rename(folder / "data" / "v.bin")
    assert Versions(Repository(root), store).known_contents("m", 1) is None
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


@pytest.mark.parametrize("how", ["overwritten", "truncated", "missing", "more", "link", "folder gone"])
def test_version_that_was_changed_is_removed_and_absent(
    stored: StoredVersion, tmp_path: Path, how: str
) -> None:
    store, path = opened_store(tmp_path), files_of(tmp_path, stored) / "data" / "w.bin"
    match how:
        case "overwritten":
            overwrite(path, b"WEIGHTS")
        case "truncated":
            overwrite(path, b"w")
        case "missing":
            path.unlink()
        case "more":
            (files_of(tmp_path, stored) / "more.bin").write_bytes(b"not hashed")
        case "link":
            path.unlink()
            path.symlink_to("/etc/hostname")
        case _:
            shutil.rmtree(files_of(tmp_path, stored))
    assert store.find(stored.digest) is None
    assert stored.digest not in store.stored_versions()
    assert not files_of(tmp_path, stored).parent.exists()
    assert check_store(tmp_path) == 0


def test_changed_blob_is_not_shared_with_another_version(
    root: Path, stored: StoredVersion, tmp_path: Path
) -> None:
    store = opened_store(tmp_path)
    overwrite(files_of(tmp_path, stored) / "data" / "w.bin", b"WEIGHTS")
    folder = write_version(root, {"model.onnx": b"other", "data/w.bin": b"weights"}, "m", 2)
    version = store_version(store, root, folder)
    assert (files_of(tmp_path, version) / "data" / "w.bin").read_bytes() == b"weights"
    assert store.find(stored.digest) is None
    assert store.find(version.digest) == version


def test_same_files_of_two_versions_are_one_blob(root: Path, stored: StoredVersion, tmp_path: Path) -> None:
    store = opened_store(tmp_path)
    folder = write_version(root, {"model.onnx": b"other", "data/w.bin": b"weights"}, "m", 2)
    version = store_version(store, root, folder)
    shared = files_of(tmp_path, version) / "data" / "w.bin"
    assert shared.samefile(files_of(tmp_path, stored) / "data" / "w.bin")
    assert len(blobs(tmp_path)) == 3
    assert check_store(tmp_path) == 2


def test_same_bytes_taken_at_once_are_stored_once(root: Path, tmp_path: Path) -> None:
    store = opened_store(tmp_path)

    def take_once(_: int) -> StoredVersion:
        copy = take(store, root, root / "m" / "1")
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
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    version = store_version(opened_store(tmp_path), root, root / "m" / "1")
    assert blobs(tmp_path) == []
    assert opened_store(tmp_path).find(version.digest) == version


# Opening


def test_open_sweeps_what_a_dead_process_left(root: Path, stored: StoredVersion, tmp_path: Path) -> None:
    store = opened_store(tmp_path)
    take(store, root, root / "m" / "1")
    copy = take(store, root, write_version(root, {"model.onnx": b"2"}, "m", 2))
    unsynced = store.settle(copy, hash_files(copy))
    store.record_source("m", 2, Source(unsynced.contents, Repository(root).stat_version("m", 2)))
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


def test_death_at_any_line_leaves_nothing_half_made(root: Path, tmp_path: Path) -> None:
    write_version(root, {"model.onnx": b"other", "data/w.bin": b"weights"}, "m", 2)
    opened_store(tmp_path)
    step = of_both(short=31, long=1)
    script = (
        "from pathlib import Path; from support.store import die_at_lines; "
        "die_at_lines(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))"
    )
    command = child(script, root, tmp_path, new_dice().randrange(1, step + 1), step)
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
    root: Path, stored: StoredVersion, tmp_path: Path
) -> None:
    store = opened_store(tmp_path)
    shutil.rmtree(tmp_path / "store")
    assert store.find(stored.digest) is None
    version = store_version(store, root, root / "m" / "1")
    assert Store(tmp_path / "store").path == store.path
    assert store.find(version.digest) == version
