"""Uploads and removals: staged, durable, visible; and what a start makes of one that was killed."""

import asyncio
import os
import resource
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from hashlib import sha256 as hashed
from pathlib import Path

import pytest
from support import ledgers, models
from support.history import child
from support.uploads import FILES, MODEL, begin_upload, body_of, files_in, opened_uploads, send_upload, staged
from support.workers import until

from events.errors import LogUnavailable
from events.log import Log
from events.types import AddedFile
from runtime.errors import RuntimeProblem
from runtime.onnxfile import MODEL_FILE
from runtime.repository import Repository
from runtime.uploads import staging
from runtime.uploads.receive import (
    BadPath,
    FileReceiver,
    InsufficientStorage,
    RepositoryReadOnly,
    UploadTooLarge,
    check_path,
    parse_digests,
    unwritable,
)
from runtime.uploads.recovery import UNUSED_LIMIT_S
from runtime.uploads.staging import UploadPolicy, VersionExists, check_writable
from runtime.uploads.uploads import UnknownUpload, UploadBody

M1 = ("m", 1, "alice")
Mortal = subprocess.Popen[str]
UPLOADED = {f"m/1/{path}": data for path, data in FILES.items()}
PLACED = {f"m/1/{MODEL_FILE}": MODEL}
SIGNED = {**PLACED, "m/1.sig": b"signature"}

DIE = """
import asyncio, os, signal
from pathlib import Path
from runtime.uploads.staging import StagingEntry, UploadEntry
from support.uploads import MODEL, body_of, opened_uploads, send_upload
async def change(folder, verb, step, when, count):
    kind = StagingEntry if verb == "remove" else UploadEntry
    real, calls = getattr(kind, step), 0
    def die(self, *arguments):
        nonlocal calls
        calls += 1
        if calls < count or when == "after":
            result = real(self, *arguments)
        if calls < count:
            return result
        os.kill(os.getpid(), signal.SIGKILL)
    async with opened_uploads(folder) as (uploads, _):
        setattr(kind, step, die)
        match verb:
            case "add":
                await uploads.add("m", 1, "alice", body_of(MODEL, 40))
            case "upload":
                await send_upload(uploads)
            case "remove":
                await uploads.remove("m", 1, "alice")
for line in sys.stdin:
    folder, *what, count = line.split()
    if (pid := os.fork()) == 0:
        asyncio.run(change(Path(folder), *what, int(count)))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
"""Makes a change for each line, in a child that dies before or after the first or second call of a step."""


def sha256(data: bytes) -> str:
    return hashed(data).hexdigest()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "repository").mkdir()
    return tmp_path


@pytest.fixture(scope="module")
def mortal() -> Iterator[Mortal]:
    """A process whose children make changes, and die."""
    with subprocess.Popen(child(DIE), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process


def run_until_death(mortal: Mortal, folder: Path, *arguments: str, call: int = 1) -> None:
    assert mortal.stdin is not None
    assert mortal.stdout is not None
    print(folder, *arguments, call, file=mortal.stdin, flush=True)
    assert int(mortal.stdout.readline()) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("arguments", "left", "events"),
    [
        (("add", "sync", "before"), {}, 0),
        (("add", "check_free", "after"), {}, 0),
        (("add", "place", "before"), PLACED, 1),
        (("add", "discard", "before"), PLACED, 1),
        (("upload", "place", "before"), UPLOADED, 1),
        (("upload", "discard", "before"), UPLOADED, 1),
        (("remove", "begin_removal", "after"), SIGNED, 0),
        (("remove", "take", "before"), {}, 1),
        (("remove", "_delete_companion", "after"), {}, 1),
        (("remove", "take", "after"), {}, 1),
    ],
)
async def test_start_after_kill_9_finishes_or_discards(
    mortal: Mortal, folder: Path, arguments: tuple[str, ...], left: dict[str, bytes], events: int
) -> None:
    repository = folder / "repository"
    if arguments[0] == "remove":
        models.save_bytes(MODEL, repository, "m")
        (repository / "m" / "1.sig").write_bytes(b"signature")
    run_until_death(mortal, folder, *arguments)
    for _ in range(2):  # a start finishes it, and the next one finds nothing to do
        async with opened_uploads(folder) as (_, log):
            assert files_in(repository) == left
            assert staged(repository) == []
            assert log.head.position == events
    assert Repository(repository).models() == (["m"] if left else [])


@pytest.mark.parametrize(
    ("step", "when", "call", "there"),
    [
        ("begin", "after", 1, []),
        ("new_part", "after", 2, ["net.onnx"]),
        ("keep", "before", 2, ["net.onnx"]),
        ("keep", "after", 2, [*FILES]),
        ("complete", "before", 1, [*FILES]),
        ("complete", "after", 1, [*FILES]),
    ],
)
async def test_upload_goes_on_after_kill_9(
    mortal: Mortal, folder: Path, step: str, when: str, *, call: int, there: list[str]
) -> None:
    repository = folder / "repository"
    run_until_death(mortal, folder, "upload", step, when, call=call)
    async with opened_uploads(folder) as (uploads, log):
        assert len(files_in(repository)) == 1 + len(there)  # with the record, and no part of a file
        assert await send_upload(uploads) == there
        assert log.head.position == 1
    assert files_in(repository) == UPLOADED
    assert staged(repository) == []


async def test_record_of_an_upload_tells_only_what_is_there(folder: Path) -> None:
    async with opened_uploads(folder) as (uploads, _):
        upload = await begin_upload(uploads)
        for path in ("a", "b", "c"):
            await uploads.add_file(upload, path, body_of(b"1"))
        assert await uploads.add_file(upload, "b", body_of(b"22")) == (
            AddedFile("b", 2, sha256(b"22")),
            False,
        )
    [entry] = (folder / "repository" / ".uploads" / "node").iterdir()
    (entry / "new").write_bytes(b"3")
    (entry / "new").rename(entry / "version" / "a")  # as if killed between the record and the rename
    (entry / "version" / "c").unlink()
    with (entry / "upload").open("ab") as record:
        record.write(b'\n{"file": {"pa')
    async with opened_uploads(folder) as (uploads, _):
        assert (await uploads.find_upload(upload.id, *M1)).files == {"b": AddedFile("b", 2, sha256(b"22"))}
        assert [each.name for each in (entry / "version").iterdir()] == ["b"]
        await uploads.add_file(upload, "a", body_of(b"4"))
    async with opened_uploads(folder) as (uploads, _):
        assert (await uploads.find_upload(upload.id, *M1)).files.keys() == {"a", "b"}


async def test_upload_is_its_subjects_alone(folder: Path) -> None:
    async with opened_uploads(folder) as (uploads, _):
        upload = await begin_upload(uploads, "key")
        assert await begin_upload(uploads, "key") is upload
        for key, subject in (("other", "alice"), (None, "alice"), ("key", "bob")):
            assert await begin_upload(uploads, key, subject) is not upload
        for foreign in (("m", 1, "bob"), ("m", 2, "alice"), ("n", 1, "alice")):
            with pytest.raises(UnknownUpload):
                await uploads.find_upload(upload.id, *foreign)
        await uploads.discard_upload(upload)
        with pytest.raises(UnknownUpload):
            await uploads.find_upload(upload.id, *M1)


async def test_uploads_of_a_subject_have_room_for_one_version(folder: Path) -> None:
    async with opened_uploads(folder, policy=UploadPolicy(max_bytes=len(MODEL))) as (uploads, _):
        first, second = await begin_upload(uploads, "a"), await begin_upload(uploads, "b")
        await uploads.add_file(first, "model.onnx", body_of(MODEL))
        with pytest.raises(UploadTooLarge, match="discard other uploads"):
            await uploads.add_file(second, "model.onnx", body_of(MODEL))
        of_bob = await begin_upload(uploads, "b", "bob")
        await uploads.add_file(of_bob, "model.onnx", body_of(MODEL))
        await uploads.discard_upload(first)
        await uploads.add_file(second, "model.onnx", body_of(MODEL))


async def test_unused_upload_ends_after_a_day(folder: Path) -> None:
    now = [time.time()]
    async with opened_uploads(folder, lambda: now[0]) as (uploads, _):
        upload = await begin_upload(uploads)
        now[0] += UNUSED_LIMIT_S - 1
        await uploads.add_file(upload, "a", body_of(b"1"))
        now[0] += UNUSED_LIMIT_S - 1
        await uploads.find_upload(upload.id, *M1)
        now[0] += 1
        with pytest.raises(UnknownUpload):
            await uploads.find_upload(upload.id, *M1)
        assert staged(folder / "repository") == []
        now[0] = time.time()
        await begin_upload(uploads)
    async with opened_uploads(folder, lambda: time.time() + UNUSED_LIMIT_S) as (uploads, _):
        assert staged(folder / "repository") == []


async def test_file_that_arrives_after_the_commit_is_refused(folder: Path) -> None:
    committed = asyncio.Event()

    async def late() -> AsyncIterator[bytes]:
        yield b"1"
        await committed.wait()

    async with opened_uploads(folder) as (uploads, _):
        upload = await begin_upload(uploads)
        for path, data in FILES.items():
            await uploads.add_file(upload, path, body_of(data))
        request = asyncio.create_task(uploads.add_file(upload, "late", UploadBody(late())))
        await until(lambda: any("part-" in path for path in files_in(folder / "repository")))
        await uploads.commit(upload)
        committed.set()
        with pytest.raises(UnknownUpload):
            await request
    assert files_in(folder / "repository") == UPLOADED


async def test_refused_commit_leaves_the_upload(folder: Path) -> None:
    async with opened_uploads(folder) as (uploads, log):
        upload = await begin_upload(uploads)
        await uploads.add_file(upload, "net.onnx", body_of(FILES["net.onnx"]))
        with pytest.raises(RuntimeProblem, match="send all files that the model names") as refused:
            await uploads.commit(upload)
        assert refused.value.code == "invalid_model"
        await uploads.add_file(upload, "data/w.bin", body_of(FILES["data/w.bin"]))
        with ledgers.unwritable(log.path, "VersionAdded"), pytest.raises(LogUnavailable):
            await uploads.commit(upload)
        await uploads.commit(upload)
    assert files_in(folder / "repository") == UPLOADED


HOSTILE = {
    "/etc/passwd": "is an absolute path",
    "../a": "leads out of the folder",
    "a/../../b": "leads out of the folder",
    "..": "leads out of the folder",
    "a//b": "is no name of a file",
    "./a": "is no name of a file",
    "a/": "is no name of a file",
    "a\x1b[2J": "cannot be printed",
    "a\0b": "cannot be printed",
    "\udcff": "is not UTF-8",
    "n" * 256: "is too long",
    "n/" * 600 + "a": "is too long",
}


@pytest.mark.parametrize("path", HOSTILE)
def test_hostile_path_is_refused_with_its_reason(path: str) -> None:
    with pytest.raises(BadPath, match=HOSTILE[path]):
        check_path(path)


async def test_files_of_an_upload_are_limited(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened_uploads(folder) as (uploads, _):
        upload = await begin_upload(uploads)
        for path in ("model.onnx", "a/b", "c/d"):
            await uploads.add_file(upload, path, body_of(MODEL))
        for path in ("a", "a/b/c", "model.onnx/x/y"):
            with pytest.raises(BadPath, match="is a file and a folder"):
                await uploads.add_file(upload, path, body_of(b"1"))
        for limit, what in ((2, "2 files"), (1, "1 folders")):
            monkeypatch.setattr(staging, "MAX_FILES", limit)
            with pytest.raises(BadPath, match=f"may have {what}"):
                await (uploads.add_file(upload, "e", body_of(b"1")) if limit > 1 else uploads.commit(upload))


async def test_bytes_are_limited_as_they_arrive(folder: Path) -> None:
    """Of bodies without a length, and of files that arrive at once and fit only one by one."""
    arrived, left = asyncio.Event(), list(range(20))

    async def long() -> AsyncIterator[bytes]:
        while left:
            left.pop()
            yield bytes(10)

    async def late() -> AsyncIterator[bytes]:
        yield bytes(60)
        await arrived.wait()

    async with opened_uploads(folder) as (uploads, _):
        uploads.changes.policy = UploadPolicy(max_bytes=100)
        with pytest.raises(UploadTooLarge):
            await uploads.add(*M1, UploadBody(long()))
        assert len(left) == 9  # ten pieces fit, and nothing was read after the eleventh
        upload = await begin_upload(uploads)
        request = asyncio.create_task(uploads.add_file(upload, "late", UploadBody(late())))
        await until(lambda: any("part-" in path for path in files_in(folder / "repository")))
        await uploads.add_file(upload, "a", body_of(bytes(60)))
        arrived.set()
        with pytest.raises(UploadTooLarge):
            await request
        assert upload.files.keys() == {"a"}
        await uploads.discard_upload(upload)
    assert staged(folder / "repository") == []


async def test_start_leaves_other_names_and_other_servers_alone(folder: Path) -> None:
    staging = folder / "repository" / ".uploads"
    kept = {".uploads/other/01a205ec-f6f2-786d-9b0e-de3a2b397850/version/a", ".uploads/node/notes"}
    for name in (*kept, ".uploads/node/01a205ec-f6f2-786d-9b0e-de3a2b397850/version/a"):
        (folder / "repository" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "repository" / name).touch()
    async with opened_uploads(folder):
        assert files_in(folder / "repository").keys() == kept
    assert staging.is_dir()


async def test_version_is_added_once_and_removed_with_its_signature(folder: Path) -> None:
    async with opened_uploads(folder) as (uploads, log):
        files = await uploads.add(*M1, body_of(MODEL, 10))
        assert [(file.path, file.bytes) for file in files] == [(MODEL_FILE, len(MODEL))]
        (folder / "repository" / "m" / "1.sig").write_bytes(b"signature")
        with pytest.raises(VersionExists):
            await uploads.add(*M1, body_of(MODEL))
        assert files_in(folder / "repository") == SIGNED
        await uploads.remove("m", 1, "bob")
        assert not (folder / "repository" / "m").exists()
        assert log.head.position == 2


async def test_concurrent_uploads_of_a_version_have_one_winner(folder: Path) -> None:
    async with opened_uploads(folder) as (uploads, log):
        orders = [M1, M1, ("m", 2, "bob"), ("m", 3, "carol")]
        ended = await asyncio.gather(
            *(uploads.add(*order, body_of(MODEL, 30)) for order in orders), return_exceptions=True
        )
        assert [isinstance(each, VersionExists) for each in ended] == [False, True, False, False]
        assert Repository(folder / "repository").versions("m") == [1, 2, 3]
        assert log.head.position == 3


async def test_cancelled_request_does_not_stop_a_durable_upload(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted = asyncio.Event()
    submit = Log.submit

    async def note(log: Log, command: object) -> object:
        submitted.set()
        return await submit(log, command)  # type: ignore[arg-type]

    monkeypatch.setattr(Log, "submit", note)
    async with opened_uploads(folder) as (uploads, _):
        request = asyncio.create_task(uploads.add(*M1, body_of(MODEL)))
        await submitted.wait()
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
    assert files_in(folder / "repository") == PLACED


async def test_upload_without_its_event_leaves_nothing(folder: Path) -> None:
    async with opened_uploads(folder) as (uploads, log):
        with ledgers.unwritable(log.path, "VersionAdded"), pytest.raises(LogUnavailable):
            await uploads.add(*M1, body_of(MODEL))
        assert files_in(folder / "repository") == {}
        models.save_bytes(MODEL, folder / "repository", "m")
        with ledgers.unwritable(log.path, "VersionRemoved"), pytest.raises(LogUnavailable):
            await uploads.remove("m", 1, "alice")
        assert files_in(folder / "repository") == PLACED
        assert Repository(folder / "repository").versions("m") == [1]


async def test_version_whose_place_is_taken_is_recorded_as_removed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody copies a folder there by hand, just when the event is durable."""
    async with opened_uploads(folder) as (uploads, log):
        submit = log.submit

        async def copy_meanwhile(command: object) -> object:
            receipt = await submit(command)  # type: ignore[arg-type]
            models.save_bytes(b"by hand", folder / "repository", "m")
            return receipt

        monkeypatch.setattr(log, "submit", copy_meanwhile)
        with pytest.raises(VersionExists):
            await uploads.add(*M1, body_of(MODEL))
        assert files_in(folder / "repository") == {f"m/1/{MODEL_FILE}": b"by hand"}
        assert (log.head.position, log.head.type) == (2, "VersionRemoved")


async def test_body_without_room_is_refused_before_it_is_read(folder: Path) -> None:
    async with opened_uploads(folder) as (uploads, _):
        for length, code in ((2**62, "insufficient_storage"), (2**64, "body_too_large")):
            with pytest.raises(RuntimeProblem) as refused:
                await uploads.add(*M1, UploadBody(body_of(MODEL).pieces, length))
            assert refused.value.code == code
        assert staged(folder / "repository") == []


async def test_entry_that_cannot_be_finished_prevents_no_other_change(mortal: Mortal, folder: Path) -> None:
    run_until_death(mortal, folder, "add", "place", "before")
    (folder / "repository" / "m").symlink_to("nowhere")  # no folder can be made there
    async with opened_uploads(folder) as (uploads, _):
        await uploads.add("other", 1, "alice", body_of(MODEL))
        (folder / "repository" / "m").unlink()
        await uploads.add("other", 2, "alice", body_of(MODEL))
        assert files_in(folder / "repository").items() >= PLACED.items()


async def test_signature_of_a_version_put_there_meanwhile_stays(mortal: Mortal, folder: Path) -> None:
    repository = folder / "repository"
    models.save_bytes(MODEL, repository, "m")
    run_until_death(mortal, folder, "remove", "take", "before")
    (repository / "m" / "1").rename(folder / "aside")
    models.save_bytes(MODEL, repository, "m")
    (repository / "m" / "1.sig").write_bytes(b"signature")
    async with opened_uploads(folder):
        assert files_in(repository) == SIGNED


async def test_version_is_not_added_beside_a_stray_signature(folder: Path) -> None:
    bundle = folder / "repository" / "m" / "1.sig"
    bundle.parent.mkdir()
    bundle.write_bytes(b"signature")
    async with opened_uploads(folder) as (uploads, log):
        with pytest.raises(RuntimeProblem, match=r"'m/1\.sig' signs a version that is not there") as refused:
            await uploads.add(*M1, body_of(MODEL))
        assert refused.value.code == "version_exists"
        assert log.head.position == 0
        bundle.unlink()
        upload = await begin_upload(uploads)
        await uploads.add_file(upload, MODEL_FILE, body_of(MODEL))
        await uploads.add_file(upload, "model.sig", body_of(b"signature"))
        await uploads.commit(upload)
    assert files_in(folder / "repository") == {**PLACED, "m/1/model.sig": b"signature"}


async def test_removal_does_not_follow_links(folder: Path) -> None:
    outside = models.save_bytes(MODEL, folder / "outside", "o")
    (folder / "repository" / "m").mkdir()
    (folder / "repository" / "m" / "1").symlink_to(outside)
    async with opened_uploads(folder) as (uploads, _):
        await uploads.remove("m", 1, "alice")
        assert not (folder / "repository" / "m").exists()
        assert (outside / MODEL_FILE).read_bytes() == MODEL
        (folder / "repository" / "m").symlink_to(folder / "outside")
        with pytest.raises(RepositoryReadOnly, match="is not on the repository's file system"):
            await uploads.add(*M1, body_of(MODEL))


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ([], set()),
        (["sha-256=:" + "A" * 43 + "=:"], {"sha-256"}),
        (["md5=:AAAA:, sha-256=:" + "A" * 43 + "=:", "unixsum=:AA==:"], {"sha-256"}),
        (["sha-512=:" + "A" * 86 + "==:"], {"sha-512"}),
        (["sha-256"], None),
        (["sha-256=:AAAA:"], None),
        (["sha-256=:" + "A" * 43 + "=:, sha-256=:" + "B" * 43 + "=:"], None),
    ],
)
def test_digests_of_rfc_9530_are_read(fields: list[str], found: set[str] | None) -> None:
    if found is None:
        with pytest.raises(ValueError, match=r"must be like|has 3 bytes|given twice"):
            parse_digests(fields)
    else:
        assert parse_digests(fields).keys() == found


@pytest.mark.parametrize(
    ("policy", "owner", "refused"),
    [
        (UploadPolicy(), "own", None),
        (UploadPolicy("own"), "own", None),
        (UploadPolicy("on"), "another", None),
        (UploadPolicy(), "another", ("repository_read_only", "--repository-writable=on")),
        (UploadPolicy("off"), "own", ("repository_read_only", "--repository-writable")),
        (UploadPolicy(is_immutable=True), "own", ("repository_read_only", "--store-size=off")),
        (UploadPolicy(), "nobody", ("repository_read_only", "cannot be used")),
        (UploadPolicy(unshared="say it"), "own", ("repository_not_shared", "say it")),
    ],
)
def test_repository_is_changed_only_where_it_may_be(
    tmp_path: Path, policy: UploadPolicy, owner: str, refused: tuple[str, str] | None
) -> None:
    root = tmp_path / "repository"
    if owner != "nobody":
        root.mkdir(0o700)
    if owner == "another":
        if os.geteuid() == 0:
            os.chown(root, 12345, -1)
        else:
            root = Path("/tmp")
    if refused is None:
        check_writable(root, policy)
        return
    code, reason = refused
    with pytest.raises(RuntimeProblem, match=reason) as problem:
        check_writable(root, policy)
    assert problem.value.code == code


def test_file_that_finds_no_room_is_insufficient_storage(tmp_path: Path) -> None:
    receiver = FileReceiver(tmp_path / "part", 10**6, 10**6, {})
    receiver.open(200)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match="large") as full:
            receiver.write(bytes(200))
        assert isinstance(unwritable(full.value), InsufficientStorage)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        receiver.discard()
