"""Run the server: event loop, signals, messages to the service manager (sd_notify(3)), exit code."""

from __future__ import annotations

import asyncio
import ctypes
import importlib
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from threading import Barrier
from typing import Any

import uvloop
from aiohttp import web

from events.errors import LedgerForked, NameInUse
from features.grpc.app import Gateway
from server.api.health import failed_tasks, vital_tasks
from server.app import create_app
from server.appkeys import CONFIG
from server.auth.tokens import TOKENS
from server.config import Config
from server.http.connection import ConnectionLimits, bind_address, listening
from server.http.tls import Certificate
from server.observability.eventlog import log_events
from server.observability.output import STDERR, log_to_stderr
from server.v2.inference import add_fast_path

_log = logging.getLogger(__name__)


class Notifier:
    """Notifies the service manager that NOTIFY_SOCKET names, if any; never blocks and never fails."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        given = environment.get("NOTIFY_SOCKET", "")
        self._address = f"\0{given[1:]}" if given.startswith("@") else given
        self._watchdog_s = _watchdog_s(environment) if given else None
        self._failed = False

    def ready(self, url: str) -> None:
        self._send(f"READY=1\nSTATUS=ready at {url}")

    def stopping(self) -> None:
        self._send("STOPPING=1\nSTATUS=stopping: running requests may end")

    async def notify_watchdog(self) -> None:
        """Notify twice per watchdog period that the event loop runs."""
        while self._watchdog_s is not None:
            self._send("WATCHDOG=1")
            await asyncio.sleep(self._watchdog_s / 2)

    def _send(self, state: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sending:
                sending.setblocking(False)
                sending.sendto(state.encode(), self._address)
            self._failed = False
        except OSError as error:
            if not self._failed:  # once, not with each watchdog message
                _log.warning("cannot notify the service manager of %s: %s", state.partition("\n")[0], error)
            self._failed = True


def _watchdog_s(environment: Mapping[str, str]) -> float | None:
    period, process = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID")
    is_ours = process is None or process == str(os.getpid())
    return int(period) / 1e6 if is_ours and period.isdecimal() and int(period) > 0 else None


SOCKETS = web.AppKey("sockets", list[socket.socket])
STDOUT = 1
REFUSALS_S = 1.0
"""Beyond the drain timeout, the time to write the refusals of inferences that have not ended by then."""
SPARE_THREADS = 4
"""Beside one for each core, for work that waits for a disk; as asyncio has it."""
MAX_THREADS = 32

OTEL_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
"""Variables that enable traces; OpenTelemetry reads them and its others itself."""

INSTALL_OTEL = "pip install 'loadledger[otel]'"

MALLOC_OPTIONS = {
    -1: 64 * 2**20,  # M_TRIM_THRESHOLD: so much is kept; some large requests at a time, with their answers
    -2: 4 * 2**20,  # M_TOP_PAD: so much is taken at once
    -3: 4 * 2**20,  # M_MMAP_THRESHOLD: what is larger goes back at once, as long as it is rare
}
"""malloc.h"""


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that is ready: its application, its address, and how to stop it."""

    app: web.Application
    url: str
    stop: Callable[[], None]


Announce = Callable[[RunningServer], Coroutine[Any, Any, object]]
"""Called with a server that is ready; it must not block the event loop."""


def serve(config: Config, announce: Announce, *, accepts_rollback: bool = False) -> int:
    """Serve until SIGTERM or SIGINT; return the process's exit code: 0, or 1 when a part of the server died.

    Args:
        config: the settings.
        announce: runs beside the server once that is ready, and is cancelled when it stops.
        accepts_rollback: as for `create_app`.

    Raises:
        TlsProblem: the certificate or its key cannot be used.
        LedgerProblem: the data directory is in use, or its ledger cannot be opened.
        LedgerForked: `ledger_forked`, at the start or later, the database has another history.
        RuntimeProblem: the fork server cannot be started.
        OSError: the address cannot be listened on.
    """
    _fill_standard_streams()
    _allow_many_descriptors()
    _keep_freed_memory()
    with log_to_stderr(config), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(config, announce, Notifier(os.environ), accepts_rollback=accepts_rollback))


def _fill_standard_streams() -> None:
    """Open closed standard streams on /dev/null, so that no other file gets their numbers.

    Otherwise log lines would go into a socket or a file, and libuv would abort when it closes one of them.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= STDERR:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    if getattr(sys, "stdout", None) is None:  # it was closed
        sys.stdout = os.fdopen(STDOUT, "w", closefd=False)


def _allow_many_descriptors() -> None:
    """Raise the soft limit to the hard one: a connection takes a descriptor, a worker six."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _keep_freed_memory() -> None:
    """Make glibc keep freed buffers of large requests, within limits; after a burst `Bodies` returns them.

    By default it returns them to the kernel at once, which clears each page again: with tensors of 600 KB,
    one client got half the throughput (measured).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # another C library has none
    if mallopt is not None:
        for option, value in MALLOC_OPTIONS.items():
            mallopt(option, value)


def _start_threads() -> ThreadPoolExecutor:
    """Return the loop's threads, all of them started: under a limit of processes there may be none later."""
    count = min(MAX_THREADS, len(os.sched_getaffinity(0)) + SPARE_THREADS)
    threads = ThreadPoolExecutor(count, thread_name_prefix="server")
    started = Barrier(count)  # a thread that waits takes no other call, so each call starts one
    try:
        for _ in range(count):
            threads.submit(started.wait)
    except RuntimeError:  # there are no more already
        started.abort()
    return threads


async def _serve(config: Config, announce: Announce, manager: Notifier, *, accepts_rollback: bool) -> int:
    asyncio.get_running_loop().set_default_executor(_start_threads())
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    app = create_app(config, accepts_rollback=accepts_rollback)
    app.cleanup_ctx.insert(1, _bind)  # with the data directory locked, before the ledger records a start
    tracing = None
    if _exports_traces():
        from server.observability.tracing import Tracing  # noqa: PLC0415 - of an extra, and slow to import

        tracing = Tracing()
    app.cleanup_ctx.append(
        partial(log_events, on_job_end=tracing.record_job if tracing is not None else None)
    )
    runner = web.AppRunner(
        app,
        access_log=None,
        # It waits as long twice: for handlers, then for connections.
        shutdown_timeout=(config.drain_timeout_s + REFUSALS_S) / 2,
        handler_cancellation=True,  # an inference without a client must not delay the next
    )
    gateway = Gateway(config)
    try:
        await runner.setup()
        assert runner.server is not None, "the runner is not set up"
        add_fast_path(runner.server, app)
        if tracing is not None:
            tracing.trace_requests(runner.server, app)
        async with _listening(runner.server, app) as url:
            await gateway.open(runner.server, app)
            app[TOKENS].server_url = local_url(url)
            running = RunningServer(app, url, stop.set)
            announcing = asyncio.create_task(announce(running), name="announcement")
            announcing.add_done_callback(_log_failed_announcement)
            manager.ready(url)
            living = asyncio.create_task(manager.notify_watchdog())
            try:
                return await _wait_for_end(app, stop)
            finally:
                manager.stopping()
                await gateway.begin_stop()
                living.cancel()  # from here the manager's stop timeout runs
                announcing.cancel()
                await asyncio.wait([announcing])
    finally:
        await runner.cleanup()
        await gateway.close()
        if tracing is not None:
            tracing.close()


def _log_failed_announcement(announcing: asyncio.Task[object]) -> None:
    """Log a defect of the announcement: the server serves without it."""
    if not announcing.cancelled() and (defect := announcing.exception()) is not None:
        _log.error("the server could not say what it found", exc_info=defect)


def _exports_traces() -> bool:
    named = any(os.environ.get(name) for name in OTEL_ENDPOINTS)
    disabled = os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    if disabled or not named:
        return False
    try:
        importlib.import_module("server.observability.tracing")
    except ImportError as error:
        reason = f"traces cannot be exported, {error.name} is not installed: {INSTALL_OTEL}"
        _log.warning("%s, or set OTEL_SDK_DISABLED=true", reason)
        return False
    return True


async def _bind(app: web.Application) -> AsyncIterator[None]:
    with bind_address(app[CONFIG].host, app[CONFIG].port) as app[SOCKETS]:
        yield


@asynccontextmanager
async def _listening(server: web.Server, app: web.Application) -> AsyncIterator[str]:
    config = app[CONFIG]
    limits = ConnectionLimits.of(config)
    tls = None
    if config.tls_cert is not None and config.tls_key is not None:
        tls = Certificate(config.tls_cert, config.tls_key).context
    async with listening(server, app[SOCKETS], limits, tls) as port:
        host = f"[{config.host}]" if ":" in config.host else config.host
        yield f"{'http' if tls is None else 'https'}://{host}:{port}"


def local_url(url: str) -> str:
    """Return the URL by which this machine reaches a server that listens at `url`."""
    return url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")


async def _wait_for_end(app: web.Application, stop: asyncio.Event) -> int:
    """Wait for a signal or the end of a vital task: no server is better than one that does nothing.

    Raises:
        LedgerForked: `ledger_forked`, the writer has found another history.
        NameInUse: `node_name_in_use`, another server has joined with this one's name.
    """
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({stopping, *vital_tasks(app).values()}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    defects = failed_tasks(app)
    refusals = [defect for defect in defects.values() if isinstance(defect, LedgerForked | NameInUse)]
    if refusals:
        raise refusals[0]  # no defect of this server, and no start of it mends that
    for name, defect in defects.items():
        _log.critical("the %s ended; the server stops", name, exc_info=defect)
    return 1 if defects else 0
