"""Both transports against servers that are gone, slow, broken or hostile, byte by byte."""

import asyncio
import re
import socket
import ssl
import threading
import traceback
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.clients import KINDS, bookmark, connected, event_lines, job
from support.connections import LIMIT_S, Script, make_pair, odd_server, said, staying, streamed

from loadledger import AsyncClient, BadAnswer, ServerError, ServerUnreachable

TOKEN = "s3cr3t-token"
JOB = said(msgspec.json.encode(job("completed")))
NOTHING = b""
TOO_LONG = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n" + b" " * 300_000

each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def short_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadledger.requests.FIRST_BACK_OFF_S", 0.01)


def refusal(kind: str, *scripts: Script, **options: Any) -> Exception:
    """Return how a request for resources fails, which has to hide the token."""
    with odd_server(*scripts) as server, connected(kind, server.url, TOKEN, **options) as client:
        with pytest.raises(Exception, match=r".") as caught:
            client.resources()
        assert TOKEN not in "".join(traceback.format_exception(caught.value))
        assert str(caught.value).isprintable()
        return caught.value


# Requests


@each_kind
def test_absent_server_is_unreachable(kind: str) -> None:
    with odd_server() as server:
        words = rf"{server.url} cannot be reached: connection ref.*is the server running"
    with connected(kind, server.url) as client:
        with pytest.raises(ServerUnreachable, match=words) as caught:
            client.load("m")
        assert (caught.value.url, caught.value.sent) == (server.url, False)
    with connected(kind, "http://nobody.invalid") as client:
        with pytest.raises(ServerUnreachable, match=r"nobody\.invalid cannot be reached: ") as caught:
            client.resources()
        assert not caught.value.sent


@contextmanager
def full_queue() -> Iterator[str]:
    """A server that accepts no connection, and whose queue of them is full."""
    with ExitStack() as opened, socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        for _ in range(4):
            waiting = opened.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(server.getsockname())
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@each_kind
def test_unanswered_connection_is_no_silent_server(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadledger.address.ConnectionOptions.connect_s", 0.3)
    with full_queue() as url, connected(kind, url) as client:
        with pytest.raises(
            ServerUnreachable, match=r"no connection within 0\.3 s; is its machine up"
        ) as caught:
            client.infer("m", [])
        assert (caught.value.sent, caught.value.lost) == (False, False)


@each_kind
def test_lost_connection_is_told_from_a_slow_answer(kind: str) -> None:
    for script, words, lost in (
        (NOTHING, "the connection was lost: .*; it or a proxy before it has stopped: see its log", True),
        (staying(NOTHING), r"no answer came within 0\.3 s; .*`loadledger infer --timeout`", False),
    ):
        with odd_server(script) as server, connected(kind, server.url, timeout_s=0.3) as client:
            with pytest.raises(ServerUnreachable, match=words) as caught:
                client.infer("m", [])
            assert (caught.value.sent, caught.value.lost) == (True, lost)


@each_kind
def test_load_is_resent_with_its_key_after_lost_connection(kind: str) -> None:
    with odd_server(NOTHING, b"HTTP/1.1 200 OK\r\nContent-Le", JOB[:-1], JOB) as server:
        with connected(kind, f"{server.url}/prefix/", TOKEN) as client:
            assert client.load("m/../é", 2, priority="high", wait=True).status == "completed"
        assert len(server.requests) == 4
        assert len({re.search(rb"Idempotency-Key: (.*)\r", each)[1] for each in server.requests}) == 1  # type: ignore[index]
        head, _, body = server.requests[-1].partition(b"\r\n\r\n")
        assert head.startswith(b"POST /prefix/api/v1/models/m%2F..%2F%C3%A9/load HTTP/1.1\r\n")
        for field in (
            b"Authorization: Bearer " + TOKEN.encode(),
            b"Prefer: wait=20",
            b"Accept-Encoding: identity",
        ):
            assert field in head.split(b"\r\n")
        assert msgspec.json.decode(body) == {"version": 2, "priority": "high"}


@each_kind
def test_redirect_is_not_followed(kind: str) -> None:
    with odd_server(JOB) as elsewhere:
        script = said(b"{}", "307 Temporary Redirect", f"Location: {elsewhere.url}/{TOKEN}")
        error = refusal(kind, script)
        assert isinstance(error, ServerError)
        assert error.code == "redirected"
        assert elsewhere.url in str(error)
        assert elsewhere.requests == []


@pytest.mark.parametrize(
    ("text", "options", "error", "words"),
    [
        (TOO_LONG, {"max_answer_bytes": 200_000}, BadAnswer, "max_answer_bytes"),
        (
            NOTHING,
            {"timeout_s": 0.2},
            ServerUnreachable,
            "the request was sent, and no answer came within 0.2 s; see what it does",
        ),
    ],
    ids=["too long", "silent"],
)
@each_kind
def test_endless_answer_is_refused(
    kind: str, text: bytes, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    found = refusal(kind, staying(text), **options)
    assert isinstance(found, error)
    assert words in str(found)


@pytest.mark.parametrize(
    ("head", "part"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n", b" "),
        (b"HTTP/1.1 200 OK\r\nX-A: ", b"a"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (streamed(b"{}", end=True)[:-2], b"X: y\r\n"),
    ],
    ids=["body", "head", "before it", "after the body"],
)
def test_byte_by_byte_server_times_out(head: bytes, part: bytes) -> None:
    over = threading.Event()

    def drip(connection: socket.socket) -> None:
        connection.sendall(head)
        for _ in range(1000):  # and then it is over, whoever still waits
            if over.wait(0.02):
                break
            connection.sendall(part)

    for kind in KINDS:
        over.clear()
        with odd_server(drip) as server, connected(kind, server.url, timeout_s=0.3) as client:
            try:
                with pytest.raises(ServerUnreachable):
                    client.infer("m", [])
            finally:
                over.set()


HTML = b"<html><h1>It works!</h1></html>"
ENDLESS = b"HTTP/1.1 200 OK\r\nContent-Length: " + b"1" * 5000 + b"\r\n\r\n[]"
OF_PROXY = "a proxy or another program says so, not loadledger: does a server run behind http"
FOREIGN = {
    # what answers: its words, what is said of it
    "ssh": (b"SSH-2.0-OpenSSH_9.9\r\n", "it speaks no HTTP/1.1, or HTTPS"),
    "tls": (b"\x15\x03\x01\0\x02\x02\x16", "it speaks no HTTP/1.1, or HTTPS"),
    "echo": (f"{TOKEN}\r\n".encode(), "it speaks no HTTP/1.1, or HTTPS"),
    "echo in a field": (
        said(b"[]", media_type=f"x/{TOKEN}"),
        "is not loadledger of this release (status 200, ",
    ),
    "many headers": (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200_000 + b"\r\n", ""),
    "html": (said(HTML, media_type="text/html"), "is not loadledger (status 200, text/html)"),
    "html 404": (said(HTML, "404 No", media_type="text/html"), "is not loadledger (status 404, text/html)"),
    "html 520": (said(HTML, "520 No", media_type="text/html"), f"the server answered 520: {OF_PROXY}"),
    "html 403": (said(HTML, "403 No", media_type="text/html"), f"the server answered 403: {OF_PROXY}"),
    "html 502": (said(HTML, "502 No", media_type="text/html"), f"the server answered 502: {OF_PROXY}"),
    "text": (said(b"It works!", media_type="text/plain"), "is not loadledger (status 200, text/plain)"),
    "gzip": (said(b"\x1f\x8b", "200 OK", "Content-Encoding: gzip"), "is not loadledger (status 200"),
    "other JSON": (said(b"[1, 2]"), "is not loadledger of this release (status 200, "),
    "other JSON 404": (said(b'{"detail": "Not Found"}', "404 No"), "is not loadledger (status 404"),
    "other code": (said(b'{"code": "not_found"}', "404 No"), "is not loadledger (status 404"),
    "nothing": (said(b"", "404 No"), "is not loadledger (status 404"),
    "endless length": (ENDLESS, ""),
    "closed": (NOTHING, "does not answer: the connection was lost"),
}


@pytest.mark.parametrize(("text", "words"), FOREIGN.values(), ids=FOREIGN)
@each_kind
def test_answer_of_another_program_says_so_and_the_cure(kind: str, text: bytes, words: str) -> None:
    error = refusal(kind, *[text] * 40)
    assert isinstance(error, BadAnswer | ServerError | ServerUnreachable)
    assert words in str(error)
    assert "is this its URL? --url or LOADLEDGER_URL names another" in str(error)
    assert "It works!" not in str(error)


@each_kind
def test_early_refusal_of_large_body_is_read(kind: str) -> None:
    early = said(b'{"code":"body_too_large","detail":"too large"}', "413 Content Too Large")
    tensor = {"shape": [4_000_000], "datatype": "BYTES", "data": ["x" * 8_000_000]}
    with (
        odd_server(staying(early)) as server,
        connected(kind, server.url) as client,
        pytest.raises(ServerError, match="body_too_large"),
    ):
        client.infer("m", {"x": tensor})


# Streams


@each_kind
def test_stream_resumes_where_it_broke_off(kind: str) -> None:
    busy = said(b'{"code":"shutting_down","detail":"x"}', "503 Service Unavailable", "Retry-After: 0")
    scripts = (
        streamed(bookmark(4) + b"\n", event_lines(5, 6) + b'{"posi'),  # the chunks have no end
        busy,
        streamed(event_lines(7), end=True),
        NOTHING,
        staying(streamed(event_lines(7, 8), event_lines(9))),
    )
    with odd_server(*scripts) as server, connected(kind, server.url, TOKEN) as client:
        events = client.events(after=4, follow=True)
        assert [next(events).position for _ in range(5)] == [5, 6, 7, 8, 9]
        assert not server.closed.is_set()
        events.close()
        assert server.closed.wait(LIMIT_S)
        asked = [re.search(rb"after=(\d+)", each)[1] for each in server.requests]  # type: ignore[index]
        assert asked == [b"4", b"6", b"6", b"7", b"7"]


@each_kind
def test_silent_stream_is_opened_again(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("blocking", "asynchronous"):
        monkeypatch.setattr(f"loadledger.transports.{module}.SILENCE_S", 0.5)
    away: list[Exception] = []
    scripts = staying(streamed(event_lines(1))), staying(streamed(event_lines(2)))
    with odd_server(*scripts) as server, connected(kind, server.url) as client:
        events = client.events(after=0, follow=True, on_away=away.append)
        assert [next(events).position for _ in range(2)] == [1, 2]
        events.close()
    assert [type(each) for each in away] == [ServerUnreachable]


@each_kind
def test_endless_line_closes_stream(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadledger.stream.LineSplitter.__init__.__defaults__", (1000,))
    with odd_server(staying(streamed(b"x" * 2000))) as server, connected(kind, server.url) as client:
        with pytest.raises(BadAnswer, match="2000 bytes"):
            next(client.events(follow=True))
        assert server.closed.wait(LIMIT_S)


@pytest.mark.parametrize(
    ("answer", "ask"),
    [
        (b"", lambda client: client.resources()),
        (b"", lambda client: anext(client.events(follow=True))),
        (streamed(bookmark(3) + b"\n"), lambda client: anext(client.events(follow=True))),
    ],
    ids=["an answer", "a stream", "an event"],
)
async def test_closing_client_ends_pending_calls(
    answer: bytes, ask: Callable[[AsyncClient], Coroutine[Any, Any, Any]]
) -> None:
    loop, asked = asyncio.get_running_loop(), asyncio.Event()

    def say(connection: socket.socket) -> None:
        connection.sendall(answer)
        loop.call_soon_threadsafe(asked.set)

    with odd_server(say) as server:
        client = AsyncClient(server.url)
        pending = asyncio.ensure_future(ask(client))
        async with asyncio.timeout(LIMIT_S):
            await asked.wait()
            await client.close()
            with pytest.raises(RuntimeError, match="this client is closed"):
                await pending
    with pytest.raises(RuntimeError, match="this client is closed"):
        await client.health()


# TLS


@each_kind
def test_own_certificate_is_trusted_by_ca_file_only(kind: str, tmp_path: Path) -> None:
    ca_file, key = tmp_path / "ca.pem", tmp_path / "key.pem"
    make_pair().write(ca_file, key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(ca_file, key)
    with odd_server(NOTHING, JOB, tls=context) as server:
        with connected(kind, server.url, TOKEN) as client:
            with pytest.raises(ServerUnreachable, match="its certificate is not trusted") as caught:
                client.job("j1")
            assert not caught.value.sent
        assert server.requests == []
        with connected(kind, server.url, TOKEN, ca_file=ca_file) as client:
            assert client.job("j1").status == "completed"
    (tmp_path / "none.pem").write_text("nothing")
    for file in ("none.pem", "missing.pem"):
        with (
            pytest.raises(ValueError, match=file),
            connected(kind, "https://localhost", ca_file=tmp_path / file) as client,
        ):
            client.health()
