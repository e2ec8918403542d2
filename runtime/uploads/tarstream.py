"""Read a tar as it arrives, piece by piece, in bounded memory, and trust nothing in it.

The standard library parses one header (`TarInfo.frombuf`); its readers are not used, because they read an
extended header of any length into memory, and follow links. Here only files and folders are taken. The long
names of GNU and pax are understood; every other kind of entry is refused by its name.
"""

import re
import tarfile
import zlib
from typing import Protocol

from runtime.uploads.paths import PathBook, quote
from runtime.uploads.problems import BadArchive, UploadTooLarge

BLOCK = tarfile.BLOCKSIZE
MAX_HEADER_BYTES = 2**16
"""Of a long name or an extended header: a path, times and owners have some hundred bytes."""
MAX_ENTRIES = 40_000
"""Headers of all kinds: an extended one for each of the most files and folders."""
UNPACKED_BYTES = 2**20
"""Of a gzip stream at a time: what one piece of it becomes may be a thousand times as long."""
GZIP = b"\x1f\x8b"

_PAX_RECORD = re.compile(rb"(\d{1,7}) ([^=\n]+)=")
_KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a FIFO",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
    tarfile.GNUTYPE_LONGLINK: "a link",
}


class FileSink(Protocol):
    """Takes the files of an archive, one after the other."""

    def begin_file(self, path: str) -> None:
        """Begin a file; the path is relative, and has been checked."""

    def write_file(self, data: memoryview) -> None:
        """Take the next bytes of it."""

    def end_file(self) -> None:
        """End it."""


class TarReader:
    """Reads a tar, and hands its files to a sink.

    Args:
        sink: takes the files.
        max_bytes: of all files together.
    """

    def __init__(self, sink: FileSink, max_bytes: int) -> None:
        self._sink = sink
        self._max_bytes = max_bytes
        self._paths = PathBook()
        self._bytes = self._entries = 0
        self._held = bytearray()  # the beginning of a header, or of a long name
        self._wanted = BLOCK
        self._meta: bytes | None = None  # the kind of a header that says something of the next one
        self._meta_bytes = 0
        self._long_name: str | None = None
        self._long_size: int | None = None
        self._left = self._padding = 0  # of the present file
        self._is_in_file = self._is_ended = False

    def feed(self, data: bytes | memoryview) -> None:
        """Take the next bytes.

        Raises:
            BadArchive: `bad_archive`.
            UploadTooLarge: `body_too_large`.
        """
        view = memoryview(data)
        while view and not self._is_ended:
            if self._is_in_file:
                view = self._feed_file(view)
            elif self._padding:
                skipped = min(self._padding, len(view))
                self._padding -= skipped
                view = view[skipped:]
            else:
                taken = min(self._wanted - len(self._held), len(view))
                self._held += view[:taken]
                view = view[taken:]
                if len(self._held) == self._wanted:
                    self._end_block()

    def close(self) -> None:
        """End the archive.

        Raises:
            BadArchive: `bad_archive`, it has no end.
        """
        if not self._is_ended:
            raise BadArchive("the tar ends too early: it was cut off, or is none")

    def _feed_file(self, view: memoryview) -> memoryview:
        taken = min(self._left, len(view))
        if taken:
            self._sink.write_file(view[:taken])
        self._left -= taken
        if not self._left:
            self._is_in_file = False
            self._sink.end_file()
        return view[taken:]

    def _end_block(self) -> None:
        block, self._held, self._wanted = bytes(self._held), bytearray(), BLOCK
        if self._meta is None:
            self._read_header(block)
        else:
            kind, self._meta = self._meta, None
            self._read_meta(kind, block[: self._meta_bytes])

    def _read_header(self, block: bytes) -> None:
        if not any(block):
            self._is_ended = True
            return
        self._entries += 1
        if self._entries > MAX_ENTRIES:
            raise BadArchive(f"the tar has more than {MAX_ENTRIES} entries")
        try:
            entry = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except (tarfile.HeaderError, ValueError):
            raise BadArchive(f"the tar is damaged at its entry {self._entries}, or is none") from None
        if entry.size < 0:
            raise BadArchive(f"{quote(entry.name)} has a negative size")
        if entry.type in (
            tarfile.XHDTYPE,
            tarfile.SOLARIS_XHDTYPE,
            tarfile.XGLTYPE,
            tarfile.GNUTYPE_LONGNAME,
        ):
            self._begin_meta(entry)
        else:
            self._begin_entry(entry)

    def _begin_meta(self, entry: tarfile.TarInfo) -> None:
        if not 0 < entry.size <= MAX_HEADER_BYTES:
            raise BadArchive(f"the tar has an extended header of {entry.size} bytes")
        self._meta, self._meta_bytes = entry.type, entry.size
        self._wanted = entry.size + -entry.size % BLOCK

    def _read_meta(self, kind: bytes, content: bytes) -> None:
        if kind == tarfile.GNUTYPE_LONGNAME:
            self._long_name = _decode(content.rstrip(b"\0"))
        elif kind != tarfile.XGLTYPE:  # a global one, as of git archive, says nothing that matters here
            members = _read_pax(content)
            if "path" in members:
                self._long_name = _decode(members["path"])
            if "size" in members:
                self._long_size = _read_size(members["size"])

    def _begin_entry(self, entry: tarfile.TarInfo) -> None:
        name = entry.name if self._long_name is None else self._long_name
        size = entry.size if self._long_size is None else self._long_size
        self._long_name = self._long_size = None
        if entry.type == tarfile.DIRTYPE:
            self._paths.add_folder(name)
            if size:
                raise BadArchive(f"{quote(name)} is a folder with contents of its own")
            return
        if entry.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            kind = _KINDS.get(entry.type, "no regular file")
            raise BadArchive(f"{quote(name)} is {kind}; a version has files and folders only")
        if name.endswith("/"):
            raise BadArchive(f"{quote(name)} is a file with the name of a folder")
        self._bytes += size
        if self._bytes > self._max_bytes:
            raise UploadTooLarge(self._max_bytes)
        self._sink.begin_file(self._paths.add_file(name))
        self._left, self._padding, self._is_in_file = size, -size % BLOCK, True
        if not size:
            self._is_in_file = False
            self._sink.end_file()


class GzipReader:
    """Decompresses a gzip stream into a tar reader, in bounded memory.

    Args:
        tar: takes what is decompressed.
        max_bytes: of it, which the reader's headers and padding are part of.
    """

    def __init__(self, tar: TarReader, max_bytes: int) -> None:
        self._tar = tar
        self._max_bytes = max_bytes
        self._bytes = 0
        self._stream = zlib.decompressobj(wbits=31)  # 31: with the header of gzip

    def feed(self, data: bytes | memoryview) -> None:
        """Take the next bytes.

        Raises:
            BadArchive: `bad_archive`.
            UploadTooLarge: `body_too_large`.
        """
        rest, is_full = bytes(data), True
        while (rest or is_full) and not self._stream.eof:  # what is left inside comes without more input
            try:
                unpacked = self._stream.decompress(rest, UNPACKED_BYTES)
            except zlib.error as error:
                raise BadArchive(f"the gzip stream is damaged: {error}") from None
            rest, is_full = self._stream.unconsumed_tail, len(unpacked) == UNPACKED_BYTES
            self._bytes += len(unpacked)
            if self._bytes > self._max_bytes:
                raise UploadTooLarge(self._max_bytes)
            self._tar.feed(unpacked)

    def close(self) -> None:
        """End the stream, and the tar in it.

        Raises:
            BadArchive: `bad_archive`, one of them has no end.
        """
        if not self._stream.eof:
            raise BadArchive("the gzip stream ends too early: it was cut off")
        self._tar.close()


def _decode(name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise BadArchive(f"{quote(name.decode(errors='replace'))} is not UTF-8") from None


def _read_pax(content: bytes) -> dict[str, bytes]:
    """Return the records of an extended header: `length key=value` and a line feed each."""
    found, position = dict[str, bytes](), 0
    while position < len(content):
        record = _PAX_RECORD.match(content, position)
        end = position + int(record[1]) if record is not None else 0
        if record is None or not record.end() < end <= len(content) or content[end - 1 : end] != b"\n":
            raise BadArchive("the tar has an extended header that is damaged")
        key = record[2].decode(errors="replace")
        if key.startswith("GNU.sparse"):
            raise BadArchive("the tar has a sparse file; a version has plain files only")
        found[key] = content[record.end() : end - 1]
        position = end
    return found


def _read_size(text: bytes) -> int:
    if not re.fullmatch(rb"\d{1,18}", text):
        raise BadArchive("the tar has a size that is no number")
    return int(text)
