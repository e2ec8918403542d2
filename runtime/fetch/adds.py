"""Adds of versions from sources: the way of one, from its start to its event, and which of them run.

Each add has a task, which reads from top to bottom; `Adds` starts them, and cancels them on request. What is
fetched lies in a stage of the repository (`runtime.uploads`) until all of it is there. An add ends with
`VersionAdded`, `AddFailed` or `JobCancelled`, each tied to its job as it was. Until then, the next start of
the server goes on with it; another node begins anew.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import posixpath
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from msgspec import UNSET

from events.clock import seconds_between, uuid7
from events.commands import JobUnchanged
from events.errors import LedgerProblem, LogUnavailable, RequestRefused
from events.jobs import TIMEOUT, Job, JobKind
from events.log import Log
from events.state import State
from events.types import (
    SYSTEM,
    AddFailed,
    AddParameters,
    AddStarted,
    Draft,
    JobCancelled,
    Provenance,
)
from runtime.consumer.loads import LOG_RETRY_S, Recorder
from runtime.errors import RuntimeProblem
from runtime.fetch.messages import PIECE_BYTES, Order, RemoteFile
from runtime.fetch.process import FETCH, UNPACK, FetchProcess, run_process
from runtime.fetch.sources import VARIABLE_PREFIXES
from runtime.onnxfields import TooManyFields, Unparsable
from runtime.onnxfile import SIGNATURE_SUFFIX, external_locations, find_model_file
from runtime.repository import Repository
from runtime.uploads.commit import PIECE_LIMIT_S, UploadBody, Uploads
from runtime.uploads.receive import quote
from runtime.uploads.stage import VERSION, Stage
from runtime.wire import plain_text

T = TypeVar("T")
_log = logging.getLogger(__name__)

MAX_RUNNING = 2
"""Adds that run at once: one may wait for a slow source, and more share the same network and disk."""
PENDING = f"its turn: {MAX_RUNNING} adds run at once"
MAX_SIGNATURE_BYTES = 8 * 2**20
"""A signature lists a version's files, at most 10,000, each with its digest."""
PASSED_TO_ALL = {"HOME", "SSL_CERT_FILE"}
"""Variables that the fetch process of any source gets."""
RETRY_S = 5.0
"""Pause before an add starts again after the ledger could not be read or written: each start is an event."""
MAX_PAUSE_S = 30.0
"""Timers do not count a suspend of the machine, deadlines do."""


@dataclass(slots=True)
class AddProgress:
    """The progress of a running add.

    Attributes:
        stage: `resolving`, `fetching` or `checking`; None while it waits for its turn.
        bytes: that are there.
        total_bytes: of all files; None while a length is unknown.
    """

    stage: str | None = None
    bytes: int = 0
    total_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class _RunningFetch:
    process: FetchProcess
    stage: Stage
    progress: AddProgress

    def expect(self, sizes: Sequence[int | None]) -> None:
        """Add the sizes of files to the total; one that is not known makes that unknown."""
        total_bytes = self.progress.total_bytes
        is_unknown = total_bytes is None or None in sizes
        self.progress.total_bytes = None if is_unknown else (total_bytes or 0) + sum(filter(None, sizes))


class Adds:
    """Carries out the adds of this server's share.

    Args:
        log: the ledger.
        recorder: records facts.
        uploads: stages and commits what is fetched.
        repository: the models.
        share: returns this server's part of a state.
        find_added: returns model, version and path of the files that were added with one of these SHA-256, by
            that.
        allowed: the operator's list of sources.
        environment: with credentials and addresses.
    """

    def __init__(
        self,
        log: Log,
        recorder: Recorder,
        uploads: Uploads,
        repository: Repository,
        *,
        share: Callable[[State], State],
        find_added: Callable[[Collection[str]], Awaitable[Mapping[str, list[tuple[str, int, str]]]]],
        allowed: str,
        environment: Mapping[str, str],
    ) -> None:
        self._log, self._recorder = log, recorder
        self._uploads, self._repository = uploads, repository
        self._share, self._find_added = share, find_added
        self._allowed = allowed
        self._environment = environment
        self._turns = asyncio.Semaphore(MAX_RUNNING)
        self._tasks = dict[str, asyncio.Task[None]]()
        self.progress = dict[str, AddProgress]()

    @property
    def is_full(self) -> bool:
        """Whether no further add can run now."""
        return self._turns.locked()

    async def run(self) -> None:
        """Work until this is cancelled; what runs then goes on after the next start."""
        wakeup = asyncio.Event()
        try:
            with self._log.subscribed(wakeup):
                while True:
                    wakeup.clear()
                    seen = await self._step(wakeup.set)
                    with suppress(TimeoutError):
                        async with asyncio.timeout(self._pause_s(seen)):
                            await wakeup.wait()
        finally:
            await self._end_tasks(list(self._tasks))

    async def _step(self, wake: Callable[[], None]) -> list[Job]:
        """Start a task for each add that has none; end those that are cancelled, late, or ended elsewhere.

        Returns all of them, as they were: one whose end could not be recorded is late still.
        """
        own = self._own()
        jobs = {job.id: job for job in own}
        over = [job for job in own if job.cancelling or self._left_s(job) <= 0]
        ends = [(job, self._describe_end(job)) for job in over]
        for job in over:
            del jobs[job.id]
        await self._end_tasks([job_id for job_id in self._tasks if job_id not in jobs])
        await asyncio.gather(*(self._end(job, data) for job, data in ends))
        for job in jobs.values():
            # One that another node was asked for, whose repository is its own, waits for that to come back.
            is_here = self._uploads.holder in (UNSET, job.node_id)
            if is_here and job.id not in self._tasks:
                self.progress[job.id] = AddProgress()
                self._tasks[job.id] = task = asyncio.create_task(self._add(job), name=f"add {job.id}")
                task.add_done_callback(partial(self._forget, job.id, wake))
        return own

    def _describe_end(self, job: Job) -> AddFailed | JobCancelled:
        """Return the end of an add that is cancelled or late."""
        if job.cancelling:
            return JobCancelled()
        known = self.progress.get(job.id)
        what = (known and known.stage) or "waiting for its turn, or for its node"
        return AddFailed(TIMEOUT, f"not added within {_parameters(job).timeout_s} s; it was {what}")

    def _forget(self, job_id: str, wake: Callable[[], None], _: asyncio.Task[None]) -> None:
        del self._tasks[job_id], self.progress[job_id]
        wake()

    def _pause_s(self, jobs: Collection[Job]) -> float | None:
        """Return how long to wait for an event: until the first of these is late, and not over a suspend."""
        left = [max(0.0, self._left_s(job)) for job in jobs]
        return min([MAX_PAUSE_S, *left]) if left else None

    async def _end_tasks(self, job_ids: Collection[str]) -> None:
        tasks = [self._tasks[job_id] for job_id in job_ids]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _own(self) -> list[Job]:
        if all(job.kind is not JobKind.ADD for job in self._log.state.jobs.values()):
            return []  # so that the share is not worked out for each event
        return [job for job in self._share(self._log.state).unended() if job.kind is JobKind.ADD]

    def _left_s(self, job: Job) -> float:
        clock = self._log.clock
        deadline_at = clock.to_monotonic(job.deadline_at or job.created_at, job.created_position)
        return seconds_between(clock.monotonic_now(), deadline_at)

    async def _add(self, job: Job) -> None:
        """The way of one add; whatever fails is recorded, and it can be asked for again."""
        try:
            async with self._turns:
                if await self._record(job, AddStarted(job.attempt + 1)):
                    await self._fetch(job, self.progress[job.id])
                else:
                    await asyncio.sleep(LOG_RETRY_S)
        except RequestRefused as refused:  # other nodes have other files of this version
            await self._end(job, AddFailed(refused.code, str(refused)))
        except LedgerProblem as problem:  # the next step looks at the job again
            _log.warning("add %s is tried again: %s", job.id, problem)
            await asyncio.sleep(RETRY_S)
        except RuntimeProblem as problem:
            await self._end(job, AddFailed(problem.code, plain_text(str(problem))))
        except Exception:  # noqa: BLE001 - else it would be tried for ever
            _log.exception("add %s failed", job.id)
            await self._end(job, AddFailed("internal", "the server failed; its log says how"))

    async def _end(self, job: Job, data: AddFailed | JobCancelled) -> None:
        """Discard what was fetched, and record the end of an add."""
        with suppress(RuntimeProblem):  # what cannot be deleted now, the next start deletes
            await self._uploads.end_fetch(job.id)
        if not await self._record(job, data):
            await asyncio.sleep(LOG_RETRY_S)

    async def _record(self, job: Job, data: AddStarted | AddFailed | JobCancelled) -> bool:
        """Record a fact of an add, unless it has changed; return whether that was done."""
        now = self._log.state.unended_job(job.id)
        if now is None or (now.cancelling and not isinstance(data, JobCancelled)):
            return False
        draft = Draft(uuid7(), data, SYSTEM, job.id, job.model_id, job.version)
        try:
            await self._recorder.record(draft, conditions=(JobUnchanged(job.id, now.position),))
        except (RequestRefused, LogUnavailable):
            return False
        return True

    async def _fetch(self, job: Job, progress: AddProgress) -> None:
        """Fetch what a source's name means now into a stage, and commit that.

        Raises:
            RuntimeProblem: of the source, of an upload, or `fetch_failed`.
            LedgerProblem: `log_unavailable`.
        """
        asked = _parameters(job)
        progress.stage = "resolving"
        async with run_process(FETCH) as process:
            digest = asked.digest and asked.digest.removeprefix("sha256:")
            variables = select_variables(asked.source, self._environment)
            resolved = await process.resolve(Order(asked.source, digest, self._allowed, variables))
            stage = await self._uploads.begin_fetch(job, resolved.name)
            progress.stage = "fetching"
            await self._fetch_files(_RunningFetch(process, stage, progress), resolved.files)
        progress.stage = "checking"
        now = self._log.state.unended_job(job.id)
        if now is not None and not now.cancelling:
            source = Provenance(asked.source, resolved.name)
            await self._uploads.commit(stage, source, (JobUnchanged(job.id, now.position),))

    async def _fetch_files(self, fetch: _RunningFetch, files: Sequence[RemoteFile]) -> None:
        """Fetch the files that a version must have, then those that its model and its signatures name."""
        known = await self._find_added({file.sha256 for file in files if file.sha256 is not None})
        done, wanted = set[int](), [index for index, file in enumerate(files) if file.is_needed]
        fetch.progress.total_bytes = 0
        while wanted:
            fetch.expect([files[index].bytes for index in wanted])
            for index in wanted:
                await self._fetch_file(fetch, index, files[index], known.get(files[index].sha256 or "", ()))
            done.update(wanted)
            paths = tuple(fetch.stage.files)
            named = await self._read(fetch, partial(find_named_files, fetch.stage.folder / VERSION, paths))
            wanted = [index for index, file in enumerate(files) if file.path in named and index not in done]

    async def _read(self, fetch: _RunningFetch, work: Callable[[], T]) -> T:
        """Return what a function returns that reads the repository, which may hang."""
        return await self._repository.file_system.run(fetch.stage.model_id, work, PIECE_LIMIT_S)

    async def _fetch_file(
        self, fetch: _RunningFetch, index: int, file: RemoteFile, added: Sequence[tuple[str, int, str]]
    ) -> None:
        """Fetch a file, or the rest of it, unless its bytes are among those that were added."""
        complete = None if file.is_archive else fetch.stage.files.get(file.path)
        before = fetch.progress.bytes
        if complete is not None:  # from before a restart: the resolved name is the same, and so are the bytes
            fetch.progress.bytes += complete.bytes
            return
        offset, copy = 0, None
        if file.sha256 is not None:
            offset = await self._read(fetch, partial(_size_of, fetch.stage.part_of(file.path)))
            copy = None if offset else await self._read(fetch, partial(self._find_copy, added))
        try:
            await self._receive(fetch, index, file, offset, copy)
        except (RuntimeProblem, OSError) as problem:
            is_damaged = isinstance(problem, OSError) or problem.code == "digest_mismatch"
            if not is_damaged or not (offset or copy):
                raise
            fetch.progress.bytes = before
            await self._receive(fetch, index, file)

    def _find_copy(self, added: Sequence[tuple[str, int, str]]) -> Path | None:
        """Return the first of these files that the repository has."""
        paths = (self._repository.folder_of(model_id, version) / path for model_id, version, path in added)
        return next((path for path in paths if path.is_file() and not path.is_symlink()), None)

    async def _receive(
        self, fetch: _RunningFetch, index: int, file: RemoteFile, offset: int = 0, copy: Path | None = None
    ) -> None:
        """Receive a file after the part of it that has arrived, from a copy of it or from the source."""
        pieces, length = self._read_file(fetch, copy), file.bytes
        if copy is None and not (offset and offset == length):
            opened = await fetch.process.open(index, offset)
            offset, pieces = opened.offset, fetch.process.pieces()
            if length is None:  # as of a file of the web, which is alone
                length = fetch.progress.total_bytes = opened.bytes
        expected = {} if file.sha256 is None else {"sha-256": bytes.fromhex(file.sha256)}
        fetch.progress.bytes += offset
        body = UploadBody(_count(pieces, fetch.progress), length, expected, offset)
        try:
            if file.is_archive:
                await self._unpack(fetch, await self._uploads.add_archive(fetch.stage, file.path, body))
            else:
                await self._uploads.add_file(fetch.stage, file.path, body)
        except RuntimeProblem as problem:
            if problem.code != "digest_mismatch":
                raise
            raise RuntimeProblem(
                f"{quote(file.path)} of the source has not the SHA-256 {file.sha256} that was named: it was"
                " changed there or on its way",
                code=problem.code,
            ) from None

    async def _unpack(self, fetch: _RunningFetch, archive: Path) -> None:
        """Add the files of an archive, which a process of its own unpacks; the archive goes then."""
        with await self._read(fetch, lambda: archive.open("rb")) as opened:
            async with run_process(UNPACK, opened) as process:
                async for entry in process.entries():
                    body = UploadBody(process.pieces(), entry.bytes)
                    await self._uploads.add_file(fetch.stage, entry.path, body)
        await self._read(fetch, archive.unlink)

    async def _read_file(self, fetch: _RunningFetch, path: Path | None) -> AsyncIterator[bytes]:
        """Yield the pieces of a file; none without one."""
        if path is None:
            return
        with await self._read(fetch, lambda: path.open("rb")) as opened:
            while piece := await self._read(fetch, partial(opened.read, PIECE_BYTES)):
                yield piece


def select_variables(source: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that the fetch process of a source gets: not the credentials of others."""
    prefix = VARIABLE_PREFIXES.get(source.partition("://")[0])
    return {
        name: text
        for name, text in environment.items()
        if name in PASSED_TO_ALL or (prefix is not None and name.startswith(prefix))
    }


def find_named_files(folder: Path, paths: Collection[str]) -> frozenset[str]:
    """Return the paths that the model of a folder names for its weights, and its signatures.

    Args:
        folder: of a version, as far as it is there.
        paths: of its files.
    """
    found = set[str]()
    model = find_model_file(paths)
    if model is not None:
        with suppress(Unparsable, TooManyFields):  # the check of the whole version says what is wrong
            found.update(map(posixpath.normpath, external_locations(folder / model)))
    for path in paths:
        if path.endswith(SIGNATURE_SUFFIX):
            with (folder / path).open("rb") as signature:
                found.update(list_signed_files(signature.read(MAX_SIGNATURE_BYTES)))
    return frozenset(found)


def list_signed_files(signature: bytes) -> Iterator[str]:
    """Yield the files that a signature lists: a Sigstore bundle with a statement of OpenSSF Model Signing.

    Its payload is an in-toto statement in DSSE; version 1.0 of model signing has the files in
    `predicate.resources`. Anything else lists none.
    """
    with suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError):
        payload = json.loads(signature)["dsseEnvelope"]["payload"]
        for resource in json.loads(base64.b64decode(payload))["predicate"]["resources"]:
            yield posixpath.normpath(resource["name"])


def _parameters(job: Job) -> AddParameters:
    """Return the parameters of an add.

    Raises:
        RuntimeError: the job has none: it is another one, or the stored job is damaged.
    """
    if job.add is UNSET:
        raise RuntimeError(f"job {job.id} is no add: the stored job is damaged")
    return job.add


def _size_of(part: Path) -> int:
    try:
        return part.stat().st_size
    except FileNotFoundError:
        return 0


async def _count(pieces: AsyncIterator[bytes], progress: AddProgress) -> AsyncIterator[bytes]:
    async for piece in pieces:
        progress.bytes += len(piece)
        yield piece
