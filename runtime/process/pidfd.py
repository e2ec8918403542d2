"""A forked process, held by its pidfd, so that no signal can reach another process with its pid."""

import asyncio
import contextlib
import os
import select
import signal
from collections.abc import Callable

from runtime.errors import Exit
from runtime.process.forkclient import Child


class Process:
    """Watches a process that is no child of this one, and sends it signals.

    Args:
        child: the process; its pidfd is from now on this object's to close.
        on_gone: is called once, on the loop, when the process has ended, whatever the fork server does.

    Attributes:
        orphaned: whether it ended with the fork server; known when closed. A missing exit report alone does
            not prove that: a process could stop the fork server and then end.
    """

    def __init__(self, child: Child, on_gone: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._child = child
        self._on_gone = on_gone
        self._closed = False
        self.orphaned = False
        self._loop.add_reader(child.pidfd, self._note_gone)

    @property
    def exit_reported(self) -> bool:
        """Whether the fork server has reported how the process ended, or has ended itself."""
        return self._child.end.done()

    def on_exit_reported(self, callback: Callable[[], None]) -> None:
        """Call back when the fork server reports how the process ended, or ends itself."""
        self._child.end.add_done_callback(lambda _: callback())

    def has_ended(self) -> bool:
        """Ask the kernel whether the process has ended."""
        if self._closed:
            return True
        poll = select.poll()
        poll.register(self._child.pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal; SIGKILL ends even a stopped process. Nothing happens if it has ended."""
        if not self._closed:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._child.pidfd, number)

    def close(self) -> Exit:
        """Close the pidfd of a process that has ended; returns how it ended, as far as known."""
        end = self._child.end.result() if self.exit_reported else Exit(None, None)
        self.orphaned = self.exit_reported and end == Exit(None, None)
        if end == Exit(None, None):
            end = _reap(self._child.pidfd)
        os.close(self._child.pidfd)
        self._closed = True
        return end

    def _note_gone(self) -> None:
        self._loop.remove_reader(self._child.pidfd)
        self._on_gone()


def _reap(pidfd: int) -> Exit:
    """Reap an orphaned worker and return how it ended.

    When the fork server dies first, the next reaper above it adopts its children. In a container that may be
    this very process, and then nobody else reaps them.
    """
    try:
        info = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    except OSError:
        return Exit(None, None)
    if info is None:
        return Exit(None, None)
    exited = info.si_code == os.CLD_EXITED
    return Exit(info.si_status, None) if exited else Exit(None, info.si_status)
