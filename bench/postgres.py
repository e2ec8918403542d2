"""A PostgreSQL server in a folder of its own, with PostgreSQL's defaults (`fsync`, `synchronous_commit`).

PostgreSQL's programs make its roles and databases. It listens on 127.0.0.1, and its folder is on the disk.
The tests use its functions for servers of their own.
"""

import asyncio
import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from nodes.postgres import connection as databases
from nodes.postgres.schema import migrate
from runtime.process.prctl import die_with

MISSING = "PostgreSQL is not installed: install its server, or name the folder of initdb in POSTGRES"
OWNER, ROLE = "ledger_owner", "ledger_server"
"""The role that migrates, and the one that servers have."""
DEBIAN = Path("/usr/lib/postgresql")
"""Where Debian and Ubuntu have a folder for each major version; none of them is on PATH."""

SUPERUSER = "postgres"
"""The user of the system that PostgreSQL runs as under root, and the superuser in the database."""

START_LIMIT_S = 60
"""After a kill it also reads what was not written yet."""
STOP_LIMIT_S = 30
_LOG_TAIL_CHARACTERS = 2000
_numbers = count(1)


class DatabaseFailed(Exception):
    """A program of PostgreSQL failed; the text has what it printed."""


def find_programs() -> Path | None:
    """Return the folder of `initdb`: what POSTGRES names, else that on PATH, else the newest of Debian's.

    None without one, or if we are root and there is no user to run it as.
    """
    if named := os.environ.get("POSTGRES"):
        return Path(named)
    if os.geteuid() == 0 and SUPERUSER not in {user.pw_name for user in pwd.getpwall()}:
        return None
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    versions = sorted(DEBIAN.glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    return versions[-1].parent if versions else None


def own(path: Path) -> None:
    """Give a path to the user of PostgreSQL's programs."""
    if os.geteuid() == 0:
        shutil.chown(path, SUPERUSER, SUPERUSER)


def run_program(folder: Path, program: Path | str, *arguments: str) -> str:
    """Run a program in a folder as PostgreSQL's user, to its end; return what it printed.

    Raises:
        DatabaseFailed: it failed.
    """
    done: subprocess.CompletedProcess[str] = subprocess.run(  # noqa: S603 - PostgreSQL's own
        [str(program), *arguments],
        **_surroundings(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise DatabaseFailed(f"{Path(program).name} ended with {done.returncode}: {done.stdout.strip()}")
    return done.stdout


def initialise(programs: Path, folder: Path, data: str, *options: str) -> None:
    """Make a data directory in a folder, whose server asks no role for a password.

    Args:
        programs: folder of PostgreSQL's programs.
        folder: of PostgreSQL's user.
        data: its name in the folder.
        options: of initdb; `--no-sync` is faster.
    """
    cluster = ("--encoding=UTF8", "--locale=C", "--auth=trust", f"--username={SUPERUSER}")
    run_program(folder, programs / "initdb", *cluster, *options, data)


class Postgres:
    """A server with ledgers; it ends with the thread that started it.

    Args:
        programs: folder of PostgreSQL's programs.
        folder: of its data directory, its socket and its log; empty, in one that PostgreSQL's user may enter.
        port: on 127.0.0.1.
    """

    def __init__(self, programs: Path, folder: Path, port: int) -> None:
        self.folder = folder
        self._programs = programs
        self._port = port
        self._log = folder / "postgres.log"
        self._process: subprocess.Popen[bytes] | None = None

    def create(self) -> None:
        """Make the data directory, start the server, and make its roles.

        Raises:
            DatabaseFailed: it does not start.
        """
        self.folder.chmod(0o700)
        own(self.folder)
        initialise(self._programs, self.folder, "data")
        self.start()
        for role in (OWNER, ROLE):
            self._run("createuser", *self._connection(), f"--username={SUPERUSER}", role)

    def create_ledger(self) -> str:
        """Create an empty ledger in a database of its own, and return the address for servers."""
        name = f"ledger_{next(_numbers)}"
        self._run("createdb", *self._connection(), f"--username={SUPERUSER}", f"--owner={OWNER}", name)
        asyncio.run(_migrate(self.address(name, OWNER)))
        return self.address(name)

    def address(self, database: str, role: str = ROLE) -> str:
        """Return the address of a database."""
        return f"postgresql://{role}@127.0.0.1:{self._port}/{database}"

    def owners(self, address: str) -> str:
        """Return the address of a ledger for its owner."""
        return self.address(address.rpartition("/")[2], OWNER)

    def start(self) -> None:
        """Start the server, after a stop too, and wait until it takes connections.

        Raises:
            DatabaseFailed: it has ended, or takes too long.
        """
        options = (
            "--listen_addresses=127.0.0.1",
            f"--port={self._port}",
            f"--unix_socket_directories={self.folder}",
        )
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - as above
                [str(self._programs / "postgres"), "-D", "data", *options],
                **_surroundings(self.folder),
                preexec_fn=partial(die_with, os.getpid(), signal.SIGINT),  # noqa: PLW1509 - no other threads
                stdout=log,
                stderr=log,
            )
        deadline_s = time.monotonic() + START_LIMIT_S
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                said = self._log.read_text(encoding="utf-8", errors="replace")[-_LOG_TAIL_CHARACTERS:]
                raise DatabaseFailed(f"PostgreSQL does not start: {said.strip()}")
            time.sleep(0.05)

    def stop(self) -> None:
        """Stop the server if it runs; connections end at once, and what was committed is on the disk."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGQUIT)
            process.wait()

    def _run(self, program: str, *arguments: str) -> str:
        return run_program(self.folder, self._programs / program, *arguments)

    def _connection(self) -> tuple[str, ...]:
        return (f"--host={self.folder}", f"--port={self._port}")

    def _is_ready(self) -> bool:
        try:
            self._run("pg_isready", *self._connection())
        except DatabaseFailed:
            return False
        return True


def _surroundings(folder: Path) -> Mapping[str, Any]:
    """Return how programs run: as PostgreSQL's user, in a session of their own.

    So Ctrl-C at the terminal reaches the caller alone, which stops them.
    """
    is_root = os.geteuid() == 0
    identity = {"user": SUPERUSER, "group": SUPERUSER, "extra_groups": []} if is_root else {}
    return {
        **identity,
        "cwd": folder,
        "env": {"PATH": os.defpath, "LC_ALL": "C"},  # without libpq's variables, such as PGHOST
        "stdin": subprocess.DEVNULL,
        "start_new_session": True,
    }


async def _migrate(address: str) -> None:
    connection = await databases.connect(address)
    await migrate(connection, ROLE)
    await databases.close(connection)


def find_free_port() -> int:
    """Return a port of 127.0.0.1 on which nothing listens."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@contextmanager
def running(folder: Path) -> Iterator[Postgres | None]:
    """Start a server, and stop it at the end; None if its programs are missing.

    Args:
        folder: A directory on a disk, in which it gets one of its own.
    """
    programs, home = find_programs(), folder / "postgres"
    if programs is None:
        yield None
        return
    home.mkdir()
    folder.chmod(0o711)  # the server's user has to reach its folder
    server = Postgres(programs, home, find_free_port())
    try:
        server.create()
        yield server
    finally:
        server.stop()
