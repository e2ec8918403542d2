"""Servers like those of clouds: moto's S3, and a small one that answers as all three clouds do.

There is no emulator of the other two clouds that can be installed with the tests.
"""

import email.utils
import hashlib
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from ipaddress import ip_address
from pathlib import Path
from urllib.request import Request, urlopen
from xml.sax.saxutils import escape

from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from moto.server import ThreadedMotoServer

from support.connections import make_pair

MODIFIED = email.utils.formatdate(0, usegmt=True)
SIGNED = "AWS4-HMAC-SHA256 Credential=a/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
"""moto checks no signature."""
DAY = timedelta(days=1)
VERSIONED = b"<VersioningConfiguration><Status>Enabled</Status></VersioningConfiguration>"


@dataclass(frozen=True, slots=True)
class S3:
    """moto's server."""

    url: str

    def create_bucket(self, name: str, *, versioned: bool = False) -> None:
        self.put(name)
        if versioned:
            self.put(f"{name}?versioning=", VERSIONED)

    def put(self, path: str, content: bytes = b"") -> None:
        """Create a bucket, or put an object: a path is quoted."""
        headers = {"Authorization": SIGNED, "Content-Type": "application/octet-stream"}
        with urlopen(Request(f"{self.url}/{path}", content, headers, method="PUT")) as answer:
            assert answer.status == HTTPStatus.OK


@contextmanager
def running_s3() -> Iterator[S3]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield S3(f"http://{host}:{port}")
    finally:
        server.stop()


@dataclass(slots=True)
class FakeCloud:
    """A server with one bucket `models`, as S3, Google Cloud Storage and Azure Blob Storage list and send it.

    Attributes:
        url: where it is; a metadata service, too, that knows nothing.
        objects: contents by key.
        requests: methods and paths, with the Authorization header.
        listing: the status of listings.
        changes_once_seen: whether an object is another one once its head was asked for.
    """

    url: str = ""
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    listing: HTTPStatus = HTTPStatus.OK
    changes_once_seen: bool = False

    async def answer(self, request: web.Request) -> web.Response:
        self.requests.append((request.method, request.path, request.headers.get("Authorization")))
        bucket, _, key = request.path.removeprefix("/").partition("/")
        if bucket != "models":
            return web.Response(status=404)
        if not key:
            is_azure = request.query.get("comp") == "list"
            text = (self._list_azure if is_azure else self._list_s3)(request.query.get("prefix", ""))
            return web.Response(status=self.listing, text=text, content_type="application/xml")
        if key not in self.objects:
            return web.Response(status=404)
        content = self.objects[key]
        etag = _tag(content)
        if request.headers.get("If-Match", etag) != etag:
            return web.Response(status=412)
        if self.changes_once_seen and request.method == "HEAD":
            self.objects[key] += b" "
        headers = {"ETag": etag, "Last-Modified": MODIFIED, "x-goog-generation": "7"}
        start = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return web.Response(status=206 if start else 200, body=content[start:], headers=headers)

    def _list_s3(self, prefix: str) -> str:
        rows = [
            f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>{escape(_tag(content))}</ETag><Size>{len(content)}</Size></Contents>"
            for key, content in self.objects.items()
            if key.startswith(prefix)
        ]
        return f"<ListBucketResult>{''.join(rows)}</ListBucketResult>"

    def _list_azure(self, prefix: str) -> str:
        rows = [
            f"<Blob><Name>{escape(key)}</Name><Properties><Last-Modified>{MODIFIED}</Last-Modified>"
            f"<Etag>{_tag(content)[1:-1]}</Etag><Content-Length>{len(content)}</Content-Length>"
            "<Content-Type>application/octet-stream</Content-Type><ResourceType>file</ResourceType>"
            "</Properties></Blob>"
            for key, content in self.objects.items()
            if key.startswith(prefix)
        ]
        return (
            '<?xml version="1.0"?><EnumerationResults ServiceEndpoint="x" ContainerName="models"><Blobs>'
            f"{''.join(rows)}</Blobs><NextMarker/></EnumerationResults>"
        )


def _tag(content: bytes) -> str:
    return f'"{hashlib.sha256(content).hexdigest()[:16]}"'


@asynccontextmanager
async def running_fake_cloud(tls: ssl.SSLContext | None = None) -> AsyncIterator[FakeCloud]:
    cloud, app = FakeCloud(), web.Application()
    app.router.add_route("*", "/{path:.*}", cloud.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
        scheme = "http" if tls is None else "https"
        cloud.url = f"{scheme}://127.0.0.1:{runner.addresses[0][1]}"
        yield cloud
    finally:
        await runner.cleanup()


def make_server_certificate(folder: Path) -> tuple[Path, ssl.SSLContext]:
    """Return the certificate of an authority, and the context of a server whose certificate it has signed.

    obstore's TLS takes no server that is its own authority.
    """
    authority, key, now = ec.generate_private_key(ec.SECP256R1()), make_pair().key, datetime.now(UTC)
    private = load_pem_private_key(key, None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    issuer = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "an authority")])
    root, leaf = (
        x509.CertificateBuilder(issuer, subject, public, x509.random_serial_number(), now - DAY, now + DAY)
        .add_extension(x509.BasicConstraints(ca=subject is issuer, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(authority, hashes.SHA256())
        .public_bytes(Encoding.PEM)
        for subject, public in ((issuer, authority.public_key()), (x509.Name([]), private.public_key()))
    )
    (folder / "authority.pem").write_bytes(root)
    (folder / "server.pem").write_bytes(leaf + key)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "server.pem")
    return folder / "authority.pem", context
