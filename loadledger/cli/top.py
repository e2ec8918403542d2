"""`loadledger top`: a live view of memory, loaded models, jobs in progress and failures."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import click

from loadledger.cli.jobs import describe_progress, model_of
from loadledger.cli.models import RIGHT, USE_HEAD, budget_line, pressure_line, use_row
from loadledger.cli.options import ServerChoice, json_option, open_chosen_client, server_options
from loadledger.cli.output import format_age, format_cell, format_table, is_dumb, print_result, to_printable

JOBS_HEAD = ("JOB", "KIND", "MODEL", "STATUS", "BY", "AGE", "WHERE")
WRONG_HEAD = ("MODEL", "STATE", "REASON")
MOST_ROWS = 100
"""Longest table: a terminal shows fewer rows, and a server may have ten thousand models."""
BAR_CELLS = 40
INTERVAL_S = 1.0
"""Pause between two snapshots: people do not read faster."""
PAUSE = 4
"""Least pause, in durations of a snapshot, so that `top` does not keep a server of many models busy."""


@dataclass(frozen=True, slots=True)
class ServerSnapshot:
    """State of a server at one moment.

    Attributes:
        took_s: duration of the requests.
        problem: why the latest requests failed; the rest is then the previous state.
    """

    url: str
    resources: Any
    jobs: Sequence[Any]
    wrong: Sequence[Any]
    at: datetime
    took_s: float
    problem: str | None = None


@click.command()
@json_option
@server_options
def top(*, as_json: bool, where: ServerChoice) -> None:
    """Watch memory, models and running jobs until Ctrl-C.

    Without a terminal, they are printed once.
    """
    with open_chosen_client(where) as client:
        snapshot = _take_snapshot(client)
        # On a dumb terminal, a live view would print nothing.
        if as_json or not sys.stdout.isatty() or is_dumb(os.environ):
            members = {"resources": snapshot.resources, "jobs": snapshot.jobs, "wrong": snapshot.wrong}
            print_result(members, lines(snapshot), as_json=as_json)
            return
        try:
            _watch(client, snapshot)
        except KeyboardInterrupt:
            return


def _watch(client: Any, snapshot: ServerSnapshot) -> None:
    """Update the view until an error that a retry cannot solve."""
    from rich.live import Live

    from loadledger import ServerError, ServerUnreachable

    with Live(_render(snapshot), screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(max(INTERVAL_S, PAUSE * snapshot.took_s))
            try:
                snapshot = _take_snapshot(client)
            except (ServerUnreachable, ServerError) as problem:
                status = problem.status if isinstance(problem, ServerError) else None
                if status is not None and status < 500 and status != 429:  # noqa: PLR2004 - permanent
                    raise
                snapshot = replace(snapshot, problem=str(problem))
            live.update(_render(snapshot), refresh=True)


def _take_snapshot(client: Any) -> ServerSnapshot:
    began = time.monotonic()
    unended = [
        job for status in ("in_progress", "pending") for job in client.jobs(status=status, limit=MOST_ROWS)
    ]
    wrong = islice((model for model in client.models() if model.state in {"failed", "lost"}), MOST_ROWS)
    found, failed, now = client.resources(), list(wrong), datetime.now(UTC)
    return ServerSnapshot(client.url, found, unended, failed, now, time.monotonic() - began)


def _render(snapshot: ServerSnapshot) -> Any:
    """Return the view for a terminal; long lines are cut."""
    from rich.text import Text

    return Text.from_ansi("\n".join(lines(snapshot)), no_wrap=True, overflow="ellipsis")


def lines(snapshot: ServerSnapshot) -> Iterator[str]:
    found, now = snapshot.resources, datetime.now(UTC)
    title = click.style("loadledger", bold=True)
    yield f"{title}  {snapshot.url}  {snapshot.at:%H:%M:%S}Z  position {found.as_of}"
    if snapshot.problem is not None:
        yield click.style(
            f"unreachable, retrying; previous state: {to_printable(snapshot.problem)}", fg="red"
        )
    yield f"memory {_bar(found)} {budget_line(found)}"
    yield from filter(None, [pressure_line(found)])
    yield ""
    uses = [use_row(use, now) for use in found.models[:MOST_ROWS]]
    yield from format_table(USE_HEAD, uses, right=RIGHT) if uses else ["nothing is loaded"]
    if snapshot.jobs:
        yield ""
        jobs = [_job_row(job, now) for job in snapshot.jobs[:MOST_ROWS]]
        yield from format_table(JOBS_HEAD, jobs, right={"AGE"})
    if snapshot.wrong:
        yield ""
        yield from format_table(WRONG_HEAD, [_wrong_row(model) for model in snapshot.wrong])


def _bar(found: Any) -> str:
    budget = max(found.budget_bytes, 1)
    used = min(BAR_CELLS, max(0, (BAR_CELLS * found.used_bytes + budget // 2) // budget))
    both = found.used_bytes + found.reserved_bytes
    taken = min(BAR_CELLS, max(used, (BAR_CELLS * both + budget // 2) // budget))
    parts = ("#" * used, "green" if found.free_bytes >= 0 else "red"), ("=" * (taken - used), "yellow")
    drawn = "".join(click.style(cells, fg=colour) for cells, colour in parts if cells)
    return f"[{drawn}{'.' * (BAR_CELLS - taken)}]"


def _job_row(job: Any, now: datetime) -> tuple[str, ...]:
    return (
        format_cell(job.id),
        job.kind,
        format_cell(model_of(job)),
        job.status,
        format_cell(job.requested_by, most=24),
        format_age(job.created_at, now),
        format_cell(describe_progress(job)),
    )


def _wrong_row(model: Any) -> tuple[str, ...]:
    reason = f"{model.error.code}: {model.error.message}" if model.error is not None else ""
    return format_cell(model.id), model.state, format_cell(reason)
