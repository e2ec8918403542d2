"""A server that says what a test has written down, byte by byte: what no proper server would say."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

LIMIT_S = 30.0

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
