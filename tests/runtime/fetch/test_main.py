"""The fetch process: a real one, which is spoken to in frames; its confinement, its end, and its secrets."""

import asyncio
import json
import os
import subprocess
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from socket import create_server

import msgspec
import pytest
from support.origins import COMMIT, HANG, Asked, Hub, RangedFile, Site, answer, serving_site, write_authority

from runtime.fetch.messages import (
    MESSAGE,
    PIECE_BYTES,
    Done,
    Failed,
    FromProcess,
    Opened,
    Order,
    Read,
    RemoteFile,
    Resolved,
    encode_message,
)
from runtime.worker import landlock

ROOT = Path(__file__).parents[3]
COMMAND = (sys.executable, "-m", "runtime.fetch.main")
LIMIT_S = 30.0
TOKEN = "hf_a-secret"
CONTENT = os.urandom(3 * PIECE_BYTES // 2)
DIGEST = sha256(CONTENT).hexdigest()


@dataclass(frozen=True)
class Fetch:
    """A fetch process, and what it says."""

    process: Process

    def send(self, message: Order | Read) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(encode_message(message))

    async def receive(self) -> FromProcess | bytes:
        assert self.process.stdout is not None
        async with asyncio.timeout(LIMIT_S):
            head = await self.process.stdout.readexactly(5)
            content = await self.process.stdout.readexactly(int.from_bytes(head[:4], "little"))
        return msgspec.msgpack.decode(content, type=FromProcess) if head[4] == MESSAGE else content

    async def read(self, request: Read) -> tuple[FromProcess | bytes, bytes]:
        """Return the answer to a request, and the file's bytes."""
        self.send(request)
        opened, content = await self.receive(), b""
        while isinstance(piece := await self.receive(), bytes):
            assert len(piece) <= PIECE_BYTES
            content += piece
        assert piece == Done()
        return opened, content

    async def end(self) -> tuple[int, bytes]:
        """Close its input; return its exit code, and what it printed."""
        async with asyncio.timeout(LIMIT_S):
            _, printed = await self.process.communicate(b"")
        return await self.process.wait(), printed


@asynccontextmanager
async def fetching(order: Order) -> AsyncIterator[Fetch]:
    process = await asyncio.create_subprocess_exec(
        *COMMAND, stdin=PIPE, stdout=PIPE, stderr=PIPE, cwd=ROOT, env={}
    )
    fetch = Fetch(process)
    try:
        fetch.send(order)
        yield fetch
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


def order_of(site: Site, folder: Path, name: str = "", **environment: str) -> Order:
    own = {"SSL_CERT_FILE": write_authority(folder), "HF_ENDPOINT": site.url("")}
    return Order(name or site.url(), DIGEST, f"https://{site.host} hf", own | environment)


async def test_https_file_is_sent_in_pieces_and_resumed(tmp_path: Path) -> None:
    async with (
        serving_site(RangedFile(CONTENT, cuts=[5000])) as site,
        fetching(order_of(site, tmp_path)) as fetch,
    ):
        assert await fetch.receive() == Resolved(
            f"{site.url()}#sha256={DIGEST}", (RemoteFile("model.onnx", sha256=DIGEST),)
        )
        for offset in (0, 500_000):
            opened = Opened(offset, len(CONTENT))
            assert await fetch.read(Read(0, offset)) == (opened, CONTENT[offset:])
        assert await fetch.end() == (0, b"")


def shows(text: str, pid: int) -> bool:
    """Whether everybody, or everybody with this user, sees a text in lists of processes."""
    return any(text.encode() in Path(f"/proc/{pid}/{name}").read_bytes() for name in ("environ", "cmdline"))


async def test_token_is_used_and_seen_by_nobody(tmp_path: Path) -> None:
    hub = Hub({"model.onnx": CONTENT}, frozenset({"model.onnx"}), token=TOKEN)
    async with (
        serving_site(hub) as site,
        fetching(order_of(site, tmp_path, "hf://org/repo", HF_TOKEN=TOKEN)) as fetch,
    ):
        file = RemoteFile("model.onnx", len(CONTENT), DIGEST)
        assert await fetch.receive() == Resolved(f"hf://org/repo@{COMMIT}", (file,))
        assert not shows(TOKEN, fetch.process.pid)
        assert (await fetch.read(Read(0)))[1] == CONTENT
        assert await fetch.end() == (0, b"")


FAILURES: Mapping[str, tuple[str, str | None, str, str]] = {
    "no digest": ("https://localhost/m.onnx", None, "https", "invalid_source"),
    "no source": ("ftp://localhost/m.onnx", DIGEST, "https", "invalid_source"),
    "not allowed": ("hf://org/repo", DIGEST, "https", "source_not_allowed"),
    "private address": ("https://localhost/m.onnx", DIGEST, "https", "source_not_allowed"),
    "no such certificates": ("https://localhost/m.onnx", DIGEST, "https", "source_unreachable"),
    "a bug": ("https://localhost/m.onnx", DIGEST, "meaningless", "internal"),
}


@pytest.mark.parametrize(("name", "digest", "allowed", "code"), FAILURES.values(), ids=FAILURES)
async def test_failure_is_the_last_message(name: str, digest: str | None, allowed: str, code: str) -> None:
    environment = {"SSL_CERT_FILE": "/none"} if code == "source_unreachable" else {}
    async with fetching(Order(name, digest, allowed, {**environment, "HF_TOKEN": TOKEN})) as fetch:
        answered = await fetch.receive()
        if isinstance(answered, Resolved):
            fetch.send(Read(0))
            answered = await fetch.receive()
        assert isinstance(answered, Failed)
        assert answered.code == code
        assert TOKEN not in answered.message
        assert await fetch.end() == (0, b"")


async def test_failed_download_is_the_last_message(tmp_path: Path) -> None:
    async with serving_site(lambda _: answer(404)) as site, fetching(order_of(site, tmp_path)) as fetch:
        assert isinstance(await fetch.receive(), Resolved)
        fetch.send(Read(0))
        failed = await fetch.receive()
        assert isinstance(failed, Failed)
        assert failed.code == "source_not_found"
        assert await fetch.end() == (0, b"")


async def test_process_ends_quietly_when_nobody_reads(tmp_path: Path) -> None:
    async with serving_site(RangedFile(CONTENT)) as site, fetching(order_of(site, tmp_path)) as fetch:
        await fetch.receive()
        fetch.send(Read(0))
        await fetch.receive()
        assert fetch.process.stdout is not None
        fetch.process.stdout._transport.close()  # type: ignore[attr-defined]
        assert await fetch.end() == (0, b"")


async def test_process_ends_with_the_server(tmp_path: Path) -> None:
    """It waits for a source that does not answer, and its standard input stays open."""
    code = f"import subprocess, time; print(subprocess.Popen({COMMAND!r}).pid, flush=True); time.sleep(99)"
    asked, ended = asyncio.Event(), asyncio.Event()

    def reply(_: Asked) -> bytes:
        asked.set()
        return HANG

    async with serving_site(reply) as site, asyncio.timeout(LIMIT_S):
        server = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, stdin=PIPE, stdout=PIPE, cwd=ROOT
        )
        assert server.stdin is not None
        assert server.stdout is not None
        descriptor = os.pidfd_open(int(await server.stdout.readline()))
        server.stdin.write(encode_message(order_of(site, tmp_path, "hf://org/repo")))
        await asked.wait()
        server.kill()
        asyncio.get_running_loop().add_reader(descriptor, ended.set)
        await ended.wait()
        asyncio.get_running_loop().remove_reader(descriptor)
        os.close(descriptor)
        await server.communicate()


ATTEMPTS = """
import json, os, resource, signal, socket, sys
from runtime.fetch.main import confine

folder, port = sys.argv[1:]
confine()

def connect():
    socket.create_connection(("localhost", int(port))).close()

def bind():
    socket.create_server(("127.0.0.1", 0)).close()

attempts = {
    "connect": connect,
    "resolve": lambda: socket.getaddrinfo("localhost", 443),
    "import": lambda: __import__("sqlite3"),
    "allocate": lambda: bytearray(300 * 2**20),
    "bind": bind,
    "read": lambda: open(f"{folder}/secret").close(),
    "list": lambda: os.listdir(folder),
    "passwords": lambda: open("/etc/shadow").close(),
    "environment": lambda: open(f"/proc/{os.getppid()}/environ").close(),
    "write": lambda: open(f"{folder}/new", "w").close(),
    "append": lambda: os.write(os.open(f"{folder}/secret", os.O_WRONLY), b"x"),
    "signal": lambda: os.kill(os.getppid(), 0),
    "allocate much": lambda: bytearray(600 * 2**20),
    "raise limit": lambda: resource.setrlimit(resource.RLIMIT_DATA, (2**40, 2**40)),
}
succeeded = []
for name, attempt in attempts.items():
    try:
        attempt()
        succeeded.append(name)
    except (OSError, MemoryError, ValueError):
        pass
print(json.dumps(succeeded))
"""


@pytest.mark.skipif(landlock.find_abi() < landlock.SCOPE_FROM, reason="the kernel has no such Landlock")
def test_confined_process_only_connects(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    with create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-c", ATTEMPTS, tmp_path, port],
            cwd=ROOT,
            check=True,
            capture_output=True,
            timeout=LIMIT_S,
        )
    assert json.loads(done.stdout) == ["connect", "resolve", "import", "allocate"]
