"""Namespaces for the processes of a test: loopback is their only network, and all of them end with it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

LIMIT_S = 180
FIRST_PROCESS = """
import fcntl, signal, socket, struct, sys
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody else reaps processes whose parents are gone
IFF_UP, SIOCSIFFLAGS = 1, 0x8914
with socket.socket() as any_socket:
    fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))
print("ready", flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True, slots=True)
class Namespaces:
    """Namespaces of network, processes and mounts; other files are shared with the test.

    Attributes:
        pid: of the first process in them, as the test sees it.
        flags: of nsenter.
    """

    pid: int
    flags: tuple[str, ...]

    def run(self, *command: object) -> "subprocess.CompletedProcess[str]":
        """Run a command in them to its end."""
        return subprocess.run(
            ["nsenter", f"--target={self.pid}", *self.flags, "--", *map(str, command)],
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )


@contextmanager
def isolated() -> Iterator[Namespaces]:
    """Make namespaces, and kill all processes in them at the end; skip the test where that is not allowed."""
    user = () if os.geteuid() == 0 else ("--user", "--map-root-user")
    flags = ("--net", "--pid", "--mount")
    command = ["unshare", *user, *flags, "--fork", "--mount-proc", "--kill-child", sys.executable, "-c"]
    with subprocess.Popen(
        [*command, FIRST_PROCESS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        if not process.stdout.readline():
            pytest.skip(f"namespaces are not allowed here: {process.stderr.read().decode().strip()}")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        try:
            enter = ("--user", "--preserve-credentials") if user else ()
            yield Namespaces(int(children.read_text(encoding="ascii")), (*enter, *flags))
        finally:
            process.kill()
