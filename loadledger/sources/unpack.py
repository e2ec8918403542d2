"""Archives: a tar file, plain or gzip, of which the files in the model's folder are written beneath a folder.

Contents alone are read, and written to files of our own making: no owner, mode, link or time comes from the
archive. Where Python has tarfile's `data` filter (not in Debian's 3.11.2), it has to agree.
"""

from __future__ import annotations

import gzip
import shutil
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from tarfile import TarInfo
from typing import BinaryIO, cast

from loadledger.errors import SourceProblem
from loadledger.uploads import CHUNK_BYTES
from runtime.onnxfile import list_model_folders

MAX_BYTES = 20 * 10**9
"""Of all files: as many as a server takes of a version."""
MAX_MEMBERS = 100_000
"""Ten times the files of a version: an image's layer may have others beside the model."""
MODELS = PurePosixPath("models")
"""KServe's images of models ("modelcars") have the model in this folder."""
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


def unpack(archive: Path, folder: Path) -> list[str]:
    """Write the files of the model's folder beneath a folder, which is empty; return their paths.

    The model's folder is that of the ONNX file nearest to the top, else `models`, else the whole archive. A
    layer of an operating system has links and no model, and so no file.

    Raises:
        SourceProblem: `source_invalid`; nothing stays in the folder.
        OSError: a file cannot be written.
    """
    try:
        with archive.open("rb") as file:
            return _unpack(file, folder)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError, OverflowError) as error:
        problem: Exception = _refusal(str(error) or "it is damaged")
    except (SourceProblem, OSError) as error:
        problem = error
    shutil.rmtree(folder, ignore_errors=True)
    raise problem from None


def _unpack(file: BinaryIO, folder: Path) -> list[str]:
    start = file.read(len(ZSTD))
    file.seek(0)
    if start == ZSTD:
        raise _refusal("it is compressed with zstd: use gzip, or no compression")
    plain = gzip.GzipFile(fileobj=file) if start.startswith(GZIP) else file
    with tarfile.open(fileobj=cast(BinaryIO, _SmallReads(plain)), mode="r:") as opened:
        members = dict[PurePosixPath, TarInfo]()
        for member in opened:
            if len(members) >= MAX_MEMBERS:
                raise _refusal(f"it has more than {MAX_MEMBERS} members")
            members[PurePosixPath(member.name)] = member
        files = select_files(members)
        if sum(member.size for member in files.values()) > MAX_BYTES:
            raise _refusal(f"its files have more than {MAX_BYTES} bytes")
        for path, member in sorted(files.items(), key=lambda each: each[1].offset_data):
            _write(opened, member, folder / path, folder)
    return sorted(files)


def _write(opened: tarfile.TarFile, member: TarInfo, target: Path, folder: Path) -> None:
    if hasattr(tarfile, "data_filter"):
        tarfile.data_filter(member, str(folder))
    target.parent.mkdir(parents=True, exist_ok=True)
    content = opened.extractfile(member)
    with target.open("xb") as written:
        while content and (piece := content.read(CHUNK_BYTES)):
            written.write(piece)
    if target.stat().st_size != member.size:
        raise _refusal("it ends early")


class _SmallReads:
    """A file of which one read takes little: a header may announce a name of gigabytes."""

    def __init__(self, file: BinaryIO | gzip.GzipFile) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if size > CHUNK_BYTES:
            raise _refusal(f"one of its headers has {size} bytes")
        return self._file.read(size)


def select_files(members: Mapping[PurePosixPath, TarInfo]) -> dict[str, TarInfo]:
    """Return the files of the model's folder, by their path in it.

    Raises:
        SourceProblem: `source_invalid`.
    """
    for path, member in members.items():
        if path.is_absolute() or ".." in path.parts or not member.name.isprintable() or member.size < 0:
            raise _refusal(f"the path {member.name!a} in it is absolute, leads upwards or is no text")
    folders = list_model_folders(members)
    if len(folders) > 1:
        first, second = map(ascii, map(str, folders[:2]))
        raise _refusal(f"it has models in {first} and in {second}: pack one model in one archive")
    has_folder = bool(folders) or any(MODELS in path.parents for path in members)
    folder = (folders or [MODELS if has_folder else PurePosixPath()])[0]
    inside = {path.relative_to(folder): member for path, member in members.items() if folder in path.parents}
    for path, member in inside.items():
        # a layer removes a file of a layer beneath it by a name with .wh. (OCI image specification)
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
