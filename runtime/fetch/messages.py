"""Messages between the server and a fetch process: frames on its standard input and output.

A frame is four bytes of length, little-endian, one byte of kind, and so many bytes of content: a message in
msgpack, or a piece of a file. The process sends `Resolved`, then answers each `Read` in turn: `Opened`, the
pieces of the file, `Done`. An unpacking process sends for each file of its archive `Entry`, its pieces, and
`Done`, and at last one more `Done`. `Failed` may take the place of any message, and is the last one.
"""

from __future__ import annotations

import msgspec
from msgspec import Struct

MESSAGE, PIECE = 0, 1
"""The kinds of frames."""
MAX_MESSAGE_BYTES = 16 * 2**20
"""A listing of 10,000 files with long paths has 10 MiB."""
PIECE_BYTES = 2**20
"""Of one piece at most: few switches between processes, and little memory."""
LENGTH_BYTES, HEAD_BYTES = 4, 5
"""Of a frame's length, and of its head, which has the kind, too."""


class Order(Struct, frozen=True, tag=True):
    """The source to fetch, and how: the first message to a fetch process.

    Attributes:
        source: its name, as `runtime.fetch.sources.parse_source` takes it.
        digest: SHA-256 in hexadecimal that the file of the source, or its manifest, must have; None for any.
        allowed: the operator's list of sources.
        environment: variables with credentials and addresses. They come this way, since everybody on the
            machine may see those with which a process starts.
    """

    source: str
    digest: str | None
    allowed: str
    environment: dict[str, str]


class RemoteFile(Struct, frozen=True):
    """One file of a resolved source.

    Attributes:
        path: in the version's folder, as the source says, unchecked; of an archive, a name for messages.
        bytes: its length, if the source says it.
        sha256: in hexadecimal, if the source names it beforehand.
        is_needed: whether the version must have it; others are taken if the model or a signature names them.
        is_archive: whether it is a tar archive, compressed with gzip or not, of files of the version.
    """

    path: str
    bytes: int | None = None
    sha256: str | None = None
    is_needed: bool = True
    is_archive: bool = False


class Resolved(Struct, frozen=True, tag=True):
    """A resolved source: a name that does not move, and the files; `Read` names a file by its index."""

    name: str
    files: tuple[RemoteFile, ...]


class Read(Struct, frozen=True, tag=True):
    """Send a file from `offset` on.

    Attributes:
        index: of the file in `Resolved.files`.
        offset: how many bytes of it are there; 0 of one whose SHA-256 is not known beforehand.
    """

    index: int
    offset: int = 0


class Opened(Struct, frozen=True, tag=True):
    """A file's pieces follow: from this offset on, which is the one that was asked for, or 0.

    Attributes:
        bytes: of the whole file, if it is known.
    """

    offset: int
    bytes: int | None


class Entry(Struct, frozen=True, tag=True):
    """A file of an archive; its pieces follow."""

    path: str
    bytes: int


class Done(Struct, frozen=True, tag=True):
    """All pieces of a file were sent; in an archive, after the last file, all files."""


class Failed(Struct, frozen=True, tag=True):
    """The fetch failed: `source_…`, `invalid_source`, `not_supported` or `internal`, and what to do."""

    code: str
    message: str


FromServer = Order | Read
FromProcess = Resolved | Opened | Entry | Done | Failed


def encode_message(message: FromServer | FromProcess) -> bytes:
    """Return the frame of a message."""
    return encode_frame(MESSAGE, msgspec.msgpack.encode(message))


def encode_frame(kind: int, content: bytes) -> bytes:
    return len(content).to_bytes(LENGTH_BYTES, "little") + bytes([kind]) + content


def decode_head(head: bytes) -> tuple[int, int]:
    """Return the kind of a frame, and the length of its content."""
    return head[LENGTH_BYTES], int.from_bytes(head[:LENGTH_BYTES], "little")
