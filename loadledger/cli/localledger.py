"""A ledger's files for the commands: results of `verify` as text and JSON, events of a file."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click

from events.audit.archivechain import ArchiveProof
from events.audit.audit import Audit, audit
from events.audit.exportreader import FileAudit, audit_files
from events.audit.signing import key_id
from events.audit.verify import Expected, Finding
from events.errors import NothingThere
from events.sqlite.history import parse_moment
from events.sqlite.listing import EventFilter, EventQuery, Reader, open_reader
from events.types import LogBase
from server.auth.keys import expected_key

PAGE = 500
POLL_S = 0.2
"""Polling interval of a followed file."""


def format_audit(found: Audit, *, key: str | None = None) -> list[str]:
    """Return an audit as lines of text: verified or not, the finding, and the proved head.

    Args:
        found: audit of a ledger.
        key: id of the expected key of its archives, if one was given.
    """
    verification, finding = found.verification, found.finding
    head = f"{verification.position}:{verification.hash.hex()}"
    if finding is not None:
        return list(_finding_lines(found, finding, head))
    lines = [f"verified: {verification.events} events after position {found.base.position}", f"head: {head}"]
    if not verification.compared:
        lines.append("not compared: the stored projections, made by another release; `serve` rebuilds them")
    lines += [f"matches the ledger: {_printable_path(path)}" for path, _ in found.compared]
    if found.behind is None:
        return lines + [f"for a whole proof, add: {each}" for each in found.archives]
    return [*lines, *_archive_lines(found.behind, key)]


def _finding_lines(found: Audit, finding: Finding, head: str) -> Iterator[str]:
    at = "" if found.at is None else f"{_printable_path(found.at)}: "
    yield f"NOT verified: {at}position {finding.position}: {finding.problem} ({finding.kind})"
    if found.damage is not None:
        yield f"SQLite's integrity check: {found.damage}"
    yield f"proved up to: {head}"


def _archive_lines(behind: ArchiveProof, key: str | None) -> Iterator[str]:
    for file in behind.files:
        positions = f"{file.after.position + 1} to {file.proved.position}"
        yield f"archive: positions {positions}, {_printable_path(file.path)}"
    for signer in dict.fromkeys(map(_signer_id, behind.files)):
        yield f"the archives are {_describe_signature(signer, key)}"
    if behind.is_folded:
        yield "proved from the first event: the archives lead to the state at the log's base"
    else:
        yield (
            f"not proved: the events up to position {behind.after.position} and their state; give the "
            "archives that have them, too"
        )


def format_file_audit(file: FileAudit, *, key: str | None = None) -> list[str]:
    """Return a file's audit as lines of text."""
    name, end = _printable_path(file.path), f"{file.proved.position}:{file.proved.hash.hex()}"
    if file.finding is not None:
        finding = file.finding
        return [
            f"{name}: NOT verified: position {finding.position}: {finding.problem} ({finding.kind})",
            f"{name}: proved up to: {end}",
        ]
    return [
        f"{name}: verified: {file.events} events after position {file.after.position}",
        f"{name}: head: {end}",
        f"{name}: {_describe_signature(_signer_id(file), key)}",
    ]


def _describe_signature(signer: str, key: str | None) -> str:
    if key is not None:
        return f"signed by the expected key {signer}"
    return f"signed by the key {signer}; use --key to check who owns it"


def _signer_id(file: FileAudit) -> str:
    assert file.head is not None
    return key_id(file.head.public_key)


def _printable_path(path: Path) -> str:
    return click.format_filename(path)


def audit_members(found: Audit) -> dict[str, Any]:
    """Return an audit as JSON members."""
    verification, finding = found.verification, found.finding
    behind = found.behind
    return {
        "verified": finding is None,
        "events": verification.events,
        "position": verification.position,
        "hash": verification.hash.hex(),
        "base": _base(found.base),
        "integrity": found.damage or "ok",
        "projections_compared": verification.compared,
        "finding": _finding(finding, found.at),
        "archives": [asdict(each) for each in found.archives],
        "proved_after": (found.base if behind is None else behind.after).position,
        "base_state_proved": found.base.position == 0 if behind is None else behind.is_folded,
    }


def file_members(file: FileAudit, *, key: str | None = None) -> dict[str, Any]:
    """Return a file's audit as JSON members; `key_expected` is null without an expected key."""
    head = file.head
    return {
        "file": str(file.path),
        "verified": file.finding is None,
        "events": file.events,
        "after": _base(file.after),
        "position": file.proved.position,
        "hash": file.proved.hash.hex(),
        "recorded_at": head and (head.statement.recorded_at or None),
        "key_id": head and key_id(head.public_key),
        "key_expected": None if key is None or head is None else key_id(head.public_key) == key,
        "sha256": file.sha256.hex() or None,
        "finding": _finding(file.finding, file.path),
    }


def _base(base: LogBase) -> dict[str, Any]:
    return {"position": base.position, "hash": base.hash.hex()}


def _finding(finding: Finding | None, at: Path | None) -> dict[str, Any] | None:
    if finding is None:
        return None
    return {
        "position": finding.position,
        "kind": str(finding.kind),
        "problem": finding.problem,
        "file": None if at is None else str(at),
    }


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """Result of `verify`: the audits of a ledger and of files, and the expected key."""

    ledger: Audit | None
    files: Sequence[FileAudit]
    key: str | None

    @property
    def verified(self) -> bool:
        """Whether there is no finding."""
        found = [each.finding for each in self.files]
        return all(finding is None for finding in (*found, self.ledger and self.ledger.finding))

    def lines(self) -> list[str]:
        """Return the result as text."""
        lines = [] if self.ledger is None else format_audit(self.ledger, key=self.key)
        return lines + [line for file in self.files for line in format_file_audit(file, key=self.key)]

    def members(self) -> dict[str, Any]:
        """Return the result as JSON members; those of the ledger only if there was one."""
        behind = self.ledger.behind.files if self.ledger and self.ledger.behind else ()
        files = [file_members(each, key=self.key) for each in (*behind, *self.files)]
        of_ledger = {} if self.ledger is None else audit_members(self.ledger)
        return {**of_ledger, "verified": self.verified, "files": files}


def verify_ledger_and_files(
    ledger: Path | None,
    archives: Sequence[Path],
    files: Sequence[Path],
    key: str | None,
    expected: Expected | None,
) -> VerifyResult:
    """Verify a ledger, files, or both against each other.

    Args:
        ledger: the database file, if any.
        archives: of that ledger.
        files: exports or archives, each verified by itself.
        key: the expected signer: a key's id, or a file with the key.
        expected: the anchor that the ledger, or without one a file, has to contain.

    Raises:
        KeyProblem: the key is invalid.
        LedgerProblem: it cannot be decided.
        OSError: a file cannot be read.
    """
    wanted = None if key is None else expected_key(key)
    checked = audit_files(files, key=wanted, expected=expected if ledger is None else None)
    if ledger is not None:
        sound = [each for each in checked if each.finding is None]
        found = audit(ledger, expected, archives=archives, key=wanted, files=sound)
        return VerifyResult(found, checked, wanted)
    if expected is not None and not any(each.has_expected or each.finding for each in checked):
        raise NothingThere(f"none of these files has position {expected.position}: name one that has it")
    return VerifyResult(None, checked, wanted)


@dataclass(frozen=True, slots=True)
class LedgerQuery:
    """Which events of a file to list or follow.

    Attributes:
        since: a position or a time, as typed.
        until: likewise.
        tail: only the last so many positions.
    """

    wanted: EventFilter
    after: int | None = None
    since: str | None = None
    until: str | None = None
    tail: int | None = None


class FileSource:
    """The ledger in a data directory, as lines of stored events."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def listed(self, wish: LedgerQuery) -> AsyncIterator[Sequence[bytes] | int]:
        """Yield pages of lines, and last the position that they reach."""
        query = EventQuery(
            wish.wanted,
            after=wish.after,
            since=parse_moment(wish.since),
            until=parse_moment(wish.until),
            limit=PAGE,
        )
        async with open_reader(self._path) as reader:
            if wish.tail is not None:
                query = replace(query, after=await _before_head(reader, wish.tail))
            async for page in _pages(reader, query):
                yield page

    async def followed(self, wanted: EventFilter, after: int | None) -> AsyncIterator[Sequence[bytes]]:
        """Yield lines as they are appended, without end; None is from the head on."""
        async with open_reader(self._path) as reader:
            if after is None:
                after = await _before_head(reader, 0)
            while True:
                page = await reader.event_page(EventQuery(wanted, after=after, limit=PAGE))
                after = page.seen
                if page.items:
                    yield [event.line for event in page.items]
                elif page.next_cursor is None:
                    await asyncio.sleep(POLL_S)


async def _before_head(reader: Reader, count: int) -> int:
    """Return the position so many before the head, or the log's base."""
    page = await reader.event_page(EventQuery(limit=1))
    return max(page.as_of - count, page.base)


async def _pages(reader: Reader, query: EventQuery) -> AsyncIterator[Sequence[bytes] | int]:
    while True:
        page = await reader.event_page(query)
        yield [event.line for event in page.items]
        if page.next_cursor is None:
            yield page.as_of
            return
        query = replace(query, after=page.next_cursor)
