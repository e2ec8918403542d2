"""The server's side of the gateway: the socket for its requests, its process, restarts and end."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from asyncio.subprocess import PIPE, Process
from contextlib import AsyncExitStack, suppress
from dataclasses import replace

import msgspec
from aiohttp import web

from features.grpc.gatewaywire import MAX_CALLS, RESERVE, SOCKET, Announcement, Order, messages_bytes
from server.appkeys import LIMIT
from server.config import Config, ConfigError
from server.http.connection import ConnectionLimits, bound_socket, listening_on

_log = logging.getLogger(__name__)

ENVIRONMENT = {
    "GRPC_VERBOSITY": "NONE",  # else it prints lines of its own
    "OPENBLAS_NUM_THREADS": "1",
    "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "upb",  # not the slow one, which other packages ask for
    "MALLOC_MMAP_THRESHOLD_": str(4 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(16 * 2**20),
    "MALLOC_TOP_PAD_": str(2**20),
}
"""Of the process. With malloc's own limits, page faults make a call of 600 KB a fifth longer (measured)."""
START_S = 30.0
"""Time for the process to start, usually 0.5 s."""
END_S = 5.0
"""Time for the process to end after all requests of its calls have been answered."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 30.0
"""Pause before a restart; it doubles each time, and is short again after a process that ran longer."""


async def _log_lines(stderr: asyncio.StreamReader) -> None:
    """Log what the process prints, such as why it failed, until its end."""
    while not stderr.at_eof():
        with suppress(ValueError):  # a line longer than any
            if line := await stderr.readline():
                _log.error("gRPC: %s", line.decode(errors="replace").rstrip())


class Gateway:
    """The gateway's process, kept alive while the server runs; nothing without `--grpc-port`."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._process: Process | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._opened = AsyncExitStack()
        self._port = config.grpc_port

    async def open(self, server: web.Server, app: web.Application) -> None:
        """Listen on the socket and start the process.

        Raises:
            ConfigError: the port cannot be listened on, or the process cannot be started.
        """
        if self._port is None:
            return
        limits = replace(
            ConnectionLimits.of(self._config),
            most=MAX_CALLS + RESERVE,
            reserve=0,
            open=set(),
            is_admitted=self._is_own,
        )
        try:
            bound = self._opened.enter_context(bound_socket(self._config.data, SOCKET))
        except OSError as error:
            raise ConfigError(f"--grpc-port: {self._config.data / SOCKET}: {error.strerror}") from None
        await self._opened.enter_async_context(listening_on(server, bound, limits))
        self._memory_bytes = messages_bytes(app[LIMIT].bytes, self._config.max_request_bytes)
        await self._start()
        self._keeping = asyncio.create_task(self._keep(), name="grpc")

    async def begin_stop(self) -> None:
        """Have the process refuse new calls, and end with the last one that is running."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait([self._keeping])
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
        await self._opened.aclose()

    async def close(self) -> None:
        """Wait for the process's end; kill it if it does not end."""
        await self._opened.aclose()
        await self._end()

    async def _end(self) -> None:
        if self._process is None:
            return
        try:
            async with asyncio.timeout(END_S):
                await self._process.wait()
        except TimeoutError:
            with suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    def _is_own(self, process: int) -> bool:
        """Whether a process is the gateway, which may say for which client it asks."""
        return self._process is not None and process == self._process.pid

    async def _start(self) -> None:
        config = self._config
        # Not from a path that others may write: -P leaves the working directory out.
        command = [sys.executable, "-P", "-m", "features.grpc.gateway"]
        environment = {**os.environ, **ENVIRONMENT}
        self._process = process = await asyncio.create_subprocess_exec(
            *command, stdin=PIPE, stdout=PIPE, stderr=PIPE, env=environment
        )
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        self._logging = asyncio.create_task(_log_lines(process.stderr))
        host = f"[{config.host}]" if ":" in config.host else config.host
        order = Order(
            data=str(config.data),
            address=f"{host}:{self._port}",
            max_request_bytes=config.max_request_bytes,
            messages_bytes=self._memory_bytes,
            cert=None if config.tls_cert is None else str(config.tls_cert),
            key=None if config.tls_key is None else str(config.tls_key),
        )
        process.stdin.write(msgspec.json.encode(order) + b"\n")
        try:
            async with asyncio.timeout(START_S):
                line = await process.stdout.readline()
            announced = msgspec.json.decode(line or b"{}", type=Announcement)
        except TimeoutError:
            announced = Announcement(error=f"the process has not started within {START_S:g} s")
        except (msgspec.DecodeError, ValueError):
            announced = Announcement(error="the process printed something else than its port")
        if announced.port is None:
            process.stdin.close()
            await self._end()
            raise ConfigError(f"--grpc-port: {announced.error or 'the process ended at its start'}")
        self._port = announced.port
        _log.info("gRPC at %s:%d, process %d", host, announced.port, process.pid)

    async def _keep(self) -> None:
        """Start the process again whenever it ends; until cancelled."""
        loop, pause_s = asyncio.get_running_loop(), FIRST_PAUSE_S
        while True:
            began_s = loop.time()
            assert self._process is not None
            code = await self._process.wait()
            if loop.time() - began_s > LONGEST_PAUSE_S:
                pause_s = FIRST_PAUSE_S
            _log.warning("the gRPC process ended (%d), and its calls with it; it is started again", code)
            while True:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                try:
                    await self._start()
                    break
                except (ConfigError, OSError) as error:
                    _log.error("gRPC cannot be started again yet: %s", error)
