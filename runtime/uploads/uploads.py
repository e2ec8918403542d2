"""The way of one upload or removal: staged, then durable as an event, then visible.

Each step may be the last one: a server that ends, a client that leaves, a disk that is full or never answers.
Before its event is durable, a change leaves nothing; from then on, it is finished: by this server, or by the
next start. All work on files is done in threads, a piece at a time, with a limit on each.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from events.accept import OUTDATED, find_use
from events.clock import uuid7
from events.commands import AddVersion, Command, NodeCurrent, Receipt, Record, RemoveVersion
from events.errors import EpochOver, LedgerProblem, LogClosed, OutcomeUnknown, RequestRefused
from events.log import Log
from events.types import SYSTEM, AddedFile, Draft, Event, VersionAdded, VersionRemoved
from runtime.errors import RuntimeProblem
from runtime.filesystem import FileSystemPool, make_call
from runtime.repository import Repository
from runtime.timeouts import timeout
from runtime.uploads.policy import UploadPolicy, check_writable
from runtime.uploads.problems import RepositoryReadOnly, VersionExists, VersionInUse, VersionNotNew
from runtime.uploads.receiving import (
    NO_DIGESTS,
    ExpectedDigests,
    Receiver,
    UploadForm,
    check_room,
    unwritable,
)
from runtime.uploads.staging import Staging, epoch_folder

T = TypeVar("T")
_log = logging.getLogger(__name__)

MAX_THREADS = 8
"""Pieces that are written at once. A disk is no faster with more, and one that hangs stops no other work."""
PIECE_LIMIT_S = 120.0
"""For one piece, the most of it syncing 64 MiB or two thousand small files, or for one step of a removal."""
START_LIMIT_S = 10.0
"""For each step of what a start has to finish: a repository that hangs must not keep it from starting."""
NOT_PLACED = "not_placed"
"""Reason of a removal that nobody asked for: something else took the place of an added version."""
_ALL = "*"
"""What work on the whole staging folder is known by; no version has such a name."""


@dataclass(frozen=True, slots=True)
class UploadOrder:
    """One upload, as its request describes it.

    Attributes:
        form: of the body.
        expected: digests that the body must have.
        length: of the body in bytes, if it is known.
        only_new: whether the request is for a version that is not there (`If-None-Match: *`).
    """

    model_id: str
    version: int
    actor: str
    form: UploadForm = UploadForm.FILE
    expected: ExpectedDigests = NO_DIGESTS
    length: int | None = None
    only_new: bool = False


class Uploads:
    """Puts versions into the repository, and removes them.

    Args:
        repository: the models.
        policy: what is taken.
        owner: names the part of the staging folder of a server without nodes.
        log: the ledger.
        submit: records a command.
        find_event: returns the event with an id, if the ledger as it was last read has it.
        node_id: of this node; None without nodes.
    """

    def __init__(
        self,
        repository: Repository,
        policy: UploadPolicy,
        owner: str,
        *,
        log: Log,
        submit: Callable[[Command], Awaitable[Receipt]],
        find_event: Callable[[str], Awaitable[Event | None]],
        node_id: str | None = None,
    ) -> None:
        self._repository = repository
        self._policy = policy
        self._owner, self._node_id = owner, node_id
        self._log, self._submit, self._find_event = log, submit, find_event
        self._file_system = FileSystemPool(MAX_THREADS)
        self._changing = dict[tuple[str, int], str]()
        self._recovering = asyncio.Lock()
        self._finishing = set[asyncio.Task[None]]()
        self._is_recovered = False
        self._unknown = dict[str, int]()
        self._following: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Finish what has its event, and discard the rest; a repository that hangs is left for later."""
        await self._try_to_recover()
        self._following = asyncio.create_task(self._follow(), name="uploads")

    async def _follow(self) -> None:
        """Finish changes whose outcome was unknown, and those of nodes that ended, once the log tells."""
        nodes = self._log.state.nodes
        with self._log.subscribed() as wakeup:
            while await wakeup.wait():
                wakeup.clear()
                if self._unknown or self._log.state.nodes is not nodes:
                    nodes, self._is_recovered = self._log.state.nodes, False
                    await self._try_to_recover()

    async def _try_to_recover(self) -> None:
        try:
            await self._recover()
        except (RuntimeProblem, LedgerProblem, OSError) as problem:
            self._is_recovered = False
            _log.warning("changes of the repository that had not ended cannot be finished yet: %s", problem)

    async def close(self) -> None:
        """Wait for changes whose event is on its way."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.wait([self._following])
        if self._finishing:
            _, hanging = await asyncio.wait(self._finishing, timeout=START_LIMIT_S)
            for task in hanging:  # the next start finishes them
                task.cancel()

    async def add(self, order: UploadOrder, body: AsyncIterator[bytes]) -> tuple[AddedFile, ...]:
        """Add a version, and return its files.

        Raises:
            RuntimeProblem: `repository_read_only`, `version_exists`, `body_too_large`, `bad_archive`,
                `not_onnx`, `unsafe_file`, `invalid_model`, `digest_mismatch`, `insufficient_storage`,
                `repository_unreadable`, `repository_busy`.
            LogUnavailable: `log_unavailable`; if that is unknown, it may become visible later.
        """
        try:
            return await self._add(order, body)
        except VersionExists as exists:
            if not order.only_new:
                raise
            raise VersionNotNew(str(exists)) from None

    async def _add(self, order: UploadOrder, body: AsyncIterator[bytes]) -> tuple[AddedFile, ...]:
        change = self._begin(order.model_id, order.version)
        try:
            await self._prepare()
            files = await self._receive(order, body, change)
        except BaseException:
            await self._abandon(change)
            self._end(change)
            raise
        await self._finish(change, self._make_visible(order, files, change))
        return files

    async def remove(self, model_id: str, version: int, actor: str) -> None:
        """Remove a version that no load uses.

        Raises:
            RuntimeProblem: `repository_read_only`, `unknown_version`, `version_in_use`, `version_exists` (it
                is just being changed), `repository_unreadable`, `repository_busy`.
            RequestRefused: `version_in_use`, a load came first.
            LogUnavailable: `log_unavailable`; if that is unknown, it may be removed later.
        """
        change = self._begin(model_id, version)
        try:
            await self._prepare()
            self._check_unused(model_id, version)
            await change.run(partial(change.staging.begin_removal, *change.entry))
        except BaseException:
            await self._abandon(change)
            self._end(change)
            raise
        await self._finish(change, self._make_invisible(actor, change))

    def _begin(self, model_id: str, version: int) -> _Change:
        """Begin a change of a version, one at a time.

        Raises:
            VersionExists: `version_exists`.
            EpochOver: `log_unavailable`.
        """
        if (model_id, version) in self._changing:
            raise VersionExists(model_id, version, is_changing=True)
        change = self._change(uuid7(), model_id, version)
        self._changing[model_id, version] = change.event_id
        return change

    def _change(self, event_id: str, model_id: str, version: int) -> _Change:
        return _Change(self._file_system, self._part(), event_id, model_id, version)

    def _part(self) -> tuple[Staging, tuple[NodeCurrent, ...]]:
        """Return this server's part of the staging folder, and what has to hold for a change there.

        Raises:
            EpochOver: `log_unavailable`.
        """
        if self._node_id is None:
            return Staging(self._repository, self._owner), ()
        node = self._log.state.nodes.get(self._node_id)
        if node is None or not node.is_present:
            raise EpochOver
        return Staging(self._repository, epoch_folder(node)), (NodeCurrent(node.id, node.epoch),)

    def _end(self, change: _Change) -> None:
        del self._changing[change.model_id, change.version]

    async def _abandon(self, change: _Change) -> None:
        await change.abandon(partial(change.staging.discard, change.event_id))

    async def _prepare(self) -> None:
        """Check that the repository may be changed, and finish what a start could not.

        Raises:
            RepositoryReadOnly: `repository_read_only`.
        """
        await self._run(partial(check_writable, self._repository.root, self._policy))
        if not self._is_recovered:
            await self._recover()

    def _check_unused(self, model_id: str, version: int) -> None:
        use = find_use(self._log.state, model_id, version)
        if use is not None:
            raise VersionInUse(f"version {version} of model {model_id!r} {use}")

    async def _receive(
        self, order: UploadOrder, body: AsyncIterator[bytes], change: _Change
    ) -> tuple[AddedFile, ...]:
        """Write the body into the staging folder, up to the moment before its event."""
        await change.run(
            partial(check_room, self._repository.root, order.length or 0, self._policy.max_bytes)
        )
        folder = await change.run(partial(change.staging.begin_addition, *change.entry))
        receiver = Receiver(folder, order.form, self._policy.max_bytes, order.expected)
        change.on_abandon = receiver.close
        async for piece in body:
            await change.run(partial(receiver.write, piece))
        files = await change.run(receiver.finish)
        await change.run(partial(change.staging.sync, change.event_id))
        await change.run(partial(change.staging.check_free, change.model_id, change.version))
        return files

    async def _make_visible(self, order: UploadOrder, files: tuple[AddedFile, ...], change: _Change) -> None:
        await self._record(
            AddVersion(
                change.model_id, change.version, order.actor, files, change.event_id, change.conditions
            ),
            change,
        )
        try:
            await change.run(partial(change.staging.place, *change.entry))
        except VersionExists:
            await self._give_up(change)
            raise
        except BaseException:
            self._is_recovered = False  # the next change, or the next start, finishes this one
            raise

    async def _make_invisible(self, actor: str, change: _Change) -> None:
        command = RemoveVersion(change.model_id, change.version, actor, change.event_id, change.conditions)
        await self._record(command, change)  # from here on, no load finds the files
        try:
            await change.run(partial(change.staging.take, *change.entry))
        except BaseException:
            self._is_recovered = False
            raise
        await change.run(partial(change.staging.discard, change.event_id))

    async def _record(self, command: AddVersion | RemoveVersion, change: _Change) -> None:
        """Submit a command; one that was not recorded leaves nothing.

        If that is unknown, its entry stays until the log has another event, and so this one or never.
        """
        try:
            await self._submit(command)
        except (OutcomeUnknown, LogClosed):
            self._unknown[change.event_id] = self._log.state.position
            raise
        except RequestRefused as refused:
            await self._abandon(change)
            raise (EpochOver() if refused.code == OUTDATED else refused) from None
        except BaseException:
            await self._abandon(change)
            raise

    async def _finish(self, change: _Change, work: Coroutine[Any, Any, None]) -> None:
        """Await what must not stop half-way, whatever becomes of the request."""
        task = asyncio.create_task(work)
        self._finishing.add(task)

        def note_end(task: asyncio.Task[None]) -> None:
            self._finishing.discard(task)
            self._end(change)
            if not task.cancelled() and task.exception() is not None:
                _log.info("a change of the repository was not made: %s", task.exception())

        task.add_done_callback(note_end)
        await asyncio.shield(task)

    async def _recover(self) -> None:
        """Finish changes whose event is durable, and discard the others, of servers that ended."""
        async with self._recovering:
            if self._is_recovered:
                return
            staging, _ = self._part()
            self._is_recovered = True
            await self._run(partial(staging.adopt, self._log.state.nodes))
            for event_id in await self._run(staging.entries):
                if event_id in self._changing.values():
                    continue
                try:
                    await self._recover_one(event_id, staging)
                except (RuntimeProblem, LedgerProblem, OSError) as problem:
                    self._is_recovered = False  # tried again by the next change, which it does not prevent
                    _log.warning("change %s of the repository cannot be finished yet: %s", event_id, problem)

    async def _recover_one(self, event_id: str, staging: Staging) -> None:
        is_final = self._log.state.position > self._unknown.get(event_id, -1)
        event = await self._find_event(event_id)
        if event is None and not is_final:
            return
        self._unknown.pop(event_id, None)
        if event is None or event.model_id is None or event.version is None:
            await self._run(partial(staging.discard, event_id))
            return
        change = self._change(event_id, event.model_id, event.version)
        if isinstance(event.data, VersionAdded):
            try:
                await self._run(partial(staging.place, *change.entry))
            except VersionExists:
                await self._give_up(change)
        elif isinstance(event.data, VersionRemoved):
            await self._run(partial(staging.take, *change.entry))
            await self._run(partial(staging.discard, event_id))
        _log.info("%s was finished: version %d of %s", event.type, change.version, change.model_id)

    async def _give_up(self, change: _Change) -> None:
        """Record that an added version never became visible; its files go first, so that it never will."""
        await change.run(partial(change.staging.discard, change.event_id))
        draft = Draft(
            uuid7(), VersionRemoved(NOT_PLACED), SYSTEM, model_id=change.model_id, version=change.version
        )
        await self._submit(Record((draft,)))

    async def _run(self, work: Callable[[], T]) -> T:
        return await self._file_system.run(_ALL, work, START_LIMIT_S)


class _Change:
    """The work in threads of one change: a step at a time, and a clean-up that waits for a step that hangs.

    Attributes:
        staging: where its entry is.
        event_id: of the event that the change will have.
        conditions: of that event: the epoch in which the change began goes on.
        on_abandon: called before the clean-up.
    """

    def __init__(
        self,
        file_system: FileSystemPool,
        part: tuple[Staging, tuple[NodeCurrent, ...]],
        event_id: str,
        model_id: str,
        version: int,
    ) -> None:
        self.staging, self.conditions = part
        self.event_id, self.model_id, self.version = event_id, model_id, version
        self._file_system = file_system
        self._key = f"{model_id}/{version}"
        self._lock = threading.Lock()
        self._is_abandoned = False
        self.on_abandon: Callable[[], None] = lambda: None

    @property
    def entry(self) -> tuple[str, str, int]:
        """The arguments that name its entry of the staging folder."""
        return self.event_id, self.model_id, self.version

    async def run(self, work: Callable[[], T]) -> T:
        """Return what a step returns.

        Raises:
            RepositoryBusy: `repository_busy`, it did not end in time; it goes on without effect.
            RuntimeProblem: of the step; errors of the file system are made into one.
        """

        def step() -> T:
            with self._lock:
                if self._is_abandoned:
                    raise RepositoryReadOnly("the change was given up")
                try:
                    return work()
                except OSError as error:
                    raise unwritable(error) from None

        return await self._file_system.run(self._key, step, PIECE_LIMIT_S)

    async def abandon(self, clean_up: Callable[[], None]) -> None:
        """Clean up when no step runs any more, and wait for that unless it hangs."""

        def work() -> None:
            with self._lock:
                self._is_abandoned = True
                self.on_abandon()
                with suppress(OSError):  # the next start discards it
                    clean_up()

        answer, call = make_call(work, lambda: None)
        threading.Thread(target=call, name="upload", daemon=True).start()
        with suppress(TimeoutError):
            async with timeout(START_LIMIT_S):
                await asyncio.shield(answer)
