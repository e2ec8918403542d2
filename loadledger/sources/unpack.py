"""Archives: tar files, plain or gzip, whose files in the model's folder are written beneath a folder.

Only contents are read, and written to new files: no owner, mode, link or time comes from the archive. Where
Python has tarfile's `data` filter (not in Debian's 3.11.2), the filter has to agree.
"""

from __future__ import annotations

import gzip
import shutil
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tarfile import TarInfo
from typing import BinaryIO, cast

from loadledger.errors import SourceProblem, printable
from runtime.onnxfile import list_model_folders
from runtime.repository import MAX_FILES

MAX_UNPACKED_BYTES = 20 * 10**9
"""Unpacked size of an archive: as much as a server accepts for a version."""
MAX_HEADER_BYTES = 2**20
"""Header of one member, with its long name and its extended attributes."""
MAX_HEADERS_BYTES = 256 * 2**20
"""Headers of all members, which are held in memory."""
MAX_MEMBERS = 100_000
"""Ten times the files of a version: an image's layer may have others beside the model."""
MAX_GLOBAL_HEADERS = 100
"""Global headers of pax, which are read into each member; `git archive` writes one."""
MODELS = PurePosixPath("models")
"""KServe's images of models ("modelcars") have the model in this folder."""
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


def unpack(archive: Path, folder: Path) -> list[str]:
    """Write the files of the model's folder beneath a folder, which is empty; return their paths.

    The model's folder is that of the ONNX file nearest to the top, else `models`, else the whole archive. A
    layer of an operating system has links and no model, and so no file.

    Raises:
        SourceProblem: `source_invalid`.
        OSError: a file cannot be written. After any error, the folder is gone.
    """
    try:
        with archive.open("rb") as file:
            return _unpack(file, folder)
    except BaseException:  # an interrupt, too
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _unpack(file: BinaryIO, folder: Path) -> list[str]:
    start = file.read(len(ZSTD))
    file.seek(0)
    if start == ZSTD:
        raise _refusal("it is compressed with zstd: use gzip, or no compression")
    bounded = _BoundedFile(gzip.GzipFile(fileobj=file) if start.startswith(GZIP) else file)
    with _refused_errors():
        opened = tarfile.open(fileobj=cast(BinaryIO, bounded), mode="r:", encoding="utf-8")  # noqa: SIM115 - below
    with opened:
        with _refused_errors():
            files = select_files(_read_members(opened, bounded))
        if len(files) > MAX_FILES:
            raise _refusal(f"its model has {len(files)} files, and a version may have {MAX_FILES}")
        for path, member in sorted(files.items(), key=lambda each: each[1].offset_data):
            _write(opened, bounded, member, folder / path)
    return sorted(files)


def _read_members(opened: tarfile.TarFile, bounded: _BoundedFile) -> dict[PurePosixPath, TarInfo]:
    """Return all members by path; a later member replaces an earlier one."""
    members, headers_bytes = dict[PurePosixPath, TarInfo](), 0
    for count, member in enumerate(opened, start=1):
        headers_bytes += bounded.read_bytes
        if count > MAX_MEMBERS or headers_bytes > MAX_HEADERS_BYTES:
            raise _refusal(f"it has more than {MAX_MEMBERS} members, or they have very long names")
        if len(opened.pax_headers) > MAX_GLOBAL_HEADERS:
            raise _refusal(f"it has more than {MAX_GLOBAL_HEADERS} headers for all members")
        if member.size < 0:  # would lead back to the same header
            raise _refusal(f"{member.name!a} in it has a negative size")
        bounded.read_bytes, member.pax_headers = 0, {}
        members[PurePosixPath(member.name)] = member
    return members


def _write(opened: tarfile.TarFile, bounded: _BoundedFile, member: TarInfo, target: Path) -> None:
    with _refused_errors():
        if hasattr(tarfile, "data_filter"):
            tarfile.data_filter(member, str(target.parent))
        content = opened.extractfile(member)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        written = target.open("xb")
    except (FileExistsError, NotADirectoryError):
        raise _refusal(f"{member.name!a} in it is a file and a folder, or there in two spellings") from None
    with written:
        while True:
            bounded.read_bytes = 0
            with _refused_errors():
                piece = content.read(MAX_HEADER_BYTES // 2) if content else b""
            if not piece:
                break
            written.write(piece)
        if written.tell() != member.size:
            raise _refusal("it ends early")


@contextmanager
def _refused_errors() -> Iterator[None]:
    """Refuse the archive for any error while it is read: a hostile header may raise any."""
    try:
        yield
    except SourceProblem:
        raise
    except Exception as error:  # noqa: BLE001
        raise _refusal(printable(str(error), 200) or type(error).__name__) from None


class _BoundedFile:
    """A file with limited reads, and a limit of its length.

    A header may announce gigabytes of names, and a short gzip file may unpack to any number of zeros.

    Attributes:
        read_bytes: bytes read since it was set to 0.
    """

    def __init__(self, file: BinaryIO | gzip.GzipFile) -> None:
        self._file, self.tell, self.read_bytes = file, file.tell, 0

    def read(self, size: int) -> bytes:
        self.read_bytes += size
        if size < 0 or self.read_bytes > MAX_HEADER_BYTES:
            raise _refusal(f"one of its headers has more than {MAX_HEADER_BYTES} bytes")
        return self._file.read(size)

    def seek(self, position: int) -> int:
        if position > MAX_UNPACKED_BYTES:
            raise _refusal(f"it unpacks to more than {MAX_UNPACKED_BYTES} bytes")
        return self._file.seek(position)


def select_files(members: Mapping[PurePosixPath, TarInfo]) -> dict[str, TarInfo]:
    """Return the files of the model's folder, by their path in it.

    Raises:
        SourceProblem: `source_invalid`.
    """
    for path, member in members.items():
        if path.is_absolute() or ".." in path.parts or not member.name.isprintable():
            raise _refusal(f"the path {member.name!a} in it is absolute, leads upwards or is no text")
    folders = list_model_folders(members)
    if len(folders) > 1:
        first, second = map(ascii, map(str, folders[:2]))
        raise _refusal(f"it has models in {first} and in {second}: pack one model in one archive")
    has_folder = bool(folders) or any(MODELS in path.parents for path in members)
    folder = (folders or [MODELS if has_folder else PurePosixPath()])[0]
    inside = {path.relative_to(folder): member for path, member in members.items() if folder in path.parents}
    for path, member in inside.items():
        # a layer removes a file of an earlier layer by a name with .wh. (OCI image specification)
        is_plain = member.isdir() or (member.isreg() and not path.name.startswith(".wh."))
        if not is_plain and not has_folder:
            return {}
        if not is_plain or member.issparse():
            raise _refusal(
                f"{str(folder / path)!a} in it is a link, a device, a sparse file or a whiteout: a model"
                " takes files and folders only; pack it again with `tar --dereference`, or as one layer"
            )
    return {str(path): member for path, member in inside.items() if member.isreg()}


def _refusal(reason: str) -> SourceProblem:
    return SourceProblem("source_invalid", f"the archive cannot be unpacked: {reason}")
