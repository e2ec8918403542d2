"""HTTPS: which files are refused and why, and that a renewed certificate is served without a restart."""

import asyncio
import os
import ssl
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from support import models
from support.certificates import Pair, make_pair, replace
from support.http import when
from support.models import save
from support.process import serving

from server.check import load_config
from server.config import Config, ConfigError
from server.connections.tls import Certificate, TlsProblem, load_context

LIMIT_S = 30.0
HEALTH_CHECK = Path(__file__).parents[3] / "deploy" / "healthcheck.py"


@pytest.fixture(scope="module")
def pair() -> Pair:
    return make_pair()


@pytest.fixture(scope="module")
def other() -> Pair:
    return make_pair()


@pytest.fixture
def files(tmp_path: Path, pair: Pair) -> tuple[Path, Path]:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    pair.write(cert, key)
    return cert, key


def refused(files: tuple[Path, Path]) -> str:
    with pytest.raises(TlsProblem) as refusal:
        load_context(*files)
    assert any(str(path) in str(refusal.value) for path in files)
    return str(refusal.value)


# What is refused


def test_a_pair_is_taken_for_tls_1_2_and_newer(files: tuple[Path, Path]) -> None:
    context = load_context(*files)
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert context.verify_mode is ssl.CERT_NONE  # of clients


def test_a_key_of_another_certificate_is_refused(files: tuple[Path, Path], other: Pair) -> None:
    replace(files[1], other.key_pem())
    assert "is not the key of the first certificate in" in refused(files)
    replace(files[1], make_pair(key=rsa.generate_private_key(65537, 2048)).key_pem())
    assert "is not the key of the first certificate in" in refused(files)


def test_an_encrypted_key_is_refused_and_nobody_is_asked_for_a_password(
    files: tuple[Path, Path], pair: Pair
) -> None:
    replace(files[1], pair.key_pem(password=b"secret"))
    text = refused(files)
    assert "is encrypted" in text
    assert "openssl pkey" in text


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o601, 0o660, 0o644, 0o777])
def test_a_key_that_others_may_read_or_change_is_refused(files: tuple[Path, Path], mode: int) -> None:
    files[1].chmod(mode)
    text = refused(files)
    assert f"mode {mode:04o}" in text
    assert "chmod 0600" in text


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o440, 0o640])
def test_a_key_that_its_group_may_read_is_taken(files: tuple[Path, Path], mode: int) -> None:
    files[1].chmod(mode)
    load_context(*files)


def test_a_key_of_another_user_is_refused(files: tuple[Path, Path]) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(files[1], 12345, -1)
    assert "another user's (12345)" in refused(files)


@pytest.mark.parametrize("content", [b"", b"no PEM", b"-----BEGIN CERTIFICATE-----\nAAAA\n", b"\xff" * 99])
def test_what_is_no_certificate_or_no_key_is_told_apart(files: tuple[Path, Path], content: bytes) -> None:
    cert, key = files
    good = key.read_bytes()
    replace(key, content)
    assert f"{key} has no private key" in refused(files)
    replace(key, good)
    replace(cert, content)
    assert f"{cert} has no certificate" in refused(files)


def test_a_key_in_place_of_the_certificate_is_refused(files: tuple[Path, Path]) -> None:
    assert "has no certificate" in refused((files[1], files[0]))


def test_what_is_missing_or_no_file_is_refused_without_waiting_for_it(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    os.mkfifo(fifo := tmp_path / "fifo", 0o600)
    for path in (tmp_path / "none", tmp_path, fifo, tmp_path / "n\0"):
        for broken in ((path, files[1]), (files[0], path)):
            assert str(path) in refused(broken)


def test_a_key_that_is_too_short_is_refused_with_openssl_s_reason(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make_pair(key=rsa.generate_private_key(65537, 1024)).write(cert, key)
    assert "key too small" in refused((cert, key))


def test_files_that_cannot_be_used_are_told_when_serving_begins(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    paths = {"repository": tmp_path, "data": tmp_path, "tls_cert": files[0], "tls_key": files[1]}
    flags = {name: str(path) for name, path in paths.items()}
    assert load_config(flags, {}).tls_cert == files[0]
    files[1].chmod(0o644)
    with pytest.raises(ConfigError, match=r"--tls-key: .* mode 0644"):
        load_config(flags, {})


def test_a_certificate_that_has_expired_is_served_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make_pair(ends_in=timedelta(days=-1)).write(cert, key)
    Certificate(cert, key)
    assert "has expired" in caplog.text


async def test_expired_renewal_is_served_with_a_warning(
    files: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    clock, expired = Clock(), make_pair(ends_in=timedelta(days=-1))
    async with listening(Certificate(*files, clock)) as port:
        expired.write(*files)
        clock.now += 1.0
        assert await shown(port) == expired.serial
    assert caplog.text.count("has expired") == 1


# Renewal


class Clock:
    """The time, as far as a test is concerned."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def listening(certificate: Certificate) -> AsyncIterator[int]:
    """Echo lines over TLS; give the port."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(line)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0, ssl=certificate.context)
    async with server:
        yield server.sockets[0].getsockname()[1]


@asynccontextmanager
async def connected(
    port: int, name: str | None
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=name or "")
    try:
        yield reader, writer
    finally:
        writer.close()
        await writer.wait_closed()


def serial(writer: asyncio.StreamWriter) -> int:
    connection = writer.get_extra_info("ssl_object")
    return x509.load_der_x509_certificate(connection.getpeercert(binary_form=True)).serial_number


async def shown(port: int, name: str | None = "localhost") -> int:
    """Return the number of the certificate that a new connection is shown."""
    async with asyncio.timeout(LIMIT_S), connected(port, name) as (_, writer):
        return serial(writer)


async def test_a_new_handshake_has_the_renewed_certificate_and_an_open_connection_goes_on(
    files: tuple[Path, Path], pair: Pair, other: Pair
) -> None:
    clock = Clock()
    async with (
        listening(Certificate(*files, clock)) as port,
        connected(port, "localhost") as (reader, writer),
    ):
        for name in ("localhost", None):
            assert await shown(port, name) == pair.serial
        other.write(*files)
        assert await shown(port) == pair.serial  # it was looked at just now
        clock.now += 1.0
        for name in ("localhost", None):
            assert await shown(port, name) == other.serial
        writer.write(b"still here\n")
        assert await reader.readline() == b"still here\n"


async def test_half_a_renewal_keeps_the_old_one_is_told_once_and_taken_when_it_is_whole(
    files: tuple[Path, Path], pair: Pair, other: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    cert, key = files
    clock = Clock()
    async with listening(Certificate(cert, key, clock)) as port:
        replace(cert, other.certificate)
        for _ in range(3):
            clock.now += 1.0
            assert await shown(port) == pair.serial
        assert caplog.text.count("cannot be renewed yet") == 1
        replace(key, other.key_pem())
        clock.now += 1.0
        assert await shown(port) == other.serial


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.chmod(0o644)], ids=["gone", "readable"])
async def test_a_key_that_can_no_longer_be_used_is_used_as_it_was(
    files: tuple[Path, Path], pair: Pair, spoil: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    async with listening(Certificate(*files, clock)) as port:
        spoil(files[1])
        clock.now += 1.0
        assert await shown(port) == pair.serial
        assert "the one in use stays" in caplog.text


async def test_files_behind_links_that_are_turned_are_renewed_as_kubernetes_does_it(
    tmp_path: Path, pair: Pair, other: Pair
) -> None:
    for folder, made in (("1", pair), ("2", other)):
        (tmp_path / folder).mkdir()
        made.write(tmp_path / folder / "tls.crt", tmp_path / folder / "tls.key")
    (tmp_path / "data").symlink_to("1")
    clock = Clock()
    certificate = Certificate(tmp_path / "data/tls.crt", tmp_path / "data/tls.key", clock)
    async with listening(certificate) as port:
        (tmp_path / "new").symlink_to("2")
        (tmp_path / "new").replace(tmp_path / "data")
        clock.now += 1.0
        assert await shown(port) == other.serial


# The command


async def checked(port: int) -> int:
    process = await asyncio.create_subprocess_exec(sys.executable, str(HEALTH_CHECK), str(port))
    return await process.wait()


async def test_the_server_speaks_https_on_its_port_and_takes_a_renewal_while_it_runs(
    files: tuple[Path, Path], pair: Pair, other: Pair, tmp_path: Path
) -> None:
    config = Config(repository=tmp_path / "repository", data=tmp_path / "data")
    config.repository.mkdir()
    save(models.identity(), config.repository, "m")
    file = tmp_path / "server.toml"
    file.write_text(f'tls_cert = "{files[0].name}"\ntls_key = "{files[1].name}"\nport = 1\n')
    async with serving(config, f"--config={file}", tls=pair.trusting()) as server:
        assert server.url.startswith("https://127.0.0.1:")
        port = int(server.url.rpartition(":")[2])
        await server.api.load("m")
        floats = [float(number) for number in range(100_000)]
        tensor = {"name": "x", "shape": [len(floats)], "datatype": "FP32", "data": floats}
        answer = await server.api.infer("m", tensor)
        assert answer.json["outputs"][0]["data"] == floats
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await reader.read() == b""  # whoever speaks plain HTTP is told nothing
        writer.close()
        assert await checked(port) == 0  # by the image's health check
        other.write(*files)

        async def served() -> int:
            return await shown(port)

        await when(served, lambda number: number == other.serial)
        assert (await server.api.get("/health/ready")).status == 200  # over a connection of before
        assert await server.stop() == 0
    assert server.output.read_text().count("Traceback") == 0
