"""Whether traces are exported, and what that needs: an extra, which is imported only where it is wanted."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Protocol

from aiohttp import web

from events.jobs import Job
from events.types import Event
from server.config import AUTO, Config
from server.logs.tracing import Trace
from server.settingchecks import OFF
from server.settings import ConfigError

_log = logging.getLogger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
"""Each says where traces go; the library reads them, and its other variables, itself."""

DISABLED = "OTEL_SDK_DISABLED"
INSTALL = "pip install 'loadledger[otel]'"


class Span(Protocol):
    """What a request is, in its trace, while it is served."""

    trace: Trace
    """Where it stands: spans of what it causes are its parts."""

    def end(self, status: int | None, attributes: Mapping[str, str | int | bool]) -> None:
        """Say how it ended: with which status, None where nobody waited for one."""


class Telemetry(Protocol):
    """Where spans go."""

    def request(self, trace: Trace, name: str, attributes: Mapping[str, str | int | bool]) -> Span:
        """Begin the span of a request, in the trace that it names or a new one."""

    def job(self, job: Job, end: Event, trace: Trace | None) -> None:
        """Record the spans of a job that has ended, as a part of the request behind it if there is one."""

    async def close(self) -> None:
        """Export what is waiting, within a few seconds; nothing is exported after that."""


TELEMETRY = web.AppKey("telemetry", Telemetry)
"""Where spans go; not there where they go nowhere."""


def open_telemetry(config: Config, environment: Mapping[str, str]) -> Telemetry | None:
    """Return where spans go, or None where that is not wanted.

    Raises:
        ConfigError: it is asked for by `--otel=on`, and the extra is not installed.
    """
    named = any(environment.get(name) for name in ENDPOINTS)
    disabled = environment.get(DISABLED, "").strip().lower() == "true"
    if config.otel == OFF or (config.otel == AUTO and (disabled or not named)):
        return None
    try:
        from server.logs.export import Exporting  # noqa: PLC0415 - an extra, and slow to import
    except ImportError as error:
        told = f"traces cannot be exported, {error.name} is not installed: {INSTALL}"
        if config.otel != AUTO:
            raise ConfigError(f"--otel: {told}") from None
        _log.warning("%s, or give --otel=off", told)
        return None
    return Exporting()
