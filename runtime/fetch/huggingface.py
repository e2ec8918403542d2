"""Repositories of Hugging Face, by the Hub's public API.

`/api/models/{repository}/revision/{revision}` names a commit, `/api/models/{repository}/tree/{commit}` its
files in pages, with the SHA-256 of those that Git LFS or Xet keeps; `/{repository}/resolve/{commit}/{file}`
leads to a file. The version's folder is that of the model file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote, unquote, urlsplit

import msgspec
from msgspec import Struct

from runtime.fetch.messages import Order, RemoteFile, Resolved
from runtime.fetch.origin import Download, SourceChanged, SourceInvalid, SourceNotFound
from runtime.fetch.sources import InvalidSource, SourceName, parse_allowed
from runtime.fetch.web import Web
from runtime.onnxfile import find_model_file, is_signature_beside, list_model_files

ENDPOINT = "https://huggingface.co"
PUBLIC_HOSTS = ("huggingface.co", "*.huggingface.co", "*.hf.co")
"""The Hub, and the content delivery networks to which it redirects."""
MODEL_FOLDERS = ("", "onnx/")
"""Where a repository has its ONNX files, as `loadledger.uploads` looks for them."""
MAX_PAGES, MAX_SHOWN = 20, 4
"""Of a listing, with 1,000 entries each, more than a version may have; and models that an error names."""
_PATH = re.compile(r"([A-Za-z0-9._-]+)(?:@([^/]+))?(?:/(.+))?")
_COMMIT, _SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")
_NEXT = re.compile(r'<([^<>]+)>\s*;\s*rel="next"')

T = TypeVar("T")


class _Revision(Struct):
    sha: str


class _LargeFile(Struct):
    oid: str


class _Entry(Struct):
    type: str
    path: str
    size: int = 0
    lfs: _LargeFile | None = None


class HuggingFace:
    """The files of one commit of a repository; see `runtime.fetch.origin.Origin`."""

    def __init__(self, source: SourceName, order: Order) -> None:
        match = _PATH.fullmatch(source.path)
        if match is None:
            raise InvalidSource(f"{source.name} is no repository: write hf://org/repo[@revision][/file.onnx]")
        self._repository = f"{source.host}/{match[1]}"
        self._revision, self._file = unquote(match[2] or "main"), unquote(match[3] or "")
        self._digest = order.digest
        self._endpoint = order.environment.get("HF_ENDPOINT", "").rstrip("/") or ENDPOINT
        named = () if self._endpoint == ENDPOINT else (urlsplit(self._endpoint).netloc,)
        hosts = parse_allowed(order.allowed).list_hosts(source, PUBLIC_HOSTS, named)
        token, credential = _read_token(order.environment)
        self._authorization = f"Bearer {token}" if token else None
        self.client = Web(hosts, order.environment.get("SSL_CERT_FILE"), credential=credential)
        self._downloads: list[tuple[str, bool]] = []

    async def resolve(self) -> Resolved:
        """Return the commit's files in the folder of its model file and beneath."""
        api = f"{self._endpoint}/api/models/{self._repository}"
        revision, _ = await self._get(f"{api}/revision/{quote(self._revision, safe='')}", _Revision)
        commit = revision.sha
        if not _COMMIT.fullmatch(commit):
            raise SourceInvalid(f"{self._endpoint} names no commit for {self._repository}")
        entries = await self._list(f"{api}/tree/{commit}?recursive=true")
        model = self._find_model(entries)
        folder = model[: model.rfind("/") + 1]
        files = tuple(
            self._describe(path.removeprefix(folder), entry, is_model=path == model)
            for path, entry in entries.items()
            if path.startswith(folder) and "/." not in f"/{path.removeprefix(folder)}"
        )
        base = f"{self._endpoint}/{self._repository}/resolve/{commit}/{quote(folder)}"
        self._downloads = [(base + quote(file.path), file.sha256 is not None) for file in files]
        file = f"/{quote(self._file)}" if self._file else ""
        return Resolved(f"hf://{self._repository}@{commit}{file}", files)

    def open(self, index: int, offset: int) -> AbstractAsyncContextManager[Download]:
        url, pinned = self._downloads[index]
        own = self._authorization
        return self.client.download(url, authorization=own, offset=offset, is_pinned=pinned)

    async def _get(self, url: str, kind: type[T]) -> tuple[T, Mapping[str, str]]:
        answer = await self.client.get(url, authorization=self._authorization)
        try:
            return msgspec.json.decode(answer.body, type=kind), answer.headers
        except msgspec.MsgspecError:
            raise SourceInvalid(f"the listing of {self._endpoint} is not what the Hub sends") from None

    async def _list(self, url: str) -> Mapping[str, _Entry]:
        """Return a commit's files by path."""
        entries = dict[str, _Entry]()
        for _ in range(MAX_PAGES):
            page, headers = await self._get(url, list[_Entry])
            entries |= {each.path: each for each in page if each.type == "file"}
            following = _NEXT.search(headers.get("Link", ""))
            if following is None:
                return entries
            url = following[1]
            if not url.startswith(f"{self._endpoint}/"):  # the token is sent there
                raise SourceInvalid(f"{self._endpoint} continues its listing at another address: name that")
        raise SourceInvalid(f"{self._repository} lists more than {MAX_PAGES} pages of files")

    def _find_model(self, paths: Mapping[str, _Entry]) -> str:
        if self._file in paths:
            return self._file
        if self._file:
            raise SourceNotFound(f"{self._repository} has no file {self._file!a} at {self._revision!a}")
        for folder in MODEL_FOLDERS:
            names = [path.removeprefix(folder) for path in paths if path.startswith(folder)]
            if model := find_model_file(names):
                return folder + model
            if several := list_model_files(names):
                shown = ", ".join(ascii(folder + each) for each in several[:MAX_SHOWN])
                raise SourceInvalid(
                    f"{self._repository} has {len(several)} models, {shown}: name one, as"
                    f" hf://{self._repository}/{quote(folder + several[0])}"
                )
        raise SourceInvalid(f"{self._repository} has no .onnx file in its root or onnx/: name one elsewhere")

    def _describe(self, path: str, entry: _Entry, *, is_model: bool) -> RemoteFile:
        sha256 = entry.lfs.oid if entry.lfs and _SHA256.fullmatch(entry.lfs.oid) else None
        if is_model and self._digest is not None:
            if sha256 not in (None, self._digest):
                raise SourceChanged(f"{path!a} has the SHA-256 {sha256}, and {self._digest} was given")
            sha256 = self._digest
        return RemoteFile(path, entry.size, sha256, is_needed=is_model or is_signature_beside(path))


def _read_token(environment: Mapping[str, str]) -> tuple[str, str]:
    """Return the token, or "", and what to say of it where it is refused."""
    token, name = environment.get("HF_TOKEN", ""), "HF_TOKEN"
    if not token:
        home = environment.get("HF_HOME") or f"{environment.get('HOME', '')}/.cache/huggingface"
        name = environment.get("HF_TOKEN_PATH") or f"{home}/token"
        with suppress(OSError, UnicodeDecodeError):
            token = Path(name).read_text("ascii")
    token = token.strip()
    if not token or not token.isascii() or not token.isprintable():
        return "", f"no token was sent; if the repository exists, set HF_TOKEN or write one to {name}"
    return token, f"check that the token of {name} may read the repository, and that it exists"
