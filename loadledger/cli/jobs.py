"""`loadledger jobs | job | cancel`: what was asked of a server, and what became of it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import click

from loadledger.cli.completion import latest_jobs, models_of_server
from loadledger.cli.connection import Where, connected, server_options
from loadledger.cli.following import conclude, follow, named, words
from loadledger.cli.options import json_option, print_json
from loadledger.cli.tables import age, cell, in_one_line, second, state, table, took

HEAD = ("JOB", "KIND", "MODEL", "STATUS", "CAUSE", "BY", "AGE", "TOOK", "DETAIL")
STATUSES = ("pending", "in_progress", "completed", "failed", "cancelled")
SHOWN = 20


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
