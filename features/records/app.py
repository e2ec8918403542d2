"""Recording as a resource of the application: writes lines, announces closed files, erases old ones."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast
from uuid import NAMESPACE_URL, uuid5

from aiohttp import web
from msgspec import UNSET

from answers.resources import OperatorNotice
from events.commands import Record
from events.errors import LedgerProblem
from events.log import Log
from events.sqlite.listing import Reader
from events.types import SYSTEM, Draft
from features.records.facts import RecordsErased
from features.records.files import FOLDER, ClosedFile, RecordFile, RecordFiles, choose_expired
from features.records.recorder import InferenceRecorder
from features.records.rules import RecordRule
from features.records.table import NAME
from runtime.statistics import InferenceTimes
from server.appkeys import CONFIG, LOG, READER
from server.cluster import CLUSTER
from server.observability.output import name_request
from server.v2.observer import OBSERVE, Observe, ObservedInference

_log = logging.getLogger(__name__)

T = TypeVar("T")

TIDY_S = 60.0
"""How often files are looked at: whether one is old, or was left, or is to be erased."""

Gauge = tuple[str, str, Mapping[Any, float], str]


class Recording:
    """The recorder of a server, the thread that writes its files, and the coroutine between them.

    Attributes:
        files: used in the thread alone, but for `problem`.
        written: records in files.
    """

    def __init__(
        self, rules: Sequence[RecordRule], folder: Path, source: str, log: Log, reader: Reader
    ) -> None:
        self._wake = asyncio.Event()
        self._rules = rules
        self._source = source
        self._log = log
        self._reader = reader
        self._thread = ThreadPoolExecutor(1, "records")
        self._turn = asyncio.Lock()
        self._problem: str | None = None
        self._said: str | None = None
        self._is_tidy = False
        self.recorder = InferenceRecorder(rules, source, self._wake.set)
        self.files = RecordFiles(folder, rules, source)
        self.written = 0

    @property
    def problem(self) -> str | None:
        """Why inferences are not recorded now, or their files not announced; None if they are."""
        return self.files.problem or self._problem

    async def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function in the thread that has the files."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    async def run(self) -> None:
        """Write and tidy up until cancelled; no error ends this, since serving goes on, too."""
        loop, tidy_at_s = asyncio.get_running_loop(), 0.0
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(tidy_at_s):
                    await self._wake.wait()
            try:
                await self.flush()
                if loop.time() >= tidy_at_s:
                    tidy_at_s = loop.time() + TIDY_S
                    await self.tidy()
            except Exception:  # noqa: BLE001 - whatever it is, inferences go on
                _log.exception("inferences could not be recorded")

    async def flush(self) -> None:
        """Write what is queued."""
        async with self._turn:
            self._wake.clear()
            queue, missing = self.recorder.take()
            if not (queue or missing or self.files.problem):
                return
            try:
                done = await self.call(self.files.write, queue, missing, time.monotonic())
            finally:
                self.recorder.give_back(queue)
            self.written += done.records
            self.recorder.dropped.update(done.dropped)
            await self._announce(done.closed)
            self._log_problem()

    def _log_problem(self) -> None:
        """Log that recording has stopped, or goes on."""
        before, self._said = self._said, self.problem
        if self._said is None and before is not None:
            _log.info("inferences are recorded again")
        elif self._said is not None and before is None:
            _log.error("inferences are not recorded, and go on: %s", self._said)

    async def tidy(self) -> None:
        """Close old files, finish what a server that died began, erase files that were kept long enough."""
        async with self._turn:
            self._problem = None
            await self._announce(await self.call(self.files.close_old, time.monotonic()))
            for path in await self.call(self.files.find_left):
                try:
                    await self._finish(path)
                except (LedgerProblem, OSError) as error:  # another time
                    self._problem = f"{path} cannot be completed: {error}"
            files = await self.call(self.files.list_files)
            for file in () if self._is_tidy else files:
                if not file.is_open and await self._reader.event(erasure_id(file)) is not None:
                    await self.call(file.path.unlink)
            self._is_tidy = True
            for file, reason in choose_expired(files, self._rules, time.time()):
                with suppress(LedgerProblem):  # the next time, then
                    await self._erase(file, reason, SYSTEM)
            self._log_problem()

    async def _finish(self, path: Path) -> None:
        """Complete and announce a file that was left; one that was announced gets its name.

        Raises:
            LedgerProblem: the ledger cannot be read.
            OSError: the file cannot be written.
        """
        if await self._reader.event(path.stem) is not None:
            await self.call(self.files.settle, path)
        elif (completed := await self.call(self.files.complete, path)) is not None:
            await self._announce([completed])

    async def erase(self, file: RecordFile, reason: str, actor: str) -> None:
        """Record that a closed file is erased, and delete it; nothing if that has been done meanwhile.

        Raises:
            LedgerProblem: it could not be recorded, and the file is still there.
        """
        async with self._turn:
            await self._erase(file, reason, actor)

    async def _erase(self, file: RecordFile, reason: str, actor: str) -> None:
        if await self._reader.event(erasure_id(file)) is None:
            data = RecordsErased(file=file.id, reason=reason, server=self._source or UNSET)
            draft = Draft(erasure_id(file), data, actor, None, file.model_id)
            await self._log.submit(Record((draft,)))
        await self.call(partial(file.path.unlink, missing_ok=True))

    async def close(self) -> None:
        """Write what is queued, and close and announce all files."""
        await self.flush()
        async with self._turn:
            await self._announce(await self.call(self.files.close_old, math.inf))

    def end(self) -> None:
        self._thread.shutdown()

    async def _announce(self, closed: Iterable[ClosedFile]) -> None:
        """Record closed files, and then give them their names; those that cannot be recorded now, later."""
        for each in closed:
            try:
                await self._log.submit(Record((Draft(each.id, each.fact, SYSTEM, None, each.model_id),)))
                await self.call(self.files.settle, each.path)
            except (LedgerProblem, OSError) as error:
                self._problem = f"{each.path} cannot be announced: {error}"


def erasure_id(file: RecordFile) -> str:
    """Return the id of the event of a file's erasure: it follows from the file's, so there is only one."""
    return str(uuid5(NAMESPACE_URL, f"loadledger:erased:{file.id}"))


RECORDING = web.AppKey("recording", Recording)
"""Missing without rules."""


async def open_recording(app: web.Application) -> AsyncIterator[None]:
    """Record inferences from here on, if there are rules."""
    config = app[CONFIG]
    rules = cast("tuple[RecordRule, ...]", config.tables.get(NAME, ()))
    folder = config.data / FOLDER
    recording = Recording(rules, folder, app[CLUSTER].name or "", app[LOG], app[READER])
    app[RECORDING] = recording
    if rules:
        observe: Observe = partial(_observe, recording.recorder)
        app[OBSERVE] = observe
    running = asyncio.create_task(recording.run(), name="records")
    yield
    running.cancel()
    await asyncio.wait([running])
    await recording.close()
    recording.end()


async def close_files(app: web.Application) -> None:
    """Close and announce all files: this server is about to leave the others, and then appends nothing."""
    await app[RECORDING].close()


def _observe(
    recorder: InferenceRecorder, request: web.BaseRequest, model_id: str, subject: str, times: InferenceTimes
) -> ObservedInference | None:
    rule = recorder.find_rule(model_id)
    return None if rule is None else recorder.begin(rule, name_request(request), model_id, subject, times)


async def read_gauges(app: web.Application) -> Sequence[Gauge]:
    """Return the metrics of records; without rules all are 0."""
    recording = app[RECORDING]
    dropped = {"queue_full": 0, "not_writable": 0, "too_long": 0, **recording.recorder.dropped}
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


async def read_resources(app: web.Application) -> Mapping[str, Any]:
    """Return the member of `Resources` that says why inferences are not recorded."""
    problem = app[RECORDING].problem
    if problem is None:
        return {}
    notice = OperatorNotice(
        title="Inferences are not recorded",
        why=f"{problem}. They are answered as ever, and counted as missing.",
        todo="Free space on the disk, or erase files with `loadledger records erase`; recording then goes on"
        " by itself.",
    )
    return {"notices": [notice]}
