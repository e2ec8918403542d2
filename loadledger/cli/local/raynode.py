"""One node on a machine of a Ray cluster: what keeps `loadledger serve` running there. Without Ray itself.

`NodeKeeper` is the class of the detached actors that `loadledger ray up` creates. The server is a child
process, as everywhere else; it begins in `main`, so that it ends when its actor does, however that ends.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from threading import Event, Thread
from typing import TypedDict

FIRST_BACK_OFF_S = 1.0
"""Before a server that has exited is started again; it doubles with each exit soon after a start."""
LONGEST_BACK_OFF_S = 30.0
STEADY_S = 60.0
"""A server that ran for so long begins with the first back-off again."""
READY = " is ready at "
"""In the line of a server that answers, before its URL."""


class KeeperStatus(TypedDict):
    """What a keeper says of its server.

    Attributes:
        machine: the address that Ray knows the machine by.
        pid: of the server; None between two.
        url: of the server that answers; None while it starts.
        exits: how many servers have exited.
        exit_code: of the last one; negative for a signal; None before the first exit.
    """

    machine: str
    pid: int | None
    url: str | None
    exits: int
    exit_code: int | None


class NodeKeeper:
    """Runs a node's server on this machine, and starts it again when it has exited.

    Args:
        machine: the address that Ray knows this machine by.
        environment: variables for the server; those of this machine go before them.
        arguments: of `loadledger serve`.
    """

    def __init__(self, machine: str, environment: Mapping[str, str], arguments: Sequence[str]) -> None:
        self._machine = machine
        self._environment = {**environment, **os.environ}
        self._command = [sys.executable, "-m", __name__, str(os.getpid()), *arguments]
        self._stopping = Event()
        self._child: subprocess.Popen[str] | None = None
        self._url: str | None = None
        self._exits = 0
        self._exit_code: int | None = None
        # A thread of its own: the kernel ends the server when the thread that started it has ended.
        self._thread = Thread(target=self._keep, name="keeper", daemon=True)
        self._thread.start()

    def status(self) -> KeeperStatus:
        """Return what is known of the server."""
        pid = self._child.pid if self._child is not None else None
        return KeeperStatus(
            machine=self._machine, pid=pid, url=self._url, exits=self._exits, exit_code=self._exit_code
        )

    def stop(self, limit_s: float) -> KeeperStatus:
        """Stop the server as SIGTERM does, and start it no more; kill it if it has not exited in time."""
        self._stopping.set()
        self._signal(signal.SIGTERM)
        self._thread.join(limit_s)
        if self._thread.is_alive():
            self._signal(signal.SIGKILL)
            self._thread.join()
        return self.status()

    def _keep(self) -> None:
        back_off_s = FIRST_BACK_OFF_S
        while not self._stopping.is_set():
            began_s = time.monotonic()
            self._run()
            if time.monotonic() - began_s >= STEADY_S:
                back_off_s = FIRST_BACK_OFF_S
            self._stopping.wait(back_off_s)
            back_off_s = min(2 * back_off_s, LONGEST_BACK_OFF_S)

    def _run(self) -> None:
        """Run a server until it exits; its log goes where the actor's does."""
        with subprocess.Popen(  # noqa: S603 - this module, with the operator's arguments
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env=self._environment,
            text=True,
            start_new_session=True,  # Ray kills the group of an actor that died
        ) as child:
            self._child = child
            if self._stopping.is_set():  # it was, before there was a child to stop
                child.terminate()
            for line in child.stdout or ():
                print(line, end="", file=sys.stderr, flush=True)  # noqa: T201 - the actor's log
                self._url = self._url or line.partition(READY)[2].strip() or None
        self._child, self._url = None, None
        self._exits, self._exit_code = self._exits + 1, child.returncode

    def _signal(self, number: signal.Signals) -> None:
        if self._child is not None:
            self._child.send_signal(number)


def main() -> None:
    """Serve until SIGTERM, or until the keeper ends: `argv` has its process id and the options of `serve`."""
    from loadledger.cli.main import main as loadledger  # noqa: PLC0415 - of this process alone
    from runtime.process.forkserver import die_with  # noqa: PLC0415 - keeps `loadledger --help` quick

    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # an actor's threads may block some
    die_with(int(sys.argv[1]), signal.SIGTERM)
    loadledger(["serve", *sys.argv[2:]], prog_name="loadledger")


if __name__ == "__main__":
    main()
