"""Running the server: the loop, the signals, and an end that says why."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import resource
import signal
import sys
from collections.abc import Callable

import uvloop
from aiohttp import web

from server.app import create_app
from server.config import Config
from server.health import dead, vital
from server.shortcut import shorten

_log = logging.getLogger(__name__)

MALLOC_OPTIONS = {
    -1: 64 * 2**20,  # M_TRIM_THRESHOLD: so much is kept; some large requests at a time, with their answers
    -2: 4 * 2**20,  # M_TOP_PAD: so much is taken at once
    -3: 4 * 2**20,  # M_MMAP_THRESHOLD: what is larger goes back at once, as long as it is rare
}
"""malloc.h"""


def serve(config: Config, announce: Callable[[str], None]) -> int:
    """Serve until SIGTERM or SIGINT; return the process's exit code: 0, or 1 when a part of the server died.

    Args:
        config: how to run.
        announce: told the server's URL once it is ready.

    Raises:
        LedgerProblem: the data directory is in use, or its ledger cannot be opened.
        RuntimeProblem: the fork server cannot be started.
        OSError: the address cannot be listened on.
    """
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # It logs, with a traceback, each request that is no HTTP, and anybody may send those; what goes wrong in
    # our handlers is logged where it is answered.
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
    _allow_many_descriptors()
    _keep_freed_memory()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(config, announce))


def _allow_many_descriptors() -> None:
    """Raise the soft limit to the hard one: each connection takes a descriptor, and each model four."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _keep_freed_memory() -> None:
    """Have glibc keep what large requests gave back, within bounds, for the next ones.

    By itself it returns their buffers to the kernel at once, and what comes back from there has to be cleared
    page by page: of tensors of 600 KB a single client had half as many answered (measured).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # another C library has none
    if mallopt is not None:
        for option, value in MALLOC_OPTIONS.items():
            mallopt(option, value)


async def _serve(config: Config, announce: Callable[[str], None]) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    app = create_app(config)
    runner = web.AppRunner(
        app,
        access_log=None,
        shutdown_timeout=config.drain_timeout_s / 2,  # it waits as long twice: for handlers, then connections
        auto_decompress=False,  # it is done before authentication, and a small body may become a huge one
        handler_cancellation=True,  # an inference that nobody waits for any more must not hold up the next
    )
    try:
        await runner.setup()
        shorten(runner, app)
        site = web.TCPSite(runner, config.host, config.port)
        await site.start()
        announce(_url(runner, config))
        return await _until_end(app, stop)
    finally:
        await runner.cleanup()


async def _until_end(app: web.Application, stop: asyncio.Event) -> int:
    """Wait for a signal, or for the end of what must not end: better no server than one that does nothing."""
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({stopping, *vital(app).values()}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    defects = dead(app)
    for name, defect in defects.items():
        _log.critical("the %s ended; the server stops", name, exc_info=defect)
    return 1 if defects else 0


def _url(runner: web.AppRunner, config: Config) -> str:
    port = runner.addresses[0][1]
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"http://{host}:{port}"
