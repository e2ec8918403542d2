"""HTTPS by certificate files, which may be renewed while the server runs: the next handshake has the new.

Nothing has to be told to the server: it looks at the files when somebody connects, at most once a second.
What it cannot use of a renewal, such as a certificate whose key is not there yet, it does not take.
"""

from __future__ import annotations

import logging
import os
import ssl
import stat
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn, cast

from cryptography import x509

from server.config import ConfigError

_log = logging.getLogger(__name__)

REREAD_AFTER_S = 1.0
"""Two looks at files a second cost nothing; who renews a certificate does not wait for a second."""

MAX_FILE_BYTES = 2**20
"""A certificate with its chain has some kilobytes."""

READABLE_BY_OTHERS = 0o007
WRITABLE_BY_GROUP = 0o020
"""A group that may read it is how Debian (`ssl-cert`) and Kubernetes (`fsGroup`) give a key to a service."""


class TlsProblem(ConfigError):
    """The certificate or its key cannot be used; the text says which, why and what to do."""


def load_context(cert: Path, key: Path) -> ssl.SSLContext:
    """Return what a server needs for a handshake, with TLS 1.2 or newer.

    Args:
        cert: PEM: the server's certificate first, then those between it and its root.
        key: PEM, not encrypted.

    Raises:
        TlsProblem: they cannot be used.
    """
    _certificate(cert)
    _check_key_file(key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])

    def encrypted() -> NoReturn:  # by default OpenSSL would ask the terminal, and wait
        raise TlsProblem(
            f"{key} is encrypted, and nobody is there to type its password;"
            f" `openssl pkey -in {key} -out …` writes one that is not: protect it by its mode"
        )

    try:
        context.load_cert_chain(cert, key, password=encrypted)
    except ssl.SSLError as error:
        raise TlsProblem(_reason(error, cert, key)) from None
    except OSError as error:
        raise TlsProblem(f"{cert} or {key} cannot be read: {error.strerror}") from None
    return context


def valid_until(cert: Path) -> datetime:
    """Return when a certificate ends, in UTC.

    Raises:
        TlsProblem: it is none.
    """
    return _certificate(cert).not_valid_after_utc


class Certificate:
    """A certificate and its key, as they are now.

    Attributes:
        context: for `create_server`; each handshake with it has the files' latest usable content.
    """

    def __init__(
        self,
        cert: Path,
        key: Path,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Read the files.

        Raises:
            TlsProblem: they cannot be used.
        """
        self._cert = cert
        self._key = key
        self._clock = clock
        self._now = now
        self._looked_at = clock()
        self._seen = self._look()  # before they are read: what changes meanwhile is read again
        self._current = self.context = load_context(cert, key)
        self.context.sni_callback = self._on_handshake
        self._ends: datetime | None = valid_until(cert)
        self._warn_if_over()

    def _on_handshake(self, connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        """Give a handshake the present certificate. It is called also when the client names no server."""
        if self._clock() - self._looked_at >= REREAD_AFTER_S:
            self._looked_at = self._clock()
            self._reread()
            self._warn_if_over()
        if self._current is not connection.context:
            connection.context = self._current

    def _reread(self) -> None:
        seen = self._look()
        if seen == self._seen:
            return
        self._seen = seen
        try:
            context, ends = load_context(self._cert, self._key), valid_until(self._cert)
            self._current, self._ends = context, ends
            _log.info("the TLS certificate %s was renewed and is valid until %s", self._cert, ends)
        except TlsProblem as error:  # half renewed, most likely: it is read again when it changes again
            _log.warning("the TLS certificate cannot be renewed yet, the one in use stays: %s", error)

    def _warn_if_over(self) -> None:
        """Say once of each certificate that it has expired, at start or while it is served."""
        if self._ends is not None and self._ends <= self._now():
            _log.warning(
                "the TLS certificate %s has expired on %s: clients will refuse it", self._cert, self._ends
            )
            self._ends = None

    def _look(self) -> tuple[object, ...]:
        return tuple(_identity(path) for path in (self._cert, self._key))


def _identity(path: Path) -> tuple[int, ...] | None:
    """Return what differs where a file has another content; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _certificate(path: Path) -> x509.Certificate:
    """Return the first certificate of a file."""
    _regular(path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES)
        return x509.load_pem_x509_certificates(content)[0]
    except (OSError, ValueError) as error:
        raise TlsProblem(
            f"{path} has no certificate that can be read ({error});"
            " it must be PEM, the server's own certificate first"
        ) from None


def _check_key_file(path: Path) -> None:
    """Refuse a key that others than the server, its group and root may read or change."""
    status = _regular(path)
    mode = stat.S_IMODE(status.st_mode)
    if mode & (READABLE_BY_OTHERS | WRITABLE_BY_GROUP):
        raise TlsProblem(
            f"{path} has mode {mode:04o}: others may read or change the key; `chmod 0600 {path}`, or 0640"
        )
    if status.st_uid not in {os.geteuid(), 0}:
        raise TlsProblem(f"{path} is another user's ({status.st_uid}); it must be the server's or root's")


def _regular(path: Path) -> os.stat_result:
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise TlsProblem(f"{path} cannot be read: {error}") from None
    if not stat.S_ISREG(status.st_mode):  # a FIFO would be waited for
        raise TlsProblem(f"{path} is not a file")
    return status


def _reason(error: ssl.SSLError, cert: Path, key: Path) -> str:
    match cast("str | None", error.reason):  # where OpenSSL names none, it is None
        case "KEY_VALUES_MISMATCH" | "KEY_TYPE_MISMATCH" | "NO_CERTIFICATE_ASSIGNED":
            return f"{key} is not the key of the first certificate in {cert}; name two that belong together"
        case None:
            return f"{key} has no private key that can be read; it must be PEM"
        case reason:
            return f"{cert} with {key} is refused: {reason.lower().replace('_', ' ')}"
