"""The HTTPS client of a fetch: hosts and addresses, redirects, credentials, limits, and resumed downloads."""

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from socket import create_server

import pytest
from support.origins import HANG, Asked, RangedFile, Reply, Site, answer, serving_site, write_authority

from runtime.errors import RuntimeProblem
from runtime.fetch.origin import (
    SourceChanged,
    SourceDenied,
    SourceInvalid,
    SourceNotFound,
    SourceProblem,
    SourceTimeout,
    SourceUnreachable,
)
from runtime.fetch.sources import AllowedHosts, SourceNotAllowed
from runtime.fetch.web import DELAYS_S, Web, is_public

PATIENT_S, IMPATIENT_S = 10.0, 0.1
MAX_RETRIES = len(DELAYS_S)
SHORT_DELAYS_S = [0.001] * MAX_RETRIES
SECRET = "a-secret"
CONTENT = bytes(range(256)) * 40
MODEL = answer(200, CONTENT, etag='"one"')


@dataclass(frozen=True)
class Sites:
    """Starts sites, and a client that may connect to those that it names."""

    stack: AsyncExitStack
    folder: Path

    async def start(self, reply: Reply) -> Site:
        return await self.stack.enter_async_context(serving_site(reply))

    async def client(
        self, *sites: Site, timeout_s: float = PATIENT_S, hosts: AllowedHosts | None = None
    ) -> Web:
        allowed = hosts or AllowedHosts(named=frozenset(site.host for site in sites))
        web = Web(
            allowed,
            write_authority(self.folder),
            credential="look at TOKEN",
            timeout_s=timeout_s,
            delays_s=SHORT_DELAYS_S,
        )
        return await self.stack.enter_async_context(web)


@pytest.fixture
async def sites(tmp_path: Path) -> AsyncIterator[Sites]:
    async with AsyncExitStack() as stack:
        yield Sites(stack, tmp_path)


async def read(web: Web, site: Site, **options: object) -> tuple[int, bytes]:
    """Return from where on a download began, and its bytes."""
    async with web.download(site.url(), **options) as download:  # type: ignore[arg-type]
        return download.offset, b"".join([piece async for piece in download.pieces])


async def failure(web: Web, url: str, **options: object) -> RuntimeProblem:
    with pytest.raises(RuntimeProblem) as caught:
        await web.get(url, **options)  # type: ignore[arg-type]
    assert SECRET not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        *[(each, True) for each in ("8.8.8.8", "2606:4700::1111")],
        *[
            (each, False)
            for each in ("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254")
        ],
        *[(each, False) for each in ("100.64.0.1", "224.0.0.1", "240.0.0.1", "0.0.0.0", "255.255.255.255")],
        *[(each, False) for each in ("::1", "::", "fe80::1", "fe80::1%1", "fec0::1", "fd00::1", "ff02::1")],
        *[(each, False) for each in ("::ffff:8.8.8.8", "::8.8.8.8", "2002:7f00:1::", "64:ff9b::7f00:1")],
        *[(each, False) for each in ("64:ff9b:1::1", "2001::1", "2001:db8::1", "fd00:ec2::254")],
    ],
)
def test_only_addresses_of_the_internet_are_public(address: str, expected: bool) -> None:  # noqa: FBT001
    assert is_public(address) is expected


@pytest.mark.parametrize(
    "host",
    [
        *(
            "127.0.0.1",
            "[::1]",
            "169.254.169.254",
            "[::ffff:127.0.0.1]",
            "[fe80::1%25eth0]",
            "[64:ff9b::7f00:1]",
        ),
        *("localhost", "LOCALHOST", "0x7f000001", "2130706433", "127.1"),
    ],
)
@pytest.mark.parametrize("is_redirect", [False, True])
async def test_private_addresses_of_unnamed_hosts_are_refused(
    sites: Sites,
    host: str,
    is_redirect: bool,  # noqa: FBT001
) -> None:
    victim = await sites.start(lambda _: MODEL)
    url = f"https://{host}:{victim.port}/?{SECRET}"
    first = await sites.start(lambda _: answer(302, location=url))
    web = await sites.client(hosts=AllowedHosts(any_public=True, named=frozenset({first.host})))
    problem = await failure(web, first.url() if is_redirect else url)
    assert problem.code in {"source_not_allowed", "source_invalid", "source_unreachable"}
    assert not victim.asked


@pytest.mark.parametrize(
    ("location", "kind"),
    [
        (f"https://other.example/?{SECRET}", SourceNotAllowed),
        ("https://localhost/", SourceNotAllowed),  # another port
        (f"http://localhost/?{SECRET}", SourceInvalid),
        ("ftp://localhost/", SourceInvalid),
        ("file:///etc/passwd", SourceInvalid),
        (f"https://user:{SECRET}@localhost/", SourceInvalid),
        ("https://[::1/", SourceInvalid),
        ("https://localhost:99999/", SourceInvalid),
        ("//localhost:0/", SourceInvalid),
        ("https://local host/", SourceInvalid),
        ("/loop", SourceInvalid),
        ("", SourceInvalid),
    ],
)
async def test_redirect_to_forbidden_target_is_refused(
    sites: Sites, location: str, kind: type[RuntimeProblem]
) -> None:
    site = await sites.start(lambda _: answer(302, location=location))
    assert type(await failure(await sites.client(site), site.url())) is kind


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirect_is_followed_without_credentials_to_another_host(sites: Sites, status: int) -> None:
    last = await sites.start(lambda _: answer(200, CONTENT, set_cookie="a=b"))
    other = await sites.start(lambda _: answer(status, location=last.url()))
    first = await sites.start(
        lambda asked: answer(
            status, location="/second" if asked.path == "/model.onnx" else other.url(), set_cookie="a=b"
        )
    )
    web = await sites.client(first, other, last)
    got = await web.get(first.url(), authorization=f"Bearer {SECRET}", headers={"X-Token": SECRET})
    assert got.body == CONTENT
    assert last.asked
    for asked in first.asked:
        assert asked.headers["authorization"] == f"Bearer {SECRET}"
        assert asked.headers["x-token"] == SECRET
    for asked in (*other.asked, *last.asked):
        assert SECRET not in str(asked.headers)
    assert all("cookie" not in asked.headers for site in (first, other, last) for asked in site.asked)


async def test_credentials_do_not_come_back_to_their_host(sites: Sites) -> None:
    """A redirect of another host could choose what they are used for."""
    away = await sites.start(lambda _: answer(302, location=first.url("/back")))
    first = await sites.start(
        lambda asked: answer(200) if asked.path == "/back" else answer(302, location=away.url())
    )
    web = await sites.client(first, away)
    await web.get(first.url(), authorization=SECRET)
    assert [asked.headers.get("authorization") for asked in first.asked] == [SECRET, None]


async def test_proxies_of_the_environment_are_ignored(sites: Sites, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    site = await sites.start(lambda _: MODEL)
    assert (await (await sites.client(site)).get(site.url())).body == CONTENT


STATUSES: Mapping[int, type[SourceProblem]] = {
    **dict.fromkeys((404, 410), SourceNotFound),
    **dict.fromkeys((401, 403), SourceDenied),
    **dict.fromkeys((429, 500, 503, 522), SourceUnreachable),
    **dict.fromkeys((201, 204, 304, 400, 451), SourceInvalid),
}


@pytest.mark.parametrize(("status", "kind"), STATUSES.items())
async def test_status_gives_code_without_query_or_body(
    sites: Sites, status: int, kind: type[SourceProblem]
) -> None:
    site = await sites.start(lambda _: answer(status, b"" if status in (204, 304) else SECRET.encode()))
    problem = await failure(await sites.client(site), site.url(f"/a%01?{SECRET}"))
    assert type(problem) is kind
    assert site.url("/a%01") in str(problem)
    assert ("look at TOKEN" in str(problem)) == (kind is SourceDenied)
    assert len(site.asked) == (1 + MAX_RETRIES if kind is SourceUnreachable else 1)


REPLIES: Mapping[str, tuple[bytes, type[SourceProblem]]] = {
    "coding": (answer(200, b"x", content_encoding="gzip"), SourceInvalid),
    "long header": (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 2**20, SourceInvalid),
    "many headers": (b"HTTP/1.1 200 OK\r\n" + b"X: x\r\n" * 10_000, SourceInvalid),
    "no HTTP": (b"SSH-2.0-OpenSSH\r\n\r\n", SourceInvalid),
    "no length": (b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n", SourceInvalid),
    "large answer": (answer(200, bytes(2000)), SourceInvalid),
    "endless answer": (answer(200, bytes(2000), content_length=None) + HANG, SourceInvalid),
    "short answer": (answer(200, b"x", content_length=9), SourceUnreachable),
    "closed": (b"", SourceUnreachable),
    "no answer": (HANG, SourceTimeout),
    "half a head": (b"HTTP/1.1 200 OK\r\n" + HANG, SourceTimeout),
    "slow body": (answer(200, b"x" * 900, content_length=950) + HANG, SourceTimeout),
}


@pytest.mark.parametrize(("reply", "kind"), REPLIES.values(), ids=REPLIES)
async def test_malformed_or_slow_answer_gives_code(
    sites: Sites, reply: bytes, kind: type[SourceProblem]
) -> None:
    site = await sites.start(lambda _: reply)
    web = await sites.client(site, timeout_s=IMPATIENT_S if kind is SourceTimeout else PATIENT_S)
    assert type(await failure(web, site.url(), max_bytes=1000)) is kind


async def test_untrusted_certificate_is_refused_at_once(sites: Sites) -> None:
    site = await sites.start(lambda _: MODEL)
    web = await sites.stack.enter_async_context(Web(AllowedHosts(named=frozenset({site.host}))))
    problem = await failure(web, site.url())
    assert isinstance(problem, SourceUnreachable)
    assert "SSL_CERT_FILE" in str(problem)


@pytest.mark.parametrize("host", ["nowhere.invalid", "localhost"])
async def test_unreachable_host_is_named(sites: Sites, host: str) -> None:
    with create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    web = await sites.client(hosts=AllowedHosts(named=frozenset({f"{host}:{port}"})))
    problem = await failure(web, f"https://{host}:{port}/")
    assert isinstance(problem, SourceUnreachable)
    assert f"https://{host}:{port}/" in str(problem)


def test_missing_authority_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceUnreachable, match="SSL_CERT_FILE"):
        Web(AllowedHosts(), str(tmp_path / "none.pem"))


async def test_failing_server_is_asked_again(sites: Sites) -> None:
    replies = iter([answer(429), answer(503), MODEL])
    site = await sites.start(lambda _: next(replies))
    assert (await (await sites.client(site)).get(site.url())).body == CONTENT
    assert len(site.asked) == 3


RESUMES: Mapping[str, tuple[RangedFile, dict[str, object], int]] = {
    "pinned": (RangedFile(CONTENT, None), {"offset": 500, "is_pinned": True}, 500),
    "pinned with tag": (RangedFile(CONTENT), {"offset": 9, "is_pinned": True}, 9),
    "not pinned": (RangedFile(CONTENT), {"offset": 500}, 0),
    "no ranges": (RangedFile(CONTENT, has_ranges=False), {"offset": 500, "is_pinned": True}, 0),
    "beyond the end": (RangedFile(CONTENT), {"offset": 99_999, "is_pinned": True}, 0),
}


@pytest.mark.parametrize(("file", "options", "offset"), RESUMES.values(), ids=RESUMES)
async def test_download_begins_where_the_server_allows(
    sites: Sites, file: RangedFile, options: dict[str, object], offset: int
) -> None:
    site = await sites.start(file)
    assert await read(await sites.client(site), site, **options) == (offset, CONTENT[offset:])


@pytest.mark.parametrize(
    "where", ["bytes 499-10239/10240", "bytes 500-900/10240", "bytes 500-999/*", "lines 1"]
)
async def test_another_range_is_refused(sites: Sites, where: str) -> None:
    site = await sites.start(lambda _: answer(206, CONTENT[500:], content_range=where))
    with pytest.raises(SourceInvalid, match="another range"):
        await read(await sites.client(site), site, offset=500, is_pinned=True)


async def test_cut_download_continues_with_its_entity_tag(sites: Sites) -> None:
    site = await sites.start(RangedFile(CONTENT, cuts=[2000] * 4))
    assert await read(await sites.client(site), site) == (0, CONTENT)
    assert [asked.headers.get("range") for asked in site.asked] == [
        None,
        *(f"bytes={begin}-" for begin in (2000, 4000, 6000, 8000)),
    ]
    assert {asked.headers.get("if-range") for asked in site.asked[1:]} == {'"one"'}


async def test_progress_gives_new_attempts(sites: Sites) -> None:
    site = await sites.start(RangedFile(CONTENT, cuts=[1000, 0, 0, 0, 0] * 5))
    assert await read(await sites.client(site), site) == (0, CONTENT)
    assert len(site.asked) > 2 * MAX_RETRIES


async def test_little_progress_gives_no_new_attempts(sites: Sites) -> None:
    site = await sites.start(RangedFile(CONTENT, cuts=[10] * 100))
    with pytest.raises(SourceUnreachable):
        await read(await sites.client(site), site)
    assert len(site.asked) == 1 + MAX_RETRIES


CHANGES: Mapping[str, tuple[list[RangedFile], dict[str, object], type[SourceProblem]]] = {
    "other tag": ([RangedFile(CONTENT, cuts=[5000]), RangedFile(CONTENT, '"two"')], {}, SourceChanged),
    "no ranges": ([RangedFile(CONTENT, has_ranges=False, cuts=[5000])] * 2, {}, SourceChanged),
    "no tag": ([RangedFile(CONTENT, None, cuts=[5000])], {}, SourceUnreachable),
    "weak tag": ([RangedFile(CONTENT, 'W/"one"', cuts=[5000])], {}, SourceUnreachable),
    "pinned, no ranges": (
        [RangedFile(CONTENT, None, has_ranges=False, cuts=[5000])] * 2,
        {"is_pinned": True},
        SourceChanged,
    ),
}


@pytest.mark.parametrize(("files", "options", "kind"), CHANGES.values(), ids=CHANGES)
async def test_cut_download_that_cannot_continue_fails(
    sites: Sites, files: list[RangedFile], options: dict[str, object], kind: type[SourceProblem]
) -> None:
    replies = iter(files)

    def reply(asked: Asked) -> bytes:
        return next(replies)(asked)

    site = await sites.start(reply)
    with pytest.raises(kind, match="add it again"):
        await read(await sites.client(site), site, **options)


async def test_stalled_download_continues(sites: Sites) -> None:
    file = RangedFile(CONTENT, cuts=[5000])
    site = await sites.start(lambda asked: file(asked) + (HANG if "range" not in asked.headers else b""))
    assert await read(await sites.client(site, timeout_s=0.5), site) == (0, CONTENT)


async def test_download_tells_length(sites: Sites) -> None:
    site = await sites.start(lambda _: MODEL)
    async with (await sites.client(site)).download(site.url()) as download:
        assert download.bytes == len(CONTENT)
