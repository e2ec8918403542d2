"""Recording as a resource of the application: writes lines, announces closed files, erases old ones."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast
from uuid import NAMESPACE_URL, uuid5

from aiohttp import web
from msgspec import UNSET

from answers.resources import OperatorNotice
from events.clock import parse_timestamp
from events.commands import Record
from events.errors import LedgerProblem
from events.log import Log
from events.sqlite.listing import Reader
from events.types import SYSTEM, Draft
from features.records.facts import RecordsErased
from features.records.files import (
    FOLDER,
    ClosedFile,
    RecordFile,
    RecordFiles,
    choose_expired,
    list_files,
)
from features.records.lines import Reason
from features.records.recorder import InferenceRecorder
from features.records.rules import RecordRule
from features.records.table import NAME
from runtime.statistics import InferenceTimes
from server.appkeys import CONFIG, LOG, READER
from server.cluster import CLUSTER
from server.observability.output import choose_request_id
from server.v2.observer import OBSERVE, Observe, ObservedInference

_log = logging.getLogger(__name__)

T = TypeVar("T")

TIDY_S = 60.0
"""How often files are looked at: whether one is old, or was left, or is to be erased."""
CLOSE_S = 10.0
"""For the last writes and announcements: a disk or a ledger that hangs delays the end no longer."""

Work = Callable[[], Coroutine[Any, Any, None]]
Gauge = tuple[str, str, Mapping[Any, float], str]


class Recording:
    """The recorder of a server, the thread that writes its files, and two coroutines between them.

    One hands the queue to the thread; the other has the ledger announce and erase files, which may take long.

    Attributes:
        files: used in the thread alone, but for `problem`.
        written: records in files.
    """

    def __init__(
        self, rules: Sequence[RecordRule], folder: Path, source: str, log: Log, reader: Reader
    ) -> None:
        self._rules = rules
        self._source = source
        self._log = log
        self._reader = reader
        self._thread = ThreadPoolExecutor(1, "records")
        self._search_thread = ThreadPoolExecutor(1, "records search")
        self._wake, self._wake_keeper = asyncio.Event(), asyncio.Event()
        self._writing, self._announcing, self._erasing = asyncio.Lock(), asyncio.Lock(), asyncio.Lock()
        self._tasks = set[asyncio.Task[Any]]()
        self._closed = list[ClosedFile]()
        self._problem: str | None = None
        self._said: str | None = None
        self._is_tidy = self._ends = False
        self.recorder = InferenceRecorder(rules, source, self._wake.set, lambda: log.state.models)
        self.files = RecordFiles(folder, rules, source)
        self.written = 0

    @property
    def problem(self) -> str | None:
        """Why inferences are not recorded now, or their files not announced; None if they are."""
        return self.files.problem or self._problem

    async def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function in the thread that has the files."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    async def search(self, function: Callable[[], T]) -> T:
        """Call a function that reads files, in a thread in which no writing waits for it."""
        return await asyncio.get_running_loop().run_in_executor(self._search_thread, function)

    async def list_files(self) -> list[RecordFile]:
        return await self.search(partial(list_files, self.files.folder))

    async def _protect(self, work: Coroutine[Any, Any, None]) -> None:
        """Wait for work that goes on if its caller is cancelled, as a handler is when its client leaves."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await asyncio.shield(task)

    def start(self) -> list[asyncio.Task[None]]:
        """Start both coroutines."""
        writer = self._run(self._wake, self._flush, self._close_old)
        keeper = self._run(self._wake_keeper, self._announce, self._tidy)
        return [asyncio.create_task(each, name="records") for each in (writer, keeper)]

    async def _run(self, wake: asyncio.Event, work: Work, tidy: Work) -> None:
        """Work when woken, and tidy up each minute, until the end; no error ends this earlier."""
        loop, due_s = asyncio.get_running_loop(), 0.0
        while not self._ends:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(due_s):
                    await wake.wait()
            try:
                await work()
                if loop.time() >= due_s:
                    due_s = loop.time() + TIDY_S
                    await tidy()
            except Exception:  # noqa: BLE001 - whatever it is, inferences go on
                _log.exception("inferences could not be recorded")

    # Writing.

    async def _close_old(self) -> None:
        self._hand_over(await self.call(self.files.close_old, time.monotonic()))

    async def flush(self) -> None:
        """Write what is queued, for somebody who reads it."""
        await self._protect(self._flush())

    async def _flush(self) -> None:
        async with self._writing:
            self._wake.clear()
            queue, missing = self.recorder.take()
            if not (queue or missing or self.files.problem):
                return
            try:
                done = await self.call(self.files.write, queue, missing, time.monotonic())
            except Exception:
                self.recorder.drop_queue(queue)
                raise
            finally:
                self.recorder.give_back(queue)
            self.written += done.records
            self.recorder.dropped.update(done.dropped)
            self._hand_over(done.closed)
        self._log_problem()

    def _hand_over(self, closed: Sequence[ClosedFile]) -> None:
        """Have closed files announced."""
        if closed:
            self._closed += closed
            self._wake_keeper.set()

    def _log_problem(self) -> None:
        """Log that recording has stopped, or goes on."""
        before, self._said = self._said, self.problem
        if self._said is None and before is not None:
            _log.info("inferences are recorded again")
        elif self._said is not None and before is None:
            _log.error("inferences are not recorded, and go on: %s", self._said)

    # Files that are closed.

    async def _announce(self) -> None:
        """Announce closed files; those that cannot be announced now are left for `_tidy`."""
        async with self._announcing:
            self._wake_keeper.clear()
            while self._closed:
                each = self._closed[0]
                try:
                    await self._announce_file(each)
                except (LedgerProblem, OSError) as error:
                    self._problem = f"{each.path} cannot be announced: {error}"
                finally:
                    self._closed.pop(0)  # not earlier: what is here was not left
        self._log_problem()

    async def _announce_file(self, closed: ClosedFile) -> None:
        """Record a closed file, unless it is recorded, and then give it its name.

        Raises:
            LedgerProblem: the ledger cannot be read or written.
            OSError: the file cannot be renamed.
        """
        if await self._reader.event(closed.id) is None:
            draft = Draft(closed.id, closed.fact, SYSTEM, None, closed.model_id)
            await self._log.submit(Record((draft,)))
        await self.call(self.files.give_name, closed.path)

    async def _tidy(self) -> None:
        """Finish what a server that died began, or an error left; erase files that were kept long enough."""
        problem: str | None = None
        left, closed = await self.call(self.files.find_left), {each.id for each in self._closed}
        for path in left:
            try:
                if path.stem not in closed:
                    await self._finish(path)
            except (LedgerProblem, OSError) as error:  # another time
                problem = f"{path} cannot be completed: {error}"
        files = await self.call(list_files, self.files.folder)
        if not self._is_tidy:
            for file in files:
                if not file.is_open and await self._reader.event(erasure_id(file)) is not None:
                    await self.call(self.files.erase, file.path)
            self._is_tidy = True
        for file, reason in choose_expired(files, self._rules, parse_timestamp(self._log.now()).timestamp()):
            try:
                await self._erase(file, reason, SYSTEM)
            except (LedgerProblem, OSError) as error:  # another time
                problem = f"{file.path} cannot be erased: {error}"
        self._problem = problem
        self._log_problem()

    async def _finish(self, path: Path) -> None:
        """Complete and announce a file that was left.

        Raises:
            LedgerProblem: the ledger cannot be read or written.
            OSError: the file cannot be written.
        """
        await self._log.catch_up()  # the outcome of an append may have been unknown
        if await self._reader.event(path.stem) is not None:
            await self.call(self.files.give_name, path)
        elif (completed := await self.call(self.files.complete, path)) is not None:
            await self._announce_file(completed)

    async def erase(self, file: RecordFile, reason: str, actor: str) -> None:
        """Record that a closed file is erased, and delete it; nothing if that has been done meanwhile.

        Raises:
            LedgerProblem: it could not be recorded, and the file is still there.
        """
        await self._protect(self._erase(file, reason, actor))

    async def _erase(self, file: RecordFile, reason: str, actor: str) -> None:
        async with self._erasing:
            if await self._reader.event(erasure_id(file)) is None:
                data = RecordsErased(file=file.id, reason=reason, server=self._source or UNSET)
                draft = Draft(erasure_id(file), data, actor, None, file.model_id)
                await self._log.submit(Record((draft,)))
            await self.call(self.files.erase, file.path)

    # The end.

    async def close(self) -> None:
        """Write what is queued, and close and announce all files, unless that takes long."""
        try:
            async with asyncio.timeout(CLOSE_S):
                await self._flush()
                self._closed += await self.call(self.files.close_old, math.inf)
                await self._announce()
        except TimeoutError:
            _log.error("files of records are not closed after %g s: the next server completes them", CLOSE_S)

    async def end(self, *tasks: asyncio.Task[None]) -> None:
        """End both coroutines, and then close."""
        self._ends = True
        self._wake.set()
        self._wake_keeper.set()
        _, late = await asyncio.wait([*tasks, *self._tasks], timeout=CLOSE_S)
        for task in late:
            task.cancel()
        await self.close()
        for thread in (self._thread, self._search_thread):
            thread.shutdown(wait=False, cancel_futures=True)


def erasure_id(file: RecordFile) -> str:
    """Return the id of the event of a file's erasure: it follows from the file's, so there is only one."""
    return str(uuid5(NAMESPACE_URL, f"loadledger:erased:{file.id}"))


RECORDING = web.AppKey("recording", Recording)


async def open_recording(app: web.Application) -> AsyncIterator[None]:
    """Record inferences from here on, if there are rules; files of earlier ones are there without."""
    config = app[CONFIG]
    rules = cast("tuple[RecordRule, ...]", config.tables.get(NAME, ()))
    folder = config.data / FOLDER
    app[RECORDING] = recording = Recording(rules, folder, app[CLUSTER].name or "", app[LOG], app[READER])
    if rules:
        observe: Observe = partial(_observe, recording.recorder)
        app[OBSERVE] = observe
    tasks = recording.start()
    yield
    await recording.end(*tasks)


async def close_files(app: web.Application) -> None:
    """Close and announce all files: this server is about to leave the others, and then appends nothing."""
    await app[RECORDING].close()


def _observe(
    recorder: InferenceRecorder, request: web.BaseRequest, model_id: str, subject: str, times: InferenceTimes
) -> ObservedInference | None:
    rule = recorder.find_rule(model_id)
    if rule is None:
        return None
    return recorder.begin(rule, choose_request_id(request), model_id, subject, times)


async def read_gauges(app: web.Application) -> Sequence[Gauge]:
    """Return the metrics of records; without rules all are 0."""
    recording = app[RECORDING]
    reasons: tuple[Reason, ...] = ("queue_full", "not_writable", "too_long", "failed")
    dropped = {each: recording.recorder.dropped[each] for each in reasons}
    stopped = float(recording.problem is not None)
    return (
        ("records_total", "Inferences that were recorded.", {(): recording.written}, ""),
        (
            "records_dropped_total",
            "Inferences that were not recorded, though a rule says so.",
            dropped,
            "reason",
        ),
        (
            "records_stopped",
            "1 if inferences cannot be recorded now, or files announced; else 0.",
            {(): stopped},
            "",
        ),
    )


def read_notices(app: web.Application) -> list[OperatorNotice]:
    """Return why inferences are not recorded; nothing if they are."""
    problem = app[RECORDING].problem
    if problem is None:
        return []
    notice = OperatorNotice(
        title="Inferences are not recorded",
        why=f"{problem}. They are answered as ever, and counted as missing.",
        todo="Free space on the disk, or erase files with `loadledger records erase`; recording then goes on"
        " by itself.",
    )
    return [notice]
