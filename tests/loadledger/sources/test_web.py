"""Files of the web: redirects, credentials, connections that break, and downloads that go on."""

import asyncio
import sys
from hashlib import sha256
from pathlib import Path

import pytest
from support import models
from support.origins import HANG, Asked, RangedFile, answer, serving_site

from loadledger.errors import SourceProblem
from loadledger.sources import downloads as downloads_module
from loadledger.sources import web as web_module
from loadledger.sources.downloads import Downloads
from loadledger.sources.fetch import fetch_version, resolve_source
from loadledger.sources.web import Web
from loadledger.uploads import CHUNK_BYTES

from .conftest import Fetch

MODEL = models.slow_identity(side=1200).SerializeToString()
"""5.8 MB."""
SHA256 = sha256(MODEL).hexdigest()
PINNED = f"sha256:{SHA256}"
SECRET = "a-secret"


def open_files() -> list[str]:
    return [str(each.readlink()) for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]


def parts(cache: Path) -> list[Path]:
    return list(cache.iterdir())


async def test_file_is_known_by_its_digest_and_leaves_nothing(fetch: Fetch, cache: Path) -> None:
    async with serving_site(RangedFile(MODEL)) as site:
        for digest in (None, PINNED):
            assert await fetch(site.url(), digest) == (
                f"{site.url()}#sha256={SHA256}", {"model.onnx": MODEL}
            )  # fmt: skip
    assert not parts(cache)


@pytest.mark.parametrize("has_ranges", [True, False])
async def test_pinned_file_goes_on_where_a_connection_broke(fetch: Fetch, *, has_ranges: bool) -> None:
    file = RangedFile(MODEL, cuts=[100_000, 200_000], has_ranges=has_ranges)
    async with serving_site(file) as site:
        _, files = await fetch(site.url(), PINNED)
        asked = [each.headers.get("range") for each in site.asked]
    assert files == {"model.onnx": MODEL}
    assert asked == [None, "bytes=100000-", "bytes=300000-" if has_ranges else "bytes=200000-"]


async def test_other_file_begins_anew(fetch: Fetch, cache: Path) -> None:
    """Without its digest nobody knows whether the rest is of the same file."""
    async with serving_site(RangedFile(MODEL, cuts=[100_000])) as site:
        with pytest.raises(SourceProblem, match=r"sent 100000 of \d+ bytes \(source_unreachable\)"):
            await fetch(site.url())
        assert not parts(cache)
        assert (await fetch(site.url()))[1] == {"model.onnx": MODEL}


FETCH_UNTIL_KILLED = """
import os, sys
from loadledger.sources.downloads import Downloads
from loadledger.sources.fetch import fetch_version, resolve_source
def end(done, _):
    if done > 2_000_000:
        os._exit(9)
with Downloads() as arriving:
    fetch_version(resolve_source(*sys.argv[1:]), arriving, end)
"""


async def test_part_of_a_killed_command_is_gone_on_with(fetch: Fetch, cache: Path) -> None:
    async with serving_site(RangedFile(MODEL)) as site:
        command = (sys.executable, "-c", FETCH_UNTIL_KILLED, site.url(), PINNED)
        assert await (await asyncio.create_subprocess_exec(*command)).wait() == 9
        [part] = parts(cache)
        there = part.stat().st_size
        assert await fetch(site.url(), PINNED) == (f"{site.url()}#sha256={SHA256}", {"model.onnx": MODEL})
        assert site.asked[-1].headers.get("range") == f"bytes={there}-"
        part.write_bytes(MODEL[:1000] + b"damaged")
        with pytest.raises(SourceProblem, match=r"they were deleted \(digest_mismatch\)"):
            await fetch(site.url(), PINNED)
        assert not parts(cache)
        part.write_bytes(MODEL)  # complete, and its upload did not end
        asked = len(site.asked)
        await fetch(site.url(), PINNED)
        assert len(site.asked) == asked


async def test_same_file_is_downloaded_by_one_command_at_a_time(fetch: Fetch) -> None:
    async with serving_site(RangedFile(MODEL)) as site:
        with Downloads() as arriving:
            named = await asyncio.to_thread(resolve_source, site.url(), PINNED)
            await asyncio.to_thread(fetch_version, named, arriving)
            with pytest.raises(SourceProblem, match="another command downloads this file now"):
                await fetch(site.url(), PINNED)
            arriving.discard()
            assert not [each for each in open_files() if str(arriving.folder) in each]
            await fetch(site.url(), PINNED)


async def test_full_disk_ends_a_download(fetch: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads_module, "RESERVE_BYTES", 2**62)
    async with serving_site(RangedFile(MODEL)) as site:
        with pytest.raises(SourceProblem, match=r"set XDG_CACHE_HOME .*\(no_space\)"):
            await fetch(site.url())


async def get(url: str, **options: object) -> bytes:
    return (await asyncio.to_thread(lambda: Web("look at TOKEN").get(url, **options))).body  # type: ignore[arg-type]


async def failure(url: str, **options: object) -> str:
    with pytest.raises(SourceProblem) as caught:
        await get(url, **options)
    assert SECRET not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_credentials_follow_redirects_to_their_own_origin_only(status: int) -> None:
    async with serving_site(lambda _: answer(200, b"content")) as other:

        def redirect(asked: Asked) -> bytes:
            there = {"/here": "/moved", "/moved": other.url("/there")}[asked.path]
            return answer(status, location=there)

        async with serving_site(redirect) as site:
            assert await get(site.url("/here"), authorization=SECRET) == b"content"
            assert [each.headers.get("authorization") for each in site.asked] == [SECRET] * 2
            assert "authorization" not in other.asked[0].headers


@pytest.mark.parametrize(
    "location",
    [
        *(f"http://localhost/?{SECRET}", "ftp://localhost/", "file:///etc/passwd", "https://local host/"),
        *(f"https://user:{SECRET}@localhost/", "https://[::1/", "https://localhost:99999/", "/loop", ""),
    ],
)
async def test_redirect_elsewhere_is_refused(location: str) -> None:
    async with serving_site(lambda _: answer(302, location=location)) as site:
        assert "(source_invalid)" in await failure(site.url())


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (answer(401), "refuses with HTTP 401: look at TOKEN (source_denied)"),
        (answer(403), "(source_denied)"),
        (answer(404), "check the name (source_not_found)"),
        (answer(204), "which is no file: check the name (source_invalid)"),
        (answer(503), "try again later (source_unreachable)"),
        (answer(200, b"x" * 99, content_encoding="gzip"), "a coding that was not asked for (source_invalid)"),
        (answer(200, bytes(web_module.MAX_ANSWER_BYTES + CHUNK_BYTES)), "more than 16777216 bytes"),
        (b"SSH-2.0-OpenSSH\r\n", "valid HTTP"),
        (b"", "source_"),
    ],
)
async def test_answer_that_is_no_file_says_why(reply: bytes, said: str) -> None:
    async with serving_site(lambda _: reply) as site:
        assert said in await failure(site.url(f"/m?{SECRET}"))


async def test_transient_failures_are_tried_again() -> None:
    cut = answer(200, b"cont", content_length=7)
    replies = iter([answer(503), cut, answer(200, b"content")])
    async with serving_site(lambda _: next(replies)) as site:
        assert await get(site.url()) == b"content"


async def test_server_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Connection refused" in await failure("https://localhost:1/m")
    assert "its host has no address; check the name" in await failure("https://nowhere.invalid/m")
    monkeypatch.setattr(web_module, "TIMEOUT_S", 0.2)
    async with serving_site(lambda _: HANG) as site:
        assert "does not answer: try again" in await failure(site.url())
        monkeypatch.delenv("SSL_CERT_FILE")
        assert "name its authority with SSL_CERT_FILE" in await failure(site.url())
