"""Uploads as the server runs them, without HTTP, and the tars that are sent."""

import io
import tarfile
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

from events.log import Log
from events.sqlite.listing import open_reader
from runtime.repository import Repository
from runtime.uploads.policy import UploadPolicy
from runtime.uploads.staging import STAGING
from runtime.uploads.uploads import Uploads

NODE = "node"


@asynccontextmanager
async def opened_uploads(folder: Path) -> AsyncIterator[tuple[Uploads, Log]]:
    """Open the uploads of `repository` over the ledger beside it, as a start of the server does."""
    log = Log(folder / "ledger.db")
    await log.open()
    try:
        async with open_reader(log.path) as reader:
            uploads = Uploads(
                Repository(folder / "repository"),
                UploadPolicy(),
                NODE,
                log=log,
                submit=log.submit,
                find_event=reader.version_event,
            )
            await uploads.open()
            yield uploads, log
            await uploads.close()
    finally:
        await log.close()


async def pieces(data: bytes, size: int = 2**20) -> AsyncIterator[bytes]:
    """Yield bytes as a connection does."""
    for start in range(0, len(data), size):
        yield data[start : start + size]


def entry(name: str, data: bytes = b"", **changes: object) -> tuple[tarfile.TarInfo, bytes]:
    """Return an entry of a tar, and its content."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for attribute, value in changes.items():
        setattr(info, attribute, value)
    return info, data


def tar(*entries: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    """Return a tar of these entries, whatever they are."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w", format=form) as archive:
        for info, data in entries:
            archive.addfile(info, io.BytesIO(data))
    return written.getvalue()


def files_in(folder: Path, names: Iterable[str] = ()) -> dict[str, bytes]:
    """Return the contents of all files beneath a folder by path, those in the staging folder included."""
    found = {each.relative_to(folder).as_posix(): each for each in folder.rglob("*") if each.is_file()}
    return {path: file.read_bytes() for path, file in found.items() if not names or path in names}


def staged(repository: Path) -> list[str]:
    """Return what is in the staging folder, beside the folders of servers."""
    return [each.name for each in (repository / STAGING).glob("*/*")]
