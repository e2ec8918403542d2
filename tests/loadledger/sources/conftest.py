"""Sources on loopback, whose authority is trusted, and a cache of the test's own."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from support.origins import write_authority

from loadledger.sources import downloads
from loadledger.sources.downloads import Downloads
from loadledger.sources.fetch import fetch_version, resolve_source

Fetched = tuple[str, dict[str, bytes]]
Fetch = Callable[..., Awaitable[Fetched]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SSL_CERT_FILE", write_authority(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(downloads, "DELAYS_S", (0.001, 0.001))
    return tmp_path / "cache/loadledger"


@pytest.fixture
def fetch() -> Fetch:
    """Return what fetches a source, and returns what it meant, and its files; its downloads are discarded."""

    def work(source: str, digest: str | None) -> Fetched:
        with Downloads() as arriving:
            found = fetch_version(resolve_source(source, digest), arriving)
            files = {file.path: file.source.read_bytes() for file in found.files.files}
            found.discard()
        assert found.provenance is not None
        return found.provenance["resolved"], files

    return lambda source, digest=None: asyncio.to_thread(work, source, digest)
