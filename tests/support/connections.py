"""Raw connections to a small server, a scripted server, and certificates."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)

from server.http.connection import ConnectionLimits, listening
from server.routing import Access, LimitClass
from support.http import route, small_app, small_config

LIMIT_S = 30.0
LONG_S = 600.0
LONG_ANSWER = bytes(16 * 2**20)
GET = b"GET /short HTTP/1.1\r\nHost: a\r\n\r\n"
PROBE = b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n"


class Client:
    """One end of a raw connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def rest(self) -> bytes:
        """Return all that comes until the server closes the connection."""
        async with asyncio.timeout(LIMIT_S):
            received = bytearray()
            with suppress(ConnectionError):
                while piece := await self.reader.read(2**20):
                    received += piece
            return bytes(received)

    async def answer(self) -> bytes:
        """Return one answer of those that have a length."""
        async with asyncio.timeout(LIMIT_S):
            head = await self.reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            return head + await self.reader.readexactly(length)

    async def close(self) -> None:
        self.writer.close()
        with suppress(ConnectionError):
            await self.writer.wait_closed()


Connect = Callable[[], Awaitable[Client]]


async def short(_: web.Request) -> web.Response:
    return web.Response(body=b"short")


async def long(_: web.Request) -> web.Response:
    return web.Response(body=LONG_ANSWER)


def roomy(most: int = 100, **others: Any) -> ConnectionLimits:
    """Return limits that no client meets, but for these."""
    return ConnectionLimits(**{"head_s": LONG_S, "idle_s": LONG_S, "most": most, "check_s": 0.02, **others})


@asynccontextmanager
async def connecting(
    folder: Path,
    limits: ConnectionLimits,
    tls: ssl.SSLContext | None = None,
    others: Mapping[str, Handler] | None = None,
) -> AsyncIterator[Connect]:
    """Serve some routes within these limits, and yield what connects to them."""
    public: dict[str, Any] = {"access": Access.PUBLIC, "limit": LimitClass.NONE}
    handlers = {"/short": short, "/long": long, "/health/live": short, "/metrics": long, **(others or {})}
    routes = [route(path, handler, **public) for path, handler in handlers.items()]
    runner = web.AppRunner(
        small_app(routes, small_config(folder / "data")), access_log=None, handler_cancellation=True
    )
    await runner.setup()
    clients = list[Client]()
    assert runner.server is not None
    try:
        async with listening(runner.server, "127.0.0.1", 0, limits, tls) as port:

            async def connect() -> Client:
                with socket.socket() as made:  # of which little is kept by the kernel
                    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
                    made.setblocking(False)
                    await asyncio.get_running_loop().sock_connect(made, ("127.0.0.1", port))
                    client = Client(*await asyncio.open_connection(sock=made.dup(), limit=2**16))
                clients.append(client)
                return client

            yield connect
    finally:
        for client in clients:
            await client.close()
        await runner.cleanup()
    assert not limits.open


def problem(answer: bytes) -> tuple[int, str]:
    """Return status and code of an answer that tells a problem."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status, told = int(head.split()[1]), json.loads(body)
    assert b"content-type: application/problem+json" in head.lower()
    assert head.startswith(b"HTTP/1.0 ") or b"\r\nConnection: close" in head
    assert b"\r\nServer: loadledger" in head
    assert told["status"] == status
    return status, told["code"]


def fields(count: int, length: int = 1) -> bytes:
    return b"".join(b"F%d: %s\r\n" % (number, b"v" * length) for number in range(count))


Script = bytes | Callable[[socket.socket], None]
"""What is sent to a connection's first request before it is closed, or what is done with it."""


class OddServer:
    """A server with a script for each connection; when they are used up, it refuses connections.

    Attributes:
        url: where it is.
        requests: each as it came, head and body.
        closed: of each connection that was left open, set when its client has closed it.
    """

    def __init__(self, scripts: Sequence[Script], tls: ssl.SSLContext | None = None) -> None:
        self.requests: list[bytes] = []
        self.closed = threading.Event()
        self._scripts = scripts
        self._tls = tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(LIMIT_S)
        self._thread = threading.Thread(target=self._run, name="odd server")
        scheme = "http" if tls is None else "https"
        self.url = f"{scheme}://localhost:{self._listener.getsockname()[1]}"

    def start(self) -> None:
        """Answer from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Answer no more."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(LIMIT_S)
        self._listener.close()

    def _run(self) -> None:
        for script in self._scripts:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, suppress(OSError):
                self._serve(connection, script)
        self._listener.close()

    def _serve(self, connection: socket.socket, script: Script) -> None:
        connection.settimeout(LIMIT_S)
        if self._tls is not None:
            connection = self._tls.wrap_socket(connection, server_side=True)
        self.requests.append(_request(connection))
        if callable(script):
            script(connection)
            self._wait_for_the_end(connection)
        else:
            connection.sendall(script)
        if self._tls is not None:
            connection.close()

    def _wait_for_the_end(self, connection: socket.socket) -> None:
        with suppress(ConnectionError):
            while connection.recv(2**16):
                pass
        self.closed.set()


@contextmanager
def odd_server(*scripts: Script, tls: ssl.SSLContext | None = None) -> Iterator[OddServer]:
    """Give a server with these scripts; it is stopped in the end."""
    server = OddServer(scripts, tls)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def said(body: bytes, status: str = "200 OK", *fields: str, media_type: str = "application/json") -> bytes:
    """Return an answer after which the connection is closed."""
    head = [f"HTTP/1.1 {status}", f"Content-Type: {media_type}", f"Content-Length: {len(body)}", *fields]
    return "\r\n".join([*head, "Connection: close", "", ""]).encode() + body


def streamed(*chunks: bytes, end: bool = False) -> bytes:
    """Return the beginning of a stream of lines, or with `end` all of it."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n" * end


def staying(text: bytes) -> Callable[[socket.socket], None]:
    """Send a text and nothing more, until the client goes."""
    return lambda connection: connection.sendall(text)


def _request(connection: socket.socket) -> bytes:
    text = b""
    while b"\r\n\r\n" not in text:
        text += (part := connection.recv(2**16))
        if not part:
            return text
    head, _, body = text.partition(b"\r\n\r\n")
    length = next(
        (
            int(line.split(b":")[1])
            for line in head.split(b"\r\n")
            if line.lower().startswith(b"content-length")
        ),
        0,
    )
    while len(body) < length:
        body += (part := connection.recv(2**16))
        if not part:
            break
    return head + b"\r\n\r\n" + body


PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its key, as PEM, and the number that tells it from others."""

    serial: int
    certificate: bytes
    key: PrivateKey

    def key_pem(self, password: bytes | None = None) -> bytes:
        """Return the key, encrypted where there is a password."""
        encryption: KeySerializationEncryption = NoEncryption()
        if password is not None:
            encryption = BestAvailableEncryption(password)
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)

    def write(self, cert: Path, key: Path) -> None:
        """Put both in their places as a renewal does: each at once."""
        replace(cert, self.certificate)
        replace(key, self.key_pem())

    def trusting(self) -> ssl.SSLContext:
        """Return what a client needs to trust it."""
        return ssl.create_default_context(cadata=self.certificate.decode())


def replace(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Give a file another content, at once."""
    draft = path.with_name(f".{path.name}.new")
    draft.write_bytes(content)
    draft.chmod(mode)
    os.replace(draft, path)  # noqa: PTH105 - it takes the place of what is there


def make_pair(*, ends_in: timedelta = timedelta(days=1), key: PrivateKey | None = None) -> Pair:
    """Make a certificate for localhost, 127.0.0.1 and ::1."""
    private = key or ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    hosts = [x509.DNSName("localhost"), *(x509.IPAddress(ip_address(each)) for each in ("127.0.0.1", "::1"))]
    now, serial = datetime.now(UTC), x509.random_serial_number()
    built = (
        x509.CertificateBuilder(name, name, private.public_key(), serial)
        .not_valid_before(now - timedelta(days=2))
        .not_valid_after(now + ends_in)
        .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    )
    return Pair(serial, built.sign(private, hashes.SHA256()).public_bytes(Encoding.PEM), private)
