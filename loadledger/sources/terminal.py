"""Files for commands: found or downloaded, with a progress bar, then sent or written."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from answers.versions import AddedFileInfo, AddedVersionInfo
from loadledger.cli import output
from loadledger.cli.output import format_cell, format_size, to_printable
from loadledger.sources.downloads import Downloads
from loadledger.sources.fetch import NamedVersion, fetch_version, resolve_source
from loadledger.uploads import LocalVersion, find_version_files


@contextmanager
def find_or_download(
    model: str, source: Path | str, digest: str | None = None, signature: Path | None = None
) -> Iterator[LocalVersion]:
    """Yield the files of a version, which do not change until the block ends.

    Raises:
        SourceProblem: the source cannot be fetched.
        ValueError: there is no model, or several; or a file has changed.
    """
    try:
        if isinstance(source, Path):
            found = find_version_files(source, signature)
            if found.left_out:
                output.print_note(f"left out, as other models: {', '.join(map(format_cell, found.left_out))}")
            yield LocalVersion(found)
            return
        with Downloads() as downloads:
            yield download_version(model, resolve_source(source, digest), downloads)
    except OSError as error:
        output.exit_with_error(f"{error.filename or source} cannot be read: {error.strerror}")


def download_version(model: str, named: NamedVersion, downloads: Downloads) -> LocalVersion:
    """Download a version; return its files."""
    with display_transfer(f"{to_printable(model)}: downloading") as show:
        return fetch_version(named, downloads, show or (lambda *_: None))


def send_version(client: Any, local: LocalVersion, model: str, version: int | None) -> AddedVersionInfo:
    """Send files to the server, and return the version that it added."""
    print_upload_size(client.url, local.files.bytes)
    with display_transfer(f"{to_printable(model)}: sending") as show:
        added: AddedVersionInfo = client.add_files(
            model, local.files, version, provenance=local.provenance, on_progress=show
        )
    local.discard()
    return added


def print_upload_size(url: str, size: int) -> None:
    """Print the number of bytes to send, if the server is on another machine."""
    if not _is_local(url):
        output.print_note(f"sending {format_size(size)} to {to_printable(url)}")


def _is_local(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def added_lines(
    added: AddedVersionInfo, local: LocalVersion, repository: Path | None = None
) -> Iterator[str]:
    """Yield lines about a version that was added to a server, or to a repository's folder."""
    files: Sequence[AddedFileInfo] = added.files
    what = f"{output.count_of(len(files), 'file')}, {sum(file.bytes for file in files)} bytes"
    yield f"{to_printable(added.model_id)} version {added.version}: added, {what}"
    if local.provenance is not None:
        yield f"  from {to_printable(local.provenance['resolved'])}"
    for file in files:
        yield f"  {format_cell(file.path)}: {file.bytes} bytes, sha256 {format_cell(file.sha256)}"
    if repository is not None:
        yield f"written to {to_printable(str(repository / added.model_id / str(added.version)))}"
        yield "no ledger has a VersionAdded of it: the first load records its files"


@contextmanager
def display_transfer(about: str) -> Iterator[Callable[[int, int | None], None] | None]:
    """Yield the callback of a progress bar, or None without a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console  # takes 50 ms, and only on terminals
    from rich.markup import escape
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(escape(about), total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
