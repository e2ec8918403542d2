"""The fetch process: gets an `Order`, confines itself, resolves the source, and sends files that are read.

It has one thread. It reads orders and writes pieces blocking: while the server does not read, nothing is read
from the network either.
"""

from __future__ import annotations

import asyncio
import fcntl
import importlib
import logging
import os
import resource
import signal
import ssl
import sys
import sysconfig
from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager, suppress
from typing import TypeVar

import msgspec

import runtime
from runtime.errors import RuntimeProblem
from runtime.fetch import messages
from runtime.fetch.huggingface import HuggingFace
from runtime.fetch.messages import Order, Read, RemoteFile, Resolved
from runtime.fetch.oci import Oci
from runtime.fetch.origin import Download, Origin
from runtime.fetch.sources import SourceName, check_pinned, parse_allowed, parse_source
from runtime.fetch.web import Web
from runtime.onnxfile import MODEL_FILE
from runtime.process.forkserver import die_with
from runtime.worker import landlock, privileges

OUTPUT = 1
MAX_DATA_BYTES = 512 * 2**20
"""Five times what a download takes: a listing of 16 MiB, decoded, or a cloud's SDK."""
SYSTEM_PATHS = (
    *("/etc/resolv.conf", "/etc/hosts", "/etc/host.conf", "/etc/nsswitch.conf", "/etc/gai.conf"),
    *("/etc/services", "/etc/ssl/certs", "/etc/ssl/openssl.cnf", "/etc/pki/tls/certs"),
    *("/etc/pki/ca-trust", "/usr/share/ca-certificates"),
    *("/etc/ld.so.cache", "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib"),
)
"""For name resolution, certificates that are looked up by their hash, and libraries."""

M = TypeVar("M", Order, Read)


class HttpsFile:
    """One file at a URL, known by its SHA-256; see `runtime.fetch.origin.Origin`."""

    def __init__(self, source: SourceName, order: Order) -> None:
        check_pinned(source, order.digest)
        self.client = Web(
            parse_allowed(order.allowed).list_hosts(source),
            order.environment.get("SSL_CERT_FILE"),
            credential="https sources are read without credentials; use a source that has them, as oci or s3",
        )
        self._url, self._digest = source.name, order.digest

    async def resolve(self) -> Resolved:
        file = RemoteFile(MODEL_FILE, sha256=self._digest)
        return Resolved(f"{self._url}#sha256={self._digest}", (file,))

    def open(self, index: int, offset: int) -> AbstractAsyncContextManager[Download]:
        del index  # there is one
        return self.client.download(self._url, offset=offset, is_pinned=True)


def main() -> None:
    """Serve the order on standard input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; the server ends this process
    die_with(os.getppid())  # if the server has ended before, standard input ends
    logging.disable()
    with suppress(OSError):  # 1.3 GB/s in place of 0.7 to 1.0
        fcntl.fcntl(OUTPUT, fcntl.F_SETPIPE_SZ, messages.PIECE_BYTES)
    with suppress(BrokenPipeError):  # the server has ended
        try:
            order = _receive(Order)
            if order is not None:
                origin = make_origin(order)
                confine(each for name, each in order.environment.items() if name.endswith("_TOKEN_FILE"))
                asyncio.run(serve(origin))
        except RuntimeProblem as problem:
            _send(messages.Failed(problem.code, str(problem)))
        except Exception as error:  # noqa: BLE001 - its text may hold a secret
            _send(messages.Failed("internal", f"the fetch failed with {type(error).__name__}"))


def make_origin(order: Order) -> Origin:
    """Return the origin of an order's source, which the operator must allow."""
    source = parse_source(order.source)
    parse_allowed(order.allowed).check(source)
    match source.scheme:
        case "https":
            return HttpsFile(source, order)
        case "hf":
            return HuggingFace(source, order)
        case "oci":
            return Oci(source, order)
    cloud: Origin = importlib.import_module("runtime.fetch.cloud").Cloud(source, order)  # of an extra
    return cloud


def confine(readable: Iterable[str] = ()) -> None:
    """Give up what a fetch does not need: writing files, reading others', privileges, much memory.

    Args:
        readable: files that it may read besides, as the tokens that a cloud's client reads itself.
    """
    privileges.limit_resource(resource.RLIMIT_CORE, 0)
    privileges.limit_resource(resource.RLIMIT_FSIZE, 0)
    privileges.limit_resource(resource.RLIMIT_DATA, MAX_DATA_BYTES)
    privileges.drop_privileges()
    if landlock.find_abi():
        code = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
        certificates = ssl.get_default_verify_paths()
        paths = {*SYSTEM_PATHS, *code, *runtime.__path__, certificates.cafile, certificates.capath, *readable}
        paths.discard(None)
        landlock.restrict(dict.fromkeys(map(str, paths), landlock.READS), connects=True)


async def serve(origin: Origin) -> None:
    """Send what the source's name means, then each file that is asked for, until standard input ends."""
    async with origin.client:
        _send(await origin.resolve())
        while (read := _receive(Read)) is not None:
            async with origin.open(read.index, read.offset) as download:
                _send(messages.Opened(download.offset, download.bytes))
                async for piece in download.pieces:
                    _send(piece)
            _send(messages.Done())


def _receive(kind: type[M]) -> M | None:
    """Return the server's next message; None after the last."""
    head = sys.stdin.buffer.read(messages.HEAD_BYTES)
    if len(head) < messages.HEAD_BYTES:
        return None
    _, length = messages.decode_head(head)
    content = sys.stdin.buffer.read(length)
    return msgspec.msgpack.decode(content, type=kind)


def _send(content: messages.FromProcess | bytes) -> None:
    """Send a message, or a piece of a file."""
    if isinstance(content, bytes):
        frame = messages.encode_frame(messages.PIECE, content)
    else:
        frame = messages.encode_message(content)
    rest = memoryview(frame)
    while rest:
        rest = rest[os.write(OUTPUT, rest) :]


if __name__ == "__main__":
    main()
