"""`loadledger load | unload | jobs | job | cancel`: request jobs, list them, wait for them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import click

from loadledger.cli.completion import latest_jobs, loaded_models, models_of_server
from loadledger.cli.output import (
    FAILED,
    INTERRUPTED,
    age,
    cell,
    in_one_line,
    note,
    second,
    state,
    table,
    took,
)
from loadledger.cli.server import Where, connected, json_option, print_json, server_options

STEPS = {
    "load": ("starting", "loading", "warming_up", "measuring"),
    "unload": ("draining", "stopping"),
}
"""The stages of a job, in their order; a job that has none yet is pending."""


HEAD = ("JOB", "KIND", "MODEL", "STATUS", "CAUSE", "BY", "AGE", "TOOK", "DETAIL")
STATUSES = ("pending", "in_progress", "completed", "failed", "cancelled")
SHOWN = 20
_wait_option = click.option(
    "--wait", "-w", is_flag=True, show_default=False, help="Follow it to its end; Ctrl-C leaves it running."
)


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


@click.command()
@click.option("--model", metavar="ID", shell_complete=models_of_server, help="Only those of this model.")
@click.option("--status", type=click.Choice(STATUSES), help="Only those that are so.")
@click.option(
    "--limit", "-n", metavar="N", type=click.IntRange(min=1), default=SHOWN, help="How many, newest first."
)
@click.option("--at", metavar="POSITION|TIME", help="As it was then: a position, or a time.")
@json_option
@server_options
def jobs(*, limit: int, as_json: bool, where: Where, **filters: str | None) -> None:
    """List the jobs, newest first."""
    given = {name: value for name, value in filters.items() if value is not None}
    with connected(where) as client:
        found = list(client.jobs(limit=limit, **given))
    if as_json:
        print_json({"jobs": found})
    elif found:
        click.echo("\n".join(table(HEAD, [_row(job) for job in found], right={"AGE", "TOOK"})))
    else:
        click.echo("no jobs")


@click.command()
@click.argument("job_id", metavar="JOB", shell_complete=latest_jobs)
@click.option(
    "--wait", "-w", is_flag=True, show_default=False, help="Follow it to its end; Ctrl-C leaves it running."
)
@json_option
@server_options
def job(job_id: str, *, wait: bool, as_json: bool, where: Where) -> None:
    """Show a job, or wait for it.

    With --wait, the exit code is 1 if the job fails or is cancelled.
    """
    with connected(where) as client:
        seen = client.job(job_id)
        if wait:
            follow(client, seen, as_json=as_json)
        elif as_json:
            print_json(seen)
        else:
            click.echo("\n".join(_details(seen)))


@click.command()
@click.argument("job_id", metavar="JOB", shell_complete=latest_jobs)
@json_option
@server_options
def cancel(job_id: str, *, as_json: bool, where: Where) -> None:
    """Cancel a job that has not ended."""
    with connected(where) as client:
        seen = client.cancel(job_id)
    if as_json:
        print_json(seen)
    elif seen.status == "cancelled":
        click.echo(f"{named(seen)}: {in_one_line(seen.kind)} {state('cancelled')}")
    else:
        conclude(seen, as_json=False)


def _row(job: Any) -> tuple[str, ...]:
    version = "" if job.version is None else f"/{job.version}"
    detail = f"{job.error.code}: {job.error.message}" if job.error is not None else ""
    return (
        cell(job.id),
        job.kind,
        cell(f"{job.model_id}{version}"),
        job.status,
        cell(job.cause),
        cell(job.requested_by, most=24),
        age(job.created_at, datetime.now(UTC)),
        took(job.created_at, job.finished_at),
        cell(detail or (None if job.ended else words(job)), most=60),
    )


def _details(job: Any) -> Iterator[str]:
    yield f"{in_one_line(job.kind)} of {named(job)}: {state(job.status)}"
    facts = {
        "job": job.id,
        "stage": job.stage,
        "waits for": job.waiting_for,
        "requested": f"{second(job.created_at)} by {job.requested_by}, cause {job.cause}",
        "started": job.started_at and f"{second(job.started_at)}, attempt {job.attempt}",
        "finished": job.finished_at
        and f"{second(job.finished_at)}, after {took(job.created_at, job.finished_at)}",
        "position": job.position,
        "parameters": ", ".join(f"{name} {value}" for name, value in job.parameters.items()) or None,
        "error": job.error and f"{job.error.code}: {job.error.message}",
    }
    for name, value in facts.items():
        if value is not None:
            yield f"  {name + ':':<12} {cell(value, most=4096)}"


@click.command()
@click.argument("model", shell_complete=models_of_server)
@click.option(
    "--version", "-v", metavar="N", type=click.IntRange(min=1), help="Which; the highest if left out."
)
@_wait_option
@click.option(
    "--priority", type=click.Choice(["high", "normal", "low"]), help="Who goes first of those that wait."
)
@click.option(
    "--timeout-s",
    metavar="SECONDS",
    type=click.IntRange(min=1),
    help="After how long it fails, waiting included.",
)
@click.option(
    "--keep-alive-s",
    metavar="SECONDS",
    type=click.IntRange(min=-1),
    help="Idle seconds to its unload; -1 is never.",
)
@click.option(
    "--memory-limit-bytes", metavar="BYTES", type=click.IntRange(min=1), help="What each instance may take."
)
@click.option(
    "--strategy", type=click.Choice(["beside", "in_place", "auto"]), help="How it replaces a loaded version."
)
@click.option("--pin/--no-pin", "pinned", default=None, help="Never unload it for room or idleness.")
@click.option("--instances", metavar="N", type=click.IntRange(min=1), help="Workers side by side.")
@click.option(
    "--max-batch-size", metavar="N", type=click.IntRange(min=0), help="Run so many waiting requests together."
)
@click.option(
    "--max-queue-delay-us",
    metavar="MICROSECONDS",
    type=click.IntRange(min=0),
    help="How long one waits for others.",
)
@json_option
@server_options
def load(
    model: str, *, version: int | None, wait: bool, as_json: bool, where: Where, **parameters: Any
) -> None:
    """Load a model, or another version of a loaded one.

    What is left out is as the model's loadledger.toml or the server says. With --wait, the exit code is 1 if
    the load fails, and the reason is told.
    """
    given = {name: value for name, value in parameters.items() if value is not None}
    with connected(where) as client:
        job = client.load(model, version, **given)
        answer(client, job, wait=wait, as_json=as_json)


@click.command()
@click.argument("model", required=False, shell_complete=loaded_models)
@click.option("--force", "-f", is_flag=True, show_default=False, help="Do not wait for running requests.")
@_wait_option
@json_option
@server_options
def unload(model: str | None, *, force: bool, wait: bool, as_json: bool, where: Where) -> None:
    """Unload a model; without a name, the one that was loaded last.

    With --force, running requests are ended, a load under way is cancelled, and a stuck worker is killed.
    """
    with connected(where) as client:
        job = client.unload(model, force=force)
        answer(client, job, wait=wait, as_json=as_json)
