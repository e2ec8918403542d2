"""Unpacks one archive: a tar file on standard input, plain or gzip; its files on standard output, as frames.

A hostile archive may exhaust or take over what parses it. This process therefore has no network, can open no
file and start no process, has little memory, and ends with the server. It reads the archive's names first:
they say in which folder the model lies. Then it sends the contents of that folder.
"""

from __future__ import annotations

import gzip
import os
import resource
import sys
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import PurePosixPath
from tarfile import TarInfo
from typing import BinaryIO

from runtime.errors import RuntimeProblem
from runtime.fetch.messages import PIECE, PIECE_BYTES, Done, Entry, Failed, encode_frame, encode_message
from runtime.onnxfile import list_model_folders
from runtime.process.forkserver import die_with
from runtime.worker import landlock, privileges, seccomp

MAX_DATA_BYTES = 256 * 2**20
"""Memory of this process, for 100,000 names; a header may announce a name of gigabytes."""
MODELS = PurePosixPath("models")
"""KServe's images of models ("modelcars") have the model in this folder."""
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


class ArchiveRefused(RuntimeProblem):
    """The archive cannot be unpacked, or has what a model does not need."""

    code = "source_invalid"


def main() -> None:
    """Unpack the archive that the server opened; refuse it with `source_invalid`."""
    confine()
    try:
        for frame in unpack(os.fdopen(0, "rb")):  # not sys.stdin: tarfile makes a path of its name
            sys.stdout.buffer.write(frame)
    except BrokenPipeError:  # the server has closed it
        os._exit(1)
    except Exception as error:  # noqa: BLE001 - a hostile header may raise any; a MemoryError has no text
        reason = str(error) or f"its headers take more than {MAX_DATA_BYTES >> 20} MiB"
        failed = Failed(ArchiveRefused.code, f"the archive cannot be unpacked: {reason}")
        sys.stdout.buffer.write(encode_message(failed))
    sys.stdout.buffer.flush()


def confine() -> None:
    """Give up files, network and privileges as far as the kernel knows how, and end when the server ends."""
    die_with(os.getppid())
    privileges.limit_resource(resource.RLIMIT_DATA, MAX_DATA_BYTES)
    privileges.limit_resource(resource.RLIMIT_CORE, 0)
    privileges.limit_resource(resource.RLIMIT_FSIZE, 0)
    privileges.drop_privileges()
    with suppress(OSError):
        landlock.restrict({})
    with suppress(OSError):
        seccomp.restrict()


def unpack(archive: BinaryIO) -> Iterator[bytes]:
    """Yield the frames of a tar archive that can be read twice; errors are those that `main` catches."""
    start = archive.read(len(ZSTD))
    archive.seek(0)
    if start == ZSTD:
        raise ArchiveRefused("it is compressed with zstd: use gzip, or no compression")
    plain = gzip.GzipFile(fileobj=archive) if start.startswith(GZIP) else archive
    with tarfile.open(fileobj=plain, mode="r:") as opened:
        files = select_files({PurePosixPath(member.name): member for member in opened})
        for path, member in sorted(files.items(), key=lambda file: file[1].offset_data):
            yield encode_message(Entry(path, member.size))
            content = opened.extractfile(member)
            while content and (piece := content.read(PIECE_BYTES)):
                yield encode_frame(PIECE, piece)
            yield encode_message(Done())
    yield encode_message(Done())


def select_files(members: Mapping[PurePosixPath, TarInfo]) -> dict[str, TarInfo]:
    """Return the files of the model's folder, by their path in it.

    The folder is that of the ONNX file nearest to the top, else `models`, else the whole archive. A layer of
    an operating system has links and no model, and so no file. `ArchiveRefused` says what is not taken.
    """
    for path, member in members.items():
        if path.is_absolute() or ".." in path.parts or not member.name.isprintable() or member.size < 0:
            raise ArchiveRefused(f"the path {member.name!a} in it is absolute, leads upwards or is no text")
    folders = list_model_folders(members)
    if len(folders) > 1:
        first, second = map(ascii, map(str, folders[:2]))
        raise ArchiveRefused(f"it has models in {first} and in {second}: pack one model in one archive")
    has_folder = bool(folders) or any(MODELS in path.parents for path in members)
    folder = (folders or [MODELS if has_folder else PurePosixPath()])[0]
    inside = {path.relative_to(folder): member for path, member in members.items() if folder in path.parents}
    for path, member in inside.items():
        # a layer removes a file of a layer beneath it by a name with .wh. (OCI image specification)
        is_plain = member.isdir() or (member.isreg() and not path.name.startswith(".wh."))
        if not is_plain and not has_folder:
            return {}
        if not is_plain:
            raise ArchiveRefused(
                f"{str(folder / path)!a} in it is a link, a device or a whiteout: a model takes files and"
                " folders only; pack it again with `tar --dereference`, or as one layer"
            )
    return {str(path): member for path, member in inside.items() if member.isreg()}


if __name__ == "__main__":
    main()
