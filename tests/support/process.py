"""`loadledger serve` as a process of its own: started, asked, stopped or killed, and nothing of it left."""

import asyncio
import os
import re
import signal
import ssl
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from events.reader import PAGE, open_reader
from events.types import Event
from events.verify import Verification, verify
from runtime.memory import descendants
from server.app import LEDGER
from server.config import Config
from support.http import Api
from support.workers import wait_gone

MODULE = (sys.executable, "-P", "-m", "loadledger")  # -P: the installed package, not the folder we are in
SCRIPT = (str(Path(sys.executable).with_name("loadledger")),)
"""The two ways to call the command."""
UNHURRIED = (sys.executable, "-P", str(Path(__file__).with_name("idlemachine.py")))
"""Called so, it prepares models however busy the machine is."""

APART = "--host=127.7.7.7"
"""For a server that is started again on its port: on 127.0.0.1 another could be given it meanwhile."""

LIMIT_S = 120.0
"""Nothing here takes this long, on a busy machine either; so a bug fails a test and does not hang it."""


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
        return descendants(self.pid)

    def worker(self) -> int:
        """Return the process id of the newest worker."""
        return max(self.children()[1:], key=started)

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
        """Kill the server as nothing can prevent, and wait until no process of it is left."""
        await self.stop(signal.SIGKILL)
        await self.nothing_left()

    async def ended(self) -> int:
        """Wait for the end and return the exit code; negative is a signal."""
        async with asyncio.timeout(LIMIT_S):
            return await self.process.wait()

    async def nothing_left(self) -> None:
        """Wait until all processes that the server had made are gone too."""
        held, self._pidfds = self._pidfds, []
        assert await asyncio.to_thread(wait_gone, held)

    def _hold_children(self) -> None:
        for child in self.children():
            with suppress(ProcessLookupError):
                self._pidfds.append(os.pidfd_open(child))


QUIET = {"LOADLEDGER_PREPARE": "off", "LOADLEDGER_LOG_LEVEL": "warning"}
"""Nothing runs, and nothing is told, but what a test asks for."""
PREPARING = {"LOADLEDGER_PREPARE": "on"}
"""As it is by default."""


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
        config: names the directories and, for the tokens, the audience; the other settings are not passed on.
        arguments: further ones.
        command: how the command is called.
        environment: settings, beside nothing else of ours but `QUIET`.
        tls: whom the client trusts, of a server that has a certificate.
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


def started(pid: int) -> int:
    """Return when a process started, in clock ticks since boot; process ids say nothing, they wrap."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])  # proc_pid_stat(5)


def clean_environment() -> dict[str, str]:
    """Return this process's environment without settings of ours."""
    return {name: value for name, value in os.environ.items() if not name.startswith("LOADLEDGER_")}


async def events(config: Config) -> list[Event]:
    """Read the whole ledger."""
    found: list[Event] = []
    async with open_reader(config.data / LEDGER) as reader:
        while page := await reader.events(len(found), PAGE):
            found += page
    return found


def verified(config: Config) -> Verification:
    """Verify the ledger, which must be whole, and return what was found."""
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
