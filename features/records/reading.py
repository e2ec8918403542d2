"""Searches files of records, page by page; reads files, and nothing of the server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from events.clock import Timestamp, parse_timestamp
from features.records.files import RecordFile

READ_BYTES = 2**20
"""Lines that are read at once, and skipped at once if they do not have the id."""
SCAN_BYTES = 64 * 2**20
"""Read for a page, so that no page takes long; then it may be empty, and the next one goes on."""
PAGE_BYTES = 2**20
"""Lines of a page, but at least one: pages may wait for clients that read slowly."""


class RecordQuery(msgspec.Struct, frozen=True):
    """A search: each member that is there narrows it.

    Attributes:
        model_id: of one model.
        request_id: the id of the request, or that of its body.
        since: of lines of this time or later.
        cursor: `MODEL/ID:OFFSET`, where the page begins.
        limit: lines of the page.
    """

    model_id: str | None = None
    request_id: str | None = None
    since: Timestamp | None = None
    cursor: str | None = None
    limit: int = 100


class RecordPage(NamedTuple):
    """Lines without their ends, and the cursor of the next page, or None."""

    lines: list[bytes]
    next_cursor: str | None


class _Searched(msgspec.Struct):
    id: str
    time: str
    request: str | None = None


def select_files(files: Sequence[RecordFile], query: RecordQuery) -> list[tuple[RecordFile, int]]:
    """Return the files that a page may have lines of, each with the offset at which it begins there. Pure."""
    at, _, offset = (query.cursor or "").rpartition(":")
    model_id, _, file_id = at.partition("/")
    first = model_id, file_id
    since_s = 0.0 if query.since is None else parse_timestamp(query.since).timestamp()
    return [
        (file, int(offset) if (file.model_id, file.id) == first else 0)
        for file in files
        if query.model_id in (None, file.model_id)
        and (file.model_id, file.id) >= first
        and file.written_at_s >= since_s - 1
    ]


def read_page(files: Sequence[RecordFile], query: RecordQuery) -> RecordPage:
    """Return a page of lines, in order of models, files and lines.

    Raises:
        OSError: a file cannot be read; one that is gone has no lines.
    """
    lines, left_bytes, scan_bytes = list[bytes](), PAGE_BYTES, SCAN_BYTES
    wanted = None if query.request_id is None else msgspec.json.encode(query.request_id)
    for file, begin in select_files(files, query):
        try:
            content = file.path.open("rb")
        except FileNotFoundError:
            continue
        with content:
            offset = content.seek(begin)
            while some := [line for line in content.readlines(READ_BYTES) if line.endswith(b"\n")]:
                has_id = wanted is None or wanted in b"".join(some)
                for line in some:
                    if len(lines) >= query.limit or left_bytes <= 0 or scan_bytes <= 0:
                        return RecordPage(lines, f"{file.model_id}/{file.id}:{offset}")
                    offset += len(line)
                    scan_bytes -= len(line)
                    if has_id and (wanted is None or wanted in line) and _matches(line, query):
                        lines.append(line[:-1])
                        left_bytes -= len(line)
    return RecordPage(lines, None)


def _matches(line: bytes, query: RecordQuery) -> bool:
    try:
        said = msgspec.json.decode(line, type=_Searched)
    except msgspec.MsgspecError:  # somebody has changed the file, as `verify` says
        return False
    is_wanted = query.request_id in (None, said.id, said.request)
    return is_wanted and (query.since is None or said.time >= query.since)
