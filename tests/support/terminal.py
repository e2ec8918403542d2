"""The installed command at a terminal, as a person has it: what it shows, and keys that are pressed."""

import asyncio
import os
import pty
import re
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from select import select

from support.process import MODULE, clean_environment

LIMIT_S = 60.0
"""Nothing here takes this long; it is there so that a bug fails a test and does not hang it."""
CTRL_C = b"\x03"
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """A process at a terminal of its own.

    Attributes:
        pid: the process.
        shown: all that it has written so far.
    """

    def __init__(self, pid: int, descriptor: int) -> None:
        self.pid = pid
        self.shown = ""
        self._descriptor = descriptor
        self._ended = False

    @property
    def plain(self) -> str:
        """What was shown, without colours and movements."""
        return _ESCAPES.sub("", self.shown)

    async def until(self, pattern: str) -> None:
        """Wait until something like this was shown since the beginning."""
        await asyncio.to_thread(self._until, pattern)

    async def end(self) -> int:
        """Wait for the end and return the exit code."""
        return await asyncio.to_thread(self._end)

    def press(self, keys: bytes) -> None:
        """Press keys."""
        os.write(self._descriptor, keys)

    def close(self) -> None:
        """Kill it if it has not ended."""
        if not self._ended:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._descriptor)

    def _until(self, pattern: str) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not re.search(pattern, self.plain):
            assert self._read(deadline), f"ended without {pattern!r}: {self.plain}"

    def _end(self) -> int:
        deadline = time.monotonic() + LIMIT_S
        while self._read(deadline):
            pass
        _, status = os.waitpid(self.pid, 0)
        self._ended = True
        return os.waitstatus_to_exitcode(status)

    def _read(self, deadline: float) -> bool:
        assert select([self._descriptor], [], [], max(0.0, deadline - time.monotonic()))[0], self.plain
        try:
            data = os.read(self._descriptor, 65536)
        except OSError:  # EIO: nobody holds the other end any more
            return False
        self.shown += data.decode(errors="replace")
        return bool(data)


@contextmanager
def at_terminal(
    *arguments: str, environment: Mapping[str, str], command: Sequence[str] = MODULE
) -> Iterator[Terminal]:
    """Run the command at a terminal of 24 lines with 120 columns."""
    surroundings = clean_environment() | {"TERM": "xterm", "LINES": "24", "COLUMNS": "120"}
    surroundings.pop("NO_COLOR", None)
    surroundings.update(environment)
    pid, descriptor = _spawn([*command, *arguments], surroundings)
    terminal = Terminal(pid, descriptor)
    try:
        yield terminal
    finally:
        terminal.close()


def _spawn(command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, int]:
    """Start a process whose terminal is a new one; no Python runs between fork and exec."""
    ours, theirs = pty.openpty()
    try:
        # A session of its own whose first terminal, opened by its name, is the one that Ctrl-C comes from.
        pid = os.posix_spawn(
            command[0],
            list(command),
            environment,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.ttyname(theirs), os.O_RDWR, 0),
                (os.POSIX_SPAWN_DUP2, 0, 1),
                (os.POSIX_SPAWN_DUP2, 0, 2),
            ],
            setsid=True,
            setsigdef=[signal.SIGINT],
        )
    finally:
        os.close(theirs)
    return pid, ours
