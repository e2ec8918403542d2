"""Sources of versions on loopback: HTTPS servers that answer as a test says, and Hugging Face's routes."""

import asyncio
import re
import ssl
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import chain, repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import unquote

import msgspec

from support.connections import make_pair

PAIR = make_pair()
"""The servers' certificate, for localhost and 127.0.0.1, which is its own authority."""
COMMIT = "0123456789" * 4
HANG = b"<the connection stays open>"
"""At the end of a reply: nothing more is sent, and the connection stays open."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that a site got; names of headers in lower case."""

    path: str
    headers: Mapping[str, str]
    method: str = "GET"


@dataclass(frozen=True, slots=True)
class Site:
    """An HTTPS server, and the requests that it got."""

    port: int
    asked: list[Asked] = field(default_factory=list)

    @property
    def host(self) -> str:
        return f"localhost:{self.port}"

    def url(self, path: str = "/model.onnx") -> str:
        return f"https://{self.host}{path}"


Reply = Callable[[Asked], bytes]
"""Returns all that the server sends on a connection."""


@contextmanager
def closing_at_once(writer: asyncio.StreamWriter) -> Iterator[None]:
    """Close the connection of a task that is cancelled: its loop may have no time to do so in order."""
    try:
        yield
    except asyncio.CancelledError:
        writer.transport.abort()
        raise


@asynccontextmanager
async def serving_site(reply: Reply) -> AsyncIterator[Site]:
    """Serve one reply on each connection, and close it, on a free port of 127.0.0.1."""
    tasks = set[asyncio.Task[None]]()
    asked = list[Asked]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, EOFError), closing_at_once(writer):
            asked.append(_parse(await reader.readuntil(b"\r\n\r\n")))
            content = reply(asked[-1])
            if asked[-1].method == "HEAD":
                content = content.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
            writer.write(content.removesuffix(HANG))
            await writer.drain()
            if content.endswith(HANG):
                await reader.read()
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()

    def start(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.ensure_future(serve(reader, writer)))

    server = await asyncio.start_server(start, "127.0.0.1", 0, ssl=server_context())
    try:
        yield Site(server.sockets[0].getsockname()[1], asked)
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()


def answer(status: int = 200, body: bytes = b"", **headers: object) -> bytes:
    """Return an answer; `content_length` and the like are headers, and None leaves one out."""
    named = {"content_length": len(body), "connection": "close", **headers}
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in named.items() if value is not None]
    return "\r\n".join([f"HTTP/1.1 {status} Answer", *lines, "", ""]).encode("latin-1") + body


@dataclass(slots=True)
class RangedFile:
    """A file with ranges and entity tags; each answer is cut after so many bytes of its body.

    Attributes:
        cuts: of one answer after the other; afterwards, none is cut.
    """

    content: bytes
    etag: str | None = '"one"'
    has_ranges: bool = True
    cuts: Iterable[int] = ()

    def __post_init__(self) -> None:
        self.cuts = chain(self.cuts, repeat(len(self.content)))

    def __call__(self, asked: Asked) -> bytes:
        cut = next(iter(self.cuts))
        size = len(self.content)
        found = re.fullmatch(r"bytes=(\d+)-", asked.headers.get("range", ""))
        is_same = asked.headers.get("if-range", self.etag) == self.etag
        if found and self.has_ranges and is_same:
            begin = int(found[1])
            if begin >= size:
                return answer(416, content_range=f"bytes */{size}")
            rest, where = self.content[begin:], f"bytes {begin}-{size - 1}/{size}"
            return answer(206, rest[:cut], content_length=len(rest), etag=self.etag, content_range=where)
        return answer(200, self.content[:cut], content_length=size, etag=self.etag)


@dataclass(slots=True)
class Hub:
    """Hugging Face's routes of one repository, `org/repo`, for its library; files redirect to `/cdn/`.

    Attributes:
        files: by path.
        large: paths of those that Git LFS keeps.
        token: without which everything but `/cdn/` is refused.
    """

    files: Mapping[str, bytes]
    large: frozenset[str] = frozenset()
    token: str | None = None

    def __call__(self, asked: Asked) -> bytes:
        path = asked.path.partition("?")[0]
        if path.startswith("/cdn/"):
            return RangedFile(self.files[unquote(path.removeprefix("/cdn/"))])(asked)
        if self.token and asked.headers.get("authorization") != f"Bearer {self.token}":
            return answer(401, b"<html>Invalid username or password.</html>")
        files = f"/org/repo/resolve/{COMMIT}/"
        if path in {f"/api/models/org/repo/revision/{name}" for name in ("main", COMMIT)}:
            siblings = [self._describe(path) for path in sorted(self.files)]
            return answer(200, msgspec.json.encode({"id": "org/repo", "sha": COMMIT, "siblings": siblings}))
        if path.startswith("/api/models/org/repo/"):
            return answer(404, x_error_code="RevisionNotFound")
        if path.startswith(files) and (name := unquote(path.removeprefix(files))) in self.files:
            content = self.files[name]
            tag = f'"{sha256(content).hexdigest()}"'
            known = {"x_repo_commit": COMMIT, "x_linked_size": len(content), "x_linked_etag": tag}
            cdn = f"https://{asked.headers['host'].replace('localhost', '127.0.0.1')}/cdn"  # another host
            there = f"{cdn}/{path.removeprefix(files)}?Signature=secret"
            return answer(302, b"", location=there, **known)
        return answer(404, x_error_code="EntryNotFound" if path.startswith(files) else "RepoNotFound")

    def _describe(self, path: str) -> dict[str, object]:
        content = self.files[path]
        entry: dict[str, object] = {"rfilename": path, "size": len(content), "blobId": "0" * 40}
        if path in self.large:
            digest = sha256(content).hexdigest()
            entry["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
        return entry


def write_authority(folder: Path) -> str:
    """Write the certificate that clients of these servers trust; return its path."""
    path = folder / "authority.pem"
    path.write_bytes(PAIR.certificate)
    return str(path)


def server_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with TemporaryDirectory() as folder:
        cert, key = Path(folder, "cert.pem"), Path(folder, "key.pem")
        PAIR.write(cert, key)
        context.load_cert_chain(cert, key)
    return context


def _parse(head: bytes) -> Asked:
    first, *lines = head.decode("latin-1").strip().split("\r\n")
    named = (line.partition(":") for line in lines)
    method, path, _ = first.split(" ")
    return Asked(path, {name.lower(): value.strip() for name, _, value in named}, method)
