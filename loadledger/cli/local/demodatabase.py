"""The database of `loadledger demo --cluster`: a PostgreSQL server of its own, in a temporary directory.

It listens at a Unix socket in a directory that only its user may enter, so its roles need no passwords. Its
programs make the roles and the database, so there is no SQL here.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from runtime.process.forkserver import die_with

DEBIAN = Path("/usr/lib/postgresql")
"""Where Debian and Ubuntu have a folder for each major version; none of them is on PATH."""

SUPERUSER = "postgres"
"""The user of the system that PostgreSQL runs as under root, and the superuser in the database."""

OWNER, SERVER, DATABASE = "loadledger_owner", "loadledger", "loadledger"
"""Who migrates, as whom the nodes connect, and to which database."""

INSTALL = (
    f"PostgreSQL is not installed: initdb is neither on PATH nor in {DEBIAN}/*/bin "
    "(Debian, Ubuntu: apt install postgresql; Fedora: dnf install postgresql-server)"
)

_NEW = ("--no-sync", "--encoding=UTF8", "--locale=C", "--auth=trust")
"""Options of initdb; who may enter the folder may be any role."""

START_LIMIT_S = 60
STOP_LIMIT_S = 30
_LOG_TAIL_CHARACTERS = 2000


class DatabaseMissing(Exception):
    """No PostgreSQL server can run here; the text says what to install."""


class DatabaseFailed(Exception):
    """A program of PostgreSQL failed; the text has what it printed."""


@dataclass(frozen=True, slots=True)
class DemoDatabase:
    """A running PostgreSQL server with an empty database and its two roles.

    Attributes:
        version: of PostgreSQL, as it says.
        folder: of its socket.
    """

    version: str
    folder: Path

    def url(self, role: str) -> str:
        return f"postgresql://{role}@/{DATABASE}?host={quote(str(self.folder))}"


def find_programs() -> Path:
    """Return the folder of PostgreSQL's programs: those on PATH, else the newest of Debian's.

    Raises:
        DatabaseMissing: there are none.
    """
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    versions = sorted(DEBIAN.glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    if not versions:
        raise DatabaseMissing(INSTALL)
    return versions[-1].parent


def check_user() -> None:
    """Check that PostgreSQL has a user to run as.

    Raises:
        DatabaseMissing: it would have to run as root.
    """
    if os.geteuid() == 0:
        try:
            pwd.getpwnam(SUPERUSER)
        except KeyError:
            text = f"PostgreSQL does not run as root, and there is no user {SUPERUSER}: run as another user"
            raise DatabaseMissing(text) from None


@contextmanager
def open_demo_database(programs: Path, folder: Path) -> Iterator[DemoDatabase]:
    """Create a database in a new folder and start its server; it is stopped in the end.

    Args:
        programs: folder of PostgreSQL's programs.
        folder: that does not exist yet, in one that the server's user may enter.

    Raises:
        DatabaseFailed: it does not start.
    """
    folder.mkdir(mode=0o700)
    if os.geteuid() == 0:
        shutil.chown(folder, SUPERUSER, SUPERUSER)
    run = _Programs(programs, folder)
    run("initdb", *_NEW, f"--username={SUPERUSER}", "data")
    with run.server() as process:
        run.wait_until_ready(process)
        for role in (OWNER, SERVER):
            run("createuser", *run.connection, role)
        run("createdb", *run.connection, f"--owner={OWNER}", DATABASE)
        yield DemoDatabase(run.version(), folder)


@dataclass(frozen=True, slots=True)
class _Programs:
    """PostgreSQL's programs, run in a folder as its user.

    Each has a session of its own, so that Ctrl-C at the terminal reaches the demo alone, which stops them.
    """

    programs: Path
    folder: Path

    def __call__(self, program: str, *arguments: str) -> str:
        """Run a program to its end; return what it printed."""
        done: subprocess.CompletedProcess[str] = subprocess.run(  # noqa: S603 - PostgreSQL's own
            [str(self.programs / program), *arguments],
            **self._surroundings(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode:
            raise DatabaseFailed(f"{program} ended with {done.returncode}: {done.stdout.strip()}")
        return done.stdout

    @property
    def connection(self) -> tuple[str, ...]:
        """How the programs reach the server."""
        return (f"--host={self.folder}", f"--username={SUPERUSER}")

    def version(self) -> str:
        """Return the version of PostgreSQL."""
        found = re.search(r"\d+(\.\d+)*", self("postgres", "--version"))
        return found[0] if found else "?"

    @contextmanager
    def server(self) -> Iterator[subprocess.Popen[bytes]]:
        """Start the server; stop it in the end, which ends its connections."""
        settings = {"listen_addresses": "", "unix_socket_directories": str(self.folder)}
        options = [f"--{name}={value}" for name, value in settings.items()]
        with (
            self._log.open("wb") as log,
            subprocess.Popen(  # noqa: S603 - as above
                [str(self.programs / "postgres"), "-D", "data", *options],
                **self._surroundings(),
                preexec_fn=partial(die_with, os.getpid(), signal.SIGINT),  # noqa: PLW1509 - no other threads
                stdout=log,
                stderr=log,
            ) as process,
        ):
            try:
                yield process
            finally:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(STOP_LIMIT_S)
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGQUIT)

    def wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        """Wait until the server takes connections.

        Raises:
            DatabaseFailed: it has ended, or takes too long.
        """
        deadline_s = time.monotonic() + START_LIMIT_S
        while True:
            try:
                self("pg_isready", f"--host={self.folder}")
            except DatabaseFailed:
                if process.poll() is not None or time.monotonic() > deadline_s:
                    said = self._log.read_text(encoding="utf-8", errors="replace")[-_LOG_TAIL_CHARACTERS:]
                    raise DatabaseFailed(f"PostgreSQL does not start: {said.strip()}") from None
                time.sleep(0.05)
            else:
                return

    @property
    def _log(self) -> Path:
        return self.folder / "postgres.log"

    def _surroundings(self) -> Mapping[str, Any]:
        is_root = os.geteuid() == 0
        identity = {"user": SUPERUSER, "group": SUPERUSER, "extra_groups": []} if is_root else {}
        environment = {"PATH": os.defpath, "LC_ALL": "C"}  # without libpq's variables, such as PGHOST
        return {
            **identity,
            "cwd": self.folder,
            "env": environment,
            "stdin": subprocess.DEVNULL,
            "start_new_session": True,
        }
