"""`loadledger serve` and other commands as processes: started, asked, stopped, killed, at a terminal."""

import asyncio
import os
import pty
import re
import shutil
import signal
import ssl
import sys
import termios
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from select import select

import aiohttp

from events.audit.verify import Verification, verify
from events.sqlite.datalock import LEDGER
from events.sqlite.listing import open_reader
from events.sqlite.queries import EVENTS_PER_READ
from events.types import Event
from runtime.memory import list_descendants
from server.config import Config
from support.http import Api
from support.leaks import MARKED
from support.workers import hold, until, wait_gone

MODULE = (sys.executable, "-P", "-m", "loadledger")  # -P: the installed package, not the folder we are in
SCRIPT = (str(Path(sys.executable).with_name("loadledger")),)
"""The two ways to call the command."""


def limited(**limits: float | str) -> tuple[str, ...]:
    """Return the command with other limits than users have, and none of reads.

    Args:
        limits: fields of `Config` that are no settings.
    """
    limits = {"limit_reads": "off", **limits}
    script = (
        "from server.config import Config\n"
        "from loadledger.cli.main import main\n"
        f"limits = {limits!r}\n"
        "assert limits.keys() <= Config.__init__.__kwdefaults__.keys()\n"
        "Config.__init__.__kwdefaults__.update(limits)\n"
        "main()\n"
    )
    return (sys.executable, "-P", "-c", script)


CONFINED_LESS = re.compile(r"WARNING +workers are (?:not )?confined\b.*")
"""The warning at the start of a server on a kernel without Landlock."""
APART = "--host=127.7.7.7"
"""For a server that starts again on its port: another process could take one of 127.0.0.1 meanwhile."""

LIMIT_S = 120.0
"""Nothing takes this long, even on a busy machine; a bug fails a test instead of hanging it."""


@dataclass(slots=True)
class Server:
    """A running `serve`.

    Attributes:
        process: the command.
        url: what it printed.
        api: a client of it.
        output: all that it wrote to stderr so far stands in this file.
    """

    process: asyncio.subprocess.Process
    url: str
    api: Api
    output: Path
    _pidfds: list[int] = field(default_factory=list)

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self.process.pid

    def children(self) -> list[int]:
        """Return the process ids of the fork server and its workers, the fork server first."""
        return list_descendants(self.pid)

    def warnings(self) -> list[str]:
        """Return the lines on stderr without events, and without what this kernel cannot confine."""
        lines = _text(self.output).splitlines()
        return [line for line in lines if " event=" not in line and not CONFINED_LESS.search(line)]

    async def logged(self, text: str) -> str:
        """Wait until a text is on stderr, which a thread of the server's writes; return all that is there."""
        await until(lambda: text in _text(self.output))
        return _text(self.output)

    def worker(self) -> int:
        """Return the process id of the newest worker that has a name of its own.

        A process that was forked just now has the fork server's name. If it is stopped before it has its own,
        it outlives the server: the kernel does not know yet that it is to end with the fork server.
        """
        fork_server, *workers = self.children()
        named = [pid for pid in workers if _command_line(pid) != _command_line(fork_server)]
        return max(named, key=started)

    def send(self, number: signal.Signals, *, to_group: bool = False) -> None:
        """Send a signal to the server, or to its whole process group as a terminal does."""
        if to_group:
            os.killpg(self.pid, number)
        else:
            self.process.send_signal(number)

    async def stop(self, number: signal.Signals = signal.SIGTERM, *, to_group: bool = False) -> int:
        """Send a signal, wait for the end and return the exit code."""
        self._hold_children()
        self.send(number, to_group=to_group)
        return await self.ended()

    async def kill(self) -> None:
        """Kill the server with SIGKILL, and wait until all its processes are gone."""
        await self.stop(signal.SIGKILL)
        await self.nothing_left()

    async def ended(self) -> int:
        """Wait for the end and return the exit code; negative is a signal."""
        async with asyncio.timeout(LIMIT_S):
            return await self.process.wait()

    async def nothing_left(self) -> None:
        """Wait until all child processes of the server are gone."""
        held, self._pidfds = self._pidfds, []
        assert await asyncio.to_thread(wait_gone, held)

    def _hold_children(self) -> None:
        self._pidfds += hold(list_descendants(self.pid))


QUIET = {"LOADLEDGER_LOG_LEVEL": "warning"}
"""No log lines unless a test asks for them."""
INFORMED = {"LOADLEDGER_LOG_LEVEL": "info"}
"""With the line that has the address of gRPC."""


@asynccontextmanager
async def serving(
    config: Config,
    *arguments: str,
    command: Sequence[str] = MODULE,
    environment: Mapping[str, str] | None = None,
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[Server]:
    """Start `serve` on the configuration's repository and data, on a free port; kill it in the end.

    Args:
        config: the directories and the audience of tokens; other settings are not passed on.
        arguments: of `serve`.
        command: the command line of `loadledger`.
        environment: settings, with `QUIET`.
        tls: the trust of the client, for a server with a certificate.
    """
    output = config.data.with_name(f"{config.data.name[:50]}.stderr")
    with output.open("ab") as stderr:
        process = await asyncio.create_subprocess_exec(
            *(*command, "serve", "--port=0", f"--repository={config.repository}", f"--data={config.data}"),
            *arguments,
            env=clean_environment() | QUIET | dict(environment or {}),
            cwd=config.repository,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,
        )
    server = None
    try:
        url = await _announced(process, output)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=tls or True)) as session:
            server = Server(process, url, Api(session, url, config), output)
            yield server
    finally:
        if process.returncode is None:
            if server is not None:
                await server.kill()
            else:
                process.kill()
        await process.communicate()
        if server is not None:
            await server.nothing_left()


async def refused_start(config: Config, *arguments: str, command: Sequence[str] = MODULE) -> str:
    """Run `serve`, which must refuse to start without a traceback; returns what it wrote to stderr."""
    process = await asyncio.create_subprocess_exec(
        *(*command, "serve", "--port=0", f"--repository={config.repository}", f"--data={config.data}"),
        *arguments,
        env=clean_environment(),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert (process.returncode, out) == (2, b"")
    assert b"Traceback" not in err
    return err.decode()


def started(pid: int) -> int:
    """Return when a process started, in clock ticks since boot."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])  # proc_pid_stat(5)


def _command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


NO_DEVICES = {"LOADLEDGER_VISIBLE_DEVICES": "none"}
"""A server has the devices that its test gives it, and not those of this machine."""


NO_AUTHORITIES = {"SSL_CERT_FILE": str(Path(__file__).with_name("authority.pem"))}
"""A process trusts whom its test says, else one whose key is thrown away. aiohttp's client, which each server
imports, reads all authorities: the 150 of this machine in a tenth of a second."""


def clean_environment() -> dict[str, str]:
    """Return this process's environment without loadledger's settings, and without devices."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LOADLEDGER_")}
    return kept | NO_DEVICES


async def events(config: Config) -> list[Event]:
    """Read the whole ledger."""
    found: list[Event] = []
    async with open_reader(config.data / LEDGER) as reader:
        while page := await reader.events(len(found), EVENTS_PER_READ):
            found += page
    return found


def verified(config: Config) -> Verification:
    """Verify the ledger, which must be sound, and return the verification."""
    verification = verify(config.data / LEDGER)
    assert verification.verified, verification
    return verification


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


async def _announced(process: asyncio.subprocess.Process, output: Path) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(LIMIT_S):
        line = (await process.stdout.readline()).decode()
    found = re.fullmatch(r"loadledger is ready at (https?://\S+:\d+)\n", line)
    assert found, f"{line!r} {_text(output)}"
    return found[1]


@contextmanager
def standing(
    repository: Path, *arguments: str, environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Start `serve` on a repository, and on `data` beside it; stop it in the end."""
    config = Config(repository=repository, data=repository.with_name("data"))
    with asyncio.Runner() as runner:
        context = serving(config, *arguments, environment=environment)
        server = runner.run(context.__aenter__())
        try:
            yield server
        finally:
            runner.run(context.__aexit__(None, None, None))


def bearer(server: Server, *roles: str) -> dict[str, str]:
    """Return the header that a client has to send."""
    return {"Authorization": f"Bearer {server.api.token(*roles)}"}


def address(server: Server) -> str:
    """Return host and port, as some clients want them."""
    return server.url.removeprefix("http://")


def find_gateways(server: Server) -> list[tuple[str, int]]:
    """Return address and process id of each process for gRPC that a server has started."""
    found = re.findall(r"gRPC at (\S+:\d+), process (\d+)", _text(server.output))
    return [(address, int(pid)) for address, pid in found]


def grpc_address(server: Server) -> str:
    """Return host and port of gRPC, for a server with `--grpc-port=0` that is `INFORMED`.

    A thread writes the log, so that its line may come after that of the ready server on stdout.
    """
    deadline = time.monotonic() + LIMIT_S
    while not (found := find_gateways(server)):
        assert time.monotonic() < deadline, _text(server.output)
        time.sleep(0.002)
    return found[-1][0]


ROOT = Path(__file__).parents[2]
PACKAGES = ("answers", "events", "features", "loadledger", "migrations", "nodes", "runtime", "server")


def copy_examples(here: Path) -> None:
    """Copy the example models and their inputs into a folder."""
    ignored = shutil.ignore_patterns("*.py", "__pycache__")
    shutil.copytree(ROOT / "examples", here / "examples", ignore=ignored)


def copy_tree(here: Path) -> None:
    """Copy all files that an installation needs into a new folder."""
    here.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, here)
    for name in (*PACKAGES, "examples"):
        shutil.copytree(ROOT / name, here / name, ignore=shutil.ignore_patterns("__pycache__"))


PYTHON_WITHOUT_PIP = """#!/bin/sh
[ "$*" = "-m venv .venv" ] || exec {python} "$@"
{python} -m venv --without-pip .venv
printf '#!/bin/sh\\nexec "${{0%%/*}}/python" -m pip "$@"\\n' > .venv/bin/pip
chmod +x .venv/bin/pip
"""


def bare_environment(folder: Path) -> dict[str, str]:
    """Return an environment with Python but without loadledger, for a page that installs it.

    pip works without a network: it builds with the packages of this environment, which come after those that
    it installs. A new environment takes pip from there, too: to install one takes 7 s.
    """
    programs = folder / "programs"
    programs.mkdir()
    python = Path(sys.base_prefix, "bin", f"python{sys.version_info.major}.{sys.version_info.minor}")
    (programs / "python3").write_text(PYTHON_WITHOUT_PIP.format(python=python))
    (programs / "python3").chmod(0o755)
    libraries = [entry for entry in sys.path if Path(entry).name in {"site-packages", "dist-packages"}]
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_QUIET": "1"}
    offline["PIP_NO_COMPILE"] = "1"  # half of the modules are never imported
    return fresh_environment(folder / "home") | {
        "PATH": os.pathsep.join([str(programs), os.defpath]),
        "PYTHONPATH": os.pathsep.join(libraries),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        **offline,
    }


def fresh_environment(home: Path) -> dict[str, str]:
    """Return an environment in which loadledger is installed, and which says no more than tests need."""
    home.mkdir(exist_ok=True)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {"PATH": path, "HOME": str(home), "LANG": "C.UTF-8", **NO_DEVICES, **NO_AUTHORITIES, **MARKED}


TERMINAL_LIMIT_S = 60.0
"""Nothing takes this long; a bug fails a test instead of hanging it."""
CTRL_C = b"\x03"
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """A process at a terminal of its own.

    Attributes:
        pid: the process.
        shown: its output so far.
    """

    def __init__(self, pid: int, descriptor: int) -> None:
        self.pid = pid
        self.shown = ""
        self._descriptor = descriptor
        self._ended = False

    @property
    def plain(self) -> str:
        """The output without escape sequences."""
        return _ESCAPES.sub("", self.shown)

    async def until(self, pattern: str) -> None:
        """Wait until the output contains a pattern."""
        await asyncio.to_thread(self._until, pattern)

    async def end(self) -> int:
        """Wait for the end and return the exit code."""
        return await asyncio.to_thread(self._end)

    def press(self, keys: bytes) -> None:
        """Press keys."""
        os.write(self._descriptor, keys)

    def resize(self, rows: int, columns: int) -> None:
        """Give the terminal another size, of which LINES and COLUMNS say nothing."""
        termios.tcsetwinsize(self._descriptor, (rows, columns))

    def close(self) -> None:
        """Kill it if it has not ended."""
        if not self._ended:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._descriptor)

    def _until(self, pattern: str) -> None:
        deadline = time.monotonic() + TERMINAL_LIMIT_S
        while not re.search(pattern, self.plain):
            assert self._read(deadline), f"ended without {pattern!r}: {self.plain}"

    def _end(self) -> int:
        deadline = time.monotonic() + TERMINAL_LIMIT_S
        while self._read(deadline):
            pass
        _, status = os.waitpid(self.pid, 0)
        self._ended = True
        return os.waitstatus_to_exitcode(status)

    def _read(self, deadline: float) -> bool:
        assert select([self._descriptor], [], [], max(0.0, deadline - time.monotonic()))[0], self.plain
        try:
            data = os.read(self._descriptor, 65536)
        except OSError:  # EIO: nobody holds the other end any more
            return False
        self.shown += data.decode(errors="replace")
        return bool(data)


@contextmanager
def at_terminal(
    *arguments: str, environment: Mapping[str, str], command: Sequence[str] = MODULE
) -> Iterator[Terminal]:
    """Run the command at a terminal of 24 lines with 120 columns."""
    surroundings = clean_environment() | {"TERM": "xterm", "LINES": "24", "COLUMNS": "120"}
    surroundings.pop("NO_COLOR", None)
    surroundings.update(environment)
    pid, descriptor = _spawn([*command, *arguments], surroundings)
    terminal = Terminal(pid, descriptor)
    try:
        yield terminal
    finally:
        terminal.close()


def _spawn(command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, int]:
    """Start a process whose terminal is a new one; no Python runs between fork and exec."""
    ours, theirs = pty.openpty()
    try:
        # A session of its own whose first terminal, opened by its name, is the one that Ctrl-C comes from.
        pid = os.posix_spawn(
            command[0],
            list(command),
            environment,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.ttyname(theirs), os.O_RDWR, 0),
                (os.POSIX_SPAWN_DUP2, 0, 1),
                (os.POSIX_SPAWN_DUP2, 0, 2),
            ],
            setsid=True,
            setsigdef=[signal.SIGINT],
        )
    finally:
        os.close(theirs)
    return pid, ours
