"""Raw connections to a small server, a scripted server, and certificates."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from aiohttp import web
from aiohttp.typedefs import Handler
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)

from server.http.connection import ConnectionLimits, bind_address, listening
from server.http.responses import STANDARD_FIELDS

LIMIT_S = 30.0
LONG_S = 600.0
LONG_ANSWER = bytes(16 * 2**20)
GET = b"GET /short HTTP/1.1\r\nHost: a\r\n\r\n"
PROBE = b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n"


@dataclass
class Client:
    """One end of a raw connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def get(self, request: bytes = GET) -> bytes:
        """Send a request, or the rest of one, and return its answer, which is a 200."""
        self.send(request)
        return await self.answer()

    async def answer(self) -> bytes:
        """Return the next answer, which is a 200 and has a length."""
        async with asyncio.timeout(LIMIT_S):
            head = await self.reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 OK")
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            return head + await self.reader.readexactly(length)

    async def rest(self) -> bytes:
        """Return all that comes until the server closes the connection."""
        async with asyncio.timeout(LIMIT_S):
            received = bytearray()
            with suppress(ConnectionError):
                while piece := await self.reader.read(2**20):
                    received += piece
            return bytes(received)

    async def refusal(self, request: bytes = b"") -> tuple[int, str]:
        """Send a request, and return status and code of the refusal that ends the connection."""
        self.send(request)
        return problem(await self.rest())

    async def close(self) -> None:
        self.writer.close()
        with suppress(ConnectionError):
            await self.writer.wait_closed()


def answering(body: bytes) -> Handler:
    """Return a handler that answers with this body."""

    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=body)

    return answer


@dataclass
class SmallServer:
    """A server with some routes, and the connections of its clients."""

    limits: ConnectionLimits
    port: int
    clients: list[Client] = field(default_factory=list)

    async def connect(self) -> Client:
        """Open a connection for which the kernel buffers little."""
        with socket.socket() as made:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
            made.setblocking(False)
            await asyncio.get_running_loop().sock_connect(made, ("127.0.0.1", self.port))
            client = Client(*await asyncio.open_connection(sock=made.dup(), limit=2**16))
        self.clients.append(client)
        return client


@asynccontextmanager
async def small_server(
    tls: ssl.SSLContext | None = None, head_s: float = LONG_S, others: Mapping[str, Handler] | None = None
) -> AsyncIterator[SmallServer]:
    """Serve some routes within limits that no client meets, unless a test lowers them."""
    limits = ConnectionLimits(head_s, LONG_S, 100, closing_s=0.1, check_s=0.02)
    app, short = web.Application(), answering(b"short")
    handlers = {"/short": short, "/long": answering(LONG_ANSWER), "/health/live": short, **(others or {})}
    app.add_routes([web.get(path, handler) for path, handler in handlers.items()])
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
    await runner.setup()
    assert runner.server is not None
    with bind_address("127.0.0.1", 0) as bound:
        async with listening(runner.server, bound, limits, tls) as port:
            server = SmallServer(limits, port)
            try:
                yield server
            finally:
                for client in server.clients:
                    await client.close()
                await runner.cleanup()
    assert not limits.open


def problem(answer: bytes) -> tuple[int, str]:
    """Return status and code of a refusal."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status, members = int(head.split()[1]), json.loads(body)
    assert b"content-type: application/problem+json" in head.lower()
    assert head.startswith(b"HTTP/1.0 ") or b"\r\nConnection: close" in head
    assert all(f"\r\n{name}: {value}".encode() in head for name, value in STANDARD_FIELDS.items())
    assert members["status"] == status
    return status, members["code"]


Script = bytes | Callable[[socket.socket], None]
"""The answer to a connection's first request, or a function that is called with the connection."""


@dataclass
class OddServer:
    """The URL and the requests of a server; `closed` is set when a client has closed a connection."""

    url: str
    requests: list[bytes] = field(default_factory=list)
    closed: threading.Event = field(default_factory=threading.Event)

    def answer(self, connection: socket.socket, script: Script) -> None:
        """Read a request and answer it; a connection that a function leaves open is the client's to close."""
        self.requests.append(_request(connection))
        if isinstance(script, bytes):
            connection.sendall(script)
            return
        script(connection)
        with suppress(ConnectionError):
            while connection.recv(2**16):
                pass
        self.closed.set()


@contextmanager
def odd_server(*scripts: Script, tls: ssl.SSLContext | None = None) -> Iterator[OddServer]:
    """Run a server with a script for each connection; after the last, it refuses connections."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(LIMIT_S)
    scheme = "http" if tls is None else "https"
    server = OddServer(f"{scheme}://localhost:{listener.getsockname()[1]}")

    def run() -> None:
        for script in scripts:
            try:
                accepted, _ = listener.accept()
            except OSError:
                return
            accepted.settimeout(LIMIT_S)
            with suppress(OSError), _wrapped(accepted, tls) as connection:
                server.answer(connection, script)
        listener.close()

    thread = threading.Thread(target=run, name="odd server")
    thread.start()
    try:
        yield server
    finally:
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        thread.join(LIMIT_S)
        listener.close()


def _wrapped(connection: socket.socket, tls: ssl.SSLContext | None) -> socket.socket:
    return connection if tls is None else tls.wrap_socket(connection, server_side=True)


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
    with connection.makefile("rb") as received:
        head = b""
        while (line := received.readline()) not in (b"\r\n", b""):
            head += line
        length = re.search(rb"(?im)^content-length: *(\d+)", head)
        return head + line + received.read(int(length[1]) if length is not None else 0)


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate with its serial number and key, both as PEM."""

    serial: int
    certificate: bytes
    key: bytes

    def write(self, cert: Path, key: Path) -> None:
        """Write both files as a renewal does: each at once."""
        replace(cert, self.certificate)
        replace(key, self.key)

    def trusting(self) -> ssl.SSLContext:
        """Return the context of a client that trusts the certificate."""
        return ssl.create_default_context(cadata=self.certificate.decode())


def replace(path: Path, content: bytes) -> None:
    """Replace a file at once."""
    draft = path.with_name(f".{path.name}.new")
    draft.write_bytes(content)
    draft.chmod(0o600)
    os.replace(draft, path)  # noqa: PTH105 - it takes the place of what is there


def make_pair(
    *,
    ends_in: timedelta = timedelta(days=1),
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | None = None,
    encryption: KeySerializationEncryption | None = None,
) -> Pair:
    """Make a certificate for localhost and 127.0.0.1."""
    private = key or ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    hosts = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))])
    now, serial = datetime.now(UTC), x509.random_serial_number()
    built = (
        x509.CertificateBuilder(name, name, private.public_key(), serial)
        .not_valid_before(now - timedelta(days=2))
        .not_valid_after(now + ends_in)
        .add_extension(hosts, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    )
    certificate = built.sign(private, hashes.SHA256()).public_bytes(Encoding.PEM)
    secret = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption())
    return Pair(serial, certificate, secret)
