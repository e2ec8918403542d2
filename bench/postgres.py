"""A PostgreSQL server of the bench's own, with PostgreSQL's defaults (`fsync`, `synchronous_commit`).

It listens on 127.0.0.1, and its folder is on the disk.
"""

import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path

from loadledger.cli import postgres
from nodes.postgres import connection as databases
from nodes.postgres.schema import migrate

MISSING = "PostgreSQL is not installed: install its server, or name the folder of initdb in POSTGRES"
OWNER, ROLE = "ledger_owner", "ledger_server"
"""The role that migrates, and the one that servers have."""
_numbers = count(1)


def find_programs() -> Path | None:
    """Return the folder of `initdb`: what POSTGRES names, else the one that `demo --cluster` finds."""
    if named := os.environ.get("POSTGRES"):
        return Path(named)
    try:
        return postgres.find_programs()
    except postgres.DatabaseMissing:
        return None


class Postgres(postgres.PostgresServer):
    """A server with ledgers.

    Args:
        programs: the folder of PostgreSQL's programs.
        folder: of its data directory, its socket and its log.
        port: on 127.0.0.1.
    """

    def __init__(self, programs: Path, folder: Path, port: int) -> None:
        super().__init__(programs, folder, listen_addresses="127.0.0.1", port=str(port))
        self._port = port

    def create_ledger(self) -> str:
        """Create an empty ledger in a database of its own, and return the address for servers."""
        name = f"ledger_{next(_numbers)}"
        self.create_database(name, OWNER)
        asyncio.run(_migrate(self.address(name, OWNER)))
        return self.address(name)

    def address(self, database: str, role: str = ROLE) -> str:
        """Return the address of a database."""
        return f"postgresql://{role}@127.0.0.1:{self._port}/{database}"

    def owners(self, address: str) -> str:
        """Return the address of a ledger for its owner."""
        return self.address(address.rpartition("/")[2], OWNER)


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
        server.create(OWNER, ROLE)
        yield server
    finally:
        server.stop()
