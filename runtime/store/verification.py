"""Verification of a store: everything in it is hashed again, whatever its recorded identities say.

It only reads, so it may run beside the server; a version that is swept meanwhile is left out.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runtime.store.folder import FILES, StoreFolder, explain_os_errors, walk_files
from runtime.store.identities import hash_file
from runtime.store.manifest import MANIFEST, StoredManifest, read_version_manifest


@dataclass(frozen=True, slots=True)
class VerifiedVersion:
    """A version whose files were hashed; `findings` say what is wrong with it, one line each."""

    digest: str
    bytes: int
    findings: tuple[str, ...]


def verify_store(folder: Path) -> Iterator[VerifiedVersion]:
    """Hash all versions of a store and yield each; one whose manifest is still to be written is left out.

    Raises:
        StoreUnavailable: `store_unavailable`, the folder cannot be listed.
    """
    store = StoreFolder(folder)
    with explain_os_errors(folder):
        versions = store.versions()
    for path in versions:
        if not os.path.lexists(path / MANIFEST):
            continue
        manifest = read_version_manifest(path)
        findings = (
            ("its manifest is damaged",) if manifest is None else tuple(_verify(path / FILES, manifest))
        )
        if os.path.lexists(path):
            size = 0 if manifest is None else sum(file.bytes for file in manifest.files)
            yield VerifiedVersion(path.name, size, findings)


def _verify(folder: Path, manifest: StoredManifest) -> Iterator[str]:
    try:
        found = set(walk_files(folder)[0])
    except OSError as error:
        yield f"its files cannot be listed: {error.strerror}"
        return
    for file in manifest.files:
        if file.path not in found:
            yield f"{file.path!r} is missing"
            continue
        try:
            seen = hash_file(folder, file.path)
        except OSError as error:
            yield f"{file.path!r} cannot be read: {error.strerror}"
            continue
        if seen.sha256 != file.sha256:
            yield f"{file.path!r} has SHA-256 {seen.sha256} instead of {file.sha256}"
    for path in sorted(found - {file.path for file in manifest.files}):
        yield f"{path!r} is not of this version"
