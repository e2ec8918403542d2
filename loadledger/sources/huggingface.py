"""Repositories of Hugging Face, by its own library, with its token, cache and endpoint (`HF_…` variables).

The version's folder is that of the model file. The library keeps complete files in its cache, under their
commit; an interrupted download begins anew.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from loadledger.errors import SourceProblem
from loadledger.sources.downloads import Download, Downloads
from loadledger.sources.names import SourceName, invalid
from loadledger.sources.origin import RemoteFile, Resolved, quote_error
from loadledger.uploads import HUB_FOLDER
from runtime.onnxfile import find_model_file, is_signature_beside, list_model_files

try:
    import httpx2
    from huggingface_hub import HfApi, errors, hf_hub_download
    from tqdm.auto import tqdm
except ModuleNotFoundError:
    raise SourceProblem(
        "not_installed", "hf:// needs a package that is not installed: pip install 'loadledger[huggingface]'"
    ) from None

MODEL_FOLDERS = ("", f"{HUB_FOLDER}/")
"""The folders of a repository that may have ONNX files, as in `loadledger.uploads`."""
MAX_SHOWN = 4
"""Models that an error names."""
_PATH = re.compile(r"([A-Za-z0-9._-]+)(?:@([^/]+))?(?:/(.+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class HuggingFace:
    """The files of one commit of a repository; see `loadledger.sources.origin.Origin`."""

    def __init__(self, source: SourceName, digest: str | None) -> None:
        match = _PATH.fullmatch(source.path)
        if match is None:
            raise invalid(f"{source.name} is no repository: write hf://org/repo[@revision][/file.onnx]")
        self._repository = f"{source.host}/{match[1]}"
        self._revision, self._file = unquote(match[2] or "main"), unquote(match[3] or "")
        self._digest = digest
        self._endpoint = os.environ.get("HF_ENDPOINT") or None  # the library reads it only at its import
        self._commit = ""

    def resolve(self) -> Resolved:
        """Return the commit's files in the folder of its model file and beneath."""
        api = HfApi(endpoint=self._endpoint)
        with _translated_errors(self._repository):
            info = api.model_info(self._repository, revision=self._revision, files_metadata=True)
        commit = str(info.sha)
        if not _COMMIT.fullmatch(commit):
            raise SourceProblem("source_invalid", f"the hub names no commit for {self._repository}")
        self._commit = commit
        found = {each.rfilename: each for each in info.siblings or ()}
        model = self._find_model(found)
        folder = model[: model.rfind("/") + 1]
        files = tuple(
            self._describe(path.removeprefix(folder), path, entry, is_model=path == model)
            for path, entry in found.items()
            if path.startswith(folder) and "/." not in f"/{path.removeprefix(folder)}"
        )
        file = f"/{quote(self._file)}" if self._file else ""
        return Resolved(f"hf://{self._repository}@{commit}{file}", files)

    def fetch(self, file: RemoteFile, downloads: Downloads) -> Download:
        bars: list[tqdm[Any]] = []
        with _translated_errors(self._repository):
            path = hf_hub_download(
                self._repository,
                file.key,
                revision=self._commit,
                endpoint=self._endpoint,
                tqdm_class=_make_bar(downloads.on_bytes, bars),
            )
        if not bars:  # the file was in the cache
            downloads.on_bytes(Path(path).stat().st_size)
        return _check(Path(path), file)

    def _find_model(self, paths: Mapping[str, object]) -> str:
        if self._file in paths:
            return self._file
        if self._file:
            raise SourceProblem(
                "source_not_found", f"{self._repository} has no file {self._file!a} at {self._revision!a}"
            )
        for folder in MODEL_FOLDERS:
            names = [path.removeprefix(folder) for path in paths if path.startswith(folder)]
            if model := find_model_file(names):
                return folder + model
            if several := list_model_files(names):
                shown = ", ".join(ascii(folder + each) for each in several[:MAX_SHOWN])
                raise SourceProblem(
                    "source_invalid",
                    f"{self._repository} has {len(several)} models, {shown}: name one, as"
                    f" hf://{self._repository}/{quote(folder + several[0])}",
                )
        raise SourceProblem(
            "source_invalid", f"{self._repository} has no .onnx file in its root or onnx/: name one elsewhere"
        )

    def _describe(self, path: str, key: str, entry: Any, *, is_model: bool) -> RemoteFile:
        sha256 = entry.lfs.sha256 if entry.lfs else None
        if is_model and self._digest is not None:
            if sha256 not in (None, self._digest):
                raise SourceProblem(
                    "digest_mismatch", f"{path!a} has the SHA-256 {sha256}, and {self._digest} was given"
                )
            sha256 = self._digest
        is_needed = is_model or is_signature_beside(path)
        return RemoteFile(path, entry.size, sha256, is_needed=is_needed, key=key)


def _check(path: Path, file: RemoteFile) -> Download:
    """Check a file's SHA-256, which the library does not check."""
    with path.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if file.sha256 not in (None, found):
        raise SourceProblem(
            "digest_mismatch",
            f"{file.path!a} has the SHA-256 {found}, and not {file.sha256}: delete {path.resolve()}, which"
            " may be damaged, and add it again",
        )
    return Download(path, found)


def _make_bar(on_bytes: Callable[[int], None], bars: list[tqdm[Any]]) -> type[Any]:
    """Return a progress bar for the library that shows nothing, and reports received bytes."""

    class Bar(tqdm):  # type: ignore[type-arg]  # it is not generic when it runs
        def __init__(self, *arguments: Any, **options: Any) -> None:
            options = {name: value for name, value in options.items() if name != "name"}
            super().__init__(*arguments, **options | {"disable": True})
            bars.append(self)

        def update(self, n: float | None = 1) -> bool | None:
            on_bytes(int(n or 0))
            return None

    return Bar


@contextmanager
def _translated_errors(repository: str) -> Iterator[None]:
    """Raise the `SourceProblem` for an error of the library."""
    problem = partial(_problem, repository)
    try:
        yield
    except errors.GatedRepoError as error:
        raise problem("source_denied", "ask for access to it on its page", error) from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError) as error:
        if isinstance(error, errors.LocalEntryNotFoundError):  # neither in the cache nor reachable
            raise problem("source_unreachable", "try again", error) from None
        advice = "check the name; if it is private, set HF_TOKEN, or run `hf auth login`"
        raise problem("source_not_found", advice, error) from None
    except errors.HFValidationError as error:
        raise problem("invalid_source", "check the name", error) from None
    except ValueError as error:
        raise problem("source_invalid", "this is no hub: check HF_ENDPOINT", error) from None
    except (httpx2.HTTPError, OSError, errors.XetDownloadError) as error:
        raise problem("source_unreachable", "try again", error) from None


def _problem(repository: str, code: str, advice: str, error: Exception) -> SourceProblem:
    reason = quote_error(str(error)) or type(error).__name__
    return SourceProblem(code, f"{repository} cannot be fetched: {reason}: {advice}")
