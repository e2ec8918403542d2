"""The gateway: the process that speaks gRPC. The server starts it, and gives it one line of JSON (`Order`).

It answers with one line (`Announcement`), and ends when its standard input does: then it has no server any
more, or that stops. First it answers health checks with NOT_SERVING and refuses new calls, until the running
ones have ended or the server has.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sys
from contextlib import suppress
from pathlib import Path

import aiohttp
import grpc
import msgspec
import uvloop

from features.grpc.calls import Calls
from features.grpc.gatewaywire import COPIES, SOCKET, Announcement, Order
from features.grpc.memory import MessageRoom

KEEPALIVE_S = 10
"""Pings of clients that are accepted, and how long the gateway's own may be unanswered."""
PING_S = 60
"""Silence of a client after which the gateway pings it."""
HANDSHAKE_S = 10
"""Time for a new connection to begin with HTTP/2, as for the head of a request."""
AGE_S = 300
"""Age of a connection at which its client is asked to make another one, and its time to end its calls. So new
nodes get their share of the calls, and a client that reads no answers holds their memory only so long."""
MAX_CONNECTIONS = 4000
"""Open at the same time. Each takes some 40 KB."""
MAX_STREAMS = 128
"""Calls of one connection at once; its client delays others."""
MAX_UNSEEN = 16_384
"""Calls that gRPC has accepted and not yet passed on; by default it refuses some of 1,000."""
WINDOW_BYTES = 64 * 2**10
"""Bytes of a message that are received before a call reads it; 1 MiB makes calls 4% faster (measured)."""
CLOSE_S = 1.0


def main() -> None:
    """Run the gateway, until its standard input ends."""
    for number in (signal.SIGINT, signal.SIGTERM):  # those of a terminal or service manager are the server's
        signal.signal(number, signal.SIG_IGN)
    order = msgspec.json.decode(sys.stdin.buffer.readline(), type=Order)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(order))


async def _serve(order: Order) -> None:
    parent = os.getppid()  # without its server it waits for no call: another one may need the port
    folder = os.open(order.data, os.O_RDONLY | os.O_DIRECTORY)  # a socket's own path is limited to 108 bytes
    connector = aiohttp.UnixConnector(f"/proc/self/fd/{folder}/{SOCKET}", limit=0)
    timeout = aiohttp.ClientTimeout()  # the server limits all times itself
    async with aiohttp.ClientSession(
        "http://server",
        connector=connector,
        timeout=timeout,
        read_bufsize=2**20,
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=("Accept-Encoding", "User-Agent"),  # nothing is compressed on the way
    ) as session:
        calls = Calls(session, MessageRoom(order.messages_bytes, order.max_request_bytes))
        server = grpc.aio.server(options=_options(order.max_request_bytes))
        server.add_generic_rpc_handlers((calls,))
        try:
            port = _listen(server, order)
        except RuntimeError:  # its text has no reason
            text = "another process listens there, or this machine does not have the address"
            _announce(Announcement(error=f"{order.address} cannot be listened on: {text}"))
            return
        await server.start()
        _limit_memory(order)
        _announce(Announcement(port))
        await _wait_for_end_of_input()
        calls.is_stopping = True
        while not calls.ended.is_set() and os.getppid() == parent:
            with suppress(TimeoutError):
                await asyncio.wait_for(calls.ended.wait(), CLOSE_S)
        await server.stop(CLOSE_S)


def _options(max_request_bytes: int) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", 0),  # else two servers could share the port unnoticed
        ("grpc.max_receive_message_length", max_request_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_concurrent_streams", MAX_STREAMS),
        ("grpc.server.max_pending_requests", MAX_UNSEEN),
        ("grpc.server.max_pending_requests_hard_limit", 2 * MAX_UNSEEN),
        ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_S * 1000),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
        ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_S * 1000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.keepalive_time_ms", PING_S * 1000),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_S * 1000),
        ("grpc.max_connection_age_ms", AGE_S * 1000),
        ("grpc.max_connection_age_grace_ms", AGE_S * 1000),
    ]


def _listen(server: grpc.aio.Server, order: Order) -> int:
    if order.cert is None or order.key is None:
        return server.add_insecure_port(order.address)
    cert, key = Path(order.cert), Path(order.key)

    def read() -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(key.read_bytes(), cert.read_bytes())])

    credentials = grpc.dynamic_ssl_server_credentials(read(), read)
    return server.add_secure_port(order.address, credentials)


def _announce(announcement: Announcement) -> None:
    os.write(sys.stdout.fileno(), msgspec.json.encode(announcement) + b"\n")


def _limit_memory(order: Order) -> None:
    """Limit what the process takes from here on, in case that `MessageRoom` is too slow.

    The limit is of addresses: what malloc has returned to the kernel counts, too, so it is twice as much.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    [now_bytes] = [int(line.split()[1]) * 1024 for line in status if line.startswith("VmData:")]
    most = now_bytes + 2 * COPIES * order.messages_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


async def _wait_for_end_of_input() -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin.buffer
    )
    await reader.read()


if __name__ == "__main__":
    main()
