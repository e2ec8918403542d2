"""TLS: which files are refused and why; a renewed certificate is served without a restart."""

import asyncio
import os
import re
import ssl
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption
from onnx import TensorProto
from support import models
from support.connections import LIMIT_S, make_pair, replace
from support.http import when
from support.models import save
from support.servers import serving

from server.check import load_config
from server.config import Config, ConfigError
from server.http.tls import Certificate, TlsProblem, load_context

HEALTH_CHECK = Path(__file__).parents[3] / "deploy" / "healthcheck.py"


PAIR, OTHER = make_pair(), make_pair()


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    PAIR.write(cert, key)
    return cert, key


def refused(files: tuple[Path, Path]) -> str:
    with pytest.raises(TlsProblem) as refusal:
        load_context(*files)
    assert any(str(path) in str(refusal.value) for path in files)
    return str(refusal.value)


def test_context_serves_tls_1_2_and_newer(files: tuple[Path, Path]) -> None:
    context = load_context(*files)
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert context.verify_mode is ssl.CERT_NONE  # of clients


OTHER_KEY = "is not the key of the first certificate in"
ENCRYPTED = make_pair(encryption=BestAvailableEncryption(b"secret"))


@pytest.mark.parametrize(
    ("place", "content", "reason"),
    [
        ("key", OTHER.key, OTHER_KEY),
        ("key", make_pair(key=rsa.generate_private_key(65537, 2048)).key, OTHER_KEY),
        ("key", ENCRYPTED.key, "is encrypted.*openssl pkey"),
        ("cert", ENCRYPTED.key, "has no readable certificate"),
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


@dataclass
class Renewable:
    """A server of a certificate, and its clock."""

    port: int = 0
    now_s: float = 0.0

    async def serial(self, name: str | None = "localhost", *, after_s: float = 1.0) -> int:
        """Return the serial number of the certificate that a new connection gets, some seconds later."""
        self.now_s += after_s
        return await served_serial(self.port, name)


@asynccontextmanager
async def listening(cert: Path, key: Path) -> AsyncIterator[Renewable]:
    """Echo lines over TLS."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(line)
        writer.close()

    renewable = Renewable()
    context = Certificate(cert, key, lambda: renewable.now_s).context
    async with await asyncio.start_server(echo, "127.0.0.1", 0, ssl=context) as server:
        renewable.port = server.sockets[0].getsockname()[1]
        yield renewable


@asynccontextmanager
async def connected(
    port: int, name: str | None
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    context = ssl._create_unverified_context()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=name or "")
    try:
        yield reader, writer
    finally:
        writer.close()
        await writer.wait_closed()


async def served_serial(port: int, name: str | None = "localhost") -> int:
    async with asyncio.timeout(LIMIT_S), connected(port, name) as (_, writer):
        connection = writer.get_extra_info("ssl_object")
        return x509.load_der_x509_certificate(connection.getpeercert(binary_form=True)).serial_number


async def test_renewed_certificate_is_served_to_new_connections(files: tuple[Path, Path]) -> None:
    async with listening(*files) as server, connected(server.port, "localhost") as (reader, writer):
        assert [await server.serial(name, after_s=0) for name in ("localhost", None)] == [PAIR.serial] * 2
        OTHER.write(*files)
        assert await server.serial(after_s=0.9) == PAIR.serial  # the files were checked just now
        assert [await server.serial(name) for name in ("localhost", None)] == [OTHER.serial] * 2
        writer.write(b"still here\n")
        assert await reader.readline() == b"still here\n"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda cert, _: replace(cert, OTHER.certificate),
        lambda _, key: key.unlink(),
        lambda _, key: key.chmod(0o644),
    ],
    ids=["half renewed", "gone", "readable"],
)
async def test_unusable_renewal_keeps_the_old_certificate(
    files: tuple[Path, Path],
    spoil: Callable[[Path, Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with listening(*files) as server:
        spoil(*files)
        assert [await server.serial() for _ in range(2)] == [PAIR.serial] * 2
        assert caplog.text.count("cannot be renewed yet, the one in use stays") == 1
        OTHER.write(*files)
        assert await server.serial() == OTHER.serial


async def test_expired_certificate_is_served_with_a_warning(
    files: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    expired = make_pair(ends_in=timedelta(days=-1))
    async with listening(*files) as server:
        expired.write(*files)
        assert await server.serial() == expired.serial
    assert caplog.text.count("has expired") == 1
    Certificate(*files)
    assert caplog.text.count("has expired") == 2


async def test_files_behind_renewed_symlinks_are_reread(tmp_path: Path) -> None:
    """Kubernetes renews a mounted secret by turning a symlink."""
    for folder, certificate in (("1", PAIR), ("2", OTHER)):
        (tmp_path / folder).mkdir()
        certificate.write(tmp_path / folder / "tls.crt", tmp_path / folder / "tls.key")
    (tmp_path / "data").symlink_to("1")
    async with listening(tmp_path / "data/tls.crt", tmp_path / "data/tls.key") as server:
        (tmp_path / "new").symlink_to("2")
        (tmp_path / "new").replace(tmp_path / "data")
        assert await server.serial() == OTHER.serial


async def test_server_speaks_https_and_renews_while_it_runs(files: tuple[Path, Path], tmp_path: Path) -> None:
    config = Config(repository=tmp_path / "repository", data=tmp_path / "data")
    config.repository.mkdir()
    save(models.identity(TensorProto.UINT8), config.repository, "m")
    file = tmp_path / "server.toml"
    file.write_text(f'tls_cert = "{files[0].name}"\ntls_key = "{files[1].name}"\nport = 1\n')
    async with serving(config, f"--config={file}", tls=PAIR.trusting()) as server:
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
        OTHER.write(*files)
        await when(lambda: served_serial(port), lambda number: number == OTHER.serial)
        assert (await server.api.get("/health/ready")).status == 200  # over an older connection
        assert await server.stop() == 0
    assert server.output.read_text().count("Traceback") == 0
