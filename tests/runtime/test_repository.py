"""The model repository, on a real folder."""

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from msgspec.structs import replace
from support.history import model_loaded, opened
from support.ledgers import SIGN
from support.models import add, bind_socket, external, external_bytes, save, save_bytes
from support.modes import unreadable
from support.workers import LIMIT_S, TAKE_ALL_MEMORY, descriptors_left, until

from events.audit.export import JSONL, export
from events.audit.exportreader import audit_file
from events.commands import Record
from events.types import SYSTEM, Draft, LoadedFile
from runtime.errors import InvalidModelId, LoadRefused, RepositoryUnreadable, UnknownModel, UnknownVersion
from runtime.repository import (
    MAX_FILES,
    MAX_PATHS_BYTES,
    MAX_VERSION,
    FileSystemPool,
    Repository,
    RepositoryBusy,
    open_folder,
)


def test_models_and_versions_appear_once_they_are_complete(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    assert repository.models() == []
    save(add(), tmp_path, "b")
    save(add(), tmp_path, "a", 2)
    folder = save_bytes(b"model", tmp_path, "a", 10)
    (folder / "data").mkdir()
    (folder / "data" / "w.bin").write_bytes(b"123")
    (tmp_path / "a" / "11").mkdir()
    (tmp_path / "empty").mkdir()
    assert repository.models() == ["a", "b"]
    assert repository.versions("a") == [2, 10]
    assert (repository.find_version("a"), repository.find_version("a", 2)) == (10, 2)
    files = repository.stat_version("a", 10)
    assert [(file.path, file.bytes) for file in files] == [("data/w.bin", 3), ("model.onnx", 5)]
    assert files[1].mtime_ns == (folder / "model.onnx").stat().st_mtime_ns
    save(add(), tmp_path, "a", 11)
    assert repository.versions("a") == [2, 10, 11]


def test_only_numbers_are_versions_and_only_plain_names_models(tmp_path: Path) -> None:
    for name in ("m", "9", "A.b_c-d", "a" * 128, ".m", "-m", "m m", "mö", "a" * 129):
        save(add(), tmp_path, name)
    assert Repository(tmp_path).models() == sorted(["m", "9", "A.b_c-d", "a" * 128])
    for name in ("0", "01", "-1", "1.0", "+1", "1 ", "9223372036854775808", "x", "１"):  # noqa: RUF001
        (tmp_path / "m" / name).mkdir()
        (tmp_path / "m" / name / "model.onnx").write_bytes(b"x")
    assert Repository(tmp_path).versions("m") == [1]
    for version in (202611261230, MAX_VERSION):
        save(add(), tmp_path, "m", version)
        assert Repository(tmp_path).find_version("m") == version


@pytest.mark.parametrize(
    "model_id",
    [
        "", ".", "..", "../m", "m/../m", "/m", "m/1", "m\0", ".m", "-m", "m\n", "m m", "mö",
        "a" * 129, "%2e%2e",
    ],
)  # fmt: skip
def test_invalid_model_id_is_refused_without_io(tmp_path: Path, model_id: str) -> None:
    repository = Repository(tmp_path / "not there")
    for ask in (repository.versions, repository.find_version):
        with pytest.raises(InvalidModelId) as refusal:
            ask(model_id)
        assert refusal.value.code == "invalid_model_id"


def test_unknown_model_and_version(tmp_path: Path) -> None:
    save(add(), tmp_path, "m")
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for model_id in ("none", "file", "empty"):
        with pytest.raises(UnknownModel, match=model_id):
            Repository(tmp_path).find_version(model_id)
    for version in (2, 0, -1):
        with pytest.raises(UnknownVersion):
            Repository(tmp_path).find_version("m", version)


def test_links_within_the_repository_are_followed(tmp_path: Path) -> None:
    folder = save(add(), tmp_path, "m")
    (folder / "again").symlink_to(folder)  # a circle
    (tmp_path / "alias").symlink_to(tmp_path / "m")
    (tmp_path / "m" / "2").symlink_to(folder)
    (tmp_path / "n" / "1").mkdir(parents=True)
    (tmp_path / "n" / "1" / "model.onnx").symlink_to(folder / "model.onnx")
    repository = Repository(tmp_path)
    assert repository.models() == ["alias", "m", "n"]
    assert repository.versions("alias") == [1, 2]
    assert repository.stat_version("n", 1)[0].inode == (folder / "model.onnx").stat().st_ino
    assert {file.path for file in repository.stat_version("m", 1)} >= {"model.onnx"}


def test_links_out_of_the_repository_are_ignored(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    save(add(), outside, "m")
    root.mkdir()
    (root / "model").symlink_to(outside / "m")
    (root / "version").mkdir()
    (root / "version" / "1").symlink_to(outside / "m" / "1")
    (root / "file" / "1").mkdir(parents=True)
    (root / "file" / "1" / "model.onnx").symlink_to(outside / "m" / "1" / "model.onnx")
    assert Repository(root).models() == []
    for model_id in ("model", "version", "file"):
        with (
            pytest.raises(UnknownVersion, match="leads out of the repository"),
            Repository(root).open_version(model_id, 1),
        ):
            pass
        with pytest.raises(UnknownModel, match="leads out of the repository"):
            Repository(root).find_version(model_id)
        with pytest.raises(LoadRefused, match="leads out of the repository"):
            Repository(root).stat_version(model_id, 1)


def point(link: Path, target: Path) -> None:
    """Re-point a link in one step, as git-sync does."""
    (new := link.with_name("new")).symlink_to(target)
    new.rename(link)


def test_link_is_followed_anew_by_each_call(tmp_path: Path) -> None:
    link = tmp_path / "current"
    for release, versions in (("a", (1, 2)), ("b", (3,))):
        for version in versions:
            save_bytes(release.encode(), tmp_path / release, "m", version)
    point(link, tmp_path / "a")
    repository = Repository(link)
    assert repository.versions("m") == [1, 2]
    (before,) = repository.stat_version("m", 2)
    with repository.open_version("m", 2) as (folder, files):
        point(link, tmp_path / "b")
        assert repository.versions("m") == [3]
        assert (folder.root, folder.path) == (tmp_path / "a", tmp_path / "a/m/2")
        assert folder.stat_files() == files == (before,)  # all files are of the release that was opened
        with folder.open_file("model.onnx", before) as descriptor:
            assert os.read(descriptor, 9) == b"a"
    with pytest.raises(UnknownVersion), repository.open_version("m", 2):
        pass
    (tmp_path / "b/m/4").symlink_to(tmp_path / "a/m/2")
    with pytest.raises(UnknownVersion, match="leads out of the repository"):  # of today
        repository.find_version("m", 4)
    point(link, tmp_path / "gone")
    with pytest.raises(RepositoryUnreadable, match="the repository's folder cannot be read: No such file"):
        repository.find_version("m")
    with pytest.raises(ValueError, match="surrogates"):  # which ONNX Runtime could not open
        Repository(tmp_path / os.fsdecode(b"\xff"))


def test_folder_named_as_the_model_file_has_the_versions_files(tmp_path: Path) -> None:
    inner = tmp_path / "m/1/model.onnx"
    save(external("weights.bin"), tmp_path / "m", "1", 1).rename(tmp_path / "inner")
    (tmp_path / "inner").rename(inner)
    (inner / "weights.bin").write_bytes(external_bytes())
    (tmp_path / "m/1.sig").touch()
    repository = Repository(tmp_path)
    assert list(repository.find_unserved()) == []
    assert repository.find_version("m") == 1
    assert repository.find_file("m", 1) == inner / "model.onnx"
    with repository.open_version("m", 1) as (folder, files):
        assert [file.path for file in files] == ["1.sig", "model.onnx", "weights.bin"]
        assert folder.path == inner
    (tmp_path / "m/2").mkdir()
    (tmp_path / "m/2/model.onnx").symlink_to("/usr")
    with pytest.raises(LoadRefused, match="leads out of the repository"):
        repository.stat_version("m", 2)
    assert repository.versions("m") == [1]


def test_version_passed_over_is_named_with_the_reason(tmp_path: Path) -> None:
    repository = Repository(tmp_path, lambda _, version: version == 4)
    for version in (1, 2, 4):
        save(add(), tmp_path, "m", version)

    def reason() -> str:
        return str(repository.find_versions("m").refusal)

    assert "version 4 of model 'm' was removed, and its folder has files all the same" in reason()
    assert repository.versions("m") == [1, 2]
    with pytest.raises(UnknownVersion, match="was removed, and its folder has files"):
        repository.find_version("m", 4)
    with pytest.raises(UnknownVersion), repository.open_version("m", 4):
        pass
    (tmp_path / "m/5").mkdir()
    assert "version 5 of model 'm' is not complete: its model.onnx cannot be looked at" in reason()
    for name in ("a.onnx", os.fsdecode(b"\xff.onnx")):
        (tmp_path / "m/5" / name).touch()
    assert "version 5 of model 'm' has several models, a.onnx, ?.onnx" in reason()
    save(add(), tmp_path, "m", 5)
    assert repository.find_versions("m") == ([1, 2, 5], None)
    (tmp_path / "m/05").mkdir()
    (tmp_path / "m/notes").mkdir()
    assert repository.find_versions("m") == ([1, 2, 5], None)
    (tmp_path / "m/99999999999999999999").mkdir()
    assert "version 99999999999999999999 of model 'm' is no version" in reason()
    assert repository.find_version("m") == 5


@pytest.mark.parametrize(
    ("path", "shown"),
    [("m/2", "version 2 of model 'm'"), ("m", "the folder of model 'm'"), (".", "the repository's folder")],
)
def test_what_the_server_may_not_read_is_not_missing(tmp_path: Path, path: str, shown: str) -> None:
    for model_id, version in (("m", 1), ("m", 2), ("n", 1)):
        save(add(), tmp_path / "root", model_id, version)
    repository = Repository(tmp_path / "root")
    with unreadable(tmp_path / "root" / path):
        with pytest.raises(RepositoryUnreadable, match=f"{shown} cannot be read: Permission denied"):
            repository.find_version("m", 2)
        if path == ".":
            with pytest.raises(RepositoryUnreadable, match=shown):
                repository.models()
            return
        assert repository.models() == (["m", "n"] if path == "m/2" else ["n"])
        (found,) = repository.find_unserved()
        assert found == (path, "cannot be read: Permission denied; let the server's user read it")
        with pytest.raises(RepositoryUnreadable, match="Permission denied"), repository.open_version("m", 2):
            pass


def test_version_missing_for_a_moment_is_not_called_unreadable(tmp_path: Path) -> None:
    folder = save(add(), tmp_path, "m")
    repository, ends = Repository(tmp_path), threading.Event()

    def exchange() -> None:
        while not ends.is_set():
            folder.rename(tmp_path / "aside").rename(folder)

    thread = threading.Thread(target=exchange)
    thread.start()
    try:
        seen = {type(repository.find_versions("m").refusal) for _ in range(2000)}
    finally:
        ends.set()
        thread.join()
    assert seen <= {type(None), UnknownVersion}


@pytest.mark.parametrize(
    ("name", "make", "reason"),
    [
        ("w.bin", lambda path: path.symlink_to("/etc/hostname"), "leads out of the repository"),
        ("more", lambda path: path.symlink_to("/etc"), "leads out of the repository"),
        ("w.bin", lambda path: path.symlink_to("nowhere"), "leads nowhere"),
        ("w.bin", lambda path: path.symlink_to("w.bin"), "symbolic links"),
        ("w.bin", lambda path: path.symlink_to("/proc/self/fd/0"), "leads out of|not a regular file"),
        ("w.bin", os.mkfifo, "not a regular file"),
        ("w.bin", bind_socket, "not a regular file"),
        (os.fsdecode(b"\xff"), Path.touch, "not UTF-8"),
        ("", lambda path: [(path / str(number)).touch() for number in range(20)], "more than 20 files"),
        ("a" * 40, Path.touch, "have 50 bytes, and may have 49 together"),
        # The signature bundle beside a version.
        ("../1.sig", lambda path: path.symlink_to("/etc/hostname"), "leads out of the repository"),
        ("../1.sig", lambda path: path.symlink_to("nowhere"), "leads nowhere"),
        ("../1.sig", os.mkfifo, "not a regular file"),
        ("../1.sig", Path.mkdir, "beside the version is a folder: move it away"),
        ("../1.sig", lambda path: [path.touch(), path.parent.with_name("1.sig").touch()], "keep one"),
    ],
)
def test_unsafe_file_is_refused(
    tmp_path: Path, name: str, make: Callable[[Path], object], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.repository.MAX_FILES", 20)
    monkeypatch.setattr("runtime.repository.MAX_PATHS_BYTES", 49)
    make(save(add(), tmp_path, "m") / name)
    repository = Repository(tmp_path)
    with pytest.raises(LoadRefused, match=reason) as refused:
        repository.stat_version("m", 1)
    with pytest.raises(LoadRefused, match=reason), repository.open_version("m", 1):
        pass
    assert refused.value.code == "unsafe_file"


async def test_export_with_the_longest_paths_is_read(tmp_path: Path) -> None:
    path = "\x01" * (MAX_PATHS_BYTES // MAX_FILES)  # escaped twice
    files = tuple(LoadedFile(path, 1, 1, "ab" * 32) for _ in range(MAX_FILES))
    ledger, exported = tmp_path / "ledger.db", tmp_path / "export"
    async with opened(ledger) as log:
        await log.submit(Record((Draft("loaded", replace(model_loaded("w"), files=files), SYSTEM),)))
    exported.write_bytes(b"".join(export(ledger, JSONL, SIGN)))
    assert audit_file(exported).finding is None


def test_version_folder_that_is_gone_or_has_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "fifo" / "1").mkdir(parents=True)
    os.mkfifo(tmp_path / "fifo" / "1" / "model.onnx")
    for model_id, code, words, unknown in (
        ("fifo", "unsafe_file", "not a regular file", UnknownVersion),
        ("none", "model_changed", "no longer there", UnknownModel),
    ):
        with pytest.raises(LoadRefused, match=words) as refusal:
            Repository(tmp_path).stat_version(model_id, 1)
        assert refusal.value.code == code
        with pytest.raises(unknown), Repository(tmp_path).open_version(model_id, 1):
            pass


def test_replaced_file_is_not_opened(tmp_path: Path) -> None:
    folder = save_bytes(b"before", tmp_path, "m")
    (identity,) = Repository(tmp_path).stat_version("m", 1)
    for make in (lambda path: path.write_bytes(b"after!"), os.mkfifo):
        make(folder / "new")
        (folder / "new").rename(folder / "model.onnx")
        with (
            open_folder(tmp_path, folder) as opened,
            pytest.raises(LoadRefused, match=r"changed|not a regular file"),
            opened.open_file("model.onnx", identity),
        ):
            pass


# The signature bundle beside a version


def test_bundle_beside_is_a_file_of_its_version(tmp_path: Path) -> None:
    folder = save_bytes(b"model", tmp_path, "m")
    (folder / "0.txt").touch()
    (tmp_path / "m" / "2").symlink_to("1")
    (tmp_path / "m" / "1.sig").write_bytes(b"bundle")
    (tmp_path / "m" / "2.sig").symlink_to("1.sig")
    (tmp_path / "m" / "9.sig").touch()
    repository = Repository(tmp_path)
    assert repository.versions("m") == [1, 2]
    assert list(repository.find_unserved()) == []
    for version in (1, 2):
        with repository.open_version("m", version) as (opened, files):
            assert [file.path for file in files] == ["0.txt", f"{version}.sig", "model.onnx"]
            assert files == repository.stat_version("m", version) == opened.stat_files()
            with opened.open_file(files[1].path, files[1]) as descriptor:
                assert os.read(descriptor, 10) == b"bundle"
            assert opened.find_hard_links() == []
    os.link(tmp_path / "m" / "1.sig", tmp_path / "other name")
    with repository.open_version("m", 1) as (opened, _):
        assert opened.find_hard_links() == ["1.sig"]


def test_file_in_the_folder_with_the_name_of_a_bundle_is_read_there(tmp_path: Path) -> None:
    (save_bytes(b"model", tmp_path, "m") / "1.sig").write_bytes(b"inside")
    with (
        Repository(tmp_path).open_version("m", 1) as (opened, files),
        opened.open_file("1.sig", files[0]) as file,
    ):
        assert os.read(file, 10) == b"inside"


WITHOUT_MEMORY = f"""
import os, sys
from pathlib import Path
from runtime.errors import RepositoryUnreadable
from runtime.repository import Repository

repository = Repository(Path(sys.argv[1]))
repository.stat_version("m", 1)
{TAKE_ALL_MEMORY}
try:
    repository.stat_version("m", 1)
except (MemoryError, RepositoryUnreadable):
    os._exit(7)
"""


def test_folder_listed_without_memory_is_not_empty(tmp_path: Path) -> None:
    save(add(), tmp_path, "m")
    ended = subprocess.run([sys.executable, "-c", WITHOUT_MEMORY, str(tmp_path)], check=False, timeout=120)
    assert ended.returncode == 7


def test_folder_listed_without_descriptors_is_not_missing(tmp_path: Path) -> None:
    save(add(), tmp_path, "m")
    repository = Repository(tmp_path)
    with descriptors_left(0):
        with pytest.raises(RepositoryBusy, match="'m' cannot be listed: Too many open files"):
            repository.find_version("m")
        with pytest.raises(RepositoryBusy, match="open files"):
            repository.models()
    assert repository.models() == ["m"]


def test_find_unserved_names_each_model_and_version_with_the_reason(tmp_path: Path) -> None:
    save(add(), tmp_path, "good", 2)
    for name in ("good/assets", "good/1", "good/01", "empty", "folder/1/model.onnx", ".git/1", "my model/1"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "README.md").touch()
    (tmp_path / "good" / "config.pbtxt").touch()
    (tmp_path / "out").symlink_to("/usr")
    (tmp_path / "long").symlink_to("x" * 300)
    (tmp_path / "good" / "7").symlink_to("x" * 300)
    (tmp_path / "good" / "8").symlink_to("/usr")
    named = (
        "flat/net.onnx",
        "two/1/a.onnx",
        "two/1/b.onnx",
        "hub/onnx/model.onnx",
        "inner/1/onnx/model.onnx",
    )
    for name in ("loose.onnx", "other/1/net.onnx", *named):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    save(add(), tmp_path, "file")
    (tmp_path / "file" / "1" / "model.onnx").unlink()
    (tmp_path / "file" / "1" / "model.onnx").symlink_to("/etc/hostname")
    unserved = dict(Repository(tmp_path).find_unserved())
    assert {place: reason.partition(":")[0] for place, reason in unserved.items()} == {
        "empty": "has no version",
        "flat": "has no version",
        "loose.onnx": "is in no model's folder",
        "hub": "has no version",
        "inner/1": "is not complete",
        "two/1": "has several models, a.onnx, b.onnx",
        "file/1": "is not complete",
        "folder/1": "is not complete",
        "good/01": "is no version, which is a number from 1 to 9223372036854775807 without zeros before it",
        "good/1": "is not complete",
        "good/7": "cannot be looked at",
        "good/8": "leads out of the repository",
        "long": "cannot be looked at",
        "out": "leads out of the repository",
    }
    assert unserved["file/1"].endswith("model.onnx leads out of the repository")
    assert unserved["folder/1"].endswith(
        "its model.onnx/model.onnx cannot be looked at: No such file or directory"
    )
    assert unserved["flat"].endswith("move net.onnx to flat/1/model.onnx")
    assert unserved["loose.onnx"].endswith("move it to loose/1/model.onnx")
    assert unserved["hub"].endswith(f"`loadledger add hub {tmp_path}/hub` takes what is needed")
    assert unserved["inner/1"].endswith("move what is in onnx/ to the version's folder")
    assert unserved["two/1"].endswith("rename one to model.onnx, or give each its own folder")
    assert unserved["good/1"].endswith("model.onnx cannot be looked at: No such file or directory")


def test_only_onnx_file_is_the_model_whatever_its_name(tmp_path: Path) -> None:
    save(add(), tmp_path, "m", 1).joinpath("model.onnx").rename(tmp_path / "m/1/silero_vad.onnx")
    (tmp_path / "m/1/._silero_vad.onnx").touch()
    repository = Repository(tmp_path)
    assert repository.versions("m") == [1]
    assert repository.find_file("m", 1) == tmp_path / "m/1/silero_vad.onnx"
    with repository.open_version("m", 1) as (_, files):
        assert "silero_vad.onnx" in [file.path for file in files]


# Calls of the file system: in their order by model, bounded in all, and nobody waits for one that hangs


SHORT_S = 0.05


class Hanging:
    """Calls that hang until they are let go."""

    def __init__(self) -> None:
        self.began = 0
        self.may_end = threading.Event()

    def __call__(self) -> str:
        self.began += 1
        self.may_end.wait()
        return "late"


async def test_call_returns_or_raises_what_it_finds() -> None:
    pool = FileSystemPool()
    assert await pool.run("m", lambda: 3, LIMIT_S) == 3
    with pytest.raises(ZeroDivisionError):
        await pool.run("m", lambda: 1 // 0, LIMIT_S)
    calls = (pool.run("m", partial(abs, number), LIMIT_S) for number in range(99))
    assert await asyncio.gather(*calls) == [*range(99)]


async def test_calls_of_one_model_run_one_after_the_other() -> None:
    pool, hanging = FileSystemPool(), Hanging()
    first = asyncio.ensure_future(pool.run("m", hanging, LIMIT_S))
    second = asyncio.ensure_future(pool.run("m", hanging, LIMIT_S))
    await until(lambda: hanging.began > 0)
    assert await pool.run("other", lambda: 3, LIMIT_S) == 3
    assert hanging.began == 1
    hanging.may_end.set()
    assert [await first, await second] == ["late", "late"]
    assert hanging.began == 2


async def test_calls_that_hang_refuse_others_at_the_bound_only() -> None:
    pool, hanging = FileSystemPool(max_threads=2), Hanging()
    for key in ("a", "b"):
        with pytest.raises(RepositoryBusy, match=f"'{key}' did not answer within 0.05 s"):
            await pool.run(key, hanging, SHORT_S)
        if key == "a":
            assert await pool.run("c", lambda: 3, LIMIT_S) == 3
    with pytest.raises(RepositoryBusy, match="'c' did not answer"):
        await pool.run("c", lambda: 3, SHORT_S)
    with pytest.raises(RepositoryBusy, match="'a' has not answered an earlier call yet"):
        await pool.run("a", lambda: 3, LIMIT_S)
    assert hanging.began == 2
    hanging.may_end.set()
    await until(lambda: not pool._late)
    assert [await pool.run(key, lambda: 3, LIMIT_S) for key in ("a", "b", "c")] == [3, 3, 3]


async def test_calls_wait_for_as_many_as_come_before_them() -> None:
    pool = FileSystemPool(max_threads=1)
    calls = [pool.run(f"m{number}", partial(time.sleep, 0.01), LIMIT_S) for number in range(20)]
    waiting = asyncio.ensure_future(pool.run("m0", lambda: 3, LIMIT_S))
    await asyncio.sleep(0)
    waiting.cancel()
    assert await asyncio.gather(*calls) == [None] * 20
    assert waiting.cancelled()
    assert await pool.run("m0", lambda: 3, LIMIT_S) == 3


def test_process_ends_though_a_call_hangs() -> None:
    script = """
import asyncio, threading
from runtime.repository import FileSystemPool
async def main():
    asyncio.create_task(FileSystemPool().run("m", threading.Event().wait, 99))
    await asyncio.sleep(0.1)
asyncio.run(main())
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=LIMIT_S)
