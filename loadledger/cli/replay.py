"""`loadledger replay`: what was so, folded from the log alone, without a server or beside one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from loadledger.cli.options import data_option, json_option


@click.command()
@data_option
@click.option(
    "--until",
    metavar="POSITION|TIME",
    help="As of when: a position, or a time with its offset like 2026-01-31T14:02:00Z. [default: the head]",
    show_default=False,
)
@click.option(
    "--archive",
    "archives",
    multiple=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="What was archived from this ledger: all its archives, in any order; may be repeated.",
)
@click.option("--model", "model_id", metavar="ID", help="Only this model, and its jobs.")
@json_option
@click.option(
    "--rebuild",
    "rebuilds",
    is_flag=True,
    show_default=False,
    help="Write the stored projections anew, and say whether they differed; takes a server that is stopped.",
)
def replay(
    data: Path,
    until: str | None,
    archives: tuple[Path, ...],
    model_id: str | None,
    *,
    as_json: bool,
    rebuilds: bool,
) -> None:
    """Fold the log, and print what was so at a moment.

    That is the models, and the jobs that had not ended. Nothing but the log is asked, and where events were
    archived, what archiving stored of them; with --archive, the archives are folded instead, and --until may
    be before the log begins. With --rebuild, the exit code is 1 where the projections differed.
    """
    from loadledger.cli.problems import problems_told  # noqa: PLC0415
    from server.app import LEDGER  # noqa: PLC0415 - keeps `loadledger --help` quick

    if rebuilds and (until is not None or model_id is not None or archives):
        raise click.UsageError("--rebuild is of the whole log: leave --until and --model out, and --archive")
    if not (data / LEDGER).is_file():
        raise click.BadParameter(f"there is no {LEDGER} in {data}", param_hint="--data")
    with problems_told():
        if rebuilds:
            _rebuild(data, data / LEDGER, as_json=as_json)
        else:
            told = replayed(data / LEDGER, until, model_id, archives)
            click.echo(json.dumps(told, indent=2) if as_json else "\n".join(_lines(told)))


def replayed(
    path: Path, until: str | None, model_id: str | None, archives: Sequence[Path] = ()
) -> dict[str, Any]:
    """Return what was so at a moment, as the management API shows it.

    Raises:
        LedgerProblem: `invalid_parameter`, `beyond_head`, `archived`, `log_unavailable`, and of archives
            `archive_missing`, `ledger_damaged`, `nothing_there`.
        OSError: an archive cannot be read.
    """
    from events.replay import replay  # noqa: PLC0415 - as above
    from events.schema import opened_to_read  # noqa: PLC0415
    from server.api.timetravel import as_of  # noqa: PLC0415
    from server.api.views import job_view, model_view  # noqa: PLC0415

    with opened_to_read(path) as connection:
        moment, state = replay(connection, until, archives)
    active = state.active()
    ids = [each for each in sorted(state.models) if model_id in (None, each)]
    return {
        **as_of(moment),
        "models": [model_view(each, state, None, active) for each in ids],
        "jobs": [job_view(job, None) for job in state.unended(model_id)],
    }


def _lines(told: dict[str, Any]) -> Iterator[str]:
    recorded = f", recorded {told['as_of_time']}" if told["as_of_time"] else ""
    yield f"as of position {told['as_of']}{recorded}"
    yield f"models: {len(told['models'])}"
    for model in told["models"]:
        version = f" version {model['version']}" if model["version"] is not None else ""
        yield f"  {model['id']}: {model['state']}{version}{', active' if model['active'] else ''}"
        if model["loaded_at"] is not None:
            where = f"position {model['position']}, job {model['job_id']}"
            yield f"    loaded {model['loaded_at']} by {model['loaded_by']}, {where}"
        for file in model["files"]:
            yield f"    {file['path']}: {file['bytes']} bytes, sha256 {file['sha256']}"
        if model["error"] is not None:
            yield f"    {model['error']['code']}: {model['error']['message']}"
    yield f"jobs that had not ended: {len(told['jobs'])}"
    for job in told["jobs"]:
        version = f" version {job['version']}" if job["version"] is not None else ""
        yield f"  {job['id']}: {job['kind']} of {job['model_id']}{version}, {job['status']}"
        yield f"    requested {job['created_at']} by {job['requested_by']}, cause {job['cause']}"


def _rebuild(data: Path, path: Path, *, as_json: bool) -> None:
    from events.lock import hold  # noqa: PLC0415 - as above
    from events.rebuild import rebuild_file  # noqa: PLC0415

    with hold(data):
        done = rebuild_file(path)
    differences = done.differences
    told = {"position": done.position, "differ": bool(differences), "differences": differences}
    if as_json:
        click.echo(json.dumps(told, indent=2))
    elif differences:
        click.echo("the stored projections differed from the log, and were made anew:")
        for difference in differences:
            click.echo(f"  {difference}")
    else:
        click.echo(f"the stored projections are what the log gives, up to position {told['position']}")
    if differences:
        raise SystemExit(1)
