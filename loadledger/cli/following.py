"""A job that is waited for: its stages while it runs, and how to come back to it after Ctrl-C."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import click

from loadledger.cli.options import print_json
from loadledger.cli.problems import FAILED, INTERRUPTED, note
from loadledger.cli.tables import age, in_one_line, state, took

STEPS = {
    "load": ("starting", "loading", "warming_up", "measuring"),
    "unload": ("draining", "stopping"),
}
"""The stages of a job, in their order; a job that has none yet is pending."""


@dataclass(frozen=True, slots=True)
class Shown:
    """What shows the changes of a job, and that the server is away."""

    on_change: Callable[[Any], None]
    on_away: Callable[[Exception], None]


def answer(client: Any, job: Any, *, wait: bool, as_json: bool) -> None:
    """Say what came of a request: a job that begins, one that was waited for, or that nothing is to do."""
    if job.status == "completed" and not as_json:  # a new one never has, so soon
        ago = age(job.finished_at, datetime.now(UTC))
        click.echo(f"{named(job)}: nothing to do, its {in_one_line(job.kind)} completed {ago} ago")
    elif wait:
        follow(client, job, as_json=as_json)
    else:
        conclude(job, as_json=as_json)


def follow(client: Any, job: Any, *, as_json: bool) -> None:
    """Wait for a job and say how it ended; the exit code is 1 if it did not complete.

    Ctrl-C ends the waiting only: the job goes on, and it is said how to come back.
    """
    try:
        with _shown(job) as shown:
            job = client.wait_for(job.id, on_change=shown.on_change, on_away=shown.on_away)
    except KeyboardInterrupt:
        note(
            f"detached: the {job.kind} of {named(job)} goes on as job {job.id}\n"
            f"  to wait for it again: loadledger job {job.id} --wait\n"
            f"  to stop it:           loadledger cancel {job.id}"
        )
        sys.exit(INTERRUPTED)
    conclude(job, as_json=as_json)


def conclude(job: Any, *, as_json: bool) -> None:
    """Say how a job ended, or that it has not; the exit code is 1 if it failed or was cancelled."""
    if as_json:
        print_json(job)
    if job.status in {"failed", "cancelled"}:
        reason = f": {job.error.message} ({job.error.code})" if job.error is not None else ""
        verb = "was cancelled" if job.status == "cancelled" else "failed"
        note(f"the {job.kind} of {named(job)} {verb}{reason}\n  more: loadledger events --job {job.id}")
        sys.exit(FAILED)
    if as_json:
        return
    kind = in_one_line(job.kind)
    if job.ended:
        click.echo(f"{named(job)}: {kind} completed in {took(job.created_at, job.finished_at)}")
    else:
        where = in_one_line(job.stage or job.waiting_for or "")
        click.echo(f"{named(job)}: {kind} {state(job.status)}{f' ({where})' if where else ''}")
        click.echo(f"to wait for it: loadledger job {in_one_line(job.id)} --wait")


def named(job: Any) -> str:
    """Return what a job is about."""
    model_id = in_one_line(job.model_id)
    return model_id if job.version is None else f"{model_id} version {job.version}"


def step(job: Any) -> tuple[int, int]:
    """Return how many of its steps a job has behind it, and of how many."""
    stages = STEPS.get(job.kind, ())
    if job.status == "completed":
        return len(stages) + 1, len(stages) + 1
    return (stages.index(job.stage) + 1 if job.stage in stages else 0), len(stages) + 1


def words(job: Any) -> str:
    """Return where a job is, in words."""
    if job.status == "in_progress":
        return in_one_line((job.stage or "in progress").replace("_", " "))
    if job.status == "pending" and job.waiting_for:
        return f"waits: {in_one_line(job.waiting_for)}"
    return in_one_line(job.status)


@contextmanager
def _shown(job: Any) -> Iterator[Shown]:
    """Give what shows a job: a bar on a terminal, else a line for each change."""
    if sys.stderr.isatty():
        with _bar(job) as shown:
            yield shown
        return
    began, last = time.monotonic(), ""

    def tell(seen: Any) -> None:
        nonlocal last
        if not seen.ended and words(seen) != last:
            last = words(seen)
            note(f"{named(seen)}: {last} ({time.monotonic() - began:.1f}s)")

    yield Shown(tell, lambda problem: note(_away(problem)))


@contextmanager
def _bar(job: Any) -> Iterator[Shown]:
    from rich.console import Console  # noqa: PLC0415 - 50 ms, and only who looks at it pays for it
    from rich.markup import escape  # noqa: PLC0415
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    columns = (
        SpinnerColumn(),
        TextColumn("{task.fields[about]}"),
        BarColumn(bar_width=24),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        done, total = step(job)
        task = progress.add_task(escape(words(job)), completed=done, total=total, about=escape(named(job)))

        def tell(seen: Any) -> None:
            done, total = step(seen)
            progress.update(task, description=escape(words(seen)), completed=done, total=total)

        def tell_away(problem: Exception) -> None:
            progress.console.print(f"loadledger: {_away(problem)}", markup=False, soft_wrap=True)

        yield Shown(tell, tell_away)


def _away(problem: Exception) -> str:
    return f"{problem}; trying again until it is back"
