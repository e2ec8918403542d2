"""Checks a load against its model's rules before it may start: its files are copied, hashed, then checked.

The load then takes exactly these files, by their hashes. `features.checks` decides; this reads files.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from events.jobs import Job
from events.types import Contents, LoadedFile
from features.checks import CheckedLoad, CheckedVersion, CheckInput, check_load, survey_version
from features.signatures.bundles import MAX_BYTES
from runtime.repository import REQUEST_LIMIT_S
from runtime.store.versions import Versions

MakeInput = Callable[[Contents, Callable[[str], bytes]], CheckInput]
"""Returns the input of a check of contents, with a function that reads one of the files."""


async def check_files(
    versions: Versions,
    job: Job,
    expected: Sequence[LoadedFile] | None,
    make_input: MakeInput,
) -> tuple[tuple[LoadedFile, ...], CheckedLoad]:
    """Copy and hash a version, and check it; returns its files and what they passed.

    `expected` are the files that a reload must have; None takes the present ones.

    Raises:
        NotLoadable: as `features.checks.check_load`.
        RuntimeProblem: as `Versions.version`.
        RuntimeError: there is no store, so files might change after the check; the server refuses to start.
    """
    if versions.store is None:
        raise RuntimeError("rules need a store")
    version, _ = job.load_order
    async with versions.version(job.model_id, version, expected) as held:
        contents = await held.hash()
        await held.settle()
        given = make_input(contents, partial(_read_bundle, held.folder))
        return held.loaded_files, await asyncio.to_thread(check_load, given, job)


async def check_version(
    versions: Versions,
    model_id: str,
    version: int | None,
    make_input: MakeInput,
) -> CheckedVersion:
    """Hash the files of a version, by default the highest, and check them against the rules; loads nothing.

    Raises:
        RuntimeProblem: as `Versions.version`.
    """
    find = partial(versions.repository.find_version, model_id, version)
    chosen = await versions.repository.file_system.run(model_id, find, REQUEST_LIMIT_S)
    async with versions.version(model_id, chosen) as held:
        contents = await held.hash()
        await held.settle()  # for those who name its digest, and for a load
        given = make_input(contents, partial(_read_bundle, held.folder))
        return await asyncio.to_thread(survey_version, given, chosen)


def _read_bundle(folder: Path, path: str) -> bytes:
    with (folder / path).open("rb") as file:  # of the store: nobody else writes there
        return file.read(MAX_BYTES + 1)
