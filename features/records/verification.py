"""Compares files of records with the ledger: which are as they were announced, and which are missing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from events.sqlite.listing import EventFilter, EventQuery, find_event_page, read
from events.sqlite.readonly import open_read_only
from features.records.facts import RecordsClosed, RecordsErased
from features.records.files import CLOSED, COMPLETE, RecordFile, list_files, stat_file

EVENTS_PER_READ = 500


class Announced(NamedTuple):
    """The files that a ledger knows.

    Attributes:
        closed: each `RecordsClosed`, as JSON, by the file's name.
        erased: each `RecordsErased`, likewise.
    """

    closed: Mapping[str, Mapping[str, Any]]
    erased: Mapping[str, Mapping[str, Any]]

    def list_nodes(self, names: Iterable[str]) -> set[str | None]:
        """Return the nodes that announced these files; None is a server alone."""
        return {node_of(self.closed[name]) for name in names if name in self.closed}


def node_of(event: Mapping[str, Any]) -> str | None:
    node: str | None = event["data"].get("node_id")
    return node


class FileFinding(NamedTuple):
    """The result for one file: `state` is as_announced, changed, unknown, missing, erased or open."""

    model_id: str
    file: str
    state: str
    detail: str

    @property
    def is_sound(self) -> bool:
        return self.state not in ("changed", "unknown", "missing")


def read_announced(ledger: Path) -> Announced:
    """Read the announcements in a ledger.

    Raises:
        LedgerProblem: it cannot be read.
    """
    closed, erased = dict[str, Any](), dict[str, Any]()
    query = EventQuery(
        EventFilter(types=(RecordsClosed.TYPE, RecordsErased.TYPE)), after=0, limit=EVENTS_PER_READ
    )
    with open_read_only(ledger) as connection:
        while True:
            page = read(connection, find_event_page(query))
            for stored in page.items:
                event = msgspec.json.decode(stored.line)
                if event["type"] == RecordsClosed.TYPE:
                    closed[event["id"]] = event
                else:
                    erased[event["data"]["file"]] = event
            if page.next_cursor is None:
                return Announced(closed, erased)
            query = replace(query, after=page.next_cursor)


def compare_folder(folder: Path, ledger: Path) -> tuple[list[FileFinding], Announced]:
    """Return a finding for each file of a data directory, and what the ledger knows; a server may be running.

    A file is there before the ledger has it, and the ledger has its erasure before it is gone. So the ledger
    is read after the files are listed, and erasures are read again after a file was not found.

    Raises:
        LedgerProblem: the ledger cannot be read.
        OSError: a file cannot be read.
    """
    listed = list_files(folder)
    announced = read_announced(ledger)
    findings = list(compare_files(listed, announced))
    names = {each.file for each in findings}
    for name, said in announced.closed.items():
        if name not in names:  # it is newer than the list, was renamed while they were listed, or is missing
            for suffix in (COMPLETE, CLOSED):  # in this order, as it is renamed
                with suppress(FileNotFoundError):
                    file = stat_file(folder / said["model_id"] / f"{name}{suffix}")
                    findings += compare_files([file], announced)
                    break
    return findings, announced._replace(erased=read_announced(ledger).erased)


def compare_files(files: Iterable[RecordFile], announced: Announced) -> Iterator[FileFinding]:
    """Yield a finding for each file; its bytes are hashed. One that is erased meanwhile has none.

    Raises:
        OSError: a file cannot be read.
    """
    for file in files:
        said = announced.closed.get(file.id)
        if said is None:
            state, detail = ("open", "the ledger has it once it is closed") if file.is_open else UNKNOWN
        elif (found := _hash(file)) is not None:
            state, detail = _compare(found, said)
        else:
            continue
        yield FileFinding(file.model_id, file.id, state, detail)


def _hash(file: RecordFile) -> str | None:
    """Return the SHA-256 of a file, which may have been renamed since it was listed; None if it is gone."""
    for path in (file.path, file.path.with_suffix(COMPLETE), file.path.with_suffix(CLOSED)):
        with suppress(FileNotFoundError), path.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    return None


UNKNOWN = "unknown", "the ledger has no RecordsClosed of this name"


def _compare(found: str, said: Mapping[str, Any]) -> tuple[str, str]:
    if found == said["data"]["sha256"]:
        return "as_announced", describe(said)
    return "changed", f"its SHA-256 is {found}, and it was {describe(said)}"


def find_missing(
    names: Iterable[str], announced: Announced, nodes: Iterable[str | None]
) -> Iterator[FileFinding]:
    """Yield a finding for each announced file of these nodes that is not among the names. Pure."""
    present, owners = set(names), set(nodes)
    for name, said in announced.closed.items():
        if name in present or node_of(said) not in owners:
            continue
        erased = announced.erased.get(name)
        if erased is None:
            yield FileFinding(said["model_id"], name, "missing", f"it was {describe(said)}")
        else:
            by = f"erased {erased['recorded_at']} by {erased['actor']}: {erased['data']['reason']}"
            yield FileFinding(said["model_id"], name, "erased", f"{by}; it was {describe(said)}")


def describe(said: Mapping[str, Any]) -> str:
    """Return what the ledger says of a file."""
    data = said["data"]
    lost = f", {data['dropped']} dropped" if data["dropped"] else ""
    end = ", the server died before its end" if data["interrupted"] else ""
    return (
        f"{data['records']} inferences{lost}{end}, {data['begin']} to {data['end']}, {data['bytes']} bytes,"
        f" sha256 {data['sha256']}, position {said['position']}"
    )
