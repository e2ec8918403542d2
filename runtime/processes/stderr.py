"""The last words of a process: the end of its stderr pipe, read as it comes and kept within bounds."""

import asyncio
import contextlib
import os

MAX_LINES = 64
MAX_BYTES = 16 * 2**10
READ_BYTES = 64 * 2**10
"""What a pipe holds: one read empties it, and the loop does something else before the next."""


class StderrTail:
    """Reads a pipe on the running loop until its end, and keeps the last 64 lines, at most 16 KiB.

    Args:
        descriptor: the reading end of the pipe, from now on this object's to close.
    """

    def __init__(self, descriptor: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._descriptor: int | None = descriptor
        self._kept = bytearray()
        os.set_blocking(descriptor, False)
        self._loop.add_reader(descriptor, self._read)

    def lines(self) -> list[str]:
        """Give the last lines, oldest first; what is not UTF-8 is replaced."""
        text = self._kept.decode("utf-8", "replace").encode()[-MAX_BYTES:]  # a replaced byte takes three
        return text.decode("utf-8", "ignore").splitlines()[-MAX_LINES:]

    def note(self, line: str) -> None:
        """Add a line of the server's own, for whoever reads why the process ended."""
        self._keep(f"{line}\n".encode())

    def close(self) -> list[str]:
        """Read what is left in the pipe, close it, and give the last lines."""
        self._read()
        self._close()
        return self.lines()

    def _read(self) -> None:
        if self._descriptor is None:
            return
        with contextlib.suppress(BlockingIOError):
            data = os.read(self._descriptor, READ_BYTES)
            self._keep(data)
            if not data:
                self._close()

    def _keep(self, data: bytes) -> None:
        self._kept += data[-MAX_BYTES:]
        del self._kept[:-MAX_BYTES]

    def _close(self) -> None:
        if self._descriptor is not None:
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None
