"""What was so at a moment, folded from archives and the log: nothing else is believed."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

from events import history
from events.archives import BadArchive, Behind, check_archives, folded, told_archives
from events.basestate import read_base
from events.errors import Archived, ArchiveMissing, LogUnavailable, NothingThere
from events.history import Moment, head_of, moment_at, parse_time, state_of
from events.state import State


def replay(
    connection: sqlite3.Connection, until: str | None, archives: Sequence[Path] = ()
) -> tuple[Moment, State]:
    """Return the live state at a moment, or at the head, and which moment that is.

    Without archives it is folded from the base: a moment before that cannot be asked for.

    Args:
        connection: that reads the ledger; it begins a transaction.
        until: a position in digits, a time, or None for the head.
        archives: of the ledger, all of them, in any order.

    Raises:
        BadMoment: `invalid_parameter`.
        BeyondHead: `beyond_head`.
        Archived: `archived`, it is before the base, and there are no archives.
        ArchiveMissing: `archive_missing`, the archives do not lead from the first event to the base.
        LedgerDamaged: `ledger_damaged`, an archive does not verify.
        NothingThere: `nothing_there`, nothing was archived.
        LogUnavailable: `log_unavailable`, a file cannot be read, or an event cannot be folded.
        OSError: an archive cannot be read.
    """
    if not archives:
        connection.execute("BEGIN")
        moment = head_of(connection) if until is None else moment_at(connection, until)
        return moment, state_of(connection, moment, from_base=True)
    behind = _proved(connection, archives)
    connection.execute("BEGIN")  # not before, since it keeps the write-ahead log from being shortened
    if read_base(connection) != behind.files[-1].proved:
        raise LogUnavailable("events were archived meanwhile: name that archive, too")
    try:
        moment = head_of(connection) if until is None else moment_at(connection, until)
    except Archived:
        assert until is not None
        return _in_archives(behind, until)
    if moment.position == 0:
        return moment, State()
    state, _ = folded(behind.files)
    if moment.recorded_at is None:
        moment = Moment(state.position, state.recorded_at)
    for page in history.pages(connection, state.position, moment.position):
        history.fold(state, page)
    return moment, state


def _proved(connection: sqlite3.Connection, archives: Sequence[Path]) -> Behind:
    base = read_base(connection)
    if base.position == 0:
        raise NothingThere("nothing was archived from this ledger: leave --archive out")
    behind = check_archives(archives, base, told_archives(connection))
    if behind.finding is not None:
        raise BadArchive(behind.finding, behind.at or behind.files[-1].path)
    if behind.after.position:
        raise ArchiveMissing(
            f"positions 1 to {behind.after.position} are missing: without the archive that has them, nobody "
            "can say what they came to"
        )
    return behind


def _in_archives(behind: Behind, until: str) -> tuple[Moment, State]:
    """Return what was so at a moment before the base, or at the base itself."""
    if until.isdigit():
        last = int(until)
        state, _ = folded(behind.files, ends=lambda event: event.position > last)
    else:
        time = parse_time(until)
        state, _ = folded(behind.files, ends=lambda event: event.recorded_at > time)
    return Moment(state.position, state.recorded_at or None), state
