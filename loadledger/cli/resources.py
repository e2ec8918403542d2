"""`loadledger resources`: the memory budget, what is taken of it, and who waits for it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import click

from loadledger.cli.connection import Where, connected, server_options
from loadledger.cli.options import json_option, print_json
from loadledger.cli.tables import age, cell, size, table

HEAD = ("MODEL", "VERSION", "PHASE", "WORKERS", "MEMORY", "RESERVED", "IN FLIGHT", "LAST USED", "KEPT")
RIGHT = frozenset({"WORKERS", "MEMORY", "RESERVED", "IN FLIGHT", "LAST USED"})
WAITING_HEAD = ("WAITING", "JOB", "NEEDS", "FOR")


@click.command()
@json_option
@server_options
def resources(*, as_json: bool, where: Where) -> None:
    """Show the memory budget, what takes it, and who waits."""
    with connected(where) as client:
        found = client.resources()
    if as_json:
        print_json(found)
    else:
        click.echo("\n".join(_told(found)))


def use_row(use: Any, now: datetime) -> tuple[str, ...]:
    """Return what one load takes, as the cells of `HEAD`."""
    return (
        cell(use.model_id),
        str(use.version),
        cell(use.phase),
        str(use.workers),
        size(use.memory_bytes),
        size(use.reserved_bytes) if use.reserved_bytes else "-",
        str(use.in_flight),
        age(use.last_used_at, now),
        kept(use),
    )


def kept(use: Any) -> str:
    """Return until when a model stays, if nobody asks for its unload."""
    if use.pinned:
        return "pinned"
    return "-" if use.keep_alive_s is None or use.keep_alive_s < 0 else f"{use.keep_alive_s}s idle"


def budget_line(found: Any) -> str:
    """Return the budget and what is taken of it."""
    free = f"free {size(found.free_bytes)}"
    parts = [f"used {size(found.used_bytes)}", f"reserved {size(found.reserved_bytes)}", free]
    most = f"; at most {found.max_loaded} loaded" if found.max_loaded is not None else ""
    return f"budget {size(found.budget_bytes)}: {', '.join(parts)}{most}"


def pressure_line(found: Any) -> str | None:
    """Return how much of the time something waited, if the kernel says so."""
    if found.pressure is None:
        return None
    told = {"memory": found.pressure.memory_some_percent, "cpu": found.pressure.cpu_some_percent}
    parts = [f"{name} {value:g} %" for name, value in told.items() if value is not None]
    return f"pressure of the last 10 s: {', '.join(parts)}" if parts else None


def _told(found: Any) -> Iterator[str]:
    now = datetime.now(UTC)
    yield budget_line(found)
    yield f"limit {size(found.limit_bytes)} ({cell(found.limit_source)})"
    pressure = pressure_line(found)
    if pressure is not None:
        yield pressure
    if found.preparing is not None:
        yield f"preparing {cell(found.preparing.model_id)} version {found.preparing.version}"
    if found.models:
        yield ""
        yield from table(HEAD, [use_row(use, now) for use in found.models], right=RIGHT)
    if found.waiting:
        yield ""
        rows = [
            (cell(wait.model_id), cell(wait.job_id), size(wait.needs_bytes), cell(wait.waiting_for))
            for wait in found.waiting
        ]
        yield from table(WAITING_HEAD, rows)
