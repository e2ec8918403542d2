"""TLS: which files are refused and why; a renewed certificate is served without a restart."""

import asyncio
import os
import re
import ssl
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from onnx import TensorProto
from support import models
from support.connections import Pair, make_pair, replace
from support.http import when
from support.models import save
from support.servers import serving

from server.check import load_config
from server.config import Config, ConfigError
from server.http.tls import Certificate, TlsProblem, load_context

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


# Files


def test_context_serves_tls_1_2_and_newer(files: tuple[Path, Path]) -> None:
    context = load_context(*files)
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert context.verify_mode is ssl.CERT_NONE  # of clients


RSA_2048 = make_pair(key=rsa.generate_private_key(65537, 2048))
OTHER_KEY = "is not the key of the first certificate in"


@pytest.mark.parametrize(
    ("place", "content", "reason"),
    [
        ("key", make_pair().key_pem(), OTHER_KEY),
        ("key", RSA_2048.key_pem(), OTHER_KEY),
        ("key", make_pair().key_pem(password=b"secret"), "is encrypted.*openssl pkey"),
        ("cert", make_pair().key_pem(), "has no readable certificate"),
        *[
            (place, content, f"has no {part}")
            for place, part in (("key", "readable private key"), ("cert", "readable certificate"))
            for content in (b"", b"no PEM", b"-----BEGIN CERTIFICATE-----\nAAAA\n", b"\xff" * 99)
        ],
    ],
)
def test_unusable_file_is_refused_by_name(
    files: tuple[Path, Path], place: str, content: bytes, reason: str
) -> None:
    replace(files[place == "key"], content)
    assert re.search(reason, refused(files), re.DOTALL)


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o601, 0o660, 0o644, 0o777])
def test_key_that_others_may_read_or_change_is_refused(files: tuple[Path, Path], mode: int) -> None:
    files[1].chmod(mode)
    assert re.search(f"mode {mode:04o}.*chmod 0600", refused(files), re.DOTALL)


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o440, 0o640])
def test_key_that_its_group_may_read_is_accepted(files: tuple[Path, Path], mode: int) -> None:
    files[1].chmod(mode)
    load_context(*files)


def test_key_of_another_user_is_refused(files: tuple[Path, Path]) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(files[1], 12345, -1)
    assert "another user's (12345)" in refused(files)


def test_missing_or_special_file_is_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    os.mkfifo(fifo := tmp_path / "fifo", 0o600)
    for path in (tmp_path / "none", tmp_path, fifo, tmp_path / "n\0"):
        for broken in ((path, files[1]), (files[0], path)):
            assert str(path) in refused(broken)


def test_short_key_is_refused_with_openssl_s_reason(files: tuple[Path, Path]) -> None:
    make_pair(key=rsa.generate_private_key(65537, 1024)).write(*files)
    assert "key too small" in refused(files)


def test_unusable_key_is_a_mistake_in_the_configuration(files: tuple[Path, Path], tmp_path: Path) -> None:
    paths = {"repository": tmp_path, "data": tmp_path, "tls_cert": files[0], "tls_key": files[1]}
    flags = {name: str(path) for name, path in paths.items()}
    assert load_config(flags, {}).tls_cert == files[0]
    files[1].chmod(0o644)
    with pytest.raises(ConfigError, match=r"--tls-key: .* mode 0644"):
        load_config(flags, {})


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


async def served_serial(port: int, name: str | None = "localhost") -> int:
    """Return the serial number of the certificate that a new connection is shown."""
    async with asyncio.timeout(LIMIT_S), connected(port, name) as (_, writer):
        connection = writer.get_extra_info("ssl_object")
        return x509.load_der_x509_certificate(connection.getpeercert(binary_form=True)).serial_number


async def test_renewed_certificate_is_served_to_new_connections(
    files: tuple[Path, Path], pair: Pair, other: Pair
) -> None:
    clock = Clock()
    async with (
        listening(Certificate(*files, clock)) as port,
        connected(port, "localhost") as (reader, writer),
    ):
        for name in ("localhost", None):
            assert await served_serial(port, name) == pair.serial
        other.write(*files)
        assert await served_serial(port) == pair.serial  # the files were checked just now
        clock.now += 1.0
        for name in ("localhost", None):
            assert await served_serial(port, name) == other.serial
        writer.write(b"still here\n")
        assert await reader.readline() == b"still here\n"


async def test_half_a_renewal_keeps_the_old_certificate(
    files: tuple[Path, Path], pair: Pair, other: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    async with listening(Certificate(*files, clock)) as port:
        replace(files[0], other.certificate)
        for _ in range(3):
            clock.now += 1.0
            assert await served_serial(port) == pair.serial
        assert caplog.text.count("cannot be renewed yet") == 1
        replace(files[1], other.key_pem())
        clock.now += 1.0
        assert await served_serial(port) == other.serial


async def test_expired_certificate_is_served_with_a_warning(
    files: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    clock, expired = Clock(), make_pair(ends_in=timedelta(days=-1))
    async with listening(Certificate(*files, clock)) as port:
        expired.write(*files)
        clock.now += 1.0
        assert await served_serial(port) == expired.serial
    assert caplog.text.count("has expired") == 1
    Certificate(*files)
    assert caplog.text.count("has expired") == 2


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.chmod(0o644)], ids=["gone", "readable"])
async def test_key_that_becomes_unusable_stays_in_use(
    files: tuple[Path, Path], pair: Pair, spoil: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    async with listening(Certificate(*files, clock)) as port:
        spoil(files[1])
        clock.now += 1.0
        assert await served_serial(port) == pair.serial
        assert "the one in use stays" in caplog.text


async def test_files_behind_renewed_symlinks_are_reread(tmp_path: Path, pair: Pair, other: Pair) -> None:
    """Kubernetes renews a mounted secret by turning a symlink."""
    for folder, certificate in (("1", pair), ("2", other)):
        (tmp_path / folder).mkdir()
        certificate.write(tmp_path / folder / "tls.crt", tmp_path / folder / "tls.key")
    (tmp_path / "data").symlink_to("1")
    clock = Clock()
    async with listening(Certificate(tmp_path / "data/tls.crt", tmp_path / "data/tls.key", clock)) as port:
        (tmp_path / "new").symlink_to("2")
        (tmp_path / "new").replace(tmp_path / "data")
        clock.now += 1.0
        assert await served_serial(port) == other.serial


# The command


async def test_server_speaks_https_and_renews_while_it_runs(
    files: tuple[Path, Path], pair: Pair, other: Pair, tmp_path: Path
) -> None:
    config = Config(repository=tmp_path / "repository", data=tmp_path / "data")
    config.repository.mkdir()
    save(models.identity(TensorProto.UINT8), config.repository, "m")
    file = tmp_path / "server.toml"
    file.write_text(f'tls_cert = "{files[0].name}"\ntls_key = "{files[1].name}"\nport = 1\n')
    async with serving(config, f"--config={file}", tls=pair.trusting()) as server:
        assert server.url.startswith("https://127.0.0.1:")
        port = int(server.url.rpartition(":")[2])
        await server.api.load("m")
        raw, headers = os.urandom(2**18), {"Inference-Header-Content-Length": "0"}
        answer = await server.api.post("/v2/models/m/infer", data=raw, headers=headers)
        assert answer.body.endswith(raw)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await reader.read() == b""  # plain HTTP gets no answer
        writer.close()
        check = await asyncio.create_subprocess_exec(sys.executable, str(HEALTH_CHECK), str(port))
        assert await check.wait() == 0  # the image's health check
        other.write(*files)
        await when(lambda: served_serial(port), lambda number: number == other.serial)
        assert (await server.api.get("/health/ready")).status == 200  # over an older connection
        assert await server.stop() == 0
    assert server.output.read_text().count("Traceback") == 0
