"""Both clients against servers that are gone, slow, broken or hostile."""

import datetime as dt
import re
import socket
import ssl
import threading
import traceback
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from support.clients import KINDS, connected
from support.oddserver import LIMIT_S, Script, odd_server, said, staying, streamed
from support.playedcalls import bookmark, event_line, job

from loadledger import BadAnswer, ServerError, ServerUnreachable

TOKEN = "s3cr3t-token"
JOB = said(msgspec.json.encode(job("completed")))
NOTHING = b""

pytestmark = pytest.mark.parametrize("kind", KINDS)


def refused(kind: str, *scripts: Script, **options: Any) -> Exception:
    """Ask such a server for its resources, which has to fail; return how."""
    with odd_server(*scripts) as server, connected(kind, server.url, TOKEN, **options) as client:
        with pytest.raises(Exception, match=r".") as caught:
            client.resources()
        assert TOKEN not in "".join(traceback.format_exception(caught.value))
        assert str(caught.value).isprintable()
        return caught.value


def test_nobody_there_is_told_with_the_url(kind: str) -> None:
    with odd_server() as server:
        server.stop()
        with connected(kind, server.url) as client:
            with pytest.raises(
                ServerUnreachable, match=rf"{server.url} cannot be reached: connection ref"
            ) as caught:
                client.load("m")
            assert (caught.value.url, caught.value.sent) == (server.url, False)
            assert "is the server running" in str(caught.value)


def test_a_name_that_nobody_knows_is_told(kind: str) -> None:
    with connected(kind, "http://nobody.invalid") as client:
        with pytest.raises(ServerUnreachable, match=r"nobody\.invalid cannot be reached: ") as caught:
            client.resources()
        assert not caught.value.sent


def test_a_load_is_sent_again_with_its_key_when_the_connection_is_lost(kind: str) -> None:
    with odd_server(NOTHING, b"HTTP/1.1 200 OK\r\nContent-Le", JOB) as server:
        with connected(kind, server.url + "/", TOKEN) as client:
            assert client.load("m/../é", 2, priority="high", wait=True).status == "completed"
        assert len(server.requests) == 3
        assert len({re.search(rb"Idempotency-Key: (.*)\r", each)[1] for each in server.requests}) == 1  # type: ignore[index]
        head, _, body = server.requests[-1].partition(b"\r\n\r\n")
        assert head.startswith(b"POST /api/v1/models/m%2F..%2F%C3%A9/load HTTP/1.1\r\n")
        for field in (
            b"Authorization: Bearer s3cr3t-token",
            b"Prefer: wait=20",
            b"Accept-Encoding: identity",
        ):
            assert field in head
        assert msgspec.json.decode(body) == {"version": 2, "priority": "high"}


def test_an_inference_is_not_sent_again(kind: str) -> None:
    tensor = {"shape": [1], "datatype": "FP32", "data": [1.5]}
    with odd_server(NOTHING, JOB) as server, connected(kind, server.url, TOKEN) as client:
        with pytest.raises(ServerUnreachable, match="does not answer: the connection was lost") as caught:
            client.infer("m", {"x": tensor})
        assert caught.value.sent
        assert len(server.requests) == 1


def test_a_server_behind_a_prefix_is_asked_there(kind: str) -> None:
    with odd_server(JOB) as server, connected(kind, f"{server.url}/loadledger/", TOKEN) as client:
        client.job("j1", at="2026-01-31T14:02:00+01:00")
        assert server.requests[0].startswith(
            b"GET /loadledger/api/v1/jobs/j1?at=2026-01-31T14%3A02%3A00%2B01%3A00 HTTP/1.1"
        )


def test_a_redirect_is_not_followed(kind: str) -> None:
    with odd_server(JOB) as elsewhere:
        script = said(b"{}", "307 Temporary Redirect", f"Location: {elsewhere.url}/{TOKEN}")
        error = refused(kind, script)
        assert isinstance(error, ServerError)
        assert error.code == "redirected"
        assert elsewhere.url in str(error)
        assert elsewhere.requests == []


def test_a_token_that_the_server_repeats_is_not_told(kind: str) -> None:
    body = msgspec.json.encode({"code": "invalid_token", "detail": f"no such token: {TOKEN}\x1b[2J"})
    error = refused(kind, said(body, "401 Unauthorized"))
    assert "no such token: [token]" in str(error)


def test_what_is_longer_than_is_taken_is_refused_before_it_is_read(kind: str) -> None:
    endless = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n" + b" " * 300_000
    error = refused(kind, staying(endless), max_answer_bytes=200_000)
    assert isinstance(error, BadAnswer)
    assert "max_answer_bytes" in str(error)


def test_an_answer_that_is_cut_off_is_lost_and_not_believed(kind: str) -> None:
    whole = said(b'{"id": "j1"}')
    with odd_server(whole[:-3]) as server, connected(kind, server.url) as client:
        with pytest.raises(ServerUnreachable) as caught:
            client.infer("m", [])
        assert caught.value.sent


def test_a_server_that_never_answers_is_given_up(kind: str) -> None:
    error = refused(kind, staying(b""), timeout_s=0.2)
    assert isinstance(error, ServerUnreachable)
    assert "it took too long" in str(error)


def test_a_server_that_answers_byte_by_byte_is_given_up_all_the_same(kind: str) -> None:
    over = threading.Event()

    def drip(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
        while not over.wait(0.02):
            connection.sendall(b" ")

    try:
        with odd_server(drip) as server, connected(kind, server.url, timeout_s=0.3) as client:
            with pytest.raises(ServerUnreachable):
                client.infer("m", [])
            over.set()
    finally:
        over.set()


@pytest.mark.parametrize(
    "text",
    [
        b"SSH-2.0-OpenSSH_9.9\r\n",
        f"{TOKEN}\r\n".encode(),
        said(b"[]", media_type=f"x/{TOKEN}"),
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200_000 + b"\r\n",
        said(b"<html></html>", media_type="text/html"),
        said(b"\x1f\x8b\x08gzip", "200 OK", "Content-Encoding: gzip"),
        said(b"[1, 2]"),
    ],
    ids=["ssh", "echo", "echo in a field", "many headers", "html", "gzip", "other JSON"],
)
def test_what_is_no_answer_of_such_a_server_is_told(kind: str, text: bytes) -> None:
    error = refused(kind, *[text] * 40)
    assert isinstance(error, BadAnswer | ServerUnreachable)
    assert "is this its URL?" in str(error)


def test_a_body_that_is_refused_early_is_told_as_it_was_refused(kind: str) -> None:
    refusal = said(b'{"code":"body_too_large","detail":"too large"}', "413 Content Too Large")
    tensor = {"shape": [4_000_000], "datatype": "BYTES", "data": ["x" * 8_000_000]}

    def refuse(connection: socket.socket) -> None:
        connection.sendall(refusal)

    with (
        odd_server(refuse) as server,
        connected(kind, server.url) as client,
        pytest.raises(ServerError, match="body_too_large"),
    ):
        client.infer("m", {"x": tensor})


# Streams


def lines(*positions: int) -> bytes:
    return b"".join(event_line(position) + b"\n" for position in positions)


def test_a_stream_is_taken_up_where_it_broke_off(kind: str) -> None:
    busy = said(b'{"code":"shutting_down","detail":"x"}', "503 Service Unavailable", "Retry-After: 0")
    scripts = (
        streamed(bookmark(4) + b"\n", lines(5, 6) + b'{"posi'),  # the chunks have no end
        busy,
        streamed(lines(7), end=True),
        NOTHING,
        staying(streamed(lines(7, 8), lines(9))),
    )
    with odd_server(*scripts) as server, connected(kind, server.url, TOKEN) as client:
        events = client.events(after=4, follow=True)
        assert [next(events).position for _ in range(5)] == [5, 6, 7, 8, 9]
        assert not server.closed.is_set()
        events.close()
        assert server.closed.wait(LIMIT_S)
        asked = [re.search(rb"after=(\d+)", each)[1] for each in server.requests]  # type: ignore[index]
        assert asked == [b"4", b"6", b"6", b"7", b"7"]


def test_a_line_that_never_ends_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadledger.lines.Lines.__init__.__defaults__", (1000,))
    with odd_server(staying(streamed(b"x" * 2000))) as server, connected(kind, server.url) as client:
        with pytest.raises(BadAnswer, match="2000 bytes"):
            next(client.events(follow=True))
        assert server.closed.wait(LIMIT_S)


def test_a_stream_without_a_sign_of_life_is_taken_for_dead(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("blocking", "looping"):
        monkeypatch.setattr(f"loadledger.{module}.SILENCE_S", 1.0)
    told: list[Exception] = []
    scripts = staying(streamed(lines(1))), staying(streamed(lines(2)))
    with odd_server(*scripts) as server, connected(kind, server.url) as client:
        events = client.events(after=0, follow=True, on_away=told.append)
        assert [next(events).position for _ in range(2)] == [1, 2]
        events.close()
    assert [type(each) for each in told] == [ServerUnreachable]


# TLS


def test_a_server_with_a_certificate_of_our_own_is_trusted_by_its_file_only(
    kind: str, tmp_path: Path
) -> None:
    context, ca_file = own_certificate(tmp_path)
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


def own_certificate(folder: Path) -> tuple[ssl.SSLContext, Path]:
    """Make a certificate for localhost; returns the server's side of it, and the file to trust."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    ca_file, both = folder / "ca.pem", folder / "both.pem"
    ca_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    both.write_bytes(secret + ca_file.read_bytes())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(both)
    return context, ca_file
