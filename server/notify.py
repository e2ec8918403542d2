"""What the service manager is told: that the server is ready, that it lives, that it stops (sd_notify(3))."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Mapping

_log = logging.getLogger(__name__)


class Notifier:
    """Tells the manager, where there is one that wants to know; nothing ever waits for it or fails by it.

    Args:
        environment: what the process was started with: NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        given = environment.get("NOTIFY_SOCKET", "")
        self._address = f"\0{given[1:]}" if given.startswith("@") else given
        self._watchdog_s = _watchdog_s(environment) if given else None
        self._failed = False

    def ready(self, url: str) -> None:
        """Say that the server answers at this address."""
        self._tell(f"READY=1\nSTATUS=ready at {url}")

    def stopping(self) -> None:
        """Say that the server ends of its own accord, or because it was told to."""
        self._tell("STOPPING=1\nSTATUS=stopping: running requests may end")

    async def live(self) -> None:
        """Say, twice in the time after which the manager would kill us, that the event loop turns."""
        while self._watchdog_s is not None:
            self._tell("WATCHDOG=1")
            await asyncio.sleep(self._watchdog_s / 2)

    def _tell(self, state: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sending:
                sending.setblocking(False)
                sending.sendto(state.encode(), self._address)
            self._failed = False
        except OSError as error:
            if not self._failed:  # once, and not with each sign of life
                _log.warning("the service manager could not be told %s: %s", state.partition("\n")[0], error)
            self._failed = True


def _watchdog_s(environment: Mapping[str, str]) -> float | None:
    """Return in how many seconds the manager wants to hear of us; None if it does not."""
    period, process = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID")
    is_ours = process is None or process == str(os.getpid())
    return int(period) / 1e6 if is_ours and period.isdecimal() and int(period) > 0 else None
