"""A PostgreSQL server in a folder of its own: for `loadledger demo --cluster`, the bench and the tests.

PostgreSQL's programs make its roles and databases, over a socket in a directory that only its user may enter.
So the roles need no passwords, and there is no SQL here.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from runtime.process.forkserver import die_with

DEBIAN = Path("/usr/lib/postgresql")
"""Where Debian and Ubuntu have a folder for each major version; none of them is on PATH."""

SUPERUSER = "postgres"
"""The user of the system that PostgreSQL runs as under root, and the superuser in the database."""

INSTALL = (
    f"PostgreSQL is not installed: initdb is neither on PATH nor in {DEBIAN}/*/bin "
    "(Debian, Ubuntu: apt install postgresql; Fedora: dnf install postgresql-server)"
)

START_LIMIT_S = 60
"""After a kill it also reads what was not written yet."""
STOP_LIMIT_S = 30
_LOG_TAIL_CHARACTERS = 2000


class DatabaseMissing(Exception):
    """No PostgreSQL server can run here; the text says what to install."""


class DatabaseFailed(Exception):
    """A program of PostgreSQL failed; the text has what it printed."""


def find_programs() -> Path:
    """Return the folder of PostgreSQL's programs: those on PATH, else the newest of Debian's.

    Raises:
        DatabaseMissing: there are none, or no user to run them as.
    """
    found = shutil.which("initdb")
    versions = sorted(DEBIAN.glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    if found is None and not versions:
        raise DatabaseMissing(INSTALL)
    if os.geteuid() == 0:
        try:
            pwd.getpwnam(SUPERUSER)
        except KeyError:
            text = f"PostgreSQL does not run as root, and there is no user {SUPERUSER}: run as another user"
            raise DatabaseMissing(text) from None
    return Path(found).resolve().parent if found else versions[-1].parent


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
    """Make a data directory in a folder; who may connect may be any role.

    Args:
        programs: folder of PostgreSQL's programs.
        folder: of PostgreSQL's user.
        data: its name in the folder.
        options: of initdb; `--no-sync` is faster.
    """
    cluster = ("--encoding=UTF8", "--locale=C", "--auth=trust", f"--username={SUPERUSER}")
    run_program(folder, programs / "initdb", *cluster, *options, data)


class PostgresServer:
    """A PostgreSQL server with its data, socket and log in a folder; it ends with the thread that started it.

    Args:
        programs: folder of PostgreSQL's programs.
        folder: empty, in one that PostgreSQL's user may enter.
        settings: of the server, beside its defaults; without `listen_addresses` it has its socket only.
    """

    def __init__(self, programs: Path, folder: Path, **settings: str) -> None:
        self.folder = folder
        self._programs = programs
        self._settings = {"listen_addresses": "", "unix_socket_directories": str(folder), **settings}
        self._log = folder / "postgres.log"
        self._process: subprocess.Popen[bytes] | None = None

    def create(self, *roles: str, options: tuple[str, ...] = ()) -> None:
        """Make the data directory with `options` of initdb, start the server, and make roles.

        Raises:
            DatabaseFailed: it does not start.
        """
        self.folder.chmod(0o700)
        own(self.folder)
        initialise(self._programs, self.folder, "data", *options)
        self.start()
        for role in roles:
            self._run("createuser", *self._connection(), f"--username={SUPERUSER}", role)

    def create_database(self, name: str, owner: str) -> None:
        self._run("createdb", *self._connection(), f"--username={SUPERUSER}", f"--owner={owner}", name)

    def url(self, role: str, database: str) -> str:
        """Return the URL of a database for a role, through the socket."""
        return f"postgresql://{role}@/{database}?host={quote(str(self.folder))}"

    def version(self) -> str:
        found = re.search(r"\d+(\.\d+)*", self._run("postgres", "--version"))
        return found[0] if found else "?"

    def start(self) -> None:
        """Start the server, after a stop too, and wait until it takes connections.

        Raises:
            DatabaseFailed: it has ended, or takes too long.
        """
        options = [f"--{name}={value}" for name, value in self._settings.items()]
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
        return (f"--host={self.folder}", f"--port={self._settings.get('port', 5432)}")

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
