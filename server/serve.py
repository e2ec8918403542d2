"""Running the server: the loop, the signals, and an end that says why."""

from __future__ import annotations

import asyncio
import ctypes
import importlib
import logging
import os
import resource
import signal
import ssl
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import uvloop
from aiohttp import web

from server.app import create_app
from server.config import AUTO, OFF, Config, ConfigError
from server.connections.connection import ConnectionLimits, listening
from server.connections.tls import Certificate
from server.health import dead, vital
from server.logs.ledger import telling
from server.logs.requests import log_inferences
from server.logs.stderr import STDERR, logging_to_stderr
from server.notify import Notifier
from server.v2.shortcut import shorten

_log = logging.getLogger(__name__)

STDOUT = 1

OTEL_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
"""Each says where traces go; OpenTelemetry reads them, and its other variables, itself."""

INSTALL_OTEL = "pip install 'loadledger[otel]'"

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
        TlsProblem: the certificate or its key cannot be used.
        LedgerProblem: the data directory is in use, or its ledger cannot be opened.
        RuntimeProblem: the fork server cannot be started.
        OSError: the address cannot be listened on.
    """
    _fill_standard_streams()
    _allow_many_descriptors()
    _keep_freed_memory()
    with logging_to_stderr(config), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(config, announce, Notifier(os.environ)))


def _fill_standard_streams() -> None:
    """Open what was closed of stdin, stdout and stderr, so that nothing else gets their numbers.

    Log lines would be written into a socket or a file of ours, and libuv aborts when it closes one of them.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= STDERR:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    if getattr(sys, "stdout", None) is None:  # as Python has it where it was closed
        sys.stdout = os.fdopen(STDOUT, "w", closefd=False)


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


async def _serve(config: Config, announce: Callable[[str], None], manager: Notifier) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    app = create_app(config)
    tracing = None
    if _exports_traces(config):
        from server.logs.tracing import Tracing  # noqa: PLC0415 - of an extra, and slow to import

        tracing = Tracing()
    app.cleanup_ctx.append(partial(telling, on_job_end=tracing.record_job if tracing is not None else None))
    runner = web.AppRunner(
        app,
        access_log=None,
        shutdown_timeout=config.drain_timeout_s / 2,  # it waits as long twice: for handlers, then connections
        handler_cancellation=True,  # an inference that nobody waits for any more must not hold up the next
    )
    try:
        await runner.setup()
        shorten(runner, app)
        log_inferences(runner, app)
        if tracing is not None:
            tracing.trace_requests(runner, app)
        async with _listening(runner, config) as url:
            announce(url)
            manager.ready(url)
            living = asyncio.create_task(manager.live())
            try:
                return await _until_end(app, stop)
            finally:
                manager.stopping()
                living.cancel()  # from here on the manager's limit for stopping counts
    finally:
        await runner.cleanup()
        if tracing is not None:
            tracing.close()


def _exports_traces(config: Config) -> bool:
    """Whether traces are exported, as the settings and the variables of OpenTelemetry say.

    Raises:
        ConfigError: `--otel=on` asks for it, and the extra is not installed.
    """
    named = any(os.environ.get(name) for name in OTEL_ENDPOINTS)
    disabled = os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    if config.otel == OFF or (config.otel == AUTO and (disabled or not named)):
        return False
    try:
        importlib.import_module("server.logs.tracing")
    except ImportError as error:
        told = f"traces cannot be exported, {error.name} is not installed: {INSTALL_OTEL}"
        if config.otel != AUTO:
            raise ConfigError(f"--otel: {told}") from None
        _log.warning("%s, or give --otel=off", told)
        return False
    return True


@asynccontextmanager
async def _listening(runner: web.AppRunner, config: Config) -> AsyncIterator[str]:
    """Listen while the server serves, and give its URL."""
    assert runner.server is not None, "the runner is not set up"
    limits = ConnectionLimits.of(config)
    async with listening(runner.server, config.host, config.port, limits, _tls(config)) as port:
        host = f"[{config.host}]" if ":" in config.host else config.host
        yield f"{'http' if config.tls_cert is None else 'https'}://{host}:{port}"


async def _until_end(app: web.Application, stop: asyncio.Event) -> int:
    """Wait for a signal, or for the end of what must not end: better no server than one that does nothing."""
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({stopping, *vital(app).values()}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    defects = dead(app)
    for name, defect in defects.items():
        _log.critical("the %s ended; the server stops", name, exc_info=defect)
    return 1 if defects else 0


def _tls(config: Config) -> ssl.SSLContext | None:
    if config.tls_cert is None or config.tls_key is None:
        return None
    return Certificate(config.tls_cert, config.tls_key).context
