"""Uploads as the server runs them, without HTTP."""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from events.log import Log
from events.sqlite.listing import open_reader
from runtime.repository import Repository
from runtime.uploads.changes import VersionChanges
from runtime.uploads.recovery import Recovery
from runtime.uploads.staging import STAGING, UploadEntry, UploadPolicy
from runtime.uploads.uploads import UploadBody, Uploads
from support import models

NODE = "node"
MODEL = models.add(1).SerializeToString()
FILES = {"net.onnx": models.external("data/w.bin").SerializeToString(), "data/w.bin": models.external_bytes()}
"""Of a version of several files."""


@asynccontextmanager
async def opened_uploads(
    folder: Path,
    now: Callable[[], float] = time.time,
    policy: UploadPolicy | None = None,
) -> AsyncIterator[tuple[Uploads, Log]]:
    """Open the uploads of `repository` over the ledger beside it, as a start of the server does."""
    log = Log(folder / "ledger.db")
    await log.open()
    try:
        async with open_reader(log.path) as reader:
            repository = Repository(folder / "repository")
            policy = policy or UploadPolicy()
            changes = VersionChanges(repository, policy, NODE, log, now=now)
            recovery = Recovery(changes, reader.event)
            await recovery.open()
            yield Uploads(changes, recovery), log
            await recovery.close()
    finally:
        await log.close()


def body_of(data: bytes, size: int = 2**20) -> UploadBody:
    """Return a body that arrives in pieces."""

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(data), size):
            yield data[start : start + size]

    return UploadBody(pieces())


async def begin_upload(uploads: Uploads, key: str | None = None, subject: str = "alice") -> UploadEntry:
    """Begin an upload of version 1 of "m", or find that of the key."""
    upload, _ = await uploads.begin_upload("m", 1, subject, key)
    return upload


async def send_upload(uploads: Uploads) -> list[str]:
    """Begin an upload with `FILES`, or go on with it, and commit it; return what it had already."""
    upload = await begin_upload(uploads, "key")
    there = list(upload.files)
    for path, data in FILES.items():
        if path not in there:
            await uploads.add_file(upload, path, body_of(data, 40))
    await uploads.commit(upload)
    return there


def files_in(folder: Path) -> dict[str, bytes]:
    """Return the contents of all files beneath a folder by path, those in the staging folder included."""
    return {
        each.relative_to(folder).as_posix(): each.read_bytes() for each in folder.rglob("*") if each.is_file()
    }


def staged(repository: Path) -> list[str]:
    """Return what is in the staging folder, beside the folders of servers."""
    return [each.name for each in (repository / STAGING).glob("*/*")]
