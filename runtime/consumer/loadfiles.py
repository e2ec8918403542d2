"""The files of one load: obtained, hashed and settled in threads, which end with the load.

A thread cannot be cancelled: it sees between two pieces that nobody needs its result. Whatever it still has
then is given back when it ends, so that nothing stays in the store for a load that is over.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar, TypeVarTuple

from events.types import LoadedFile
from runtime.contents import Contents, ModelContents, VersionFiles
from runtime.errors import UnknownModel, UnknownVersion
from runtime.lookups import LOAD_LIMIT_S

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class LoadFiles:
    """The files of one load.

    Attributes:
        found: the files, once they are obtained.
    """

    def __init__(self, contents: ModelContents, model_id: str, version: int) -> None:
        self.found: VersionFiles | None = None
        self._contents = contents
        self._model_id, self._version = model_id, version
        self._cancelled = threading.Event()
        self._working = set[asyncio.Future[Any]]()
        self._closed = False

    @property
    def version_files(self) -> VersionFiles:
        """The obtained files.

        Raises:
            RuntimeError: they have not been obtained.
        """
        if self.found is None:
            raise RuntimeError(f"the files of {self._model_id!r} have not been obtained")
        return self.found

    async def obtain(self, expected: Sequence[LoadedFile] | None) -> VersionFiles:
        """Obtain the files, once; for arguments and errors see `ModelContents.obtain`."""
        if expected is not None and self.found is None and self._contents.store is not None:
            await self._run(self._find, expected)  # whatever the repository is like
        if self.found is None:
            await self._check_answers()
            await self._run(self._obtain, expected)
        return self.version_files

    async def hash(self) -> Contents:
        """Hash the files unless their hashes are known; for errors see `ModelContents.hash`."""
        files = self.version_files
        if files.sha256s is None:
            await self._run(self._contents.hash, files, self._cancelled.is_set)
        return files.contents or ()

    async def settle(self) -> VersionFiles:
        """Keep the hashed files for later loads; for errors see `ModelContents.settle`."""
        files = self.version_files
        if files.copy is not None or not files.is_stored:
            await self._run(self._contents.settle, files)
        return files

    async def make_durable(self) -> None:
        """Sync the settled files to the disk; for errors see `ModelContents.make_durable`."""
        await self._run(self._contents.make_durable, self.version_files)

    def cancel(self) -> None:
        """Let the threads end."""
        self._cancelled.set()

    def close(self) -> None:
        """Give the files back, as soon as no thread works on them."""
        self.cancel()
        self._closed = True
        self._release_if_idle()

    async def _check_answers(self) -> None:
        """Look at the version in the repository, since that has a limit where a file system hangs.

        Raises:
            RepositoryBusy: `repository_busy`.
        """
        repository = self._contents.repository
        look = partial(repository.resolve, self._model_id, self._version)
        with suppress(UnknownModel, UnknownVersion):  # which `obtain` explains
            await repository.lookups.run(self._model_id, look, LOAD_LIMIT_S)

    def _find(self, expected: Sequence[LoadedFile]) -> None:
        self.found = self._contents.find(self._model_id, self._version, expected)

    def _obtain(self, expected: Sequence[LoadedFile] | None) -> None:
        self.found = self._contents.obtain(self._model_id, self._version, expected, self._cancelled.is_set)

    async def _run(self, work: Callable[[*Ts], T], *args: *Ts) -> T:
        """Call a function in a daemon thread: no stop of the process waits for a file system that hangs."""
        loop = asyncio.get_running_loop()
        working: asyncio.Future[T] = loop.create_future()

        def settle(set_result: Callable[[Any], None], value: Any) -> None:
            if not working.done():
                set_result(value)

        def job() -> None:
            try:
                result: tuple[Callable[[Any], None], Any] = (working.set_result, work(*args))
            except BaseException as error:  # noqa: BLE001 - raised where it is awaited
                result = (working.set_exception, error)
            with suppress(RuntimeError):  # the loop is closed: the server has stopped
                loop.call_soon_threadsafe(settle, *result)

        threading.Thread(target=job, name="files of a load", daemon=True).start()
        self._working.add(working)
        working.add_done_callback(self._on_done)
        return await asyncio.shield(working)

    def _on_done(self, working: asyncio.Future[Any]) -> None:
        self._working.discard(working)
        if not working.cancelled():
            working.exception()  # retrieved: who asked may have gone
        self._release_if_idle()

    def _release_if_idle(self) -> None:
        if self._closed and not self._working and self.found is not None:
            found, self.found = self.found, None
            threading.Thread(target=self._contents.release, args=(found,), name="files of a load").start()
