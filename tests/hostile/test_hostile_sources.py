"""Hostile servers as sources of versions: each download fails, and leaves nothing that grows.

Hostile archives and redirects are in tests/loadledger/sources/.
"""

import asyncio
import gzip
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from support import models
from support.origins import HANG, Asked, answer, serving_site, write_authority

from loadledger.errors import SourceProblem
from loadledger.sources import downloads, web
from loadledger.sources.downloads import Downloads
from loadledger.sources.fetch import fetch_version, resolve_source

MODEL = models.add(1).SerializeToString()
LOGIN = {"auth": "dXNlcjpodW50ZXIy"}  # of user, hunter2
ROOM_BYTES = 2**25
"""On the disk, above its reserve."""


class Usage(NamedTuple):
    """Of a disk, as `shutil.disk_usage` returns it."""

    free: int


def small_disk(folder: Path) -> Usage:
    """Return what is free of a disk that has only this folder."""
    used = sum(path.stat().st_size for path in folder.glob("*"))
    return Usage(downloads.RESERVE_BYTES + ROOM_BYTES - used)


MANIFEST = "application/vnd.oci.image.manifest.v1+json"
Reply = Callable[[Asked], bytes]


def artifact(size: int) -> Reply:
    """Return a registry with one artifact, whose manifest says that the model has this size."""
    digest = f"sha256:{hashlib.sha256(MODEL).hexdigest()}"
    layer = {"mediaType": "application/octet-stream", "digest": digest, "size": size}
    manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "layers": [layer]}
    return lambda asked: answer(200, json.dumps(manifest).encode() if "/manifests/" in asked.path else MODEL)


def to_itself(asked: Asked) -> bytes:
    return answer(302, location=f"https://{asked.headers['host']}{asked.path}/again")


def asking(realm: str) -> Reply:
    """Return a registry that wants the password at another address."""
    return lambda _: answer(401, www_authenticate=f'Bearer realm="{realm}",service="s"')


ATTACKS: dict[str, tuple[str, Reply, str]] = {
    # what: scheme, reply, code
    "endless body": ("https", lambda _: answer(200, bytes(4 * ROOM_BYTES), content_length=None), "no_space"),
    "body of 9 EB": ("https", lambda _: answer(200, MODEL, content_length=2**63 - 1), "source_unreachable"),
    "slow body": ("https", lambda _: answer(200, MODEL[:9], content_length=99) + HANG, "source_unreachable"),
    "no answer": ("https", lambda _: HANG, "source_unreachable"),
    "other coding": (
        "https", lambda _: answer(200, gzip.compress(bytes(2**26)), content_encoding="gzip"), "source_invalid"
    ),
    "endless head": ("https", lambda _: b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 2**20, "source_invalid"),
    "no HTTP": ("https", lambda _: bytes(2**20), "source_invalid"),
    "redirects without end": ("https", to_itself, "source_invalid"),
    "endless manifest": ("oci", lambda _: answer(200, b"[" * 2**25, content_length=None), "source_invalid"),
    "realm elsewhere": ("oci", asking("https://collector.example/token"), "source_denied"),
    "realm without TLS": ("oci", asking("http://localhost/token"), "source_denied"),
    "blob above its size": ("oci", artifact(9), "source_invalid"),
    "blob below its size": ("oci", artifact(2**40), "digest_mismatch"),
}  # fmt: skip


@pytest.mark.parametrize("what", ATTACKS)
async def test_hostile_source_fails_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    scheme, reply, code = ATTACKS[what]
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setenv("SSL_CERT_FILE", write_authority(tmp_path))
    if what in {"slow body", "no answer"}:
        monkeypatch.setattr(web, "TIMEOUT_S", 1.0)
    monkeypatch.setattr(downloads, "DELAYS_S", (0.001,))
    monkeypatch.setattr(shutil, "disk_usage", small_disk)
    async with serving_site(reply) as site:
        (tmp_path / "config.json").write_text(json.dumps({"auths": {site.host: LOGIN}}), encoding="utf-8")

        def fetch() -> int:
            folder = tmp_path / "downloads"
            with pytest.raises(SourceProblem) as failed, Downloads(folder) as arriving:
                fetch_version(resolve_source(f"{scheme}://{site.host}/m"), arriving)
            assert failed.value.code == code, failed.value
            assert "hunter2" not in str(failed.value)
            return sum(path.stat().st_size for path in folder.glob("*"))

        assert await asyncio.to_thread(fetch) <= len(MODEL)
        is_sent = [each for each in site.asked if "authorization" in each.headers]
    assert not is_sent
