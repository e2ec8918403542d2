"""Real PostgreSQL servers: started, stopped, killed, with a standby, and a database for each test.

A server runs from a folder of its own, as the user `postgres` if we are root. It has a unix socket for its
superuser, and an address of its own in 127.0.0.0/8 for the two roles of the product. A keeper (`keeper.py`)
kills and removes everything when the process that owns the folder ends.
"""

import asyncio
import fcntl
import json
import os
import pwd
import random
import select
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Literal, TypeAlias
from urllib.parse import quote

import asyncpg
import pytest

from bench.postgres import SUPERUSER, DatabaseFailed, find_programs, initialise, own, run_program
from support import keeper, leaks
from support.workers import LIMIT_S

ROLES = ("ledger_owner", "ledger_server")
"""Who migrates and owns the database, and as whom the product runs."""
PASSWORD = "ledger: secret"
"""Of both roles, where the server asks for one. It has to be quoted in a URL."""

MEMORY, DISK = Path("/dev/shm"), Path("/tmp")
"""Where a server's folder is. Not in the run's own, which the user `postgres` may not enter; and a socket's
path is short. In memory a new database takes 20 ms, on a disk 200."""

MIN_MEMORY_BYTES = 2 * 2**30
"""A container often has 64 MB there; a server takes 50 to 300."""
PREFIX = f"{leaks.NAME}postgres-{leaks.RUN}-"
PRISTINE = "pristine"
"""A data directory before its first start, in the folder of the shared server."""

SETTINGS = {
    "fsync": "off",  # what was written survives kill -9 of all processes, not of the machine
    "shared_buffers": "16MB",
    "max_connections": "100",
    "max_wal_size": "128MB",
    "min_wal_size": "32MB",
    "autovacuum": "off",  # a worker in the template of a new database makes it wait
    "dynamic_shared_memory_type": "mmap",  # in the data directory: kill -9 leaves nothing in /dev/shm
    "wal_retrieve_retry_interval": "100ms",  # of a standby whose primary starts again
}
"""What differs from PostgreSQL's own; a test may change them."""

Role = Literal["ledger_owner", "ledger_server"]
Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
Address = tuple[str, int]
Prepare = Callable[["Database"], Awaitable[None]]
_numbers = count(1)


def require_programs() -> Path:
    """Return the folder of the programs; skip the test without them, fail if POSTGRES names another."""
    folder = find_programs()
    if folder is None:
        pytest.skip(
            "PostgreSQL is not installed here: .ci/postgres installs it, and POSTGRES names its bin folder"
        )
    if not (folder / "initdb").is_file():
        pytest.fail(f"POSTGRES names {folder}, where no initdb is")
    return folder


@cache
def _parent() -> Path:
    if not os.access(MEMORY, os.W_OK) or shutil.disk_usage(MEMORY).total < MIN_MEMORY_BYTES:
        return DISK
    return MEMORY


def free_address() -> Address:
    """Return a free port at a loopback address that nothing else uses."""
    host = f"127.{random.randint(64, 254)}.{random.randint(0, 254)}.{random.randint(1, 254)}"
    with closing(socket.socket()) as free:
        free.bind((host, 0))
        return host, free.getsockname()[1]


@dataclass(slots=True)
class PostgresServer:
    """One data directory, and the server that runs on it.

    Attributes:
        home: the folder of this server and its standbys.
        name: the name of the data directory in it, and of the server to its primary.
        host: its own loopback address, so that no other process takes its port while it is down.
        port: its TCP port, also in the socket's name.
        settings: what its postgresql.conf says.
        auth: how roles that come over TCP prove who they are.
    """

    home: Path
    name: str
    host: str
    port: int
    settings: dict[str, str]
    auth: str = "trust"

    @classmethod
    def placed(cls, home: Path, name: str, settings: dict[str, str], auth: str) -> "PostgresServer":
        """Choose an address for a server; nothing runs yet."""
        return cls(home, name, *free_address(), settings, auth)

    @property
    def data(self) -> Path:
        return self.home / self.name

    @property
    def log(self) -> Path:
        return self.home / f"{self.name}.log"

    @property
    def address(self) -> Address:
        return self.host, self.port

    @property
    def pid(self) -> int:
        """The process id of its first process; it is in a file that a stopped server does not have."""
        return int((self.data / keeper.PID_FILE).read_text(encoding="utf-8").split()[0])

    @property
    def is_running(self) -> bool:
        return (self.data / keeper.PID_FILE).exists()

    async def create(self) -> None:
        await self._initialise()
        await self.start()
        async with self.connection() as superuser:
            for role in ROLES:
                await superuser.execute(f"CREATE ROLE {role} LOGIN PASSWORD '{PASSWORD}'")

    async def start(self) -> None:
        self._write_settings()
        wait = ("-w", "-t", str(int(LIMIT_S)))
        await self._run("pg_ctl", "start", "-D", str(self.data), "-l", str(self.log), "-s", *wait)

    async def kill(self) -> None:
        """Kill all processes of the server with SIGKILL, and wait until they are gone."""
        command = (sys.executable, "-I", "-S", keeper.__file__, "kill", str(self.data))
        process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.DEVNULL)
        assert await process.wait() == 0

    async def configure(self, **settings: str) -> None:
        """Change settings, and wait until all processes of the running server have them."""
        async with self.connection() as superuser:
            before = await superuser.fetchval("SELECT pg_conf_load_time()")
        self.settings |= settings
        self._write_settings()
        os.kill(self.pid, signal.SIGHUP)
        async with asyncio.timeout(LIMIT_S):
            while not await self._has_loaded_since(before):
                pass
        async with self.connection() as superuser:
            # The checkpointer tells the others whether to wait for a standby; it reads settings before this.
            await superuser.execute("CHECKPOINT")

    async def standby(self, name: str = "standby", *, synchronous: bool = True) -> "PostgresServer":
        """Start a copy that follows this server; if synchronous, each later commit waits for it.

        Args:
            name: of its data directory, and in `synchronous_standby_names`.
            synchronous: else a commit that was acknowledged may be missing in it.
        """
        inherited = {key: value for key, value in self.settings.items() if key != "synchronous_standby_names"}
        copy = PostgresServer.placed(self.home, name, inherited, self.auth)
        source = ("-h", str(self.home), "-p", str(self.port), "-U", SUPERUSER)
        options = ("--no-sync", "--checkpoint=fast", "--wal-method=stream", "--write-recovery-conf")
        await self._run("pg_basebackup", "-D", str(copy.data), *source, *options)
        await copy.start()
        if synchronous:
            await self.configure(synchronous_standby_names=name)
        await self._followed_by(name, "sync" if synchronous else "async")
        return copy

    async def promote(self) -> None:
        """Make a standby a primary; return when it takes writes."""
        async with self.connection() as superuser:
            assert await superuser.fetchval("SELECT pg_promote(wait_seconds => $1)", int(LIMIT_S))

    @asynccontextmanager
    async def connection(self, database: str = "postgres") -> AsyncIterator[Connection]:
        connection = await asyncpg.connect(
            host=str(self.home), port=self.port, user=SUPERUSER, database=database, timeout=LIMIT_S
        )
        try:
            yield connection
        finally:
            await connection.close()

    def url(self, database: str, role: Role, *addresses: Address) -> str:
        """Return the URL of a database for a role.

        Args:
            database: its name.
            role: who connects.
            addresses: of a proxy, or of several servers; without them, this server's.
        """
        hosts = ",".join(f"{host}:{port}" for host, port in addresses or [self.address])
        password = f":{quote(PASSWORD, safe='')}" if self.auth != "trust" else ""
        return f"postgresql://{role}{password}@{hosts}/{database}"

    @asynccontextmanager
    async def database(self, prepare: Prepare | None = None) -> AsyncIterator["Database"]:
        """Make a database that belongs to `ledger_owner`, and drop it in the end with its connections.

        Args:
            prepare: fills a template, once in the life of this server; the database is a copy of it.
        """
        template = await self._template(prepare) if prepare else "template1"
        made = Database(self, f"ledger_{os.getpid()}_{next(_numbers)}")
        await self._create_database(made.name, template)
        try:
            yield made
        finally:
            if self.is_running:
                async with self.connection() as superuser:
                    await superuser.execute("SET synchronous_commit = local")  # its standby may be gone
                    await superuser.execute(f"DROP DATABASE IF EXISTS {made.name} WITH (FORCE)")

    async def _initialise(self) -> None:
        """Make the data directory: a copy of the run's, if there is one, takes a tenth of the time."""
        pristine = _shared_home() / PRISTINE
        shutil.rmtree(self.data, ignore_errors=True)  # of an attempt that failed
        if pristine.exists():
            await self._run("cp", "-a", str(pristine), str(self.data))
        else:
            await asyncio.to_thread(initialise, require_programs(), self.home, self.name, "--no-sync")

    async def _create_database(self, name: str, template: str) -> None:
        async with self.connection() as superuser:
            await superuser.execute(f'CREATE DATABASE "{name}" OWNER {ROLES[0]} TEMPLATE "{template}"')

    async def _template(self, prepare: Prepare) -> str:
        """Return the name of the database that `prepare` has filled; the first caller fills it."""
        name = f"{prepare.__module__}.{prepare.__qualname__}"[-50:]
        async with self.connection() as superuser:
            await superuser.execute("SELECT pg_advisory_lock(1)")  # until the connection ends
            if await superuser.fetchval("SELECT true FROM pg_database WHERE datname = $1", name):
                return name
            await superuser.execute(f'DROP DATABASE IF EXISTS "{name} begun" WITH (FORCE)')
            await self._create_database(f"{name} begun", "template1")
            await prepare(Database(self, f"{name} begun"))
            await superuser.execute(f'ALTER DATABASE "{name} begun" ALLOW_CONNECTIONS false')
            await superuser.execute(f'ALTER DATABASE "{name} begun" RENAME TO "{name}"')
        return name

    async def _has_loaded_since(self, before: object) -> bool:
        async with self.connection() as superuser:
            return bool(await superuser.fetchval("SELECT pg_conf_load_time() <> $1", before))

    async def _followed_by(self, name: str, state: str) -> None:
        """Wait until a standby streams, and counts as synchronous or not."""
        found = (
            "SELECT true FROM pg_stat_replication"
            " WHERE application_name = $1 AND state = 'streaming' AND sync_state = $2"
        )
        async with asyncio.timeout(LIMIT_S), self.connection() as superuser:
            while not await superuser.fetchval(found, name, state):  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.01)

    def _write_settings(self) -> None:
        own = {
            "listen_addresses": self.host,
            "port": str(self.port),
            "unix_socket_directories": str(self.home),
            "cluster_name": self.name,
        }
        lines = [f"{key} = '{value}'\n" for key, value in {**SETTINGS, **self.settings, **own}.items()]
        (self.data / "postgresql.conf").write_text("".join(lines), encoding="utf-8")
        rules = [
            "local all all trust\n",
            "local replication all trust\n",
            f"host all {SUPERUSER} 0.0.0.0/0 reject\n",
            f"host all all 127.0.0.0/8 {self.auth}\n",
        ]
        (self.data / "pg_hba.conf").write_text("".join(rules), encoding="utf-8")

    async def _run(self, program: str, *arguments: str) -> None:
        """Run a program, one of PostgreSQL's if it has it, to its end as the servers' user."""
        found = shutil.which(program, path=f"{require_programs()}:{os.defpath}") or program
        try:
            await asyncio.to_thread(run_program, self.home, found, *arguments)
        except DatabaseFailed as failure:
            log = self.log.read_text(encoding="utf-8")[-2000:] if self.log.exists() else ""
            raise RuntimeError(f"{failure}{log}") from None


@dataclass(frozen=True, slots=True)
class Database:
    """A database of a server, and its URLs for the two roles."""

    server: PostgresServer
    name: str

    @property
    def owner_url(self) -> str:
        return self.url("ledger_owner")

    @property
    def server_url(self) -> str:
        return self.url("ledger_server")

    def url(self, role: Role, *addresses: Address) -> str:
        """Return the URL for a role, through other addresses than the server's if there are any."""
        return self.server.url(quote(self.name), role, *addresses)


@asynccontextmanager
async def postgres_server(
    auth: Literal["trust", "scram-sha-256"] = "trust",
) -> AsyncIterator[PostgresServer]:
    """Start a server for one test, which may kill it; its standbys end with it.

    `auth` is how roles that come over TCP prove who they are.
    """
    require_programs()
    home = Path(tempfile.mkdtemp(prefix=PREFIX, dir=_parent()))
    own(home)
    _start_keeper(home, os.getpid())
    try:
        server = PostgresServer.placed(home, "main", {}, auth)
        await server.create()
        yield server
    finally:
        await asyncio.to_thread(end_keeper, home)


async def join_shared_server() -> PostgresServer:
    """Return the server that all processes of this test run share; the first one starts it.

    It ends with the controlling process of the run: by `end_shared_server`, else its keeper ends it.
    """
    require_programs()
    home = _shared_home()
    with _locked(home):
        own(home)
        if not (home / "keeper.pid").exists():
            _start_keeper(home, _controller())
        record = home / "server.json"
        if not record.exists():
            server = PostgresServer.placed(home, "main", {}, "trust")
            await server._initialise()
            server.data.rename(home / PRISTINE)
            await server.create()
            record.write_text(json.dumps(server.address), encoding="utf-8")
        host, port = json.loads(record.read_text(encoding="utf-8"))
    return PostgresServer(home, "main", host, port, {})


def end_shared_server() -> None:
    """End the server that this process controls, if a test has started it."""
    if _controller() == os.getpid() and (_shared_home() / "keeper.pid").exists():
        end_keeper(_shared_home())


def _controller() -> int:
    """Return the id of the process that controls the test run."""
    return os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()


def _shared_home() -> Path:
    return _parent() / f"{PREFIX}shared"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make a folder if it is not there, and hold its lock."""
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    assert folder.owner() in {pwd.getpwuid(os.geteuid()).pw_name, SUPERUSER}, f"{folder} is another user's"
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _start_keeper(home: Path, owner: int) -> None:
    """Start the keeper of a folder, in a session of its own: a signal to our group does not reach it."""
    null = [(os.POSIX_SPAWN_OPEN, descriptor, "/dev/null", os.O_RDWR, 0) for descriptor in range(3)]
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, "-I", "-S", keeper.__file__, "watch", str(home), str(owner)],
        leaks.MARKED,
        file_actions=null,
        setsid=True,
        setsigmask=[signal.SIGTERM],
    )
    (home / "keeper.pid").write_text(str(pid), encoding="utf-8")


def end_keeper(home: Path) -> None:
    """Have the keeper kill and remove everything, and wait until it has."""
    pid = int((home / "keeper.pid").read_text(encoding="utf-8"))
    with suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        select.select([pidfd], [], [], LIMIT_S)
        os.close(pidfd)
    with suppress(ChildProcessError):  # another process of the run has started it
        os.waitpid(pid, 0)
