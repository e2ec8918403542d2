"""A PostgreSQL server of the bench's own: its programs, its folder on the disk, and empty ledgers in it.

It runs with PostgreSQL's defaults, `fsync` and `synchronous_commit` among them, and listens on 127.0.0.1. As
root it runs as the user `postgres`, because it refuses to run as root.
"""

import asyncio
import os
import pwd
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from events.postgres import connection as databases
from events.postgres.schema import migrate
from loadledger.cli.local import demodatabase

OWNER, ROLE = "ledger_owner", "ledger_server"
"""The role that migrates, and the one that servers have."""
LIMIT_S = 60
"""For a start: after a kill it also reads what was not written yet."""
_numbers = count(1)


def find_programs() -> Path | None:
    """Return the folder of `initdb`: what POSTGRES names, else the one that `demo --cluster` finds."""
    if named := os.environ.get("POSTGRES"):
        return Path(named)
    try:
        return demodatabase.find_programs()
    except demodatabase.DatabaseMissing:
        return None


@dataclass(frozen=True, slots=True)
class Postgres:
    """A server.

    Args:
        programs: the folder of PostgreSQL's programs.
        folder: of its data directory, its socket and its log.
        port: on 127.0.0.1.
    """

    programs: Path
    folder: Path
    port: int

    def start(self) -> None:
        """Start it, and return when it takes connections."""
        settings = f"-c listen_addresses=127.0.0.1 -p {self.port} -k {self.folder}"
        wait = ("-w", "-t", str(LIMIT_S), "-l", self.folder / "log")
        self._run("pg_ctl", "start", "-D", self._data, "-o", settings, *wait)

    def stop(self) -> None:
        """Stop it; connections end at once, and what was committed is on the disk."""
        self._run("pg_ctl", "stop", "-D", self._data, "-m", "fast", "-w", "-t", str(LIMIT_S))

    def create_ledger(self) -> str:
        """Create an empty ledger in a database of its own, and return the address for servers."""
        name = f"ledger_{next(_numbers)}"
        asyncio.run(self._create(name))
        return self.address(name)

    def address(self, database: str, role: str = ROLE) -> str:
        """Return the address of a database."""
        return f"postgresql://{role}@127.0.0.1:{self.port}/{database}"

    def owners(self, address: str) -> str:
        """Return the address of a ledger for its owner."""
        return self.address(address.rpartition("/")[2], OWNER)

    def version(self) -> str:
        """Return the version, as `postgres --version` prints it."""
        return self._run("postgres", "--version").split(maxsplit=2)[2].strip()

    def initialise(self) -> None:
        """Make the data directory; the owner of the ledgers is the superuser, and has no password."""
        options = ("--encoding=UTF8", "--locale=C", "--auth=trust", f"--username={OWNER}")
        self._run("initdb", "-D", self._data, *options)
        self.start()
        asyncio.run(self._execute("postgres", f"CREATE ROLE {ROLE} LOGIN"))

    @property
    def _data(self) -> Path:
        return self.folder / "data"

    async def _create(self, name: str) -> None:
        await self._execute("postgres", f"CREATE DATABASE {name}")
        connection = await databases.connect(self.address(name, OWNER))
        await migrate(connection, ROLE)
        await databases.close(connection)

    async def _execute(self, database: str, statement: str) -> None:
        connection = await databases.connect(self.address(database, OWNER))
        await connection.execute(statement)
        await databases.close(connection)

    def _run(self, program: str, *arguments: str | Path) -> str:
        """Run one of PostgreSQL's programs as the server's user, and return what it printed."""
        output = self.folder / "output"  # a pipe would be open as long as the server runs
        with output.open("w") as sink:
            done = subprocess.run(  # noqa: S603 - PostgreSQL's programs and our arguments
                [self.programs / program, *arguments],
                cwd=self.folder,
                env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                check=False,
                **_identity(),
            )
        if done.returncode:
            raise SystemExit(f"{program} ended with {done.returncode}\n{output.read_text()}")
        return output.read_text()


def find_free_port() -> int:
    """Return a port of 127.0.0.1 on which nothing listens."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@contextmanager
def running(folder: Path, programs: Path) -> Iterator[Postgres]:
    """Start a server, and stop it at the end.

    Args:
        folder: An empty directory on a disk, which the server's user can reach.
        programs: What `find_programs` has found.
    """
    if (user := _server_user()) is not None:
        os.chown(folder, user.pw_uid, user.pw_gid)
    server = Postgres(programs, folder, find_free_port())
    try:
        server.initialise()
        yield server
    finally:
        with suppress(SystemExit):  # it is not running
            server.stop()


def _server_user() -> pwd.struct_passwd | None:
    """Return as whom the server runs; None is our own user."""
    if os.geteuid():
        return None
    with suppress(KeyError):
        return pwd.getpwnam("postgres")
    return pwd.getpwnam("nobody")


def _identity() -> dict[str, Any]:
    user = _server_user()
    return {} if user is None else {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
