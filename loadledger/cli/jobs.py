"""`loadledger load | unload | jobs | job | cancel`."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from itertools import islice
from typing import Any, NoReturn

import click

from loadledger.cli import options, output
from loadledger.cli.completion import latest_jobs, loaded_models, models_of_server

STAGES_OF_KIND = {
    "load": ("copying", "starting", "loading", "warming_up", "measuring"),
    "unload": ("draining", "stopping"),
}
"""The stages of a job, in order; a pending job has no stage yet."""
COLUMNS = ("JOB", "KIND", "MODEL", "STATUS", "CAUSE", "BY", "AGE", "TOOK", "DETAIL")
NO_JOB = "{} has no job; `loadledger jobs` lists them"
OPEN = ("pending", "in_progress")
STATUSES = (*OPEN, "completed", "failed", "cancelled")
SHOWN = 20
MAX_DETAIL = 130
"""Longest last cell of a line: a reason of waiting with its advice."""
PATIENCE_S = 3.0
"""Longer waits for running inferences are offered to be ended by force."""
_JOB_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_wait_option = click.option(
    "--wait", "-w", is_flag=True, help="Wait until the job ends; Ctrl-C leaves it running."
)


JobDisplay = tuple[Callable[[Any], None], Callable[[str], None]]
"""Callbacks that display a job's changes, and a note beside them."""


def report_request(client: Any, job: Any, *, wait: bool, as_json: bool) -> None:
    """Print the outcome of a request: a new job, an awaited one, changed settings, or nothing to do."""
    if job.passed_over:
        output.print_note(f"passed over: {output.to_printable(job.passed_over)}")
    if job.status == "completed" and job.kind == "load" and job.started_at is None and not as_json:
        labelled = f", {output.to_printable(job.label)} names it" if job.label else ""
        click.echo(f"{model_of(job)}: settings changed{labelled}")
    elif job.status == "completed" and not as_json:  # a new job cannot have completed yet
        ago = output.format_age(job.finished_at, datetime.now(UTC))
        click.echo(f"{model_of(job)}: nothing to do, its {output.to_printable(job.kind)} completed {ago} ago")
    elif wait:
        wait_and_report(client, job, as_json=as_json)
    else:
        report_job(job, as_json=as_json)


def wait_and_report(client: Any, job: Any, *, as_json: bool) -> None:
    """Wait for a job and print its outcome; exit with 1 if it did not complete."""
    report_job(wait_until_ended(client, job), as_json=as_json)


def wait_until_ended(client: Any, job: Any) -> Any:
    """Display a job until it has ended, and return it.

    Ctrl-C ends only the wait, and prints how to resume it.
    """
    try:
        with display_job(job) as (on_change, note):
            return _wait_for(client, job, on_change, note)
    except KeyboardInterrupt:
        output.print_note(
            f"detached: the {job.kind} of {model_of(job)} continues as job {job.id}\n"
            f"  to wait for it again: loadledger job {job.id} --wait\n"
            f"  to stop it:           loadledger cancel {job.id}"
        )
        sys.exit(output.INTERRUPTED)


def _wait_for(client: Any, job: Any, on_change: Callable[[Any], None], note: Callable[[str], None]) -> Any:
    """Wait until a job has ended; an unload that drains for a while is offered to be forced."""
    from loadledger import ClientProblem, JobUnfinished

    callbacks = {"on_change": on_change, "on_away": lambda problem: note(output.retry_message(problem))}
    if job.kind == "unload":
        try:
            return client.wait_for(job.id, timeout_s=PATIENCE_S, **callbacks)
        except JobUnfinished as problem:
            job = problem.job
    if job.stage == "draining":
        with suppress(ClientProblem):
            uses = [each for each in client.resources().models if each.model_id == job.model_id]
            running = output.count_of(sum(each.in_flight for each in uses), "running inference")
            name = output.to_printable(job.model_id)
            note(f"{model_of(job)} waits for {running}; to end them: loadledger unload {name} --force")
    return client.wait_for(job.id, **callbacks)


def report_job(job: Any, *, as_json: bool) -> None:
    """Print a job's outcome or progress; exit with 1 if it failed or was cancelled."""
    if as_json:
        output.print_json(job)
    if job.status in {"failed", "cancelled"}:
        reason = f": {job.error.message} ({job.error.code})" if job.error is not None else ""
        verb = "was cancelled" if job.status == "cancelled" else "failed"
        verb += f", superseded by job {job.superseded_by}" if job.superseded_by else ""
        output.print_note(
            f"the {job.kind} of {model_of(job)} {verb}{reason}\n  more: loadledger events --job {job.id}"
        )
        sys.exit(output.NEGATIVE_RESULT)
    if as_json:
        return
    kind = output.to_printable(job.kind)
    if job.ended:
        took, rest = output.format_elapsed(job.created_at, job.finished_at), job.unreturned_bytes
        unreturned = f"; its device has not returned {output.format_size(rest)}" if rest else ""
        click.echo(f"{model_of(job)}: {kind} completed in {took}{unreturned}")
    else:
        where = output.to_printable(job.stage or job.waiting_for or "")
        click.echo(
            f"{model_of(job)}: {kind} {output.format_state(job.status)}{f' ({where})' if where else ''}"
        )
        click.echo(f"to wait for it: loadledger job {output.to_printable(job.id)} --wait")


def model_of(job: Any) -> str:
    model_id = output.to_printable(job.model_id)
    return model_id if job.version is None else f"{model_id} version {job.version}"


def count_steps(job: Any) -> tuple[int, int]:
    """Return the completed steps of a job and their total."""
    stages = STAGES_OF_KIND.get(job.kind, ())
    if job.status == "completed":
        return len(stages) + 1, len(stages) + 1
    return (stages.index(job.stage) + 1 if job.stage in stages else 0), len(stages) + 1


def describe_progress(job: Any) -> str:
    if job.status == "in_progress":
        return output.to_printable((job.stage or "in progress").replace("_", " "))
    if job.status == "pending" and job.waiting_for:
        return f"waits for {output.to_printable(job.waiting_for)}"
    return output.to_printable(job.status)


@contextmanager
def display_job(job: Any) -> Iterator[JobDisplay]:
    """Yield a display of a job: a progress bar on a terminal, else a line for each change."""
    if sys.stderr.isatty():
        with _progress_bar(job) as display:
            yield display
        return
    began, last = time.monotonic(), None

    def on_change(seen: Any) -> None:
        nonlocal last
        step = (seen.status, seen.stage, seen.waiting_for)
        if not seen.ended and step != last:
            last = step
            output.print_note(
                f"{model_of(seen)}: {describe_progress(seen)} ({time.monotonic() - began:.1f}s)"
            )

    yield on_change, output.print_note


@contextmanager
def _progress_bar(job: Any) -> Iterator[JobDisplay]:
    from rich.console import Console  # takes 50 ms, and only on terminals
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.fields[about]}"),
        BarColumn(bar_width=24),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        done, total = count_steps(job)
        task = progress.add_task(
            escape(describe_progress(job)), completed=done, total=total, about=escape(model_of(job))
        )

        def on_change(seen: Any) -> None:
            done, total = count_steps(seen)
            progress.update(task, description=escape(describe_progress(seen)), completed=done, total=total)

        def note(text: str) -> None:
            progress.console.print(f"loadledger: {output.to_printable(text)}", markup=False, soft_wrap=True)

        yield on_change, note


@click.command()
@click.option("--model", metavar="ID", shell_complete=models_of_server, help="Only jobs of this model.")
@click.option("--status", type=click.Choice(STATUSES), help="Only jobs with this status.")
@options.int_option("--limit", "-n", metavar="N", text="Number of jobs.", default=SHOWN)
@click.option("--at", type=options.MOMENT, help="Past state: a position or a time.")
@options.json_option
@options.server_options
def jobs(
    *, model: str | None, limit: int, as_json: bool, where: options.ServerChoice, **filters: str | None
) -> None:
    """List the jobs, newest first."""
    with options.open_chosen_client(where) as client:
        found, at = _find_jobs(client, model, limit, **filters), filters["at"]
        past = client.job(found[0].id, at=at) if at is not None and found else None
    now = datetime.now(UTC) if at is None or past is None else output.note_moment(past, at)
    rows = output.with_column(COLUMNS, [_row(job, now) for job in found], "NODE", [job.node for job in found])
    table = output.format_table(*rows, right={"AGE", "TOOK"})
    output.print_result({"jobs": found}, table if found else ["no jobs"], as_json=as_json)


def _find_jobs(client: Any, model: str | None, most: int, **filters: Any) -> list[Any]:
    """Return the newest jobs of MODEL or MODEL/VERSION, or of all models."""
    model_id, version = options.parse_version_name(model or "")
    found = client.jobs(model=model_id or None, limit=most if version is None else None, **filters)
    return list(islice((each for each in found if version in (None, each.version)), most))


def _find_job_id(client: Any, named: str) -> str:
    """Return the id of a job that is named itself, or by its model, of which it is the only open job."""
    if _JOB_ID.fullmatch(named):
        return named
    listed = (job for status in OPEN for job in _find_jobs(client, named, SHOWN, status=status))
    unended = list({job.id: job for job in listed}.values())  # it may begin between the two requests
    if len(unended) != 1:
        found = unended or _find_jobs(client, named, 1)
        verb = click.get_current_context().info_name if unended else "job"
        which = "several open jobs" if unended else "no open job; its last one is" if found else "no job"
        jobs = [f"  loadledger {verb} {each.id}  ({each.kind} of {model_of(each)})" for each in found]
        output.exit_with_error(
            "\n".join([f"{named} has {which}:", *jobs] if found else [NO_JOB.format(named)])
        )
    return str(unended[0].id)


@click.command()
@click.argument("job_id", metavar="JOB|MODEL", shell_complete=latest_jobs)
@_wait_option
@options.json_option
@options.server_options
def job(job_id: str, *, wait: bool, as_json: bool, where: options.ServerChoice) -> None:
    """Show a job, or wait for it.

    MODEL or MODEL/VERSION stands for its only job that has not ended.

    With --wait, the exit code is 1 if the job fails or is cancelled. If a person's load superseded the
    job, the command waits for that load.
    """
    with options.open_chosen_client(where) as client:
        seen = client.job(_find_job_id(client, job_id))
        if wait:
            wait_and_report(client, seen, as_json=as_json)
        else:
            output.print_result(seen, _details(seen), as_json=as_json)


@click.command()
@click.argument("job_id", metavar="JOB|MODEL", shell_complete=latest_jobs)
@options.json_option
@options.server_options
def cancel(job_id: str, *, as_json: bool, where: options.ServerChoice) -> None:
    """Cancel a job that has not ended.

    MODEL or MODEL/VERSION stands for its only one.
    """
    with options.open_chosen_client(where) as client:
        seen = client.cancel(_find_job_id(client, job_id))
    if as_json:
        output.print_json(seen)
    elif seen.status == "cancelled":
        click.echo(f"{model_of(seen)}: {output.to_printable(seen.kind)} {output.format_state('cancelled')}")
    else:
        report_job(seen, as_json=False)


def _row(job: Any, now: datetime) -> tuple[str, ...]:
    version = "" if job.version is None else f"/{job.version}"
    detail = f"{job.error.code}: {job.error.message}" if job.error is not None else ""
    return (
        output.format_cell(job.id),
        job.kind,
        output.format_cell(f"{job.model_id}{version}"),
        job.status,
        output.format_cell(job.cause),
        output.format_cell(job.requested_by, most=24),
        output.format_age(job.created_at, now),
        output.format_elapsed(job.created_at, job.finished_at),
        output.format_cell(detail or (None if job.ended else describe_progress(job)), most=MAX_DETAIL),
    )


def _details(job: Any) -> Iterator[str]:
    by, took = output.format_cell(job.requested_by), output.format_elapsed(job.created_at, job.finished_at)
    yield f"{output.to_printable(job.kind)} of {model_of(job)}: {output.format_state(job.status)}"
    facts = {
        "job": job.id,
        "stage": job.stage,
        "waits for": job.waiting_for,
        "requested": f"{output.format_timestamp(job.created_at)} by {by}, cause {job.cause or '-'}",
        "started": job.started_at and f"{output.format_timestamp(job.started_at)}, attempt {job.attempt}",
        "finished": job.finished_at and f"{output.format_timestamp(job.finished_at)}, after {took}",
        "superseded by": job.superseded_by,
        "node": job.node,
        "position": job.position,
        "parameters": output.format_parameters(job.parameters) or None,
        "passed over": job.passed_over,
        "label": job.label,
        "reason": job.reason,
        "emergency": job.emergency,
        "error": job.error and f"{job.error.code}: {job.error.message}",
    }
    yield from output.format_facts(facts)


def _split_attributes(_: click.Context, __: click.Parameter, value: str | None) -> list[str] | None:
    return None if value is None else [each.strip() for each in value.split(",") if each.strip()]


@click.command()
@options.model_argument()
@options.int_option("--version", "-v", metavar="N", text="Version. [default: the highest]")
@_wait_option
@click.option("--priority", type=click.Choice(["high", "normal", "low"]), help="Order among waiting jobs.")
@options.int_option("--timeout-s", metavar="SECONDS", text="Limit of the whole job, waiting included.")
@options.int_option("--progress-timeout-s", metavar="SECONDS", text="Limit of a load without progress.")
@options.int_option(
    "--keep-alive-s", metavar="SECONDS", least=-1, text="Unload after so many idle seconds; -1: never."
)
@click.option(
    "--memory-limit-bytes", metavar="SIZE", type=options.SIZE, help="Memory limit of each instance, like 2GB."
)
@click.option(
    "--strategy", type=click.Choice(["beside", "in_place", "auto"]), help="How to replace a loaded version."
)
@click.option("--pin/--no-pin", "pinned", default=None, help="Never evict the model or unload it when idle.")
@options.int_option("--instances", metavar="N", text="Number of workers.")
@options.int_option("--threads", metavar="N", text="Threads of each worker.")
@options.int_option("--max-batch-size", metavar="N", least=0, text="Batch up to so many waiting requests.")
@click.option(
    "--dependent-rows",
    type=click.Choice(["refuse", "allow"]),
    help="What becomes of batches whose rows may change each other's answers.",
)
@options.int_option(
    "--max-queue-delay-us", metavar="MICROSECONDS", least=0, text="Longest wait for a fuller batch."
)
@options.int_option("--max-queue", metavar="N", text="Inferences that may be queued or running.")
@options.int_option("--priority-levels", metavar="N", least=0, text="Levels of priority; 0: none.")
@options.int_option(
    "--default-priority-level", metavar="N", least=0, text="Level of other requests; 0: the lowest."
)
@click.option(
    "--node-attributes",
    metavar="ATTRIBUTES",
    callback=_split_attributes,
    help="Attributes that the node must have, like zone=a,disk=fast; empty for none.",
)
@click.option(
    "--device",
    "devices",
    metavar="DEVICE",
    multiple=True,
    callback=lambda _context, _option, names: list(names) or None,
    help="Device, like cuda:0 or cuda:*; repeat it for others, of which the first with room is taken.",
)
@click.option(
    "--fallback",
    type=click.Choice(["refuse", "cpu"]),
    help="What becomes of nodes of the graph that the device does not support.",
)
@options.int_option("--copies", metavar="N", text="Number of nodes that are to have the model loaded.")
@click.option("--label", metavar="LABEL", help="Label that names the version once it is loaded.")
@click.option("--reason", metavar="TEXT", help="Why, for the ledger.")
@click.option(
    "--emergency", metavar="TEXT", help="Why it must not wait for others; takes the role emergency."
)
@options.json_option
@options.server_options
def load(
    model: str,
    *,
    version: int | None,
    wait: bool,
    as_json: bool,
    where: options.ServerChoice,
    **parameters: Any,
) -> None:
    """Load a model, or another version of a loaded one.

    Defaults come from the model's loadledger.toml, then from the server. With --wait, the command prints why
    a load failed, and the exit code is 1. An emergency is for the files that the version has now, which the
    server hashes first.
    """
    given = {name: value for name, value in parameters.items() if value is not None}
    with options.open_chosen_client(where) as client:
        if "emergency" in given:
            found = client.verify_model(model, version)
            version, given["digest"] = found.version, found.digest
            output.print_note(f"emergency: version {version}, files {output.to_printable(found.digest)}")
        job = client.load(model, version, **given)
        report_request(client, job, wait=wait, as_json=as_json)


@click.command()
@options.model_argument(completes=loaded_models, is_required=False)
@click.option("--active", is_flag=True, help="Unload the active model, which was loaded last.")
@click.option("--force", "-f", is_flag=True, help="Do not wait for running requests.")
@click.option("--until-asked", is_flag=True, help="Let the next inference load it again.")
@_wait_option
@options.json_option
@options.server_options
def unload(
    model: str | None,
    *,
    version: int | None,
    active: bool,
    force: bool,
    until_asked: bool,
    wait: bool,
    as_json: bool,
    where: options.ServerChoice,
) -> None:
    """Unload a model.

    --force aborts running requests, cancels a load in progress and kills a stuck worker. Where inferences
    load models (`serve --on-demand on`), they do not load this one until you do; with --until-asked the next
    one does.
    """
    if active and model is not None:
        raise click.UsageError("name a model or give --active, not both")
    with options.open_chosen_client(where) as client:
        if model is None and not active:
            _refuse_nameless(client)
        if version is not None:
            found = client.model(model)
            options.check_version(found, version, found.version or found.next_version)
        job = client.unload(model, force=force, until_asked=until_asked)
        report_request(client, job, wait=wait, as_json=as_json)


def _refuse_nameless(client: Any) -> NoReturn:
    """Refuse to guess the model; name the active one."""
    found = next((each.id for each in client.models() if each.active), None)
    if found is None:
        output.exit_with_error("name a model; none is loaded now; `loadledger models` lists them")
    output.exit_with_error(
        f"name a model; the active one, which --active unloads, is {output.to_printable(found)}"
    )
