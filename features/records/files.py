"""Files of records: `MODEL/ID.open` while it is written, `MODEL/ID.jsonl` once the ledger has its digest.

Between the two it is `MODEL/ID.complete`, which tells a file that was closed in order from one of a server
that died: that one is completed by the next server. Every method of `RecordFiles` runs in one thread.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import msgspec
from msgspec import UNSET

from events.clock import format_timestamp, utc_now, uuid7
from events.files import sync
from features.records.facts import RecordsClosed
from features.records.lines import (
    DROPPED,
    INFERENCE,
    DroppedRecords,
    Reason,
    encode_dropped,
    encode_or_drop,
)
from features.records.recorder import Entry
from features.records.rules import RecordRule, find_rule

_log = logging.getLogger(__name__)

FOLDER = "records"
"""In the data directory."""
FILE_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
OPEN, COMPLETE, CLOSED = ".open", ".complete", ".jsonl"
"""Suffixes of files: being written, not announced yet, announced."""
FULL_BYTES = 64 * 2**20
"""Size at which a file is closed: some 100,000 inferences without tensors."""
FULL_SHARE = 4
"""Of `max_bytes` a file takes a quarter at most, so that the oldest ones are a small part."""
OLD_S = 3600.0
"""Age at which a file is closed."""
WRITE_BYTES = 2**20
"""Lines are joined up to this: the thread and the event loop take turns at each call of the system."""
LEFT_FREE_BYTES, LEFT_FREE_SHARE = 2**30, 20
"""Room that stays free on the disk, on which the ledger may lie, too: a twentieth of it, at most this."""


class ClosedFile(NamedTuple):
    """A file that is complete on the disk, and what the ledger has to say of it."""

    id: str
    model_id: str
    path: Path
    fact: RecordsClosed


class RecordFile(NamedTuple):
    """A file in the folder: its size, and when it was last written, in seconds since 1970."""

    model_id: str
    id: str
    path: Path
    bytes: int
    written_at_s: float

    @property
    def is_open(self) -> bool:
        """Whether the ledger may not have it yet."""
        return self.path.suffix != CLOSED


@dataclass(slots=True)
class _Lines:
    """Lines of a model that are written together: each part has whole ones."""

    parts: list[bytes] = field(default_factory=list)
    records: int = 0
    size: int = 0

    def add(self, part: bytes, records: int) -> int:
        self.parts.append(part)
        self.records += records
        self.size += len(part)
        return self.size


@dataclass(slots=True)
class Written:
    """How many records a call has written, which it could not, by reason, and the files that it closed."""

    records: int = 0
    dropped: Counter[Reason] = field(default_factory=Counter)
    closed: list[ClosedFile] = field(default_factory=list)


@dataclass(slots=True)
class _OpenFile:
    """A file that is being written, with the digest of its bytes so far; it holds no descriptor."""

    id: str
    path: Path
    begin: str
    opened_s: float = 0.0
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)
    size: int = 0
    records: int = 0
    lines: int = 0
    dropped: int = 0

    def append(self, text: bytes, lines: int) -> None:
        """Append so many whole lines; the file is as before if they find no room.

        Raises:
            TornFile: nobody knows what the file has: write no more into it.
            OSError: they cannot be written.
        """
        flags = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
        try:
            descriptor = os.open(self.path, flags if self.size else flags | os.O_CREAT, 0o600)
        except FileNotFoundError as error:
            raise TornFile(error.errno, error.strerror) from None
        try:
            rest = memoryview(text)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        except OSError as error:
            try:
                os.ftruncate(descriptor, self.size)
            except OSError:
                raise TornFile(error.errno, error.strerror) from None
            raise
        finally:
            os.close(descriptor)
        self.digest.update(text)
        self.size += len(text)
        self.lines += lines


class TornFile(OSError):
    """A file has been deleted, or has half a line that could not be taken back."""


class RecordFiles:
    """The files of one server, in folders by model.

    Args:
        folder: of all of them; created with the first.
        rules: of the configuration.
        source: the name of this server among several, or empty.

    Attributes:
        problem: why nothing can be written; None if it can.
    """

    def __init__(self, folder: Path, rules: Sequence[RecordRule], source: str) -> None:
        self.folder = folder
        self.problem: str | None = None
        self._rules = rules
        self._source = source
        self._open = dict[str, _OpenFile]()
        self._missing = Counter[tuple[str, Reason]]()

    def write(
        self, queue: Iterable[Entry], missing: Mapping[tuple[str, Reason], int], now_s: float
    ) -> Written:
        """Write lines, and before those of a model how many of it are missing.

        What cannot be written is missing, too, and said as soon as something can be.
        """
        self._missing.update(missing)
        done, joined = Written(), defaultdict[str, _Lines](_Lines)
        for model_id, content, records, _ in queue:
            line = content if isinstance(content, bytes) else encode_or_drop(content, self._source)
            if isinstance(line, str):
                self._drop(model_id, line, records, done)
            elif joined[model_id].add(line, records) >= WRITE_BYTES:
                self._write_lines(model_id, joined.pop(model_id), now_s, done)
        for model_id in {*joined, *(model_id for model_id, _ in self._missing)}:
            self._write_lines(model_id, joined[model_id], now_s, done)
        return done

    def _drop(self, model_id: str, reason: Reason, records: int, done: Written) -> None:
        if records:
            self._missing[model_id, reason] += records
            done.dropped[reason] += records

    def _write_lines(self, model_id: str, lines: _Lines, now_s: float, done: Written) -> None:
        try:
            self._check_room()
            self._append(self._open.get(model_id) or self._open_file(model_id, now_s), model_id, lines)
        except OSError as error:
            if isinstance(error, TornFile):
                _log.error("%s is written no more: %s", self._open.pop(model_id).path, error.strerror)
            self.problem = f"{self.folder}: {error.strerror}"
            self._drop(model_id, "not_writable", lines.records, done)
            return
        self.problem = None
        done.records += lines.records
        rule = find_rule(self._rules, model_id) or RecordRule(models=())
        if self._open[model_id].size >= min(FULL_BYTES, rule.max_bytes // FULL_SHARE):
            done.closed.extend(self._close(model_id))

    def _append(self, file: _OpenFile, model_id: str, lines: _Lines) -> None:
        """Append how many inferences of the model are missing, and then lines.

        Raises:
            OSError: they cannot be written.
        """
        missing = {reason: count for (each, reason), count in self._missing.items() if each == model_id}
        said = [encode_dropped(self._make_dropped(model_id, *each)) for each in missing.items()]
        file.append(b"".join((*said, *lines.parts)), len(said) + lines.records)
        for reason in missing:
            del self._missing[model_id, reason]
        file.records += lines.records
        file.dropped += sum(missing.values())

    def _make_dropped(self, model_id: str, reason: Reason, count: int | None) -> DroppedRecords:
        now = format_timestamp(utc_now())
        return DroppedRecords(
            id=uuid7(), source=self._source, time=now, model=model_id, dropped=count, reason=reason
        )

    def _check_room(self) -> None:
        _make_folder(self.folder)
        disk = os.statvfs(self.folder)
        left = min(LEFT_FREE_BYTES, disk.f_blocks * disk.f_frsize // LEFT_FREE_SHARE)
        if (free := disk.f_bavail * disk.f_frsize) < left:
            text = f"the disk has {free >> 20} MiB left, and {left >> 20} MiB are left free for the ledger"
            raise OSError(errno.ENOSPC, text)

    def _open_file(self, model_id: str, now_s: float) -> _OpenFile:
        _make_folder(self.folder / model_id)
        name, begin = uuid7(), format_timestamp(utc_now())
        file = _OpenFile(name, self.folder / model_id / f"{name}{OPEN}", begin, now_s)
        self._open[model_id] = file
        return file

    def close_old(self, now_s: float) -> list[ClosedFile]:
        """Close the files that are old; with an infinite time all of them."""
        old = [model_id for model_id, file in self._open.items() if now_s - file.opened_s >= OLD_S]
        return [closed for model_id in old for closed in self._close(model_id)]

    def _close(self, model_id: str) -> Iterator[ClosedFile]:
        """Close a file once all of it is on the disk; if that fails, it is left as by a server that died.

        If inferences are missing, it says so at its end, for which the space that is left free is enough.
        """
        file = self._open[model_id]
        try:
            with suppress(OSError):  # else the next file says it
                self._append(file, model_id, _Lines())
            del self._open[model_id]
            if not file.size:
                file.path.unlink(missing_ok=True)
                return
            sync(file.path)
            file.path = file.path.rename(file.path.with_suffix(COMPLETE))
            sync(file.path.parent)
        except OSError as error:
            _log.error("%s cannot be closed, and is completed later: %s", file.path, error.strerror)
            return
        yield self._describe(file, model_id, is_interrupted=False)

    def _describe(self, file: _OpenFile, model_id: str, *, is_interrupted: bool) -> ClosedFile:
        fact = RecordsClosed(
            records=file.records,
            lines=file.lines,
            dropped=file.dropped,
            interrupted=is_interrupted,
            bytes=file.size,
            sha256=file.digest.hexdigest(),
            begin=file.begin,
            end=format_timestamp(utc_now()),
            server=self._source or UNSET,
        )
        return ClosedFile(file.id, model_id, file.path, fact)

    def give_name(self, path: Path) -> None:
        """Give a file its name: the ledger has it. A deleted one is missing, as `verify` says."""
        try:
            path.rename(path.with_suffix(CLOSED))
            sync(path.parent)
        except FileNotFoundError:
            _log.error("%s was deleted before it got its name", path)

    def erase(self, path: Path) -> None:
        """Delete a file for good."""
        path.unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            sync(path.parent)

    def find_left(self) -> list[Path]:
        """Return the files that an error left, or a server that died, or that could not announce them."""
        written = {file.path for file in self._open.values()}
        files = list_files(self.folder)
        return [each.path for each in files if each.is_open and each.path not in written]

    def complete(self, path: Path) -> ClosedFile | None:
        """Complete a file that was left: without half a line at its end, and with a line that says so.

        One that was complete stays as it is. An empty one is deleted, and None returned.

        Raises:
            OSError: that cannot be written.
        """
        if not path.stat().st_size:
            path.unlink()
            return None
        model_id, last, is_interrupted = path.parent.name, b"", path.suffix == OPEN
        file = _OpenFile(path.stem, path, format_timestamp(utc_now()))
        with path.open("rb") as content:
            for line in content:
                if not line.endswith(b"\n"):
                    os.truncate(path, file.size)
                    break
                _count_line(file, line)
                last = line
        if is_interrupted and not _is_interruption(last):
            file.append(encode_dropped(self._make_dropped(model_id, "interrupted", None)), 1)
        sync(path)
        sync(path.parent)
        return self._describe(file, model_id, is_interrupted=is_interrupted)


def _make_folder(folder: Path) -> None:
    """Create a folder for good, if it is not there."""
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        return
    sync(folder.parent)


def list_files(folder: Path) -> list[RecordFile]:
    """Return all files in order of their models and ids, and so of their beginnings; others are ignored."""
    found = list[RecordFile]()
    for path in sorted(folder.glob("*/*")):
        if path.suffix in (OPEN, COMPLETE, CLOSED) and FILE_ID.fullmatch(path.stem):
            with suppress(FileNotFoundError):
                file = stat_file(path)
                if not (path.is_symlink() or path.is_dir()):
                    found.append(file)
    return found


def stat_file(path: Path) -> RecordFile:
    """Return a file as it is now.

    Raises:
        OSError: it is not there.
    """
    status = path.stat()
    return RecordFile(path.parent.name, path.stem, path, status.st_size, status.st_mtime)


class _Line(msgspec.Struct):
    type: str
    time: str = ""
    dropped: int | None = 0
    reason: str = ""


def _read_line(line: bytes) -> _Line:
    try:
        return msgspec.json.decode(line, type=_Line)
    except msgspec.MsgspecError:
        return _Line("")


def _count_line(file: _OpenFile, line: bytes) -> None:
    said = _read_line(line)
    if not file.lines:
        file.begin = said.time or file.begin
    file.digest.update(line)
    file.size += len(line)
    file.lines += 1
    file.records += said.type == INFERENCE
    file.dropped += said.dropped or 0 if said.type == DROPPED else 0


def _is_interruption(line: bytes) -> bool:
    said = _read_line(line)
    return said.type == DROPPED and said.reason == "interrupted"


def choose_expired(
    files: Sequence[RecordFile], rules: Sequence[RecordRule], now_s: float
) -> Iterator[tuple[RecordFile, str]]:
    """Yield the closed files that are to be erased, the oldest first, and why: pure.

    Files of a model for which no rule holds any more stay until a person erases them.
    """
    by_rule = defaultdict[RecordRule, list[RecordFile]](list)
    for each in files:
        rule = find_rule(rules, each.model_id)
        if rule is not None:
            by_rule[rule].append(each)
    for rule, of_rule in by_rule.items():
        left_bytes = sum(each.bytes for each in of_rule)
        for each in sorted(of_rule, key=lambda file: file.id):
            if each.is_open:
                continue
            is_old = now_s - each.written_at_s >= rule.keep_s
            if not is_old and left_bytes <= rule.max_bytes:
                continue
            left_bytes -= each.bytes
            yield each, "kept for as long as its rule says" if is_old else "its rule has no more room"
