"""The way of one source: the meaning of its name, the files of its version, and their download."""

from __future__ import annotations

import base64
import json
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from loadledger.errors import SourceProblem
from loadledger.sources.downloads import Downloads, unwritable
from loadledger.sources.names import SourceName, parse_digest, parse_source
from loadledger.sources.origin import Origin, RemoteFile
from loadledger.uploads import LocalVersion, VersionFile, VersionSource
from runtime.onnxfields import TooManyFields, Unparsable
from runtime.onnxfile import SIGNATURE_SUFFIX, describe_foreign_file, external_locations, find_model_file

MAX_SIGNATURE_BYTES = 8 * 2**20
"""A signature lists a version's files, at most 10,000, each with its digest."""

Progress = Callable[[int, int | None], None]
"""Called with the local bytes, and the bytes of all files; None while a length is unknown."""


@dataclass(frozen=True, slots=True)
class NamedVersion:
    """A version by name, before its files are downloaded: see `resolve_source`.

    Attributes:
        source: its name, as given.
        resolved: a name for the same bytes for ever; None if only the bytes identify them.
    """

    source: SourceName
    resolved: str | None
    files: tuple[RemoteFile, ...]
    origin: Origin


def resolve_source(name: str, digest: str | None = None) -> NamedVersion:
    """Return the present meaning of a name.

    Args:
        name: as `loadledger.sources.names` describes them.
        digest: `sha256:` and the digits of its file, or of a registry's manifest.

    Raises:
        SourceProblem: with its code.
    """
    source, sha256 = parse_source(name), parse_digest(digest)
    origin = _open_origin(source, sha256)
    resolved = origin.resolve()
    return NamedVersion(source, resolved.name, resolved.files, origin)


def _open_origin(source: SourceName, sha256: str | None) -> Origin:
    match source.scheme:  # imported on use: some are extras
        case "https":
            from loadledger.sources.web import Https

            return Https(source, sha256)
        case "hf":
            from loadledger.sources.huggingface import HuggingFace

            return HuggingFace(source, sha256)
        case "oci":
            from loadledger.sources.oci import Oci

            return Oci(source, sha256)
    from loadledger.sources.cloud import Cloud

    return Cloud(source, sha256)


def fetch_version(
    named: NamedVersion, downloads: Downloads, on_progress: Progress = lambda _, __: None
) -> LocalVersion:
    """Fetch the files that a version must have, then those that its model and its signatures name.

    Raises:
        SourceProblem: with its code; parts of files stay for a later attempt.
    """
    files = dict[str, VersionFile]()
    done = set[RemoteFile]()
    here, total = 0, _sum(each.bytes for each in named.files if each.is_needed)

    def count(more: int) -> None:
        nonlocal here
        here += more
        on_progress(here, total)

    def note_length(length: int) -> None:
        nonlocal total
        total = length if len(named.files) == 1 else total

    downloads.on_bytes, downloads.on_length = count, note_length
    wanted = [file for file in named.files if file.is_needed]
    while wanted:
        for file in wanted:
            files |= _fetch_file(named.origin, file, downloads)
        done.update(wanted)
        also = _find_named(files)
        wanted = [file for file in named.files if file not in done and file.path in also]
        total = _sum([total, *(file.bytes for file in wanted)])
    try:
        model = _check_model(named.source.name, files)
    except SourceProblem:  # the same bytes would be refused again
        downloads.discard()
        raise
    resolved = named.resolved or f"{named.source.name}#sha256={files[model].sha256}"
    in_order = sorted(files.values(), key=lambda file: (file.path != model, file.path))
    provenance = {"source": named.source.name, "resolved": resolved}
    return LocalVersion(VersionSource(tuple(in_order)), provenance, downloads.discard)


def _fetch_file(origin: Origin, file: RemoteFile, downloads: Downloads) -> dict[str, VersionFile]:
    """Return the files of the version in one of the source's: several if it is an archive."""
    download = origin.fetch(file, downloads)
    if not file.is_archive:
        return {_version_path(file.path): _describe(file.path, download.path, download.sha256)}
    from loadledger.sources.unpack import unpack

    folder = downloads.new_folder(download.path)
    try:
        paths = unpack(download.path, folder)
    except OSError as error:
        raise unwritable(error, folder) from None
    return {_version_path(path): _describe(path, folder / path) for path in paths}


def _describe(path: str, where: Path, sha256: str | None = None) -> VersionFile:
    return VersionFile(path, where, where.stat().st_size, sha256)


def _version_path(path: str) -> str:
    """Return a path in a version; refuse an invalid one."""
    from runtime.errors import RuntimeProblem
    from runtime.uploads.receive import check_path  # takes 60 ms, which `serve` saves

    try:
        return check_path(path)
    except RuntimeProblem as problem:
        raise SourceProblem(
            "source_invalid", f"the source has a file that no version can: {problem}"
        ) from None


def _sum(lengths: Iterable[int | None]) -> int | None:
    found = list(lengths)
    return None if None in found else sum(filter(None, found))


def _find_named(files: Mapping[str, VersionFile]) -> frozenset[str]:
    """Return the paths that the model names for its weights, and the paths in its signatures."""
    found = set(_weights_of(files))
    for path, file in files.items():
        if path.endswith(SIGNATURE_SUFFIX):
            with file.source.open("rb") as signature:
                found.update(list_signed_files(signature.read(MAX_SIGNATURE_BYTES)))
    return frozenset(found)


def _weights_of(files: Mapping[str, VersionFile]) -> Iterator[str]:
    model = find_model_file(files)
    if model is not None:
        with suppress(Unparsable, TooManyFields):  # the check of the whole version reports the problem
            yield from map(posixpath.normpath, external_locations(files[model].source))


def _check_model(source: str, files: Mapping[str, VersionFile]) -> str:
    """Return the model file; refuse models that a server would refuse after the upload."""
    model = find_model_file(files)
    if model is None:
        shown = ", ".join(sorted(map(ascii, files))[:4]) or "none"
        raise SourceProblem(
            "source_invalid", f"{source} has no model.onnx, and not one .onnx file: its files are {shown}"
        )
    foreign = describe_foreign_file(files[model].source)
    if foreign is not None:
        raise SourceProblem("source_invalid", f"{model!a} of {source} {foreign}")
    missing = next((path for path in _weights_of(files) if path not in files), None)
    if missing is not None:
        raise SourceProblem(
            "source_invalid", f"{model!a} of {source} keeps weights in {missing!a}, which the source has not"
        )
    return model


def list_signed_files(signature: bytes) -> Iterator[str]:
    """Yield the files that a signature lists, in Sigstore's format: a statement of OpenSSF Model Signing.

    Its payload is an in-toto statement in DSSE; version 1.0 of model signing has the files in
    `predicate.resources`. Other signatures list none.
    """
    with suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError):
        payload = json.loads(signature)["dsseEnvelope"]["payload"]
        for resource in json.loads(base64.b64decode(payload))["predicate"]["resources"]:
            yield posixpath.normpath(resource["name"])
