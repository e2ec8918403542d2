"""`loadledger top`: a live view of failures, jobs in progress, loaded models and memory."""

from __future__ import annotations

import os
import re
import select
import sys
import textwrap
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import accumulate, chain, islice
from typing import Any

import click

from loadledger.cli.jobs import describe_progress, model_of
from loadledger.cli.models import (
    RIGHT,
    USE_HEAD,
    budget_line,
    notice_lines,
    pressure_line,
    reloads_line,
    use_row,
)
from loadledger.cli.options import ServerChoice, json_option, open_chosen_client, server_options
from loadledger.cli.output import (
    NOTHING,
    cleaned_up_after_signals,
    display_width,
    format_age,
    format_cell,
    format_duration,
    format_table,
    is_dumb,
    print_result,
    to_printable,
)

WRONG_HEAD = ("MODEL", "STATE", "REASON")
JOBS_HEAD = ("JOB", "KIND", "MODEL", "STATUS", "BY", "AGE", "WHERE")
MODELS_HEAD = (*USE_HEAD[:6], "CPU", "IN FLIGHT", "OLDEST", *USE_HEAD[7:])
ALL_RIGHT = RIGHT | {"AGE", "CPU", "OLDEST"}
MOST_JOBS = 1000
"""Most jobs of a status that are read: a server may have ten thousand."""
BAR_CELLS, MIN_BAR_CELLS = 40, 10
INTERVAL_S = 1.0
"""Pause between two snapshots: people do not read faster."""
PAUSE = 4
"""Least pause, in durations of a snapshot, so that `top` does not keep a server of many models busy."""
RESIZE_S = 0.25
"""How often the size of the terminal is read."""
MAX_REASON_CHARACTERS = 300
MIN_LAST_COLUMNS = 20
"""Width that the last column of a table has at least, if its texts are so long."""
UNLIMITED = sys.maxsize
"""Columns and rows of an output that is no terminal."""
STEPS = {b"\x1b[A": -1, b"\x1b[B": 1, b"\x1b[5~": -10, b"\x1b[6~": 10, b" ": 10}
"""Rows by which keys scroll: arrows, page up and down, space."""
KEY = re.compile(rb"\x1b\[[\d;]*.|.", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ServerSnapshot:
    """State of a server at one moment.

    Attributes:
        took_s: duration of the requests.
        problem: why the latest requests failed; the rest is then the previous state.
        cpu_percent: processor time since the snapshot before, by job of the load.
    """

    url: str
    resources: Any
    jobs: Sequence[Any]
    wrong: Sequence[Any]
    at: datetime
    took_s: float
    problem: str | None = None
    cpu_percent: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TopView:
    """A person's choice: the order of the loaded models, and the first one that is shown."""

    order: bytes = b"T"
    first: int = 0

    def press(self, key: bytes, loaded: int) -> TopView:
        """Return the view after a key, with so many loaded models."""
        if key in {b"T", b"P", b"M"}:
            return TopView(key)
        return replace(self, first=max(0, min(self.first + STEPS.get(key, 0), loaded - 1)))


@dataclass(frozen=True, slots=True)
class TopTable:
    """A table.

    Attributes:
        noun: the rows' name after "and 12 more".
        total: how many rows there are; `rows` has those that a terminal may have room for.
        spare: columns that a narrow terminal does not show, the least useful one first.
        lines: most lines of the last column, whose texts are wrapped.
    """

    noun: str
    total: int
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    spare: Sequence[str] = ()
    lines: int = 2


@click.command()
@json_option
@server_options
def top(*, as_json: bool, where: ServerChoice) -> None:
    """Watch failures, jobs, models and memory until q or Ctrl-C.

    T puts the models with the oldest unanswered request first, P those with the most processor time, M those
    with the most memory. Arrows, page keys and space scroll. Without a terminal, all is printed once.
    """
    with open_chosen_client(where) as client:
        snapshot = _take_snapshot(client)
        # On a dumb terminal, a live view would print nothing.
        if as_json or not sys.stdout.isatty() or is_dumb(os.environ):
            members = {"resources": snapshot.resources, "jobs": snapshot.jobs, "wrong": snapshot.wrong}
            print_result(members, lay_out(snapshot, UNLIMITED, UNLIMITED), as_json=as_json)
            return
        try:
            _watch(client, snapshot)
        except KeyboardInterrupt:
            return


def _watch(client: Any, snapshot: ServerSnapshot) -> None:
    """Update the view until an error that a retry cannot solve."""
    from rich.live import Live
    from rich.text import Text

    from loadledger import ServerError, ServerUnreachable

    view, drawn = TopView(), None
    with cleaned_up_after_signals(), _keyboard(), Live(screen=True, auto_refresh=False) as live:
        while True:
            due_s = time.monotonic() + max(INTERVAL_S, PAUSE * snapshot.took_s)
            while (left_s := due_s - time.monotonic()) > 0:
                seen = snapshot, view, live.console.size
                if seen != drawn:
                    text = "\n".join(lay_out(snapshot, *live.console.size, view))
                    live.update(Text.from_ansi(text, no_wrap=True, overflow="ellipsis"), refresh=True)
                drawn = seen
                keys = _read_keys(min(left_s, RESIZE_S))
                if b"q" in keys:
                    return
                for key in keys:
                    view = view.press(key, len(snapshot.resources.models))
            try:
                snapshot = _take_snapshot(client, snapshot)
            except (ServerUnreachable, ServerError) as problem:
                status = problem.status if isinstance(problem, ServerError) else None
                if status is not None and status < 500 and status != 429:  # noqa: PLR2004 - permanent
                    raise
                snapshot = replace(snapshot, problem=str(problem))


@contextmanager
def _keyboard() -> Iterator[None]:
    """Take keys one by one, without echo."""
    if not sys.stdin.isatty():
        yield
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        mode = termios.tcgetattr(sys.stdin)
        mode[6][termios.VSUSP] = b"\0"  # no Ctrl-Z: it would leave the screen
        termios.tcsetattr(sys.stdin, termios.TCSAFLUSH, mode)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSAFLUSH, before)  # the shell gets nothing that was typed


def _read_keys(limit_s: float) -> list[bytes]:
    """Return the keys that are pressed, after a wait of at most so many seconds for the first."""
    keyboards = [sys.stdin] if sys.stdin.isatty() else []
    ready, _, _ = select.select(keyboards, [], [], limit_s)
    return KEY.findall(os.read(sys.stdin.fileno(), 1024)) if ready else []


def _take_snapshot(client: Any, before: ServerSnapshot | None = None) -> ServerSnapshot:
    began = time.monotonic()
    unended = [
        job for status in ("pending", "in_progress") for job in client.jobs(status=status, limit=MOST_JOBS)
    ]
    wrong = [model for model in client.models() if model.state in {"failed", "lost"}]
    found, now = client.resources(), datetime.now(UTC)
    percent = {} if before is None else _cpu_percent(before, found, now)
    return ServerSnapshot(
        client.url, found, unended, wrong, now, time.monotonic() - began, cpu_percent=percent
    )


def _cpu_percent(before: ServerSnapshot, found: Any, now: datetime) -> dict[str, float]:
    """Return the percent of a processor that each load took since a snapshot; no load that is new."""
    known = {use.job_id: use.cpu_s for use in before.resources.models}
    passed_s = max((now - before.at).total_seconds(), 0.001)
    taken = {use.job_id: use.cpu_s - known[use.job_id] for use in found.models if use.job_id in known}
    return {job_id: max(cpu_s, 0.0) / passed_s * 100 for job_id, cpu_s in taken.items()}  # workers may end


def lay_out(snapshot: ServerSnapshot, columns: int, rows: int, view: TopView | None = None) -> list[str]:
    """Return the lines for a terminal of this size, which say how many items they leave out.

    A view is a person's; None is for an output that takes no keys.
    """
    tables = [each for each in _list_tables(snapshot, rows, view or TopView()) if each.total]
    lines = list(_head_lines(snapshot, columns, has_keys=view is not None))[: max(1, rows - len(tables))]
    formatted = [_format_rows(table, columns) for table in tables]
    wants = [  # a blank line, the head, the rows, and the number of other ones
        2 + sum(map(len, blocks)) + (len(blocks) < table.total)
        for table, (_, blocks) in zip(tables, formatted, strict=True)
    ]
    shares = share_rows(wants, rows - len(lines))
    for table, (head, blocks), want, share in zip(tables, formatted, wants, shares, strict=True):
        room = share - (2 if share == want and len(blocks) == table.total else 3)
        shown = blocks[: bisect_right(list(accumulate(map(len, blocks))), room)]
        lines += ["", head, *chain.from_iterable(shown)] if shown else []
        if len(shown) < table.total:
            lines.append(f"and {table.total - len(shown)} more {table.noun}")
    return [_fit(line, columns) for line in lines[:rows]]


def share_rows(wants: Sequence[int], rows: int) -> list[int]:
    """Share rows among tables: small ones get all that they want, the others equal parts."""
    shares = list(wants)
    smallest_first = sorted(range(len(wants)), key=wants.__getitem__)
    for index, left in zip(smallest_first, range(len(wants), 0, -1), strict=True):
        shares[index] = min(wants[index], rows // left)
        rows -= shares[index]
    return shares


def _format_rows(table: TopTable, columns: int) -> tuple[str, list[list[str]]]:
    """Return the head line and the lines of each row, without spare columns that do not fit."""
    rows = [dict(zip(table.head, row, strict=True)) for row in table.rows]
    for row in rows:
        row["MODEL"] = _fit(row["MODEL"], max(8, columns // 2 - 10))
    head, spare = list(table.head), list(table.spare)
    while True:
        *others, last = head
        room = columns - sum(
            2 + max(display_width(each[name]) for each in [*rows, {name: name}]) for name in others
        )
        least = min(MIN_LAST_COLUMNS, max(display_width(each[last]) for each in [*rows, {last: last}]))
        if not spare or (room >= least and all(len(_wrap(row[last], room)) <= table.lines for row in rows)):
            break
        head.remove(spare.pop(0))
    cells, texts = [], [_wrap(row[last], room, table.lines) for row in rows]
    for row, (first, *more) in zip(rows, texts, strict=True):
        cells += [[*(row[name] for name in others), first], *([*[""] * len(others), each] for each in more)]
    line, *lines = format_table(head, cells, right=ALL_RIGHT)
    left = iter(lines)
    return line, [list(islice(left, len(text))) for text in texts]


def _wrap(text: str, columns: int, lines: int | None = None) -> list[str]:
    columns = max(columns, 1)
    return textwrap.wrap(text, columns, max_lines=lines, placeholder="…", break_on_hyphens=False) or [NOTHING]


def _fit(line: str, columns: int) -> str:
    """Return a line cut to a width; a cut one has no colours."""
    plain = click.unstyle(line)
    if display_width(plain) <= columns:
        return line
    from rich.cells import set_cell_size

    return set_cell_size(plain, columns - 1) + "…"


def _head_lines(snapshot: ServerSnapshot, columns: int, *, has_keys: bool) -> Iterator[str]:
    found = snapshot.resources
    title, keys = click.style("loadledger", bold=True), "q quits, T P M sort  " if has_keys else ""
    yield f"{title}  {snapshot.url}  {keys}{snapshot.at:%H:%M:%S}Z  position {found.as_of}"
    trouble = [f"NOT READY: {each.cause}: {each.cure}" for each in found.not_ready]
    trouble += notice_lines(found, "critical")
    if snapshot.problem is not None:
        trouble.insert(0, f"unreachable, retrying; previous state: {snapshot.problem}")
    for text in trouble:
        yield from (
            click.style(_fit(line, columns), fg="red") for line in _wrap(to_printable(text), columns, 2)
        )
    pressure = pressure_line(found) or ""
    cells = max(MIN_BAR_CELLS, min(BAR_CELLS, columns - len(f"memory [] {pressure}")))
    yield f"memory {_bar(found, cells)} {pressure}".rstrip()
    yield budget_line(found)
    yield from filter(None, [reloads_line(found)])
    yield from (_fit(to_printable(text), columns) for text in notice_lines(found, "note"))
    if not found.models:
        yield "nothing is loaded"


def _list_tables(snapshot: ServerSnapshot, rows: int, view: TopView) -> list[TopTable]:
    """Return the tables, with at most so many rows: failures, jobs (waiting ones first), loaded models."""
    now, percent = datetime.now(UTC), snapshot.cpu_percent
    orders: dict[bytes, Callable[[Any], float]] = {
        b"T": lambda use: -(use.oldest_request_s or 0),
        b"P": lambda use: -percent.get(use.job_id, 0),
        b"M": lambda use: -use.memory_bytes - use.reserved_bytes,
    }
    by = [orders[view.order], *orders.values()]
    uses = sorted(snapshot.resources.models, key=lambda use: [*(order(use) for order in by), use.model_id])
    jobs = sorted(snapshot.jobs, key=lambda job: (job.status != "pending", job.created_at))
    wrong_rows = [_wrong_row(model) for model in snapshot.wrong[:rows]]
    job_rows = [_job_row(job, now) for job in jobs[:rows]]
    first = min(view.first, max(0, len(uses) - 1))  # models may have been unloaded since
    use_rows = [_use_row(use, percent.get(use.job_id), now) for use in uses[first:][:rows]]
    spare = "RESERVED", "WORKERS", "KEPT", "VERSION", "LAST USED"
    return [
        TopTable("failed", len(snapshot.wrong), WRONG_HEAD, wrong_rows, lines=3),
        TopTable("jobs", len(jobs), JOBS_HEAD, job_rows, ("JOB", "STATUS", "BY", "KIND")),
        TopTable("loaded", len(uses), MODELS_HEAD, use_rows, spare, lines=1),
    ]


def _use_row(use: Any, cpu_percent: float | None, now: datetime) -> list[str]:
    cpu = format_duration(use.cpu_s) if cpu_percent is None else f"{cpu_percent:.0f}%"
    oldest = NOTHING if use.oldest_request_s is None else format_duration(use.oldest_request_s)
    cells = dict(zip(USE_HEAD, use_row(use, now), strict=True)) | {"CPU": cpu, "OLDEST": oldest}
    return [cells[name] for name in MODELS_HEAD]


def _bar(found: Any, cells: int) -> str:
    budget = max(found.budget_bytes, 1)
    used = min(cells, max(0, (cells * found.used_bytes + budget // 2) // budget))
    both = found.used_bytes + found.reserved_bytes
    taken = min(cells, max(used, (cells * both + budget // 2) // budget))
    parts = ("#" * used, "green" if found.free_bytes >= 0 else "red"), ("=" * (taken - used), "yellow")
    drawn = "".join(click.style(part, fg=colour) for part, colour in parts if part)
    return f"[{drawn}{'.' * (cells - taken)}]"


def _job_row(job: Any, now: datetime) -> tuple[str, ...]:
    return (
        format_cell(job.id),
        job.kind,
        format_cell(model_of(job)),
        job.status,
        format_cell(job.requested_by, most=24),
        format_age(job.created_at, now),
        format_cell(describe_progress(job), most=MAX_REASON_CHARACTERS),
    )


def _wrong_row(model: Any) -> tuple[str, ...]:
    reason = f"{model.error.code}: {model.error.message}" if model.error is not None else ""
    return format_cell(model.id), model.state, format_cell(reason, most=MAX_REASON_CHARACTERS)
