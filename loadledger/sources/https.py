"""One file at a URL of https, whose bytes are unknown beforehand."""

from __future__ import annotations

from loadledger.sources.downloads import Download, Downloads
from loadledger.sources.names import SourceName
from loadledger.sources.origin import RemoteFile, Resolved
from loadledger.sources.web import Web
from runtime.onnxfile import MODEL_FILE


class Https:
    """The model at a URL; see `loadledger.sources.origin.Origin`."""

    def __init__(self, source: SourceName, digest: str | None) -> None:
        self._url, self._digest = source.name, digest
        self._web = Web("https sources are read without credentials; use one that has them, as oci or s3")

    def resolve(self) -> Resolved:
        name = f"{self._url}#sha256={self._digest}" if self._digest else None
        return Resolved(name, (RemoteFile(MODEL_FILE, sha256=self._digest),))

    def fetch(self, file: RemoteFile, downloads: Downloads) -> Download:
        identity = file.sha256 and f"sha256:{file.sha256}"
        return downloads.receive(identity, self._web.file_opener(self._url), sha256=file.sha256)
