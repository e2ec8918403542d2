"""A fetch process as the server sees it: started, asked, and killed at the end.

It gets none of the server's variables, and its order through a pipe.
"""

from __future__ import annotations

import asyncio
import os
import re
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import IO, TypeVar

import msgspec

from runtime.errors import RuntimeProblem
from runtime.fetch.messages import (
    HEAD_BYTES,
    MAX_MESSAGE_BYTES,
    MESSAGE,
    PIECE_BYTES,
    Done,
    Entry,
    Failed,
    FromProcess,
    FromServer,
    Opened,
    Order,
    Read,
    Resolved,
    decode_head,
    encode_message,
)
from runtime.process.forkserver import launch_command, launch_environment
from runtime.repository import MAX_FILES

FETCH, UNPACK = "runtime.fetch.main", "runtime.fetch.unpack"
BUFFER_BYTES = PIECE_BYTES
"""Read ahead of a process, which writes while the server hashes; asyncio takes up to twice as much."""

_NAME = re.compile(r"[!-~]{1,4096}")
_CODE = re.compile(r"source_[a-z_]{1,20}|invalid_source|not_supported|internal")
"""The codes with which a fetch process may end."""
_DECODER = msgspec.msgpack.Decoder(FromProcess)
_Sent = TypeVar("_Sent", bound=FromProcess | bytes)


class FetchFailed(RuntimeProblem):
    """The fetch process ended, or said what no fetch process says."""

    code = "fetch_failed"


class FetchProcess:
    """A running fetch or unpacking process."""

    def __init__(self, process: Process) -> None:
        self._process = process

    async def resolve(self, order: Order) -> Resolved:
        """Return what a source's name means now.

        Raises:
            RuntimeProblem: `fetch_failed`, or a code of the source.
        """
        await self._send(order)
        resolved = await self._expect(Resolved)
        scheme = order.source.partition("://")[0]
        is_name = _NAME.fullmatch(resolved.name) and resolved.name.startswith(f"{scheme}://")
        if not is_name or len(resolved.files) > MAX_FILES:
            raise FetchFailed(f"the source has no name, or more than {MAX_FILES} files")
        return resolved

    async def open(self, index: int, offset: int) -> Opened:
        """Begin to read a file; `pieces` yields it then. For errors see `resolve`."""
        await self._send(Read(index, offset))
        opened = await self._expect(Opened)
        if opened.offset not in (0, offset):
            raise FetchFailed
        return opened

    def pieces(self) -> AsyncIterator[bytes]:
        """Yield the bytes of the file that was begun; for errors see `resolve`."""
        return self._receive_all(bytes)

    def entries(self) -> AsyncIterator[Entry]:
        """Yield the files of an archive; `pieces` yields each of them then. For errors see `resolve`."""
        return self._receive_all(Entry)

    async def _send(self, message: FromServer) -> None:
        assert self._process.stdin is not None, "an unpacking process is asked nothing"
        with suppress(ConnectionError):  # what it said before it ended is read below
            self._process.stdin.write(encode_message(message))
            await self._process.stdin.drain()

    async def _expect(self, kind: type[_Sent]) -> _Sent:
        return _check_kind(await self._receive(), kind)

    async def _receive_all(self, kind: type[_Sent]) -> AsyncIterator[_Sent]:
        while not isinstance(found := await self._receive(), Done):
            yield _check_kind(found, kind)

    async def _receive(self) -> FromProcess | bytes:
        assert self._process.stdout is not None
        try:
            kind, length = decode_head(await self._process.stdout.readexactly(HEAD_BYTES))
            if length > (MAX_MESSAGE_BYTES if kind == MESSAGE else PIECE_BYTES):
                raise FetchFailed
            content = await self._process.stdout.readexactly(length)
            found = _DECODER.decode(content) if kind == MESSAGE else content
        except (asyncio.IncompleteReadError, msgspec.MsgspecError, ConnectionError):
            raise FetchFailed from None
        if isinstance(found, Failed):
            is_known = _CODE.fullmatch(found.code) is not None
            raise RuntimeProblem(found.message, code=found.code if is_known else FetchFailed.code)
        return found


def _check_kind(found: FromProcess | bytes, kind: type[_Sent]) -> _Sent:
    if not isinstance(found, kind):
        raise FetchFailed
    return found


@asynccontextmanager
async def run_process(module: str, archive: IO[bytes] | None = None) -> AsyncIterator[FetchProcess]:
    """Run a fetch process, or one that unpacks an archive; at the end it is killed.

    Raises:
        FetchFailed: `fetch_failed`, no process can be started.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *launch_command(module),
            stdin=PIPE if archive is None else archive,
            stdout=PIPE,
            stderr=DEVNULL,  # what it says of a source may hold credentials
            env=launch_environment(os.environ),
            limit=BUFFER_BYTES,
            start_new_session=True,
        )
    except OSError as error:
        raise FetchFailed(f"no fetch process can be started: {error.strerror}") from None
    try:
        yield FetchProcess(process)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await asyncio.shield(process.communicate())  # pipes that are not read to their ends stay open
