"""A fetch process and an unpacking process as the server sees them: frames."""

import subprocess
import sys
from collections.abc import Iterator
from typing import IO

import msgspec

from runtime.fetch.messages import (
    HEAD_BYTES,
    MESSAGE,
    Done,
    Entry,
    Failed,
    FromProcess,
    Opened,
    Order,
    Read,
    Resolved,
    decode_head,
    encode_message,
)

_DECODER: msgspec.msgpack.Decoder[FromProcess] = msgspec.msgpack.Decoder(
    Resolved | Opened | Entry | Done | Failed
)


def read_frames(output: bytes) -> Iterator[FromProcess | bytes]:
    """Yield messages, and pieces of files as bytes."""
    view = memoryview(output)
    while view:
        length, kind = int.from_bytes(view[:4], "little"), view[4]
        content, view = bytes(view[5 : 5 + length]), view[5 + length :]
        assert len(content) == length
        yield _DECODER.decode(content) if kind == MESSAGE else content


def read_archive(output: bytes) -> dict[str, bytes] | Failed:
    """Return the files that an unpacking process has sent, or why it failed."""
    files, path = dict[str, bytes](), None
    for frame in read_frames(output):
        match frame:
            case Entry():
                path = frame.path
                assert path not in files
                files[path] = b""
            case bytes() if path is not None:
                files[path] += frame
            case Done() if path is not None:
                path = None
            case Done():
                return files
            case Failed():
                return frame
            case _:
                raise AssertionError(frame)
    raise AssertionError("the frames end without Done or Failed")


def fetch(order: Order) -> tuple[str, dict[str, bytes]] | Failed:
    """Run a fetch process; return what the source's name means and its files, or why it failed."""
    command = (sys.executable, "-m", "runtime.fetch.main")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(encode_message(order))
        process.stdin.flush()
        resolved = _read_frame(process.stdout)
        if isinstance(resolved, Failed):
            return resolved
        assert isinstance(resolved, Resolved)
        files = {file.path: b"" for file in resolved.files}
        for index, file in enumerate(resolved.files):
            process.stdin.write(encode_message(Read(index)))
            process.stdin.flush()
            assert isinstance(_read_frame(process.stdout), Opened)
            while isinstance(piece := _read_frame(process.stdout), bytes):
                files[file.path] += piece
            assert isinstance(piece, Done), piece
        process.stdin.close()
        assert process.wait() == 0
    return resolved.name, files


def _read_frame(stream: IO[bytes]) -> FromProcess | bytes:
    kind, length = decode_head(stream.read(HEAD_BYTES))
    content = stream.read(length)
    return _DECODER.decode(content) if kind == MESSAGE else content
