"""Uploads and removals: staged, durable, visible; and what a start makes of one that was killed."""

import asyncio
import os
import resource
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support import models
from support.ledgers import unwritable
from support.uploads import files_in, opened_uploads, pieces, staged

from events.errors import LogUnavailable
from events.log import Log
from runtime.errors import RuntimeProblem
from runtime.onnxfile import MODEL_FILE
from runtime.repository import Repository
from runtime.uploads.policy import UploadPolicy, check_writable
from runtime.uploads.problems import InsufficientStorage, NotOnnx, RepositoryReadOnly, VersionExists
from runtime.uploads.receiving import NO_DIGESTS, Receiver, UploadForm, parse_digests
from runtime.uploads.uploads import UploadOrder

MODEL = models.add(1).SerializeToString()
ORDER = UploadOrder("m", 1, "alice")
PLACED = {f"m/1/{MODEL_FILE}": MODEL}

DIE = """
import asyncio, os, signal, sys
from pathlib import Path
from runtime.uploads.staging import Staging
from runtime.uploads.uploads import UploadOrder
from support.uploads import opened_uploads, pieces
folder, verb, step, when = Path(sys.argv[1]), *sys.argv[2:]
real = getattr(Staging, step)
def die(self, *arguments):
    if when == "after":
        real(self, *arguments)
    os.kill(os.getpid(), signal.SIGKILL)
async def main():
    async with opened_uploads(folder) as (uploads, _):
        setattr(Staging, step, die)
        if verb == "add":
            model = (folder / "model").read_bytes()
            await uploads.add(UploadOrder("m", 1, "alice"), pieces(model, 40))
        else:
            await uploads.remove("m", 1, "alice")
asyncio.run(main())
"""
"""Makes one change, and dies of SIGKILL before or after one of its steps."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "repository").mkdir()
    (tmp_path / "model").write_bytes(MODEL)
    return tmp_path


async def run_until_death(folder: Path, *arguments: str) -> None:
    path = os.pathsep.join(map(str, (Path(__file__).parents[2], *filter(None, sys.path))))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-c", DIE, str(folder), *arguments),
        env={**os.environ, "PYTHONPATH": path},
    )
    assert await process.wait() == -signal.SIGKILL


@pytest.mark.parametrize(
    ("arguments", "left", "events"),
    [
        (("add", "sync", "before"), {}, 0),
        (("add", "check_free", "after"), {}, 0),
        (("add", "place", "before"), PLACED, 1),
        (("add", "discard", "before"), PLACED, 1),
        (("remove", "begin_removal", "after"), PLACED, 0),
        (("remove", "take", "before"), {}, 1),
        (("remove", "take", "after"), {}, 1),
    ],
)
async def test_start_after_kill_9_finishes_or_discards(
    folder: Path, arguments: tuple[str, ...], left: dict[str, bytes], events: int
) -> None:
    repository = folder / "repository"
    if arguments[0] == "remove":
        models.save_bytes(MODEL, repository, "m")
    await run_until_death(folder, *arguments)
    for _ in range(2):  # a start finishes it, and the next one finds nothing to do
        async with opened_uploads(folder) as (_, log):
            assert files_in(repository) == left
            assert staged(repository) == []
            assert log.head.position == events
    assert Repository(repository).models() == (["m"] if left else [])


async def test_start_leaves_other_names_and_other_servers_alone(folder: Path) -> None:
    staging = folder / "repository" / ".uploads"
    kept = {".uploads/other/01a205ec-f6f2-786d-9b0e-de3a2b397850/version/a", ".uploads/node/notes"}
    for name in (*kept, ".uploads/node/01a205ec-f6f2-786d-9b0e-de3a2b397850/version/a"):
        (folder / "repository" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "repository" / name).touch()
    async with opened_uploads(folder):
        assert files_in(folder / "repository").keys() == kept
    assert staging.is_dir()


async def test_version_is_visible_once_it_is_durable(folder: Path) -> None:
    async with opened_uploads(folder) as (uploads, log):
        files = await uploads.add(ORDER, pieces(MODEL, 10))
        assert [(file.path, file.bytes) for file in files] == [(MODEL_FILE, len(MODEL))]
        assert files_in(folder / "repository") == PLACED
        await uploads.remove("m", 1, "bob")
        assert files_in(folder / "repository") == {}
        assert not (folder / "repository" / "m").exists()
        assert log.head.position == 2


async def test_concurrent_uploads_of_a_version_have_one_winner(folder: Path) -> None:
    async with opened_uploads(folder) as (uploads, log):
        orders = [ORDER, ORDER, UploadOrder("m", 2, "bob"), UploadOrder("m", 3, "carol")]
        ended = await asyncio.gather(
            *(uploads.add(order, pieces(MODEL, 30)) for order in orders), return_exceptions=True
        )
        assert [isinstance(each, VersionExists) for each in ended] == [False, True, False, False]
        assert Repository(folder / "repository").versions("m") == [1, 2, 3]
        assert log.head.position == 3


async def test_body_that_ends_early_leaves_nothing(folder: Path) -> None:
    async def lost() -> AsyncIterator[bytes]:
        yield MODEL[:50]
        raise ConnectionResetError

    async def endless() -> AsyncIterator[bytes]:
        yield MODEL[:50]
        await asyncio.Event().wait()

    async with opened_uploads(folder) as (uploads, log):
        with pytest.raises(ConnectionResetError):
            await uploads.add(ORDER, lost())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await uploads.add(ORDER, endless())
        assert staged(folder / "repository") == []
        assert log.head.position == 0
        await uploads.add(ORDER, pieces(MODEL))


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
        request = asyncio.create_task(uploads.add(ORDER, pieces(MODEL)))
        await submitted.wait()
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
    assert files_in(folder / "repository") == PLACED


async def test_upload_without_its_event_leaves_nothing(folder: Path) -> None:
    async with opened_uploads(folder) as (uploads, log):
        with unwritable(log.path, "VersionAdded"), pytest.raises(LogUnavailable):
            await uploads.add(ORDER, pieces(MODEL))
        assert files_in(folder / "repository") == {}
        models.save_bytes(MODEL, folder / "repository", "m")
        with unwritable(log.path, "VersionRemoved"), pytest.raises(LogUnavailable):
            await uploads.remove("m", 1, "alice")
        assert files_in(folder / "repository") == PLACED
        assert Repository(folder / "repository").versions("m") == [1]


async def test_version_whose_place_is_taken_is_recorded_as_removed(folder: Path) -> None:
    """Somebody copies a folder there by hand, just when the event is durable."""
    async with opened_uploads(folder) as (uploads, log):
        submit = uploads._submit

        async def copy_meanwhile(command: object) -> object:
            receipt = await submit(command)  # type: ignore[arg-type]
            models.save_bytes(b"by hand", folder / "repository", "m")
            return receipt

        uploads._submit = copy_meanwhile  # type: ignore[assignment]
        with pytest.raises(VersionExists):
            await uploads.add(ORDER, pieces(MODEL))
        assert files_in(folder / "repository") == {f"m/1/{MODEL_FILE}": b"by hand"}
        assert (log.head.position, log.head.type) == (2, "VersionRemoved")


async def test_body_without_room_is_refused_before_it_is_read(folder: Path) -> None:
    async with opened_uploads(folder) as (uploads, _):
        for length, code in ((2**62, "insufficient_storage"), (2**64, "body_too_large")):
            order = UploadOrder("m", 1, "alice", length=length)
            with pytest.raises(RuntimeProblem) as refused:
                await uploads.add(order, pieces(MODEL))
            assert refused.value.code == code
        assert not (folder / "repository" / ".uploads").exists()


async def test_entry_that_cannot_be_finished_prevents_no_other_change(folder: Path) -> None:
    await run_until_death(folder, "add", "place", "before")
    (folder / "repository" / "m").symlink_to("nowhere")  # no folder can be made there
    async with opened_uploads(folder) as (uploads, _):
        await uploads.add(UploadOrder("other", 1, "alice"), pieces(MODEL))
        (folder / "repository" / "m").unlink()
        await uploads.add(UploadOrder("other", 2, "alice"), pieces(MODEL))
        assert files_in(folder / "repository").items() >= PLACED.items()


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
            await uploads.add(ORDER, pieces(MODEL))


BODIES = {
    "an HTML page": b"<!DOCTYPE html>\n<html>",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "an empty file": b"",
    "text": b"hello, this is a model\n",
    "a truncated model": MODEL[:50],
    "a ZIP archive": b"PK\x03\x04" + bytes(100),
    "numbers": bytes(range(256)),
}


@pytest.mark.parametrize("name", BODIES)
async def test_body_that_is_no_model_is_refused(folder: Path, name: str) -> None:
    async with opened_uploads(folder) as (uploads, _):
        with pytest.raises(NotOnnx, match=r"model\.onnx (is|ends)"):
            await uploads.add(ORDER, pieces(BODIES[name]))
        assert files_in(folder / "repository") == {}


async def test_model_without_its_weights_is_refused(folder: Path) -> None:
    async with opened_uploads(folder) as (uploads, _):
        with pytest.raises(RuntimeProblem, match="send a tar of the folder") as refused:
            await uploads.add(ORDER, pieces(models.external("w.bin").SerializeToString()))
        assert refused.value.code == "unsafe_file"


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
        assert parse_digests(fields).values.keys() == found


@pytest.mark.parametrize(
    ("policy", "mode", "reason"),
    [
        (UploadPolicy(), 0o700, None),
        (UploadPolicy("on"), 0o700, None),
        (UploadPolicy("off"), 0o700, "--repository-writable"),
        (UploadPolicy(is_immutable=True), 0o700, "--store-size=off"),
        (UploadPolicy(), None, "cannot be used"),
    ],
)
def test_repository_is_changed_only_where_it_may_be(
    tmp_path: Path, policy: UploadPolicy, mode: int | None, reason: str | None
) -> None:
    root = tmp_path / "repository"
    if mode is not None:
        root.mkdir(mode)
    if reason is None:
        check_writable(root, policy)
        return
    with pytest.raises(RepositoryReadOnly, match=reason):
        check_writable(root, policy)


def test_repository_of_another_user_is_not_changed_by_itself(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        os.chown(tmp_path, 12345, -1)
        root = tmp_path
    else:
        root = Path("/tmp")
    with pytest.raises(RepositoryReadOnly, match="--repository-writable=on"):
        check_writable(root, UploadPolicy())
    check_writable(root, UploadPolicy("on"))


def test_file_that_finds_no_room_is_insufficient_storage(tmp_path: Path) -> None:
    receiver = Receiver(tmp_path, UploadForm.FILE, 10**6, NO_DIGESTS)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(InsufficientStorage, match="free some space"):
            receiver.write(bytes(200))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        receiver.close()
