"""`loadledger events`: list or follow the events of a server or of a ledger's file."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from events.eventtext import describe_event
from loadledger.cli import options
from loadledger.cli.completion import latest_jobs, models_of_server
from loadledger.cli.output import exit_with_error, note_retry
from loadledger.errors import printable
from loadledger.profiles import PROFILE, URL

MAX_CHARACTERS = 200
"""Longest description of an event in a line: messages may have 4 KiB."""

DATA = "LOADLEDGER_DATA"
EVENTS_PER_READ = 500
FILE_POLL_S = 0.2
"""Polling interval of a followed file."""
FILTERS = ("types", "models", "jobs", "actors")
Show = Callable[[Sequence[bytes]], None]


def event_line(line: bytes) -> str:
    """Return a stored event as one printable line; for an invalid event, as much as possible."""
    event = _object(line)
    data = event.get("data")
    values = data if isinstance(data, dict) else {}
    kind = _word(event.get("type"))
    parts = [
        _word(event.get("recorded_at")),
        f"{_word(event.get('position')):>6}",
        f"{kind:<15}",
        f"{_model(event):<16}",
        _word(event.get("actor")),
        printable(describe_event(kind, values), MAX_CHARACTERS),
    ]
    return "".join(letter if letter.isprintable() else "?" for letter in "  ".join(parts).rstrip())


def _object(line: bytes) -> Mapping[str, Any]:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return event if isinstance(event, dict) else {}


def _model(event: Mapping[str, Any]) -> str:
    model_id, version = event.get("model_id"), event.get("version")
    name = "-" if model_id is None else str(model_id)
    return name if version is None else f"{name}/{version}"


def _word(value: object) -> str:
    return "?" if value is None else str(value)


def _repeatable(flag: str, text: str, **settings: Any) -> Callable[[options.Command], options.Command]:
    return click.option(
        flag, f"{flag[2:]}s", multiple=True, metavar="TEXT", help=f"{text} May be repeated.", **settings
    )


@click.command()
@click.argument("named", metavar="[MODEL[/VERSION]]...", nargs=-1, shell_complete=models_of_server)
@click.option("--follow", "-f", is_flag=True, help="Continue with new events: from now, or from --after.")
@options.int_option("--tail", "-n", metavar="N", least=0, text="Only the last N positions.")
@options.int_option("--after", metavar="POSITION", least=0, text="Only events above this position.")
@click.option("--since", type=options.MOMENT, help="Only from a position, or a time like 10m (ago), on.")
@click.option("--until", type=options.MOMENT, help="Only up to a position or time.")
@_repeatable("--type", "Only events of this type.")
@_repeatable("--model", "Only events of this model.", shell_complete=models_of_server)
@_repeatable("--job", "Only events of the job with this id.", shell_complete=latest_jobs)
@_repeatable("--actor", "Only events by this actor.")
@click.option("--json", "as_json", is_flag=True, help="Print each event as stored, with its hash.")
@click.option("--data", type=options.FOLDER, help="Directory of a ledger, not of a server. [LOADLEDGER_DATA]")
@options.server_options
def events(
    data: Path | None, where: options.ServerChoice, *, as_json: bool, named: tuple[str, ...], **chosen: Any
) -> None:
    """List or follow the ledger's events.

    --follow resumes when the server was unreachable: no event comes twice, none is missing. Your token needs
    the role audit or admin.
    """
    _check(data, where, chosen)
    names = {*chosen["models"], *named}  # as in `docker logs`
    chosen["models"] = tuple({options.parse_version_name(each)[0] for each in names})

    def show(lines: Sequence[bytes]) -> None:
        if any("/" in each for each in names):
            found = ((line, _object(line)) for line in lines)
            lines = [line for line, event in found if names & {_model(event), event.get("model_id")}]
        if lines:
            click.echo(b"\n".join(lines) if as_json else "\n".join(map(event_line, lines)))

    folder = _folder(data, where)
    if folder is None:
        _print_server_events(where, show, **chosen)
    else:
        _print_file_events(folder, show, **chosen)


def _check(data: Path | None, where: options.ServerChoice, chosen: dict[str, Any]) -> None:
    if data is not None and where != options.ServerChoice():
        raise click.UsageError("give --data for a ledger's file or --url for a server, not both")
    if chosen["follow"] and chosen["until"] is not None:
        raise click.UsageError("--until ends a list and --follow never ends: give one of them")
    if chosen["tail"] is not None and (chosen["after"] is not None or chosen["since"] is not None):
        raise click.UsageError("--tail sets the beginning: leave out --after and --since")


def _folder(data: Path | None, where: options.ServerChoice) -> Path | None:
    """Return the data directory, unless an option or variable names a server."""
    named = os.environ.get(DATA)
    names_server = where != options.ServerChoice() or os.environ.get(URL) or os.environ.get(PROFILE)
    return Path(named) if data is None and named and not names_server else data


def _print_server_events(
    where: options.ServerChoice, show: Show, *, tail: int | None, after: int | None, **chosen: Any
) -> None:
    with options.open_chosen_client(where) as client:
        if tail is not None:
            head = client.head()
            after = max(head.position - tail, 0)
        for event in client.events(after=after, on_away=note_retry, **chosen):
            show([event.line])


def _print_file_events(data: Path, show: Show, **chosen: Any) -> None:
    from events.sqlite.datalock import LEDGER
    from events.sqlite.listing import EventFilter
    from events.types import TYPES

    if not (data / LEDGER).is_file():
        exit_with_error(f"there is no ledger in {data}: give the --data directory of a server, or --url")
    unknown = set(chosen["types"]) - set(TYPES)
    if unknown:
        raise click.BadParameter(f"{min(unknown)!r} is none of {', '.join(TYPES)}", param_hint="--type")
    wanted = EventFilter(**{name: chosen.pop(name) for name in FILTERS})
    show_events(data / LEDGER, show, wanted, **chosen)


def show_events(
    path: Path,
    show: Show,
    wanted: Any,
    *,
    follow: bool,
    after: int | None,
    since: str | None,
    until: str | None,
    tail: int | None,
) -> None:
    """Show a ledger's events page by page, as stored lines; with `follow` also new ones, without end.

    Following begins at the head, unless `after`, `since` or `tail` (a number of latest positions) sets the
    beginning. `since` and `until` are positions or times in UTC, and `wanted` is an `EventFilter`.
    """
    from dataclasses import replace

    from events.sqlite.listing import EventQuery, find_event_page, read
    from events.sqlite.readonly import open_read_only
    from events.sqlite.timetravel import parse_moment

    query = EventQuery(
        wanted, after=after, since=parse_moment(since), until=parse_moment(until), limit=EVENTS_PER_READ
    )
    if follow and after is None and since is None and tail is None:
        tail = 0
    with open_read_only(path) as ledger:
        if tail is not None:
            newest = read(ledger, find_event_page(EventQuery(limit=1)))
            query = replace(query, after=max(newest.as_of - tail, 0))
        while True:
            page = read(ledger, find_event_page(query))
            show([event.line for event in page.items])
            if page.next_cursor is not None:
                query = replace(query, after=page.next_cursor)
            elif follow:
                query = replace(query, after=page.as_of, since=None)
                time.sleep(0 if page.items else FILE_POLL_S)
            else:
                return
