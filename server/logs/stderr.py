"""The server's log: what is written to stderr, in which form, from which level on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import Context

from server.config import Config
from server.logs.forms import FORMS
from server.logs.pipe import LinePipe

STDERR = 2
OURS = ("events", "runtime", "server")
"""The packages whose levels are set; of others, warnings are told."""

_QUIET = {
    # It logs, with a traceback, each request that is no HTTP, and anybody may send those; what goes wrong in
    # our handlers is logged where it is answered.
    "aiohttp.server": logging.CRITICAL,
}


@contextmanager
def logging_to_stderr(config: Config) -> Iterator[LinePipe]:
    """Write log lines to stderr as configured; what is queued at the end is written first."""
    form = FORMS[config.log_format]()
    handler = LinePipe(STDERR, lambda count: Context().run(form.format, _dropped(count)))
    handler.setFormatter(form)
    handler.setLevel(config.log_level.upper())
    root, levels = logging.getLogger(), _levels(config.log_level.upper())
    before = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    root.addHandler(handler)
    try:
        yield handler
    finally:
        root.removeHandler(handler)
        for name, was in before.items():
            logging.getLogger(name).setLevel(was)
        handler.close()


def _levels(level: str) -> dict[str, int | str]:
    return {**_QUIET, **dict.fromkeys(OURS, level)}


def _dropped(count: int) -> logging.LogRecord:
    told = f"{count} log lines were dropped: who reads them is too slow"
    return logging.LogRecord(__name__, logging.WARNING, __file__, 0, told, None, None)
